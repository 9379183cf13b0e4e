"""The `plan` command: memory, speed and cost of a run on TPUs, estimated.

The run's own steps are compiled ahead of time for a TPU topology, from shapes
alone; no TPU is needed. `report.LEFT_OUT` says what the estimate leaves out.
"""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from vit_jax import config as configuration
from vit_jax import sharding
from vit_jax.data import find_task, parse_mixture
from vit_jax.errors import UserError
from vit_jax.tools.paper import data as paper
from vit_jax.tools.paper.flops import OPERATIONS, count_in_jaxpr
from vit_jax.tools.plan import hlo
from vit_jax.tools.plan.compiling import (
  OutOfMemory,
  Program,
  Slice,
  compile_step,
  find_slice,
  make_batch,
  make_shapes,
)
from vit_jax.training.metrics import duration
from vit_jax.training.objectives import Objective, create

log = logging.getLogger(__name__)

GIB = 2**30
_USUALLY = "2 minutes for ViT-B_16 on two cores"
# Of the memory, what the compiler leaves to the system: 0.25 GiB of 16.
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
  """Returns what a configuration would take on these machines.

  Args:
    spec: "CONFIG[:ARG]" of a configuration.
    topology: "CHIP:SIZE", such as "v5e:16x16".
    overrides: {"fsdp": "16"} as typed by the user.
    num_classes: of the data set, for one that the project does not know.
    num_examples: of an epoch of it, likewise; else the run's length is left
      out where it is given in epochs.
    price: of a chip-hour, in dollars.
    dump_hlo: a file for the text of the compiled train step.

  Returns:
    See `estimate`, and "config", "topology", "chips"; "fits". If it does not
    fit: "fallback", what would, as overrides, and "estimate" of that.

  Raises:
    UserError: a configuration, topology or data set that cannot be had.
  """
  machines = find_slice(topology)
  given = dict(overrides or {})
  sizes = (num_classes, num_examples)
  found = _try(spec, given, machines, sizes, price, dump_hlo)
  found = {
    "config": spec,
    "overrides": given,
    "topology": topology,
    "chips": machines.chips,
    "estimated": True,
    **found,
  }
  if found["fits"]:
    return found
  tried = []
  for change in list_fallbacks(configuration.load(spec, given), machines):
    attempt = _try(spec, given | change, machines, sizes, price, None)
    tried.append({"overrides": change, "fits": attempt["fits"]})
    if attempt["fits"]:
      return found | {"tried": tried, "fallback": change, "then": attempt}
  return found | {"tried": tried, "fallback": None}


def list_fallbacks(config, machines: Slice) -> Iterator[dict[str, str]]:
  """Yields overrides that take less memory, each more of it than the last.

  Rematerialisation first, which costs a third of the time at most; then fsdp,
  which costs communication; then micro-batches, which make products small.
  """
  change: dict[str, str] = {}
  policies = ("none", "dots", "full")
  for remat in policies[policies.index(config.model.remat) + 1 :]:
    change = change | {"model.remat": remat}
    yield change
  for fsdp in _double(config.fsdp, len(machines.devices)):
    change = change | {"fsdp": str(fsdp)}
    yield change
  rows = config.batch_size // len(machines.devices)
  for micro_batches in _double(config.micro_batches, rows):
    change = change | {"micro_batches": str(micro_batches)}
    yield change


def _double(value, limit):
  """Yields 2, 4, 8 ... times a value, up to a limit that they divide."""
  while value * 2 <= limit and limit % (value * 2) == 0:
    value *= 2
    yield value


def _try(spec, overrides, machines, sizes, price, dump_hlo):
  """Returns the estimate of one configuration as it is."""
  # What was traced for other plans is gigabytes by then.
  jax.clear_caches()
  flags = " ".join(f"{key}={value}" for key, value in overrides.items())
  log.info(
    "compiling %s for %s %s: the train step, then the evaluation; %s",
    *(spec, machines.name, flags, _USUALLY),
  )
  config = configuration.load(spec, overrides)
  configuration.check_ranges(config)
  configuration.check_unused(config)
  num_classes, num_examples = find_sizes(config, *sizes)
  names = [str(i) for i in range(num_classes)]
  objective = create(config, names)
  total_steps = _count_steps(config, num_examples)
  mesh = sharding.make_mesh(config.fsdp, machines.devices)
  step, state, batch = make_shapes(
    config, objective, mesh, total_steps or 10**6
  )
  try:
    begin = time.monotonic()
    train = compile_step(step, state, batch)
    log.info("the train step took %s", duration(time.monotonic() - begin))
    evaluation = _compile_evaluation(config, objective, mesh, state)
  except OutOfMemory as e:
    need = e.needed and e.needed * machines.per_chip()
    return {"fits": False, "hbm_gib": need, "hbm_limit_gib": _limit(machines)}
  if dump_hlo:
    Path(dump_hlo).write_text(train.text, encoding="utf-8")
  # In float32 nothing is computed that is not part of the model.
  given = overrides | {"model.dtype": "float32"}
  plain = create(configuration.load(spec, given), names)
  products = count_products(plain)
  found = estimate(train, machines, config.batch_size, products)
  memory = add_up_memory(train, evaluation, state, batch, machines)
  found = {"fits": memory["hbm_gib"] <= _limit(machines), **memory, **found}
  return found | estimate_run(found, total_steps, machines.chips, price)


def find_sizes(config, num_classes, num_examples) -> tuple[int, int | None]:
  """Returns the classes of a config's data set, and its images if known.

  Raises:
    UserError: nobody knows how many classes it has.
  """
  name = parse_mixture(config.train.dataset)[0][0]
  known = {row["dataset"]: row for row in paper.load()["pretraining"].values()}
  if name in known:
    num_classes = num_classes or known[name]["classes"]
    num_examples = num_examples or known[name]["images"]
  if not num_classes:
    task = find_task(name)
    num_classes = task.num_classes if task else None
  if not num_classes and config.objective == "classification":
    raise UserError(
      f"plan reads no data, and does not know {name!r}; say --num_classes=N"
    )
  return num_classes or 0, num_examples


def _count_steps(config, num_examples):
  """Returns the steps of the whole run, None if that takes unknown data."""
  if config.total_epochs and not num_examples:
    return None
  return configuration.count_steps(config, num_examples or 0)


def _compile_evaluation(config, objective, mesh, state):
  size = config.eval.batch_size or config.batch_size
  batch = make_batch(mesh, size, objective.model.image_size)
  if config.objective == "classification":
    del batch["index"]
  step = jax.jit(sharding.on_mesh(mesh, objective.eval_step))
  return compile_step(step, state.params, batch)


def count_products(objective: Objective) -> float:
  """Returns the FLOPs of training on one image, without rematerialisation.

  Those of the forward pass, and twice as many of the backward pass.
  """
  size = objective.model.image_size
  batch = {
    "image": jax.ShapeDtypeStruct((1, *size, 3), "uint8"),
    "labels": jax.ShapeDtypeStruct((1, 1), "int32"),
  }
  key = jax.random.key(0)
  params = jax.eval_shape(objective.model.init, key)
  examples = jax.eval_shape(objective.prepare, batch, key)
  traced = jax.make_jaxpr(objective.loss)(params, examples, key)
  return OPERATIONS * count_in_jaxpr(traced.jaxpr)


def estimate(
  program: Program, machines: Slice, batch_size: int, products: float
) -> dict[str, Any]:
  """Returns the figures of a train step, per chip.

  Args:
    program: the compiled step.
    machines: that it is compiled for.
    batch_size: of the global batch.
    products: FLOPs of the model's matmuls for an image, from `count_products`.

  Returns:
    "estimated_cycles", and what follows from them: "step_seconds",
    "images_per_second_per_chip", "mfu"; "flops", "bytes" and the
    "roofline_seconds" of both, None for a program with loops, whose bodies XLA
    counts once; "collectives" and their "collective_seconds" if nothing hides
    them; "hottest", the instructions with the most cycles.
  """
  chip, devices = machines.chip, machines.per_chip()
  parsed = hlo.parse(program.text)
  rows = hlo.list_cycles(parsed)
  cycles = sum(row[0] for row in rows)
  seconds = cycles / chip.clock()
  images = batch_size / machines.chips
  peak = chip.teraflops * 1e12
  flops = accessed = roofline = None
  if not any(x.opcode == "while" for _, x in hlo.walk(parsed)):
    flops, accessed = devices * program.flops, devices * program.bytes
    roofline = max(flops / peak, accessed / (chip.gigabytes * 1e9))
  collectives = [
    row | {"bytes": devices * row["bytes"]}
    for row in hlo.list_collectives(parsed)
  ]
  return {
    "flops": flops,
    "bytes": accessed,
    "estimated_cycles": cycles,
    "step_seconds": seconds,
    "roofline_seconds": roofline,
    "collectives": collectives,
    "collective_seconds": _estimate_links(collectives, machines),
    "images_per_second_per_chip": images / seconds,
    "mfu": images * products / seconds / peak,
    "hottest": hlo.summarize(rows)[:10],
  }


def _estimate_links(collectives, machines):
  """Returns the seconds that the links between chips are busy, at the least.

  A ring moves a result's bytes past each chip once; for a sum, twice.
  """
  moved = sum(
    (2 if x["kind"] == "all-reduce" else 1) * x["bytes"] for x in collectives
  )
  share = (machines.chips - 1) / machines.chips
  return moved * share / (machines.chip.gigabits * 1e9 / 8)


def add_up_memory(train, evaluation, state, batch, machines) -> dict[str, Any]:
  """Returns the peak "hbm_gib" of a chip, its parts and its limit.

  The batches that wait for their step count, and during an evaluation the
  optimizer's state.
  """
  params, whole, one = map(
    sharding.bytes_per_device, (state.params, state, batch)
  )
  waiting = sharding.RUN_AHEAD * one
  peak = sum(train.memory.values()) + waiting
  during = sum(evaluation.memory.values()) + whole - params + waiting
  parts = {
    "parameters": params,
    "optimizer": whole - params,
    "temporaries": train.memory["temporaries"],
    "program": train.memory["program"],
    "batches": waiting,
    "evaluation": during,
  }
  gib = machines.per_chip() / GIB
  return {
    "hbm_gib": gib * max(peak, during),
    "hbm_limit_gib": _limit(machines),
    "hbm": {name: gib * size for name, size in parts.items()},
  }


def _limit(machines):
  return machines.chip.hbm_gib * (1 - _RESERVED)


def estimate_run(found, total_steps, chips: int, price) -> dict[str, Any]:
  """Returns what the whole run takes; {} if its length is not known."""
  if not total_steps:
    return {}
  hours = total_steps * found["step_seconds"] / 3600
  run = {
    "total_steps": total_steps,
    "hours": hours,
    "chip_hours": hours * chips,
  }
  return run | ({"dollars": run["chip_hours"] * price} if price else {})
