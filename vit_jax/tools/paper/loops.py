"""Table rows of models that `vit-jax noisy-student` trains.

Their cells are the results of the loop's last run: the fine-tuning, or without
one the last student.
"""

import re

from vit_jax.tools.paper import cells, protocol
from vit_jax.tools.paper.cells import Found, Plan
from vit_jax.tools.runs import Run, find_origin

_FILE = "noisy_student.py"  # in configs/
_LABELLED = "imagenet2012"


def measure(model: str, dataset: str, runs: list[Run]) -> Found:
  """Returns the results of finished runs for a loop's last model.

  Args:
    model: its name in configs/noisy_student.py.
    dataset: the test set: the labelled set, or its images with other labels.
    runs: all runs.
  """
  measured, differs = {}, set()
  for run in _find_last(_load_loop(model)["variant"], runs):
    results = run.results
    if dataset != _LABELLED:
      results = run.read_json(f"{dataset}.json")
    accuracy = results.get("accuracy", results.get("prec@1"))
    if accuracy is not None:
      measured[str(run.path)] = 100 * accuracy
    differs.update(_compare(run, model, runs))
  return Found([*measured.values()], [*measured], sorted(differs))


def plan(model: str, dataset: str, runs: list[Run], folder: str) -> Plan:
  """Returns the plan to fill a cell; new runs go below `folder`."""
  loop = _load_loop(model)
  paths = [str(run.path) for run in _find_last(loop["variant"], runs)]
  commands, images, datasets = [], 0, []
  if not paths:
    workdir = f"{folder}/noisy_student_{model}"
    paths = [f"{workdir}/{loop['stages'][-1]}"]
    config = f"--config=configs/{_FILE}:{model}"
    words = ("noisy-student", config, f"--workdir={workdir}")
    commands, datasets = (
      [cells.make_command(*words)],
      [_LABELLED, loop["dataset"]],
    )
    images = loop["images"]
  if dataset != _LABELLED:
    commands += [cells.evaluate_run(path, dataset) for path in paths]
    datasets.append(dataset)
  return Plan(commands, images, datasets)


def _load_loop(model):
  """Returns the loop's keys, its last model and the images trained on."""
  spec = f"{_FILE}:{model}"
  loop = dict(protocol.load(f"{spec},loop"))
  stages = [protocol.load(f"{spec},{stage}") for stage in loop["stages"]]
  images = sum(stage["total_steps"] * stage["batch_size"] for stage in stages)
  return {**loop, "variant": stages[-1]["model.variant"], "images": images}


def _find_last(variant, runs):
  """Returns the finished runs that are a loop's last training.

  Among several settings of a stage, it chooses the one with most runs.
  """
  groups = {}
  for run in runs:
    stage = _find_stage(run, runs)
    if (
      all(stage)
      and run.results
      and run.config["model.variant"] == variant
      and run.config["eval.split"] == "validation"
    ):
      groups.setdefault(stage, {}).setdefault(run.setting, []).append(run)
  if not groups:
    return []
  return max(groups[max(groups)].values(), key=len)


def _find_stage(run, runs):
  """Returns (student number, 1, or 2 if fine-tuned), 0s for other runs."""
  if number := _count_students(run):
    return number, 1
  origin = find_origin(run, runs)
  plain = protocol.plain_name(run.config["train.dataset"]) == _LABELLED
  if plain and origin and run.config["train.split"] == "train":
    return _count_students(origin), 2
  return 0, 0


def _count_students(run) -> int:
  """Returns the number of a student, 0 for other runs.

  It is part of the pseudo-labelled set's name.
  """
  name = rf"{_LABELLED}=.*,pseudo:.*labels_student(\d+)"
  found = re.match(name, run.config["train.dataset"])
  is_classifier = run.config["objective"] == "classification"
  return int(found[1]) if found and is_classifier else 0


def _compare(run, model, runs):
  """Returns a loop's differences, see `protocol.compare_pretraining`."""
  *_, last = stages = _load_loop(model)["stages"]
  student = max(stage for stage in stages if stage.startswith("student"))
  number, stage = _find_stage(run, runs)
  differs = []
  if stage == 2:
    differs += protocol.compare(run, f"{_FILE}:{model},{last}")
    run = find_origin(run, runs)
    assert run is not None
  elif last != student:
    differs.append(f"no {last}")
  other = protocol.compare(run, f"{_FILE}:{model},{student}")
  differs += [f"{student}: {text}" for text in other]
  if f"student{number}" != student:
    differs.append(f"student{number} is the last (protocol: {student})")
  return differs
