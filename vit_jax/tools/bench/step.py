"""The `bench step` command: the train step on the devices of this machine.

It measures the step that trains, on a batch that is already on the devices.
Only jax, flax, optax and numpy are needed.
"""

import functools
import importlib.metadata
import logging
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax import models, sharding
from vit_jax.errors import UserError
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
      found.append(_run_timm(found[-1]))
  return found


def _run_timm(ours):
  """Returns timm's figures for the model of `ours`."""
  given = {key: ours[key] for key in ("batch_size", "steps", "dtype")}
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
    "act_layer": "gelu_tanh",  # ours
  }
  from vit_jax.tools.bench import torch_step  # which needs Pillow

  result |= call(torch_step.measure, {"model": model, **given})
  if "step_seconds" in result:
    result |= _rates(ours, result["step_seconds"], ours.get("ceiling_tflops"))
    if "step_seconds" in ours:
      result["times_ours"] = result["step_seconds"] / ours["step_seconds"]
  return result


# --- the measurement ---


def measure(
  *,
  variant: str,
  batch_size: int,
  num_classes: int,
  steps: int,
  dtype: str,
  **options: Any,
) -> dict[str, Any]:
  """Measures the train step on all local devices, data parallel.

  Args:
    variant, num_classes, dtype, **options: as `models.create`.
    batch_size: images, over all devices.
    steps: number of timed steps; the median is returned.

  Returns:
    "step_seconds", "images_per_second",
    "tflops" (of all devices; FLOPs of the forward pass times three),
    "ceiling_tflops" (likewise, of the best matmul), "mfu", "memory_gib" of a
    device, "compile_seconds", "loss", "devices", "device", "how", "versions".
  """
  mesh = sharding.make_mesh(devices=jax.local_devices())
  sharding.check_batch_size(batch_size, mesh)
  model = models.create(
    variant=variant, num_classes=num_classes, dtype=dtype, **options
  )
  ceiling = measure_ceiling(dtype) * mesh.size
  train_step, state, batch = make_step(mesh, model, num_classes, batch_size)
  start = time.perf_counter()
  compiled = train_step.lower(state, batch).compile()
  compile_seconds = time.perf_counter() - start
  seconds = []
  for _ in range(_WARM_UP + steps):
    start = time.perf_counter()
    state, metrics = jax.block_until_ready(compiled(state, batch))
    seconds.append(time.perf_counter() - start)
  step_seconds = statistics.median(seconds[_WARM_UP:])
  spec = {"variant": variant, "image_size": options["image_size"]}
  spec |= {"num_classes": num_classes, "batch_size": batch_size}
  return {
    "step_seconds": step_seconds,
    "memory_gib": _find_memory(compiled) / 2**30,
    "compile_seconds": compile_seconds,
    "loss": float(metrics["loss"]),
    **_rates(spec, step_seconds, ceiling),
    "ceiling_tflops": ceiling,
    "devices": mesh.size,
    "device": jax.local_devices()[0].device_kind,
    "how": f"{dtype} matmuls reach {ceiling / mesh.size:.3g} TFLOP/s a device",
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

  def make_batch(key):
    shape = (batch_size, *model.image_size, 3)
    return {
      "image": jax.random.bits(key, shape, jnp.uint8),
      "labels": jax.random.randint(key, (batch_size, 1), 0, num_classes),
    }

  key = jax.random.key(0)
  layout = sharding.tree_shardings(mesh, jax.eval_shape(init_state, key))
  state = jax.jit(init_state, out_shardings=layout)(key)
  on_devices = sharding.batch_sharding(mesh)
  batch = jax.jit(make_batch, out_shardings=on_devices)(key)
  return sharding.jit_train_step(mesh, train_step, layout), state, batch


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


def _rates(spec, step_seconds, ceiling):
  """Returns the figures that are computed from a step's time."""
  products = count_multiply_adds(
    spec["variant"], spec["image_size"], spec["num_classes"]
  )
  images_per_second = spec["batch_size"] / step_seconds
  tflops = OPERATIONS * products * images_per_second / 1e12
  mfu = {"mfu": tflops / ceiling} if ceiling else {}
  return {"images_per_second": images_per_second, "tflops": tflops, **mfu}


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
  notes = dict.fromkeys(
    f"{row['code']}: {row['devices']} x {row['device']}, "
    + " ".join(f"{x} {y}" for x, y in row["versions"].items())
    + f"; {row['how']}"
    for row in rows
    if "error" not in row
  )
  return "\n".join([*lines, *notes])


def _list_figures(row):
  name = (f"{row['variant']} {row['code']}", str(row["batch_size"]))
  if "error" in row:
    return (*name, *[""] * 6, row["error"])
  times = row.get("times_ours")
  return (
    *name,
    f"{row['images_per_second']:,.1f}",
    f"{row['tflops']:.3g}",
    f"{row['mfu']:.1%}" if "mfu" in row else "-",
    f"{row['memory_gib']:.2f}",
    f"{row['step_seconds'] * 1e3:.2f}",
    f"{row['compile_seconds']:.1f}",
    f"vit_jax is {times:.2f} x as fast" if times else "",
  )
