"""Benchmarks of this machine: `step`, `torch_step` (timm's) and `input`.

Each step is measured in a process of its own, to isolate memory and failures.
"""
