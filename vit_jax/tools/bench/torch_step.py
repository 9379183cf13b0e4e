"""The train step of the same model in timm, for `bench step --beside=timm`.

As PyTorch is made fast today: torch.compile, bf16 autocast, fused AdamW. Read
from timm and PyTorch is what they do; nothing of the JAX code runs here.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

from vit_jax.data.preprocess import as_pair
from vit_jax.errors import UserError
from vit_jax.tools.bench.process import report

_WARM_UP = 5  # steps, after the one that compiles


def measure(
  *,
  variant: str,
  image_size: int | Sequence[int],
  batch_size: int,
  num_classes: int,
  steps: int,
  dtype: str,
  patch_size: int,
  hidden_size: int,
  num_layers: int,
  mlp_dim: int,
  num_heads: int,
  device: str = "cuda",
  compiled: bool = True,
) -> dict[str, Any]:
  """Measures the train step on one GPU.

  Args:
    variant: for nothing but to be told.
    image_size, num_classes: of the model.
    batch_size: images.
    steps: that are timed; the median counts.
    dtype: of the matrix products, "bfloat16" or "float32".
    patch_size, hidden_size, num_layers, mlp_dim, num_heads: of the model.
    device: "cuda"; tests have "cpu".
    compiled: whether torch.compile is used; tests do without.

  Returns:
    "step_seconds", "fastest_seconds", "memory_gib", "compile_seconds", "loss",
    "how", "devices", "device", "versions"; the better of both memory formats.

  Raises:
    UserError: PyTorch, timm or the GPU is not there.
  """
  del variant
  torch, timm = _import_libraries(device)
  torch.set_float32_matmul_precision("high")
  how = "torch.compile" if compiled else "eager"
  how += f", {dtype} autocast, fused AdamW"
  size = as_pair(image_size)
  found = []
  for memory_format in ("contiguous_format", "channels_last"):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
      img_size=size,
      patch_size=patch_size,
      num_classes=num_classes,
      embed_dim=hidden_size,
      depth=num_layers,
      num_heads=num_heads,
      mlp_ratio=mlp_dim / hidden_size,
      act_layer="gelu_tanh",  # ours
    )
    where = {"device": device, "memory_format": getattr(torch, memory_format)}
    step = _make_step(
      torch, model.to(**where), device, getattr(torch, dtype), compiled
    )
    images = torch.randint(0, 256, (batch_size, 3, *size), dtype=torch.uint8)
    labels = torch.randint(0, num_classes, (batch_size,), device=device)
    batch = (images.to(**where), labels)
    found.append({"how": f"{how}, {memory_format}"})
    found[-1] |= _time(torch, step, batch, steps, device)
  name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
  return min(found, key=lambda x: x["step_seconds"]) | {
    "devices": 1,
    "device": name,
    "versions": {"torch": torch.__version__, "timm": timm.__version__},
  }


def _import_libraries(device):
  """Returns the modules torch and timm; the device must be there."""
  try:
    import timm  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
  except ImportError as e:
    raise UserError(
      f"--beside=timm needs PyTorch and timm: {e}; pip install torch "
      "torchvision timm"
    ) from e
  if device == "cuda" and not torch.cuda.is_available():
    raise UserError(f"PyTorch {torch.__version__} sees no GPU")
  return torch, timm


def _make_step(torch, model, device, dtype, compiled):
  """Returns the train step (images, labels) -> loss of a model."""
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-4, weight_decay=0.1, fused=True
  )

  def compute_loss(images, labels):
    # From uint8, as our step does.
    pixels = (images.float() - 127.5) / 127.5
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
      logits = model(pixels)
    return torch.nn.functional.cross_entropy(logits.float(), labels)

  if compiled:
    compute_loss = torch.compile(compute_loss)

  def step(images, labels):
    optimizer.zero_grad(set_to_none=True)
    loss = compute_loss(images, labels)
    loss.backward()
    optimizer.step()
    return loss

  return step


def _time(torch, step, batch, steps, device):
  """Returns the figures of a step; the GPU forgets its peak memory before."""
  on_gpu = device == "cuda"
  if on_gpu:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
  seconds = []
  for _ in range(1 + _WARM_UP + steps):
    start = time.perf_counter()
    loss = step(*batch)
    if on_gpu:
      torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)
  timed = seconds[1 + _WARM_UP :]
  peak = torch.cuda.max_memory_allocated() if on_gpu else 0
  return {
    "step_seconds": statistics.median(timed),
    "fastest_seconds": min(timed),
    "compile_seconds": seconds[0],
    "memory_gib": peak / 2**30,
    "loss": float(loss.detach()),
  }


if __name__ == "__main__":
  report(measure)
