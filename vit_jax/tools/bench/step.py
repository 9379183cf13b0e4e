"""The `bench step` command: the train step on the devices of this machine.

What is measured is the step that trains, on a batch that is on the devices
already. Only jax, flax, optax and numpy are needed.
"""

import functools
import importlib.metadata
import logging
import os
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax import models, sharding
from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.tools.bench.process import call, report
from vit_jax.tools.paper.flops import OPERATIONS, count_multiply_adds
from vit_jax.tools.text import format_columns
from vit_jax.training import losses, optim, steps
from vit_jax.training.objectives import Classification

log = logging.getLogger(__name__)

_WARM_UP = 3  # steps
_FIRST_BATCH = 8  # images a device, where the largest batch is looked for
_TRIAL_STEPS = 2  # there
# Sides of the matrix products: large ones are faster, up to where power ends
# that. A CPU would take minutes.
_SIDES = (4096, 8192, 16384)
_CPU_SIDES = (256, 512)
_PRODUCTS = 8  # in one program, so that starting it costs nothing


def bench(
  names: list[str], *, beside: str | None = None, **options: Any
) -> list[dict[str, Any]]:
  """Measures the steps of some models, one after the other.

  Args:
    names: variants, such as "ViT-L_16".
    beside: "timm" for the same models there as well.
    **options: as `measure`; a `batch_size` of 0 looks for the largest power of
      two that fits, times the number of devices.

  Returns:
    What `measure` returned, of each; "error", one line, in place of figures
    where there are none. After ours timm's, if asked for, with "code" "timm".

  Raises:
    UserError: an option that cannot be used.
  """
  if beside not in (None, "timm"):
    raise UserError(f"--beside={beside}: only timm is known")
  check(names, **options)
  found = []
  for name in names:
    ours = _run_largest if options["batch_size"] == 0 else _run
    spec = {"variant": name, **options}
    found.append({"code": "vit_jax", **spec, **ours(spec)})
    if beside:
      found.append(_run_timm(found[-1]))
  return found


def check(names: list[str], *, batch_size, steps, **options) -> None:
  """Raises a UserError for what `measure` cannot take, before anything runs."""
  if batch_size < 0 or steps < 1:
    raise UserError(
      f"--batch_size={batch_size} --steps={steps}: a batch has at least one "
      "image (0 looks for the largest that fits), and there is a step to take"
    )
  for name in names:
    models.create(variant=name, **options)


# --- processes ---


def _run(spec):
  """Returns what `measure` says of a spec, in another process."""
  what = "%s, %d images: compiling, then %d steps"
  log.info(what, spec["variant"], spec["batch_size"], spec["steps"])
  return call("vit_jax.tools.bench.step", spec)


def _run_largest(spec):
  """Doubles the batch until it does not fit; measures the last that did."""
  spec = spec | {"per_device": True}
  fits, trial = 0, _FIRST_BATCH
  while True:
    found = _run(spec | {"batch_size": trial, "steps": _TRIAL_STEPS})
    if "error" in found:
      break
    fits, trial = trial, trial * 2
  if not fits or not found.get("out_of_memory"):
    return found  # it is not the size that is wrong
  return _run(spec | {"batch_size": fits})


def _run_timm(ours):
  """Returns the figures of the model in timm that `ours` are of."""
  spec = {key: ours[key] for key in ("variant", "image_size", "num_classes")}
  spec |= {key: ours[key] for key in ("batch_size", "steps", "dtype")}
  result = {"code": "timm", **spec}
  sizes = variants.parse(ours["variant"])
  if sizes.encoder is None or sizes.units is not None:
    return result | {"error": f"timm has no {ours['variant']} as ours is"}
  if ours["remat"] != "none" or not ours["batch_size"]:
    return result | {"error": "measured without --remat, and where ours ran"}
  shape = {"patch_size": sizes.patch_size, **sizes.encoder._asdict()}
  result |= call("vit_jax.tools.bench.torch_step", spec | shape)
  if "step_seconds" in result:
    result |= _rates(ours, result["step_seconds"], ours.get("ceiling_tflops"))
    if "step_seconds" in ours:
      result["times_ours"] = result["step_seconds"] / ours["step_seconds"]
  return result


# --- the measurement ---


def measure(
  *,
  variant: str,
  image_size: int,
  batch_size: int,
  num_classes: int,
  steps: int,
  dtype: str,
  remat: str,
  per_device: bool = False,
) -> dict[str, Any]:
  """Measures the train step on all local devices, data parallel.

  Args:
    variant, image_size, num_classes, dtype, remat: as `models.create`.
    batch_size: images, over all devices.
    per_device: the batch is of each device instead.
    steps: that are timed; the median counts.

  Returns:
    "batch_size" over all devices, "step_seconds", "fastest_seconds",
    "images_per_second", "tflops" (of all devices; products of the forward pass
    times `OPERATIONS`), "ceiling_tflops": of all devices, the best matrix
    product before or after, "ceilings": both, of one device, "mfu",
    "memory_gib" of a device and "memory_from", "compile_seconds", "loss",
    "devices", "device", "platform", "versions", "xla_flags".
  """
  mesh = sharding.make_mesh(devices=jax.local_devices())
  batch_size *= mesh.size if per_device else 1
  sharding.check_batch_size(batch_size, mesh)
  model = models.create(
    variant=variant,
    num_classes=num_classes,
    image_size=image_size,
    dtype=dtype,
    remat=remat,
  )
  before = measure_ceiling(dtype)
  timed = _time_steps(*make_step(mesh, model, num_classes, batch_size), steps)
  after = measure_ceiling(dtype)
  spec = {"variant": variant, "image_size": image_size}
  spec |= {"num_classes": num_classes, "batch_size": batch_size}
  device = jax.local_devices()[0]
  ceiling = max(before, after) * mesh.size
  return {
    "batch_size": batch_size,
    **timed,
    **_rates(spec, timed["step_seconds"], ceiling),
    "ceiling_tflops": ceiling,
    "ceilings": [before, after],
    "devices": mesh.size,
    "device": device.device_kind,
    "platform": device.platform,
    "versions": {x: importlib.metadata.version(x) for x in ("jax", "flax")},
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
  }


def _time_steps(train_step, state, batch, steps):
  """Returns the figures of a step that is compiled here."""
  start = time.perf_counter()
  compiled = train_step.lower(state, batch).compile()
  compile_seconds = time.perf_counter() - start
  seconds = []
  for _ in range(_WARM_UP + steps):
    start = time.perf_counter()
    state, metrics = jax.block_until_ready(compiled(state, batch))
    seconds.append(time.perf_counter() - start)
  memory, memory_from = _find_memory(compiled)
  return {
    "step_seconds": statistics.median(seconds[_WARM_UP:]),
    "fastest_seconds": min(seconds[_WARM_UP:]),
    "memory_gib": memory / 2**30,
    "memory_from": memory_from,
    "compile_seconds": compile_seconds,
    "loss": float(metrics["loss"]),
  }


def make_step(mesh, model, num_classes: int, batch_size: int):
  """Returns (the jitted train step, its state, a batch), on the devices.

  Adam with decoupled weight decay and a constant rate; softmax cross-entropy,
  one label an image; no clipping, dropout or averaging.
  """
  schedule = optim.make_schedule(
    base_lr=1e-4,
    decay="constant",
    warmup_steps=0,
    linear_end=0.0,
    rsqrt_timescale=1.0,
    cooldown_steps=0,
    total_steps=10**6,
  )
  optimizer = optim.make_optimizer(
    name="adam",
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    momentum=0.0,
    accumulator_dtype="float32",
    weight_decay=0.1,
    weight_decay_scaling="lr",
    weight_decay_params=".*",
    clip_norm=0.0,
    lr_multipliers=(),
    schedule=schedule,
    base_lr=1e-4,
    params=jax.eval_shape(model.init, jax.random.key(0)),
  )
  train_step = functools.partial(
    steps.train_step,
    objective=Classification(
      model=model,
      class_names=[str(i) for i in range(num_classes)],
      loss_fn=losses.get_loss("softmax"),
    ),
    optimizer=optimizer,
    schedule=schedule,
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
  """Returns the TFLOP/s of the best of some matrix products, on one device.

  No step of a model that is products for the most part can be above it.
  """
  platform = jax.local_devices()[0].platform
  best = 0.0
  for side in _CPU_SIDES if platform == "cpu" else _SIDES:
    # Random numbers of variance 1, and factors that keep it so.
    x, factor = jax.random.normal(jax.random.key(0), (2, side, side), dtype)

    @jax.jit
    def multiply(x, factor):
      return jax.lax.fori_loop(0, _PRODUCTS, lambda _, x: x @ factor, x)

    factor = factor / side**0.5
    jax.block_until_ready(multiply(x, factor))
    for _ in range(4):
      start = time.perf_counter()
      jax.block_until_ready(multiply(x, factor))
      seconds = time.perf_counter() - start
      best = max(best, 2 * side**3 * _PRODUCTS / seconds / 1e12)
  return best


def _rates(spec, step_seconds, ceiling):
  """Returns the figures that follow from a step's time."""
  products = count_multiply_adds(
    spec["variant"], spec["image_size"], spec["num_classes"]
  )
  images_per_second = spec["batch_size"] / step_seconds
  tflops = OPERATIONS * products * images_per_second / 1e12
  mfu = {"mfu": tflops / ceiling} if ceiling else {}
  return {"images_per_second": images_per_second, "tflops": tflops, **mfu}


def _find_memory(compiled):
  """Returns the bytes that a device needed at most, and who says so."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    return stats["peak_bytes_in_use"], "device"
  plan = compiled.memory_analysis()
  if plan is None:
    return 0, "nobody"
  used = plan.argument_size_in_bytes + plan.temp_size_in_bytes
  used += plan.output_size_in_bytes - plan.alias_size_in_bytes
  return used, "compiler"


# --- the table ---


def format_report(rows: list[dict[str, Any]]) -> str:
  """Returns the table of what `bench` found, and what it was measured on."""
  head = ("", "batch", "images/s", "TFLOP/s", "MFU", "GiB", "ms", "compile s")
  lines = format_columns([(*head, ""), *map(_list_figures, rows)], "<>>>>>>><")
  notes = dict.fromkeys(map(_describe, (r for r in rows if "error" not in r)))
  return "\n".join([*lines, *notes])


def _list_figures(row):
  name = f"{row['variant']} {row['code']}"
  batch_size = str(row["batch_size"])
  if "error" in row:
    return (name, batch_size, *[""] * 6, row["error"])
  remark = ""
  if "times_ours" in row:
    remark = f"vit_jax is {row['times_ours']:.2f} x as fast"
  return (
    name,
    batch_size,
    f"{row['images_per_second']:,.1f}",
    f"{row['tflops']:.3g}",
    f"{row['mfu']:.1%}" if "mfu" in row else "-",
    f"{row['memory_gib']:.2f}",
    f"{row['step_seconds'] * 1e3:.2f}",
    f"{row['compile_seconds']:.1f}",
    remark,
  )


def _describe(row):
  versions = " ".join(f"{x} {y}" for x, y in row["versions"].items())
  text = f"{row['code']}: {row['devices']} x {row['device']}, {versions}"
  if "ceilings" not in row:
    return f"{text}; {row['how']}"
  before, after = row["ceilings"]
  return (
    f"{text}; {row['dtype']} matrix products {before:.3g} and {after:.3g} "
    f"TFLOP/s a device, before and after {row['variant']}; memory by the "
    f"{row['memory_from']}"
  )


if __name__ == "__main__":
  report(measure)
