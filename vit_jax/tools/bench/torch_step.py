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
  try:
    import timm  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    from timm.models.vision_transformer import (  # pyright: ignore
      VisionTransformer,
    )
  except ImportError as e:
    raise UserError(
      f"--beside=timm needs PyTorch and timm: {e}; pip install torch "
      "torchvision timm"
    ) from e
  if device == "cuda" and not torch.cuda.is_available():
    raise UserError(f"PyTorch {torch.__version__} sees no GPU")
  torch.set_float32_matmul_precision("high")

  def build():
    torch.manual_seed(0)
    return VisionTransformer(
      img_size=as_pair(image_size),
      patch_size=patch_size,
      num_classes=num_classes,
      embed_dim=hidden_size,
      depth=num_layers,
      num_heads=num_heads,
      mlp_ratio=mlp_dim / hidden_size,
      act_layer="gelu_tanh",  # ours
    ).to(device)

  found = []
  for memory_format in ("contiguous_format", "channels_last"):
    torch.compiler.reset()
    found.append(
      _time_steps(
        torch,
        build(),
        getattr(torch, memory_format),
        (batch_size, 3, *as_pair(image_size)),
        num_classes,
        steps,
        device,
        getattr(torch, dtype),
        compiled,
      )
    )
    found[-1]["how"] = (
      f"{'torch.compile' if compiled else 'eager'}, {dtype} autocast, fused "
      f"AdamW, {memory_format}"
    )
    if device == "cuda":
      torch.cuda.empty_cache()
      torch.cuda.reset_peak_memory_stats()
  name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
  return min(found, key=lambda x: x["step_seconds"]) | {
    "devices": 1,
    "device": name,
    "versions": {"torch": torch.__version__, "timm": timm.__version__},
  }


def _time_steps(
  torch,
  model,
  memory_format,
  shape,
  num_classes,
  steps,
  device,
  dtype,
  compiled,
):
  """Returns the figures of one model as it is laid out in memory."""
  model = model.to(memory_format=memory_format)
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-4, weight_decay=0.1, fused=True
  )
  images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
  images = images.to(memory_format=memory_format)
  labels = torch.randint(0, num_classes, shape[:1], device=device)

  def compute_loss(images, labels):
    # From uint8, as our step does.
    pixels = (images.float() - 127.5) / 127.5
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
      logits = model(pixels)
    return torch.nn.functional.cross_entropy(logits.float(), labels)

  if compiled:
    compute_loss = torch.compile(compute_loss)

  def step():
    optimizer.zero_grad(set_to_none=True)
    loss = compute_loss(images, labels)
    loss.backward()
    optimizer.step()
    return loss

  def wait():
    if device == "cuda":
      torch.cuda.synchronize()

  seconds = []
  for _ in range(1 + _WARM_UP + steps):
    start = time.perf_counter()
    loss = step()
    wait()
    seconds.append(time.perf_counter() - start)
  timed = seconds[1 + _WARM_UP :]
  peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
  return {
    "step_seconds": statistics.median(timed),
    "fastest_seconds": min(timed),
    "compile_seconds": seconds[0],
    "memory_gib": peak / 2**30,
    "loss": float(loss.detach()),
  }


if __name__ == "__main__":
  report(measure)
