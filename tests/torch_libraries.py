"""PyTorch, transformers and timm, imported; see interop_test.py."""

import os
import sys
from unittest import mock

# No test reaches for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers

# torchvision has no build for PyTorch without CUDA on the package index, and
# its own operators do not load there. timm imports it for image augmentation
# only; its models and their weights never call it. So its imports find nothing.
_NOTHING = {
  name: mock.MagicMock()
  for name in (
    "torchvision",
    "torchvision.datasets",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
  )
}
sys.modules.update(_NOTHING)
try:
  import timm
  import timm.layers
  import timm.models.resnetv2
  import timm.models.vision_transformer
  import timm.models.vision_transformer_hybrid
finally:
  for _name in _NOTHING:
    del sys.modules[_name]

__all__ = ["timm", "torch", "transformers"]

torch.set_num_threads(1)
