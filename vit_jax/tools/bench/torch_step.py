"""The same model in timm, for `bench step --beside=timm`: step, forward pass.

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
  inference: bool = False,
  device: str = "cuda",
  compiled: bool = True,
) -> dict[str, Any]:
  """Measures the step on one GPU, with images in channels-last order.

  Args:
    model: arguments of timm's VisionTransformer; with "model_name" those of
      `timm.create_model`.
    batch_size, steps, dtype, inference: as in `step.measure`.
    device, compiled: tests use "cpu" without torch.compile.

  Returns:
    "step_seconds", "memory_gib", "compile_seconds", "loss" of training, "how",
    "devices", "device", "versions".

  Raises:
    UserError: PyTorch, timm or the GPU is missing.
  """
  torch, timm = _import_libraries(device)
  size = as_pair(model["img_size"])
  torch.set_float32_matmul_precision("high")
  where = {"device": device, "memory_format": torch.channels_last}
  named = "model_name" in model
  make = timm.create_model if named else timm.models.VisionTransformer
  net = make(**model | {"img_size": size}).to(**where)
  step = _make_step(torch, net, getattr(torch, dtype), inference, compiled)
  images = torch.randint(0, 256, (batch_size, 3, *size), dtype=torch.uint8)
  images = images.to(**where)
  labels = torch.randint(0, model["num_classes"], (batch_size,), device=device)
  on_gpu = device == "cuda"
  seconds = []
  for _ in range(1 + _WARM_UP + steps):
    start = time.perf_counter()
    out = step(images, labels)
    if on_gpu:
      torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)
  how = "torch.compile" if compiled else "eager"
  what = "inference" if inference else "fused AdamW"
  loss = {} if inference else {"loss": float(out.detach())}
  return {
    "step_seconds": statistics.median(seconds[1 + _WARM_UP :]),
    "compile_seconds": seconds[0],
    "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0,
    **loss,
    "how": f"{how}, {dtype} autocast, {what}, channels last",
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


def _make_step(torch, model, dtype, inference, compiled):
  """Returns a model's step: (images, labels) -> loss, or logits."""

  def predict(images, labels=None):
    # From uint8, as our step does.
    pixels = (images.float() - 127.5) / 127.5
    on = dtype != torch.float32
    with torch.autocast(images.device.type, dtype, enabled=on):
      return model(pixels).float()

  def compute_loss(images, labels):
    return torch.nn.functional.cross_entropy(predict(images), labels)

  if inference:
    model.eval()
    return torch.no_grad()(torch.compile(predict) if compiled else predict)
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-4, weight_decay=0.1, fused=True
  )
  if compiled:
    compute_loss = torch.compile(compute_loss)

  def step(images, labels):
    optimizer.zero_grad(set_to_none=True)
    loss = compute_loss(images, labels)
    loss.backward()
    optimizer.step()
    return loss

  return step
