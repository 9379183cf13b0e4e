"""The train step of the same model in timm, for `bench step --beside=timm`.

It uses PyTorch's fast path: torch.compile, bf16 autocast and fused AdamW. None
of the JAX code runs here.
"""

import statistics
import time
from typing import Any

from vit_jax.data.sizes import as_pair
from vit_jax.errors import UserError

_WARM_UP = 5  # steps, after the one that compiles


def measure(
  *,
  model: dict[str, Any],
  batch_size: int,
  steps: int,
  dtype: str,
  device: str = "cuda",
  compiled: bool = True,
) -> dict[str, Any]:
  """Measures the train step on one GPU, with images in channels-last order.

  Args:
    model: arguments of timm's VisionTransformer.
    batch_size, steps, dtype: as in `step.measure`.
    device, compiled: tests use "cpu" without torch.compile.

  Returns:
    "step_seconds", "memory_gib", "compile_seconds", "loss", "how", "devices",
    "device", "versions".

  Raises:
    UserError: PyTorch, timm or the GPU is missing.
  """
  torch, timm = _import_libraries(device)
  size = as_pair(model["img_size"])
  torch.set_float32_matmul_precision("high")
  where = {"device": device, "memory_format": torch.channels_last}
  net = timm.models.VisionTransformer(**model | {"img_size": size}).to(**where)
  step = _make_step(torch, net, device, getattr(torch, dtype), compiled)
  images = torch.randint(0, 256, (batch_size, 3, *size), dtype=torch.uint8)
  images = images.to(**where)
  labels = torch.randint(0, model["num_classes"], (batch_size,), device=device)
  on_gpu = device == "cuda"
  seconds = []
  for _ in range(1 + _WARM_UP + steps):
    start = time.perf_counter()
    loss = step(images, labels)
    if on_gpu:
      torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)
  how = "torch.compile" if compiled else "eager"
  return {
    "step_seconds": statistics.median(seconds[1 + _WARM_UP :]),
    "compile_seconds": seconds[0],
    "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0,
    "loss": float(loss.detach()),
    "how": f"{how}, {dtype} autocast, fused AdamW, channels last",
    "devices": 1,
    "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    "versions": {"torch": torch.__version__, "timm": timm.__version__},
  }


def _import_libraries(device):
  """Returns the modules torch and timm; checks the device."""
  try:
    import timm  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
  except ImportError as e:
    raise UserError(
      f"--beside=timm needs PyTorch and timm: {e}; pip install torch "
      "torchvision timm"
    ) from e
  if device == "cuda" and not torch.cuda.is_available():
    raise UserError(f"PyTorch {torch.__version__} finds no GPU")
  return torch, timm


def _make_step(torch, model, device, dtype, compiled):
  """Returns the train step (images, labels) -> loss of a model."""
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-4, weight_decay=0.1, fused=True
  )

  def compute_loss(images, labels):
    # From uint8, as in our step.
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
