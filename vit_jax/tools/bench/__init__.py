"""How fast a step is on this machine; it needs no TensorFlow.

`step` measures ours, `torch_step` timm's. Each is a process of its own: with
all of the memory, whose peak is its own, and no other's failure.
"""
