"""The `plan` command: memory, speed and cost of a run on TPUs, estimated.

The run's own steps are compiled ahead of time for a TPU topology, from shapes
alone; no TPU is needed. `report.LEFT_OUT` lists what the estimate leaves out.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from vit_jax import config as configuration
from vit_jax import sharding
from vit_jax.data import find_task, parse_mixture
from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.tools.paper import data as paper
from vit_jax.tools.paper.flops import OPERATIONS, count_in_jaxpr
from vit_jax.tools.plan import hlo
from vit_jax.tools.plan.compiling import Slice, compile_step, find_slice
from vit_jax.train import make_step
from vit_jax.training.objectives import Objective, create

log = logging.getLogger(__name__)

GIB = 2**30
# Fraction of memory that the compiler reserves for the system: 0.25 GiB of 16.
_RESERVED = 1 / 64


def plan(
  spec: str,
  topology: str,
  *,
  overrides: dict[str, str] | None = None,
  num_classes: int | None = None,
  num_examples: int | None = None,
  price: float | None = None,
  dump_hlo: str | None = None,
) -> dict[str, Any]:
  """Returns the memory, speed and cost of a configuration on a TPU topology.

  Args:
    spec: "CONFIG[:ARG]" of a configuration.
    topology: "CHIP:SIZE", such as "v5e:16x16".
    overrides: {"fsdp": "16"} as typed by the user.
    num_classes, num_examples: of a data set that is not in the catalogue.
      Without num_examples, the length of a run in epochs is left out.
    price: of a chip-hour, in dollars.
    dump_hlo: a file for the text of the compiled train step.

  Returns:
    "config", "topology", "chips", "fits", "hbm_gib", "hbm_limit_gib". If it
    fits, also what `add_up_memory` and `estimate` return. Else "tried";
    "fallback", the overrides that fit; and "then", the plan with them.

  Raises:
    UserError: an invalid configuration, or an unknown topology or data set.
  """
  machines = find_slice(topology)
  given = dict(overrides or {})
  sizes = (num_classes, num_examples)
  found = {
    "config": spec,
    "overrides": given,
    "topology": topology,
    "chips": machines.chips,
    "estimated": True,
    **_try(spec, given, machines, sizes, price, dump_hlo),
  }
  if found["fits"]:
    return found
  tried = []
  config = configuration.load(spec, given)
  for change in list_fallbacks(config, len(machines.devices)):
    attempt = _try(spec, given | change, machines, sizes, price, None)
    tried.append({"overrides": change, "fits": attempt["fits"]})
    if attempt["fits"]:
      return found | {"tried": tried, "fallback": change, "then": attempt}
  return found | {"tried": tried, "fallback": None}


def find_fastest(
  spec: str,
  topology: str,
  *,
  overrides: dict[str, str] | None = None,
  num_classes: int | None = None,
  num_examples: int | None = None,
  price: float | None = None,
) -> list[dict[str, Any]]:
  """Returns plans with fsdp 1, 2, 4, ..., as of `plan`, fastest first.

  Each has the least rematerialisation, then the fewest micro-batches, that fit.
  They are compared by the time of compute and collectives, without overlap.

  Raises:
    UserError: see `plan`; or nothing fits.
  """
  machines = find_slice(topology)
  given, devices = dict(overrides or {}), len(machines.devices)
  config = configuration.load(spec, given)
  head = {"config": spec, "topology": topology, "chips": machines.chips}
  plans = []
  sizes = (num_classes, num_examples)
  for fsdp in (1, *_double(1, devices)):
    for change in ({}, *list_fallbacks(config, devices, but=("fsdp",))):
      change = {"fsdp": str(fsdp)} | change
      try:
        found = _try(spec, given | change, machines, sizes, price, None)
      except UserError:
        if not plans:
          raise
        break  # such an fsdp does not divide the model's width
      if found["fits"]:
        plans.append({**head, "overrides": change, "estimated": True, **found})
        break
  if not plans:
    raise UserError(
      f"{spec} does not fit on {topology}; use more or larger chips"
    )
  return sorted(plans, key=add_up_seconds)


def add_up_seconds(found: dict[str, Any]) -> float:
  """Returns the time of a plan's step if nothing overlaps its collectives."""
  return found["step_seconds"] + found["collective_seconds"]


def list_fallbacks(
  config, devices: int, but: tuple[str, ...] = ()
) -> Iterator[dict[str, str]]:
  """Yields overrides that save memory, each more than the one before.

  Rematerialisation first, which costs a third of the time at most; then fsdp,
  which costs communication; then micro-batches, which make matmuls small.
  None of the keys of `but` is changed.
  """
  encoder = variants.parse(config.model.variant).encoder
  policies = ("none", "dots", "full") if encoder else ("none", "full")
  options = {
    "model.remat": policies[policies.index(config.model.remat) + 1 :],
    "fsdp": _double(config.fsdp, devices),
    "micro_batches": _double(
      config.micro_batches, config.batch_size // devices
    ),
  }
  change = {}
  for key, values in options.items():
    for value in () if key in but else values:
      change = change | {key: str(value)}
      yield change


def _double(value, limit):
  """Yields 2, 4, 8 ... times a value while that divides a limit."""
  while limit % (value := 2 * value) == 0:
    yield value


def _try(spec, overrides, machines, sizes, price, dump_hlo):
  """Returns the estimate of a configuration, without fallbacks."""
  # The traces of earlier plans take gigabytes.
  jax.clear_caches()
  log.info(
    "compiling %s for %s %s: the train step, then the evaluation; 2 minutes "
    "for ViT-B_16 on two cores",
    *(spec, machines.name, overrides or ""),
  )
  config = configuration.load(spec, overrides)
  configuration.check_ranges(config)
  configuration.check_unused(config)
  if config.teacher.source:
    raise UserError(
      f"plan cannot estimate the teacher {config.teacher.source}; give "
      "--config.teacher.source= to plan the run without it"
    )
  num_classes, num_examples = find_sizes(config, *sizes)
  total_steps = None
  if num_examples or not config.total_epochs:
    total_steps = configuration.count_steps(config, num_examples or 0)
  names = [str(i) for i in range(num_classes)]
  objective = create(config, names)
  mesh = sharding.make_mesh(
    config.fsdp, machines.devices, config.optimizer.shard_state
  )
  sharding.check_batch_size(config.batch_size, mesh, config.micro_batches)
  train_step, init_state = make_step(config, objective, total_steps or 10**6)
  shapes = jax.eval_shape(init_state, jax.random.key(0))
  layout = sharding.tree_shardings(mesh, shapes)
  state = jax.tree.map(lambda x, s: x.update(sharding=s), shapes, layout)
  batch = make_batch(objective, config.batch_size, mesh)
  examples = make_batch(
    objective, config.eval.batch_size or config.batch_size, mesh
  )
  limit = machines.chip.hbm_gib * (1 - _RESERVED)
  try:
    step = sharding.jit_train_step(mesh, train_step, layout)
    text, cost, memory = compile_step(step, state, batch)
    step = jax.jit(sharding.on_mesh(mesh, objective.eval_step))
    *_, evaluation = compile_step(step, state.params, examples)
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    need = read_need(str(e))
    need = need and need * machines.per_chip()
    return {"fits": False, "hbm_gib": need, "hbm_limit_gib": limit}
  if dump_hlo:
    Path(dump_hlo).write_text(text, encoding="utf-8")
  # FLOPs are counted in float32, because bfloat16 models also compute padding.
  plain = configuration.load(spec, overrides | {"model.dtype": "float32"})
  flops = config.batch_size * count_flops(create(plain, names))
  used = add_up_memory(memory, evaluation, state, batch, machines)
  figures = (text, cost, machines, config.batch_size, flops)
  return {
    "fits": used["hbm_gib"] <= limit,
    "hbm_limit_gib": limit,
    **used,
    **estimate(*figures, total_steps, price),
  }


def read_need(message: str) -> float | None:
  """Returns the GiB that a device would need, from the compiler's error."""
  found = re.search(r"Used ([\d.]+)([MG]) of [\d.]+[MG] hbm", message)
  return found and float(found[1]) / {"G": 1, "M": 1024}[found[2]]


def find_sizes(config, num_classes, num_examples) -> tuple[int, int | None]:
  """Returns the numbers of classes and, if known, images of the data set.

  Raises:
    UserError: its number of classes is unknown.
  """
  name = parse_mixture(config.train.dataset)[0][0]
  for row in paper.load()["pretraining"].values():
    if row["dataset"] == name:
      num_classes = num_classes or row["classes"]
      num_examples = num_examples or row["images"]
  if not num_classes and (task := find_task(name)):
    num_classes = task.num_classes
  if not num_classes and config.objective == "classification":
    raise UserError(
      f"plan reads no data, and {name!r} is unknown; give --num_classes=N"
    )
  return num_classes or 0, num_examples


def make_batch(objective: Objective, size: int, mesh=None) -> dict[str, Any]:
  """Returns the shapes of a batch of `data`, with one label per image."""
  image = (size, *objective.model.image_size, 3)
  shapes = {"image": (image, "uint8"), "labels": ((size, 1), "int32")}
  shapes |= {"mask": ((size,), "bool"), "index": ((size,), "int32")}
  layout = mesh and sharding.batch_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout)
    for name, (shape, dtype) in shapes.items()
  }


def count_flops(objective: Objective) -> float:
  """Returns the FLOPs of training on one image, without rematerialisation.

  The backward pass takes twice as many as the forward pass.
  """
  key = jax.random.key(0)
  params = jax.eval_shape(objective.model.init, key)
  examples = jax.eval_shape(objective.prepare, make_batch(objective, 1), key)
  traced = jax.make_jaxpr(objective.loss)(params, examples, key)
  return OPERATIONS * count_in_jaxpr(traced.jaxpr)


def estimate(
  text: str,
  cost: dict[str, float],
  machines: Slice,
  batch_size: int,
  model_flops: float,
  total_steps: int | None = None,
  price: float | None = None,
) -> dict[str, Any]:
  """Returns the figures of a train step, per chip, and of the run.

  `text` and `cost` are from `compile_step`. `model_flops` is for a batch, and
  `price` is in dollars per chip-hour.

  Returns:
    The result of `hlo.read`, and "step_seconds", "images_per_second_per_chip"
    and "mfu" from its cycles. "collective_seconds" is a lower bound without
    overlap. "flops", "bytes" and "roofline_seconds" are None for a program with
    loops, because XLA counts their bodies once. For a run of known length also
    "total_steps", "hours", "chip_hours" and "dollars".
  """
  chip, chips, devices = machines.chip, machines.chips, machines.per_chip()
  found = hlo.read(text)
  seconds = found["estimated_cycles"] / chip.clock()
  peak = chip.teraflops * 1e12
  flops = accessed = roofline = None
  if not found.pop("loops"):
    flops, accessed = devices * cost["flops"], devices * cost["bytes accessed"]
    roofline = max(flops / peak, accessed / (chip.gigabytes * 1e9))
  moved = 0
  for row in found["collectives"]:
    row["bytes"] *= devices
    # A ring sends a result's bytes past each chip once, in an all-reduce twice.
    moved += row["bytes"] * (2 if row["kind"] == "all-reduce" else 1)
  links = chip.gigabits * 1e9 / 8
  if total_steps:
    hours = total_steps * seconds / 3600
    found |= {"total_steps": total_steps, "hours": hours}
    found |= {"chip_hours": hours * chips}
    found |= {"dollars": hours * chips * price} if price else {}
  return {
    **found,
    "hottest": found["hottest"][:10],
    "flops": flops,
    "bytes": accessed,
    "step_seconds": seconds,
    "roofline_seconds": roofline,
    "collective_seconds": moved * (chips - 1) / chips / links,
    "images_per_second_per_chip": batch_size / chips / seconds,
    "mfu": model_flops / chips / seconds / peak,
  }


def add_up_memory(train, evaluation, state, batch, machines) -> dict[str, Any]:
  """Returns the peak "hbm_gib" of a chip and its parts, "hbm".

  Both include the batches that wait for their step, and the evaluation also the
  optimizer's state. `train` and `evaluation` are JAX's memory analyses.
  """

  def add_up(x):
    outputs = x.output_size_in_bytes - x.alias_size_in_bytes
    code = x.generated_code_size_in_bytes
    return x.argument_size_in_bytes + outputs + x.temp_size_in_bytes + code

  params, whole, one = map(
    sharding.bytes_per_device, (state.params, state, batch)
  )
  waiting = sharding.RUN_AHEAD * one
  during = add_up(evaluation) + whole - params + waiting
  parts = {
    "parameters": params,
    "optimizer": whole - params,
    "temporaries": train.temp_size_in_bytes,
    "program": train.generated_code_size_in_bytes,
    "batches": waiting,
    "evaluation": during,
  }
  gib = machines.per_chip() / GIB
  return {
    "hbm_gib": gib * max(add_up(train) + waiting, during),
    "hbm": {name: gib * size for name, size in parts.items()},
  }
