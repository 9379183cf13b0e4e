"""The `plan` command: what a run would take, from the TPU compiler's figures.

The real steps are compiled for a TPU topology from shapes alone, on a machine
that has no TPU. What comes out is an estimate: see `report.LEFT_OUT`.
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
# The table of the paper whose core-days are estimated, on these machines.
TABLE2_SLICE = "v3:8x8"


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
  """Returns the operations of training on one image that cannot be saved.

  Those of the forward pass, and twice as many of the backward pass; what is
  computed again for want of memory is no part of it.
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
  """Returns what a train step takes, each figure of one chip.

  Args:
    program: the compiled step.
    machines: that it is compiled for.
    batch_size: of the global batch.
    products: operations of the model for an image, from `count_products`.

  Returns:
    "flops" and "bytes" of the program; "estimated_cycles" and what follows
    from them: "step_seconds", "images_per_second_per_chip", "mfu". Beside it
    the "roofline_seconds" of flops and bytes, and the "collectives" with their
    "collective_seconds" if nothing hides them. "hottest" has where the cycles
    go.
  """
  chip, devices = machines.chip, machines.per_chip()
  parsed = hlo.parse(program.text)
  rows = hlo.list_cycles(parsed, lambda cost: chip.cost_kernel(cost, devices))
  cycles = sum(row[0] for row in rows)
  seconds = cycles / chip.clock()
  images = batch_size / machines.chips
  flops = devices * hlo.count_flops(parsed)
  accessed = devices * (program.bytes + hlo.count_loop_bytes(parsed))
  collectives = [
    {"kind": x.kind, "count": x.count, "bytes": devices * x.bytes}
    for x in hlo.list_collectives(parsed)
  ]
  peak = chip.teraflops * 1e12
  return {
    "flops": flops,
    "bytes": accessed,
    "estimated_cycles": cycles,
    "step_seconds": seconds,
    "roofline_seconds": max(flops / peak, accessed / (chip.gigabytes * 1e9)),
    "collectives": collectives,
    "collective_seconds": _exchange(collectives, machines),
    "images_per_second_per_chip": images / seconds,
    "mfu": images * products / seconds / peak,
    "hottest": hlo.summarize(rows)[:10],
  }


def _exchange(collectives, machines):
  """Returns the seconds that the links between chips are busy, at the least.

  A ring takes a result's bytes past each chip once; for a sum, twice.
  """
  if machines.chips == 1:
    return 0.0
  passes = {"all-reduce": 2}
  moved = sum(passes.get(x["kind"], 1) * x["bytes"] for x in collectives)
  share = (machines.chips - 1) / machines.chips
  return moved * share / (machines.chip.gigabits * 1e9 / 8)


def add_up_memory(train, evaluation, state, batch, machines) -> dict[str, Any]:
  """Returns the peak "hbm_gib" of a chip, its parts and its limit.

  The batches that wait for the step count; the optimizer's state stays where
  it is during an evaluation.
  """
  waiting = sharding.RUN_AHEAD * _bytes(batch)
  peak = sum(train.memory.values()) + waiting
  params, whole = _bytes(state.params), _bytes(state)
  during = sum(evaluation.memory.values()) + whole - params + waiting
  devices = machines.per_chip()

  def gib(size):
    return devices * size / GIB

  parts = {
    "parameters": params,
    "optimizer": whole - params,
    "temporaries": train.memory["temporaries"],
    "program": train.memory["program"],
    "batches": waiting,
    "evaluation": during,
  }
  return {
    "hbm_gib": gib(max(peak, during)),
    "hbm_limit_gib": _limit(machines),
    "hbm": {name: gib(size) for name, size in parts.items()},
  }


def _bytes(tree):
  """Returns the bytes that a device holds of shapes with layouts."""
  return sharding.bytes_per_device(tree)


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


def plan_table2() -> list[dict[str, Any]]:
  """Returns the core-days of the paper's Table 2, estimated and printed.

  Raises:
    UserError: no TPU compiler, or not in the project's folder.
  """
  rows = []
  for row in paper.load()["table2"]["rows"]:
    if row.get("reference"):
      continue
    dataset = paper.load()["pretraining"][row["pretraining"]]["dataset"]
    variant = paper.variant_of(row["name"])
    spec = f"configs/pretrain.py:{variant},{dataset},{row['epochs']}"
    found = plan(spec, TABLE2_SLICE)
    best = found.get("then") or found
    days = 2 * best["chip_hours"] / 24 if best["fits"] else None
    rows.append(
      found
      | {
        "name": f"{row['name']} {row['pretraining']}",
        "core_days": days,
        "paper_core_days": row["tpuv3_core_days"],
      }
    )
  return rows


def plan_scale(spec: str, topology: str, **kwargs) -> list[dict[str, Any]]:
  """Returns plans of a configuration from `topology` up to 16 times its chips.

  The first is the "base"; the others are of "scaling" strong (the same global
  batch) and weak (the same batch of a chip). Arguments as of `plan`.
  """
  overrides = kwargs.pop("overrides", None) or {}
  base = find_slice(topology)
  batch_size = configuration.load(spec, overrides).batch_size
  rows = []
  for name in list_larger(topology):
    factor = find_slice(name).chips // base.chips
    sizes = {"strong": batch_size, "weak": batch_size * factor}
    if factor == 1:
      sizes = {"base": batch_size}
    for scaling, size in sizes.items():
      given = overrides | {"batch_size": str(size)}
      try:
        found = plan(spec, name, overrides=given, **kwargs)
      except UserError as e:
        if "not divisible" not in str(e):
          raise
        found = {"topology": name, "fits": False, "why": str(e)}
      rows.append({"scaling": scaling, "batch_size": size, **found})
  return rows


def list_larger(topology: str, count: int = 3) -> list[str]:
  """Returns a topology and those with its shortest sides doubled in turn."""
  name, _, size = topology.partition(":")
  sides = [int(side) for side in size.split("x")]
  names = [topology]
  for _ in range(count - 1):
    sides = [2 * side for side in sides] if len(sides) == 2 else _grow(sides)
    names.append(f"{name}:{'x'.join(map(str, sides))}")
  return names


def _grow(sides):
  """Doubles the two shortest of three sides."""
  longest = sides.index(max(reversed(sides)))
  return [s if i == longest else 2 * s for i, s in enumerate(sides)]
