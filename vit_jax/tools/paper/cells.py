"""Cells of a results table: results of their runs, and plans to fill them.

A cell is one model with one pre-training and one evaluation.
"""

import shlex
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from vit_jax.tools.paper import data, flops, protocol
from vit_jax.tools.paper.protocol import Pretraining
from vit_jax.tools.runs import Run, find_origin

# Few-shot evaluation as in the paper's code (big_vision): images are squeezed
# to 256 px and the central 224 cropped. Shots are drawn from a part of ImageNet
# because the rest would take hours and change nothing.
_FEWSHOT = {
  "train_split": "train[:65000]",
  "test_split": "validation",
  "preprocess": "resize(256)|central_crop(size)",
}

# Learning rates and steps: the grid of `vit-jax vtab`, and the values that the
# paper selected.
_VTAB_GRID = ((0.003, 0.01), (500, 2500))
_VTAB_SELECTED = ((0.01,), (2500,))


class Cell(NamedTuple):
  """One result to compute.

  Its kind is "finetune", "real" (a fine-tuned model on other labels), "vtab",
  "vtab_mean" (of all its tasks) or "linear" (5-shot).
  """

  kind: str
  pretraining: Pretraining
  dataset: str = ""  # our name of the test set; "" for a mean
  image_size: int = 384
  averaged: bool = False  # Polyak averaging
  seeds: int = 1  # number of runs in the paper's mean

  @property
  def training_set(self) -> str:
    """Our name of the fine-tuning set."""
    return "imagenet2012" if self.kind == "real" else self.dataset

  @property
  def spec(self) -> str:
    """The fine-tuning's file in configs/ and its argument."""
    file = "vtab" if self.kind == "vtab" else "finetune"
    size = f",{self.image_size}" if self.averaged else ""
    return f"{file}.py:{self.pretraining.variant},{self.training_set}{size}"


class Found(NamedTuple):
  """The results of a cell's runs."""

  values: list[float]  # percent, of each run
  runs: list[str]  # their folders
  differs: list[str]  # differences from the paper's protocol


class Plan(NamedTuple):
  """Commands that fill a cell, and their cost."""

  commands: list[str]
  images: int  # number of training images, with repetitions
  datasets: list[str]  # read by the commands


# --- results of runs ---


def measure(cell: Cell, runs: list[Run]) -> Found:
  """Returns the results of a cell's finished runs."""
  if cell.kind == "vtab_mean":
    tasks = [measure(task, runs) for task in _list_tasks(cell)]
    # Of the seeds that every task has.
    rows = zip(*(task.values for task in tasks), strict=False)
    values = [statistics.fmean(row) for row in rows]
    paths = [path for task in tasks for path in task.runs if values]
    return Found(values, paths, sorted({x for t in tasks for x in t.differs}))
  if cell.kind == "linear":
    return _measure_linear(cell, runs)
  measured, differs = {}, set()
  for run in _find_finetunings(cell, runs):
    results = run.results
    if cell.kind == "real":
      results = run.read_json(f"{cell.dataset}.json")
    accuracy = results.get("accuracy", results.get("prec@1"))
    if accuracy is not None:
      measured[str(run.path)] = 100 * accuracy
    rates = _row_of_table_4(cell)["base_lrs"]
    differs.update(protocol.compare_finetuning(run, cell.spec, rates))
    if origin := find_origin(run, runs):
      differs.update(_compare_pretraining(origin, cell))
  return Found([*measured.values()], [*measured], sorted(differs))


def _find_finetunings(cell, runs):
  """Returns the finished runs of a cell.

  Among several settings it chooses the one with most runs, never by results,
  because these are from the test set.
  """
  name = cell.training_set
  train, test = "train", "validation" if name == "imagenet2012" else "test"
  wanted = {
    "objective": "classification",
    "model.variant": cell.pretraining.variant,
    "train.dataset": name,
    "train.split": "train800val200" if cell.kind == "vtab" else train,
    "eval.split": test,
    "image_size": cell.image_size,
  }
  groups = {}
  for run in runs:
    if (
      run.results
      and wanted.items() <= run.config.items()
      and bool(run.config["ema_decay"]) == cell.averaged
      and protocol.comes_from(run, cell.pretraining, runs)
    ):
      groups.setdefault(run.setting, []).append(run)
  return max(groups.values(), key=len, default=[])


def _compare_pretraining(run, cell):
  differs = protocol.compare_pretraining(run, cell.pretraining)
  return [f"pre-training: {text}" for text in differs]


def _row_of_table_4(cell):
  """Returns Table 4's row of a cell's fine-tuning; the last is VTAB's."""
  *rows, vtab = data.load()["table4"]["rows"]
  names = {x.get("dataset"): key for key, x in data.load()["measures"].items()}
  name = names.get(cell.training_set)
  return next((row for row in rows if row["name"] == name), vtab)


def _list_tasks(cell):
  """Returns the cells of the tasks of a mean."""
  tasks = data.load()["vtab"]["tasks"].values()
  return [cell._replace(kind="vtab", dataset=f"vtab:{task}") for task in tasks]


def _measure_linear(cell, runs):
  """Returns what `vit-jax linear` wrote to the folder of a pre-training."""
  size = cell.image_size
  expected = _FEWSHOT | {"image_size": [size, size], "l2": 1024}
  for run in runs:
    if protocol.is_pretraining(run, cell.pretraining):
      found = run.read_json(f"linear_{cell.dataset}.json")
      differs = [
        f"{key} {found[key]} (protocol: {right})"
        for key, right in expected.items()
        if key in found
        and found[key] not in (right, str(right).replace("(size)", f"({size})"))
      ]
      for row in found.get("results", ()):
        if row["shots"] == 5:
          values = [100 * x for x in row["accuracies"]]
          differs += _compare_pretraining(run, cell)
          return Found(values, [str(run.path)], differs)
  return Found([], [], [])


# --- plans ---


def plan(cell: Cell, runs: list[Run], folder: str) -> Plan:
  """Returns the plan to fill a cell; new runs go below `folder`."""
  source, parts = _find_weights(cell, runs, folder)
  if cell.kind == "linear":
    parts.append(_plan_linear(cell, source))
  elif cell.kind.startswith("vtab"):
    parts.append(_plan_vtab(cell, runs, source, folder))
  else:
    paths = [str(run.path) for run in _find_finetunings(cell, runs)]
    if len(paths) < cell.seeds:
      size = f"_{cell.image_size}" if cell.averaged else ""
      sweep = _name_folder(cell.pretraining, folder)
      sweep += f"-{cell.training_set}{size}"
      parts.append(_plan_sweep(cell, source, sweep))
      paths = [f"{sweep}/final/seed={seed}" for seed in range(cell.seeds)]
    if cell.kind == "real":
      commands = [evaluate_run(path, cell.dataset) for path in paths]
      parts.append(Plan(commands, 0, [cell.dataset]))
  return Plan(
    [command for part in parts for command in part.commands],
    sum(part.images for part in parts),
    [*dict.fromkeys(name for part in parts for name in part.datasets)],
  )


def prepare(datasets: Iterable[str]) -> list[str]:
  """Returns the commands that prepare data sets."""
  return [
    f"# {name} is private: see docs/questions.md"
    if data.find_set(name).get("private")
    else make_command("data", "prepare", name)
    for name in datasets
  ]


def _find_weights(cell, runs, folder):
  """Returns the source of a cell's weights, and [its plan] if it is missing."""
  wanted = cell.pretraining
  for run in runs:
    if run.finished and protocol.is_pretraining(run, wanted):
      return str(run.path), []
  # `linear` writes beside the weights, so it needs a folder.
  if wanted.published and cell.kind != "linear":
    return wanted.published, []
  return _name_folder(wanted, folder), [plan_pretraining(wanted, folder)]


def _name_folder(wanted, folder):
  kinds = "".join(f"_{x}" for _, x in wanted.overrides if isinstance(x, str))
  return f"{folder}/{wanted.variant}_{wanted.dataset}_{wanted.epochs}{kinds}"


def plan_pretraining(wanted: Pretraining, folder: str) -> Plan:
  """Returns the plan of a pre-training."""
  command = make_command(
    "train",
    f"--config=configs/{wanted.spec}",
    f"--workdir={_name_folder(wanted, folder)}",
    *(f"--config.{key}={value}" for key, value in wanted.overrides),
  )
  images = wanted.epochs * data.find_set(wanted.dataset)["images"]
  return Plan([command], images, [wanted.dataset])


def count_exaflops(wanted: Pretraining) -> float:
  """Returns the exaFLOPs of a pre-training, as in Table 6."""
  known = data.find_set(wanted.dataset)
  products = flops.count_multiply_adds(
    wanted.variant, 224, known["classes"], hidden=True
  )
  return flops.count_exaflops(products, wanted.epochs * known["images"])


def _plan_sweep(cell, source, workdir):
  """Returns the plan of selecting a learning rate and of the final runs."""
  row = _row_of_table_4(cell)
  command = make_command(
    "sweep",
    f"--config=configs/{cell.spec},held_out",
    f"--final=configs/{cell.spec}",
    f"--workdir={workdir}",
    f"--config.init_from={source}",
    _grid("schedule.base_lr", row["base_lrs"]),
    f"--seeds={cell.seeds}",
  )
  images = _count_images((len(row["base_lrs"]) + cell.seeds) * row["steps"])
  return Plan([command], images, [cell.training_set])


def evaluate_run(path: str, dataset: str) -> str:
  """Returns the command that evaluates a fine-tuned run on other labels."""
  words = [f"--workdir={path}", f"--dataset={dataset}"]
  command = make_command("evaluate", *words, "--split=validation", "--json")
  output = shlex.quote(f"{path}/{dataset}.json")
  return f"{command} > {output}"


def _plan_vtab(cell, runs, source, folder):
  """Returns the plan of one command for all missing tasks.

  For the mean, it selects a setting on 800 images of each task. For a single
  task, it takes the setting that the paper selected.
  """
  kind, (rates, steps), tasks = "vtab_selected", _VTAB_SELECTED, [cell]
  if cell.kind == "vtab_mean":  # a folder of its own, as settings may differ
    kind, (rates, steps), tasks = "vtab", _VTAB_GRID, _list_tasks(cell)
    tasks = [t for t in tasks if len(measure(t, runs).values) < cell.seeds]
  names = [task.dataset for task in tasks]
  command = make_command(
    "vtab",
    f"--init_from={source}",
    f"--workdir={_name_folder(cell.pretraining, folder)}-{kind}",
    f"--tasks={','.join(names)}",
    _grid("schedule.base_lr", rates),
    _grid("total_steps", steps),
    f"--seeds={cell.seeds}",
  )
  # The last schedule is the paper's; it is assumed to be selected.
  steps = len(rates) * sum(steps) + cell.seeds * steps[-1]
  return Plan([command], len(names) * _count_images(steps), names)


def _plan_linear(cell, source):
  """Returns the plan of the few-shot linear evaluation."""
  command = make_command(
    "linear",
    f"--checkpoint={source}",
    f"--dataset={cell.dataset}",
    *(f"--{key}={value}" for key, value in _FEWSHOT.items()),
    "--shots=5",
    f"--image_size={cell.image_size}",
    "--json",
  )
  output = shlex.quote(f"{source}/linear_{cell.dataset}.json")
  return Plan([f"{command} > {output}"], 0, [cell.dataset])


def _count_images(steps):
  return steps * data.load()["table4"]["common"]["batch_size"]


def _grid(key, values):
  return f"--grid={key}={','.join(map(str, values))}"


def make_command(*words: str) -> str:
  """Returns a command line, quoted for a shell."""
  return shlex.join(["vit-jax", *words])
