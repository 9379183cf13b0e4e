"""The `bench step` command: the train step on the devices of this machine.

It measures the train step or the forward pass, on a batch that is already on
the devices. Only jax, flax, optax and numpy are needed.
"""

import contextlib
import functools
import importlib.metadata
import logging
import statistics
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from vit_jax import models, sharding
from vit_jax.errors import UserError, check_choice
from vit_jax.models import variants
from vit_jax.tools.bench.process import call
from vit_jax.tools.paper.flops import OPERATIONS, count_multiply_adds
from vit_jax.tools.text import format_columns
from vit_jax.training import losses, steps
from vit_jax.training.objectives import Classification

log = logging.getLogger(__name__)

_LR = 1e-4
_WARM_UP = 3  # steps
# Sides of the matmuls that define 100 % MFU; on a CPU these would take minutes.
_SIDES = (4096, 8192, 16384)
_CPU_SIDES = (256, 512)
_MATMULS = 8  # in one program, so that its start costs nothing


def bench(
  names: list[str], *, beside: str | None = None, **options: Any
) -> list[dict[str, Any]]:
  """Measures the train steps of models, one after the other.

  Args:
    names: variants, such as "ViT-L_16".
    beside: "timm" to measure the same models in timm as well.
    **options: as `measure`.

  Returns:
    For each model the result of `measure`, or "error", one line, if it failed.
    Each is followed by timm's, with "code" "timm", if `beside` is given.

  Raises:
    UserError: an option that cannot be used.
  """
  if beside not in (None, "timm"):
    raise UserError(f"--beside={beside}: only timm is known")
  attention = options.get("attention", "fused")
  check_choice("--attention", attention, ("fused", "plain"))
  for key in ("batch_size", "steps"):
    if options[key] < 1:
      raise UserError(f"--{key}={options[key]}; it must be at least 1")
  for name in names:  # before anything runs
    given = ("image_size", "num_classes", "dtype", "remat")
    models.create(variant=name, **{key: options[key] for key in given})
  found = []
  for name in names:
    log.info(
      "%s, %d images: compiling, then %d steps",
      *(name, options["batch_size"], options["steps"]),
    )
    spec = {"variant": name, **options}
    found.append({"code": "vit_jax", **spec, **call(measure, spec)})
    if beside:
      found.append(run_timm(found[-1]))
  return found


def run_timm(
  ours: dict[str, Any], timeout: float | None = None, **where: Any
) -> dict[str, Any]:
  """Returns timm's figures for the model of `ours`.

  `where` has further arguments of `torch_step.measure`.
  """
  keys = ("batch_size", "steps", "dtype", "inference")
  given = {key: ours[key] for key in keys if key in ours}
  result = {"code": "timm", "variant": ours["variant"], **given}
  sizes = variants.parse(ours["variant"])
  if sizes.encoder is None or sizes.units is not None:
    return result | {"error": "only plain ViTs of timm can be measured"}
  if ours["remat"] != "none":
    return result | {"error": "timm cannot be measured with --remat"}
  size = sizes.encoder
  model = {
    "img_size": ours["image_size"],
    "num_classes": ours["num_classes"],
    "patch_size": sizes.patch_size,
    "embed_dim": size.hidden_size,
    "depth": size.num_layers,
    "num_heads": size.num_heads,
    "mlp_ratio": size.mlp_dim / size.hidden_size,
  }
  if ours.get("rope") == "dinov3":
    # Its other options are those of all sizes.
    model["model_name"] = "vit_small_patch16_dinov3_qkvb"
    model["global_pool"] = "token"
  else:
    model["act_layer"] = "gelu_tanh"  # ours
  from vit_jax.tools.bench import torch_step  # which needs Pillow

  result |= call(
    torch_step.measure, {"model": model, **given, **where}, timeout
  )
  if "step_seconds" in result:
    result["images_per_second"] = ours["batch_size"] / result["step_seconds"]
    if "step_seconds" in ours:
      times = result["step_seconds"] / ours["step_seconds"]
      # Nothing is counted here: JAX in this process would take GPU memory.
      result |= {x: ours[x] / times for x in ("tflops", "mfu") if x in ours}
      result["times_ours"] = times
  return result


# --- the measurement ---


def measure(
  *,
  batch_size: int,
  steps: int,
  dtype: str,
  inference: bool = False,
  attention: str = "fused",
  ceiling_tflops: float | None = None,
  **options: Any,
) -> dict[str, Any]:
  """Measures the step on all local devices, data parallel.

  Args:
    batch_size: images, over all devices.
    steps: number of timed steps; the median is returned.
    dtype, **options: as `models.create`.
    inference: time the forward pass, uint8 pixels to logits.
    attention: "fused" (a kernel, if there is one) or "plain" (compiled by XLA).
    ceiling_tflops: of the best matmul on a device; None: it is measured.

  Returns:
    "step_seconds", "images_per_second",
    "tflops" (of all devices; FLOPs of the forward pass, times three if it
    trains), "ceiling_tflops" (likewise, of the best matmul), "mfu",
    "memory_gib" of a device, "compile_seconds", "loss" of training, "kernel" of
    the attention, "devices", "device", "how", "versions".
  """
  mesh = sharding.make_mesh(devices=jax.local_devices())
  sharding.check_batch_size(batch_size, mesh)
  model = models.create(dtype=dtype, **options)
  ceiling = (ceiling_tflops or measure_ceiling(dtype)) * mesh.size
  make = make_forward if inference else make_step
  step, state, batch = make(mesh, model, options["num_classes"], batch_size)
  start = time.perf_counter()
  with _choose_attention(attention):
    compiled = step.lower(state, batch).compile()
  compile_seconds = time.perf_counter() - start
  seconds, metrics = [], {}
  for _ in range(_WARM_UP + steps):
    start = time.perf_counter()
    out = jax.block_until_ready(compiled(state, batch))
    seconds.append(time.perf_counter() - start)
    if not inference:
      state, metrics = out
  step_seconds = statistics.median(seconds[_WARM_UP:])
  operations = OPERATIONS // 3 if inference else OPERATIONS
  flops = operations * count_multiply_adds(**options)
  tflops = flops * batch_size / step_seconds / 1e12
  kernel = _find_kernel(compiled)
  how = ["inference"] if inference else []
  how += [f"attention by {kernel}"] if model.num_layers else []
  how += [f"{dtype} matmuls reach {ceiling / mesh.size:.3g} TFLOP/s a device"]
  return {
    "step_seconds": step_seconds,
    "images_per_second": batch_size / step_seconds,
    "tflops": tflops,
    "mfu": tflops / ceiling,
    "memory_gib": _find_memory(compiled) / 2**30,
    "compile_seconds": compile_seconds,
    **{name: float(x) for name, x in metrics.items() if name == "loss"},
    "kernel": kernel,
    "ceiling_tflops": ceiling,
    "devices": mesh.size,
    "device": jax.local_devices()[0].device_kind,
    "how": ", ".join(how),
    "versions": {x: importlib.metadata.version(x) for x in ("jax", "flax")},
  }


def make_step(mesh, model, num_classes: int, batch_size: int):
  """Returns (the jitted train step, its state, a batch), on the devices.

  AdamW with a constant learning rate, softmax cross-entropy with one label per
  image; no clipping, dropout or weight averaging.
  """
  # It has the same transformations as `optim.make_optimizer` would have.
  optimizer = optax.adamw(_LR, weight_decay=0.1)
  names = [str(i) for i in range(num_classes)]
  train_step = functools.partial(
    steps.train_step,
    objective=Classification(model, names, losses.get_loss("softmax")),
    optimizer=optimizer,
    schedule=optax.constant_schedule(_LR),
  )
  init_state = functools.partial(
    steps.init_state, model=model, optimizer=optimizer
  )
  state, layout = _init(mesh, init_state)
  batch = _make_batch(mesh, model, num_classes, batch_size)
  return sharding.jit_train_step(mesh, train_step, layout), state, batch


def make_forward(mesh, model, num_classes: int, batch_size: int):
  """Returns (the jitted forward pass, its parameters, a batch)."""

  def forward(params, batch):
    return model.apply(params, steps.normalize(batch["image"]))

  params, _ = _init(mesh, model.init)
  batch = _make_batch(mesh, model, num_classes, batch_size)
  return jax.jit(sharding.on_mesh(mesh, forward)), params, batch


def _init(mesh, init):
  """Returns what `init` makes of a key, on the devices, and its layout."""
  key = jax.random.key(0)
  layout = sharding.tree_shardings(mesh, jax.eval_shape(init, key))
  return jax.jit(init, out_shardings=layout)(key), layout


def _make_batch(mesh, model, num_classes, batch_size):
  def make(key):
    shape = (batch_size, *model.image_size, 3)
    return {
      "image": jax.random.bits(key, shape, jnp.uint8),
      "labels": jax.random.randint(key, (batch_size, 1), 0, num_classes),
    }

  on_devices = sharding.batch_sharding(mesh)
  return jax.jit(make, out_shardings=on_devices)(jax.random.key(0))


def _choose_attention(kind):
  """Within it models are traced with this attention, see `measure`."""
  if kind == "fused":
    return contextlib.nullcontext()
  # Models have no option for it: only a comparison has a use for it.
  return mock.patch("vit_jax.models.attention.find_fused", return_value=None)


def _find_kernel(compiled):
  """Returns what computes the attention of a compiled program."""
  text = compiled.as_text()
  kernels = {"__cudnn$fmha": "cuDNN", "tpu_custom_call": "Pallas"}
  return next((name for x, name in kernels.items() if x in text), "XLA")


def measure_ceiling(dtype: str) -> float:
  """Returns the highest TFLOP/s of matmuls of some sizes, on one device."""
  platform = jax.local_devices()[0].platform
  best = 0.0
  for side in _CPU_SIDES if platform == "cpu" else _SIDES:
    # Random numbers of variance 1, and a factor that preserves the variance.
    x, factor = jax.random.normal(jax.random.key(0), (2, side, side), dtype)

    @jax.jit
    def multiply(x, factor):
      return jax.lax.fori_loop(0, _MATMULS, lambda _, x: x @ factor, x)

    factor = factor / side**0.5
    jax.block_until_ready(multiply(x, factor))
    for _ in range(4):
      start = time.perf_counter()
      jax.block_until_ready(multiply(x, factor))
      seconds = time.perf_counter() - start
      best = max(best, 2 * side**3 * _MATMULS / seconds / 1e12)
  return best


def _find_memory(compiled):
  """Returns a device's peak memory in bytes, or the compiler's estimate."""
  stats = jax.local_devices()[0].memory_stats() or {}
  plan = compiled.memory_analysis()
  used = plan.argument_size_in_bytes + plan.temp_size_in_bytes
  used += plan.output_size_in_bytes - plan.alias_size_in_bytes
  return stats.get("peak_bytes_in_use", used)


# --- the table ---


def format_report(rows: list[dict[str, Any]]) -> str:
  """Returns the results of `bench` as a table, with devices and versions."""
  head = ("", "batch", "images/s", "TFLOP/s", "MFU", "GiB", "ms", "compile s")
  lines = format_columns([(*head, ""), *map(_list_figures, rows)], "<>>>>>>><")
  return "\n".join([*lines, *list_notes(rows)])


def list_notes(rows: list[dict[str, Any]]) -> list[str]:
  """Returns the lines that tell what rows of `bench` were measured on."""
  notes = dict.fromkeys(
    f"{row['code']}: {row['devices']} x {row['device']}, "
    + " ".join(f"{x} {y}" for x, y in row["versions"].items())
    + f"; {row['how']}"
    for row in rows
    if "error" not in row
  )
  return list(notes)


def _list_figures(row):
  name = (f"{row['variant']} {row['code']}", str(row["batch_size"]))
  if "error" in row:
    return (*name, *[""] * 6, row["error"])
  times = row.get("times_ours")
  return (
    *name,
    f"{row['images_per_second']:,.1f}",
    f"{row['tflops']:.3g}" if "tflops" in row else "-",
    f"{row['mfu']:.1%}" if "mfu" in row else "-",
    f"{row['memory_gib']:.2f}",
    f"{row['step_seconds'] * 1e3:.2f}",
    f"{row['compile_seconds']:.1f}",
    f"vit_jax is {times:.2f} x as fast" if times else "",
  )
