"""Speed of this machine: `step` and `torch_step` (timm's), and the `input`.

Each measurement of a step is a process of its own, so that its memory, its peak
and its failure are its own.
"""
