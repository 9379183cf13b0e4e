"""A cell of a results table: what it measures, who measured it, what it takes.

A cell is one model, pre-trained in one way, measured in one way.
"""

import math
import shlex
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from vit_jax.tools.paper import data, flops, protocol
from vit_jax.tools.paper.pretraining import (
  Pretraining,
  comes_from,
  is_pretraining,
)
from vit_jax.tools.runs import Run, find_origin

# Few-shot accuracy is looked at as the paper's code did (big_vision's few-shot
# evaluation): images squeezed to 256 px, of which the middle 224, and drawing
# from a part of ImageNet, as the rest would take hours and change nothing.
_FEWSHOT = {
  "train_split": "train[:65000]",
  "test_split": "validation",
  "preprocess": "resize(256)|central_crop(size)",
}

# The paper selects among two learning rates and two schedules, and prints which
# ones won; the other two are those of `vit-jax vtab`.
_VTAB_SELECTED = (("schedule.base_lr", (0.01,)), ("total_steps", (2500,)))
_VTAB_GRID = (
  ("schedule.base_lr", (0.003, 0.01)),
  ("total_steps", (500, 2500)),
)


class Cell(NamedTuple):
  """One number that can be computed.

  Attributes:
    kind: "finetune", "real" (a fine-tuned model on other labels), "vtab",
      "vtab_mean" (of all its tasks) or "linear" (5-shot).
    pretraining: where the weights come from.
    dataset: our name of what is measured on; "" for a mean.
    image_size: pixels.
    averaged: whether the parameters are Polyak averages.
    seeds: how many runs the paper's number is the mean of.
  """

  kind: str
  pretraining: Pretraining
  dataset: str = ""
  image_size: int = 384
  averaged: bool = False
  seeds: int = 1


class Found(NamedTuple):
  """What runs say of a cell.

  Attributes:
    values: percent, of each run.
    runs: their folders.
    differs: in what they are not the paper's protocol.
  """

  values: tuple[float, ...] = ()
  runs: tuple[str, ...] = ()
  differs: tuple[str, ...] = ()


class Plan(NamedTuple):
  """What it takes to fill a cell.

  Attributes:
    commands: in order.
    images: that are trained on.
    datasets: that the commands read.
  """

  commands: tuple[str, ...]
  images: int
  datasets: tuple[str, ...] = ()


# --- what runs say ---


def measure(cell: Cell, runs: list[Run]) -> Found:
  """Returns what finished runs say of a cell."""
  if cell.kind == "vtab_mean":
    return _measure_vtab_mean(cell, runs)
  if cell.kind == "linear":
    return _measure_linear(cell, runs)
  group = _choose(_find_finetunings(cell, runs))
  values, paths = [], []
  for run in group:
    value = _read_accuracy(run, cell)
    if value is not None:
      values.append(100 * value)
      paths.append(str(run.path))
  differs = sorted({x for run in group for x in _differences(run, cell, runs)})
  return Found(tuple(values), tuple(paths), tuple(differs))


def _find_finetunings(cell, runs):
  """Returns the finished runs that a cell is about."""
  dataset = _training_set(cell)
  train, test = "train", "validation" if dataset == "imagenet2012" else "test"
  if cell.kind == "vtab":
    train, test = "train800val200", "test"
  return [
    run
    for run in runs
    if run.results
    and run.config["objective"] == "classification"
    and run.config["model.variant"] == cell.pretraining.variant
    and run.config["train.dataset"] == dataset
    and run.config["train.split"] == train
    and run.config["eval.split"] == test
    and run.config["image_size"] == cell.image_size
    and bool(run.config["ema_decay"]) == cell.averaged
    and comes_from(run, cell.pretraining, runs)
  ]


def _training_set(cell):
  return "imagenet2012" if cell.kind == "real" else cell.dataset


def _choose(runs):
  """Returns the runs of the setting with most of them.

  Never by their results, which are those of the test set.
  """
  groups = {}
  for run in runs:
    groups.setdefault(run.setting, []).append(run)
  return max(groups.values(), key=len, default=[])


def _read_accuracy(run, cell):
  """Returns a run's accuracy in a cell, None if nobody has measured it."""
  results = run.results
  if cell.kind == "real":
    results = run.read_json(f"{cell.dataset}.json")
  return results.get("accuracy", results.get("prec@1"))


def _differences(run, cell, runs):
  """Yields in what a run and its pre-training are not the paper's protocol."""
  spec, rates = _finetuning_spec(cell), _row_of_table_4(cell)["base_lrs"]
  yield from protocol.compare_finetuning(run, spec, rates)
  origin = find_origin(run, runs)
  if origin:
    for text in protocol.compare_pretraining(origin, cell.pretraining):
      yield f"pre-training: {text}"


def _row_of_table_4(cell):
  """Returns Table 4's row of a cell's fine-tuning; the last is VTAB's."""
  *rows, vtab = data.load()["table4"]["rows"]
  names = {x.get("dataset"): key for key, x in data.load()["measures"].items()}
  name = names.get(_training_set(cell))
  return next((row for row in rows if row["name"] == name), vtab)


def vtab_cells(cell: Cell) -> list[Cell]:
  """Returns the cells of the tasks that a mean is the mean of."""
  tasks = data.load()["vtab"]["tasks"].values()
  return [cell._replace(kind="vtab", dataset=f"vtab:{task}") for task in tasks]


def _measure_vtab_mean(cell, runs):
  """The mean over the tasks, of as many runs as each task has."""
  found = [measure(task, runs) for task in vtab_cells(cell)]
  count = min(len(task.values) for task in found)
  values = [
    statistics.fmean(task.values[i] for task in found) for i in range(count)
  ]
  differs = sorted({text for task in found for text in task.differs})
  paths = [path for task in found for path in task.runs if count]
  return Found(tuple(values), tuple(paths), tuple(differs))


def _measure_linear(cell, runs):
  """What `vit-jax linear` wrote into the folder of a pre-training."""
  for run in runs:
    if is_pretraining(run, cell.pretraining):
      found = run.read_json(_linear_file(cell))
      for row in found.get("results", ()):
        if row["shots"] == 5:
          values = tuple(100 * x for x in row["accuracies"])
          differs = _linear_differences(run, cell, found)
          return Found(values, (str(run.path),), tuple(differs))
  return Found()


def _linear_differences(run, cell, found):
  """Yields in what a few-shot evaluation is not the protocol."""
  size = cell.image_size
  expected = _FEWSHOT | {"image_size": [size, size], "l2": 1024}
  for key, value in expected.items():
    given = found.get(key, value)
    if key == "preprocess":
      given = given.replace(f"({size})", "(size)")
    if given != value:
      yield f"{key} {found[key]} (protocol: {value})"
  for text in protocol.compare_pretraining(run, cell.pretraining):
    yield f"pre-training: {text}"


def _linear_file(cell):
  return f"linear_{cell.dataset}.json"


# --- what it takes ---


def plan(cell: Cell, runs: list[Run], folder: str) -> Plan:
  """Returns what it takes to fill a cell; new runs go below `folder`."""
  source, parts = _find_weights(cell, runs, folder)
  if cell.kind == "linear":
    parts.append(_plan_linear(cell, source))
  elif cell.kind == "vtab":
    parts.append(_plan_vtab(cell, [cell], source, folder))
  elif cell.kind == "vtab_mean":
    tasks = vtab_cells(cell)
    missing = [t for t in tasks if len(measure(t, runs).values) < cell.seeds]
    parts.append(_plan_vtab(cell, missing, source, folder))
  else:
    group = _choose(_find_finetunings(cell, runs))
    paths = [str(run.path) for run in group]
    if len(group) < cell.seeds:
      sweep = _finetuning_folder(cell, folder)
      parts.append(_plan_sweep(cell, source, sweep))
      paths = [f"{sweep}/final/seed={seed}" for seed in range(cell.seeds)]
    if cell.kind == "real":
      parts += [_plan_real(cell, path) for path in paths]
  return Plan(
    tuple(command for part in parts for command in part.commands),
    sum(part.images for part in parts),
    tuple(dict.fromkeys(name for part in parts for name in part.datasets)),
  )


def prepare(datasets: Iterable[str]) -> list[str]:
  """Returns the commands that prepare data sets."""
  private = {known["dataset"] for known in _sets() if known["private"]}
  return [
    f"# {name} is private: see docs/questions.md"
    if name in private
    else _command("data", "prepare", name)
    for name in datasets
  ]


def _find_weights(cell, runs, folder):
  """Returns the source of a cell's weights, and [how to make it] if need be."""
  wanted = cell.pretraining
  for run in runs:
    if run.finished and is_pretraining(run, wanted):
      return str(run.path), []
  # `linear` writes beside the weights, so it wants a folder.
  if wanted.published() and cell.kind != "linear":
    return wanted.published(), []
  return _pretraining_folder(wanted, folder), [plan_pretraining(wanted, folder)]


def _pretraining_folder(wanted, folder):
  kinds = "".join(
    f"_{value}" for key, value in wanted.overrides if isinstance(value, str)
  )
  name = f"{wanted.variant}_{wanted.dataset}_{wanted.epochs}{kinds}"
  return f"{folder}/{name}"


def plan_pretraining(wanted: Pretraining, folder: str) -> Plan:
  """Returns what a pre-training takes."""
  command = _command(
    "train",
    f"--config=configs/{protocol.pretraining_spec(wanted)}",
    f"--workdir={_pretraining_folder(wanted, folder)}",
    *(f"--config.{key}={value}" for key, value in wanted.overrides),
  )
  images = wanted.epochs * _describe_set(wanted.dataset)["images"]
  return Plan((command,), images, (wanted.dataset,))


def pretraining_exaflops(wanted: Pretraining) -> float:
  """Returns the exaFLOPs of a pre-training, as Table 6 counts them."""
  known = _describe_set(wanted.dataset)
  products = flops.count_multiply_adds(
    wanted.variant, 224, known["classes"], hidden=True
  )
  return flops.count_exaflops(products, wanted.epochs * known["images"])


def _describe_set(dataset):
  return next(known for known in _sets() if known["dataset"] == dataset)


def _sets():
  return data.load()["pretraining"].values()


def _plan_sweep(cell, source, workdir):
  """Returns the selection of a learning rate, and the final runs with it."""
  row = _row_of_table_4(cell)
  rates = row["base_lrs"]
  config = f"configs/{_finetuning_spec(cell)}"
  command = _command(
    "sweep",
    f"--config={config},held_out",
    f"--final={config}",
    f"--workdir={workdir}",
    f"--config.init_from={source}",
    f"--grid=schedule.base_lr={','.join(map(str, rates))}",
    f"--seeds={cell.seeds}",
  )
  images = _count_images((len(rates) + cell.seeds) * row["steps"])
  return Plan((command,), images, (_training_set(cell),))


def _finetuning_folder(cell, folder):
  dataset = _training_set(cell)
  size = f"_{cell.image_size}" if cell.averaged else ""
  return f"{_pretraining_folder(cell.pretraining, folder)}-{dataset}{size}"


def _finetuning_spec(cell):
  spec = f"{cell.pretraining.variant},{_training_set(cell)}"
  if cell.kind == "vtab":
    return f"vtab.py:{spec}"
  if cell.averaged:
    spec += f",{cell.image_size}"
  return f"finetune.py:{spec}"


def _plan_real(cell, path):
  """Returns the evaluation of a fine-tuned run on other labels."""
  words = [f"--workdir={path}", f"--dataset={cell.dataset}"]
  command = _command("evaluate", *words, "--split=validation", "--json")
  output = shlex.quote(f"{path}/{cell.dataset}.json")
  return Plan((f"{command} > {output}",), 0, (cell.dataset,))


def _plan_vtab(cell, tasks, source, folder):
  """Returns one command for all tasks that are missing.

  For the mean it selects among settings, on 800 images of each task; for a
  single task it takes the setting that the paper selected.
  """
  is_mean = cell.kind == "vtab_mean"
  grid = _VTAB_GRID if is_mean else _VTAB_SELECTED
  # Settings may differ, so folders do.
  kind = "vtab" if is_mean else "vtab_selected"
  all_steps = next(values for key, values in grid if key == "total_steps")
  rates = math.prod(len(v) for key, v in grid if key != "total_steps")
  command = _command(
    "vtab",
    f"--init_from={source}",
    f"--workdir={_pretraining_folder(cell.pretraining, folder)}-{kind}",
    f"--tasks={','.join(task.dataset for task in tasks)}",
    *(f"--grid={key}={','.join(map(str, v))}" for key, v in grid),
    f"--seeds={cell.seeds}",
  )
  # The last schedule is the paper's, and taken to be the one selected.
  steps = rates * sum(all_steps) + cell.seeds * all_steps[-1]
  images = len(tasks) * _count_images(steps)
  return Plan((command,), images, tuple(task.dataset for task in tasks))


def _plan_linear(cell, source):
  """Returns the few-shot evaluation: features, and a small linear system."""
  command = _command(
    "linear",
    f"--checkpoint={source}",
    f"--dataset={cell.dataset}",
    *(f"--{key}={value}" for key, value in _FEWSHOT.items()),
    "--shots=5",
    f"--image_size={cell.image_size}",
    "--json",
  )
  output = shlex.quote(f"{source}/{_linear_file(cell)}")
  return Plan((f"{command} > {output}",), 0, (cell.dataset,))


def _count_images(steps):
  return steps * data.load()["table4"]["common"]["batch_size"]


def _command(*words):
  return shlex.join(["vit-jax", *words])
