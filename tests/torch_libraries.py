"""PyTorch, transformers and timm, imported; see interop_test.py."""

import contextlib
import enum
import os
import sys
import types

# No test reaches for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers

# torchvision has no build for PyTorch without CUDA on the package index, and
# its own operators do not load there. timm imports it for image augmentation
# only; its models and their weights never call it.
_MODULES = (
  "torchvision",
  "torchvision.datasets",
  "torchvision.ops",
  "torchvision.ops.misc",
  "torchvision.transforms",
  "torchvision.transforms.functional",
)
_MODES = "NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS"


class _Empty(types.ModuleType):
  """A module in which every name is a class without anything in it."""

  def __getattr__(self, name):
    if name.startswith("__"):
      raise AttributeError(name)
    setattr(self, name, type(name, (), {}))
    return vars(self)[name]


@contextlib.contextmanager
def _without_torchvision():
  """Lets imports of torchvision find nothing in it, as long as they last."""
  modules = {name: _Empty(name) for name in _MODULES}
  for name, module in modules.items():
    module.__path__ = []
    parent, _, child = name.rpartition(".")
    if parent:
      setattr(modules[parent], child, module)
  # These are the keys of a dictionary.
  functional = modules["torchvision.transforms.functional"]
  functional.InterpolationMode = enum.Enum("InterpolationMode", _MODES)
  sys.modules.update(modules)
  try:
    yield
  finally:
    for name in modules:
      del sys.modules[name]


with _without_torchvision():
  import timm
  import timm.layers
  import timm.models.resnetv2
  import timm.models.vision_transformer
  import timm.models.vision_transformer_hybrid

__all__ = ["timm", "torch", "transformers"]

torch.set_num_threads(1)
