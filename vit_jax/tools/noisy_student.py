"""The `noisy-student` command: a self-training loop (arXiv 1911.04252).

A teacher is trained on labelled images. Each student is trained on these and on
images that the previous network has labelled, with noise (augmentation,
dropout, stochastic depth). It then labels images for the next student. An
optional last stage fine-tunes the last student on the labelled images.

  WORKDIR/STAGE                 runs: teacher, student1, student2, ..., finetune
  WORKDIR/labels_STAGE          the pseudo-labels for training a student
  WORKDIR/noisy_student.json    the results
"""

import contextlib
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from vit_jax import checkpoint, data, files
from vit_jax import config as configuration
from vit_jax.data.sizes import as_pair
from vit_jax.errors import UserError
from vit_jax.tools import runs
from vit_jax.tools.pseudo_label import check_options, on_first, pseudo_label
from vit_jax.tools.text import format_columns
from vit_jax.train import train
from vit_jax.training import early, lock, run_folder
from vit_jax.training.stop import Stopping, StopSignal

log = logging.getLogger(__name__)

REPORT = "noisy_student.json"
FINETUNE = "finetune"
# Keys of get_config("loop"): the stages, the ratio of pseudo-labelled to
# labelled images in a student's batches (a number, or one for each student),
# and arguments of `pseudo_label`.
_LABELLING = (
  *("dataset", "split", "soft", "min_confidence", "per_class", "balance"),
)
_LOOP = {"stages", "ratio", *_LABELLING}


class Stage(NamedTuple):
  """One training of the loop.

  Attributes:
    name: "teacher", "student1", ..., or "finetune".
    config: of the run, with its data sets.
    workdir: the run folder.
    teacher: the run folder of the previous stage.
    labels: the folder of a student's pseudo-labels, None for other stages.
  """

  name: str
  config: Any
  workdir: Any
  teacher: Any
  labels: Any


# --- stages ---


def load(spec: str, overrides: dict[str, str]) -> tuple[Any, dict[str, Any]]:
  """Returns the configuration of the loop, and {stage: its configuration}.

  Args:
    spec: "CONFIG" or "CONFIG:ARG" of a file whose get_config takes "[ARG,]loop"
      and "[ARG,]STAGE".
    overrides: {key: text}; the loop's keys apply to the loop, all others to
      every stage.

  Raises:
    UserError: as `config.load`; the loop lacks a key, or has invalid stages.
  """

  def load_one(stage, given):
    between = "," if ":" in spec else ":"
    return configuration.load(f"{spec}{between}{stage}", given)

  loop = load_one("loop", {})
  if missing := sorted(_LOOP - {*loop}):
    raise UserError(
      f"{spec} is not a configuration of noisy-student, because its "
      f"get_config('loop') has no {', '.join(missing)}; see "
      "configs/quickstart_noisy_student.py"
    )
  for key in overrides.keys() & _LOOP:
    configuration.override(loop, key, overrides[key])
  rest = {k: x for k, x in overrides.items() if k not in _LOOP}
  return loop, {stage: load_one(stage, rest) for stage in _list_stages(loop)}


def _list_stages(loop):
  """Returns the stages of a loop: a teacher, students, maybe a fine-tuning."""
  stages = tuple(loop.stages)
  students = tuple(s for s in stages if s not in ("teacher", FINETUNE))
  known = tuple(f"student{i + 1}" for i in range(len(students)))
  full = ("teacher", *known, FINETUNE)
  if not students or stages not in (full, full[:-1]):
    raise UserError(
      f"stages are {', '.join(map(str, stages)) or 'none'}; they must be "
      f"teacher, student1, student2 and so on, and optionally {FINETUNE}"
    )
  return stages


def _list_ratios(loop):
  """Returns the ratio of each student."""
  count = sum(stage.startswith("student") for stage in loop.stages)
  given = loop.ratio
  ratios = given if isinstance(given, tuple | list) else (given,) * count
  if len(ratios) != count:
    raise UserError(
      f"ratio is {given} and there are {count} students; give one number, or "
      "one per student"
    )
  return ratios


def plan(loop, configs: dict[str, Any], folder) -> list[Stage]:
  """Returns the stages, after the checks that are possible before a run.

  Args:
    loop: the result of get_config("loop").
    configs: {stage: its configuration}, with the labelled images alone.
    folder: the absolute path of the loop.

  Raises:
    UserError: an invalid configuration, or data set names that a mixture cannot
      have.
  """
  check_options(loop.min_confidence, loop.per_class)
  stages, teacher = [], None
  ratios = iter(_list_ratios(loop))
  for name in _list_stages(loop):
    workdir, labels = folder / name, None
    config = configs[name].copy_and_resolve_references().unlock()
    if name == FINETUNE:
      config.init_from = str(teacher)
    elif name != "teacher":
      labels = folder / f"labels_{name}"
      config.train.dataset = _mix(config.train.dataset, labels, next(ratios))
    stages.append(Stage(name, config.lock(), workdir, teacher, labels))
    early.check(config)
    if not run_folder.check(config, workdir):
      configuration.check_unused(config)
    teacher = workdir
  return stages


def _mix(labelled, labels, ratio) -> str:
  """Returns a student's mixture; raises a UserError if it would not parse."""
  pseudo = f"{data.PSEUDO}{labels}"
  text = f"{labelled}=1,{pseudo}={ratio}"
  try:
    found = data.parse_mixture(text)
  except UserError:
    found = None
  if found != [(labelled, 1.0), (pseudo, ratio)]:
    raise UserError(
      f"{text!r} is not a valid mixture for a student; it needs one data set "
      "of labelled images, no comma in its name or in --workdir, and a ratio "
      "above 0"
    )
  return text


# --- running ---


def noisy_student(
  loop, configs: dict[str, Any], workdir: str
) -> dict[str, Any] | None:
  """Runs or resumes the loop, and writes `workdir`/REPORT.

  Args:
    loop, configs: see `load`.
    workdir: the folder of all runs; a local path or a gs:// address.

  Returns:
    {"stages": a list of {"stage", "workdir", "model", "image_size", "labelled":
    number of images, "pseudo": the report of `pseudo_label` or None,
    "results": of `train`}}; None after a stop signal.

  Raises:
    UserError: see `plan`, `train` and `pseudo_label`.
    RunStopped: a stage failed.
  """
  folder = checkpoint.absolute(workdir)
  stages = plan(loop, configs, folder)
  # To fail early, because these images are used only after the teacher's run.
  data.get_source(loop.dataset, loop.split, stages[0].config.data_dir)
  with contextlib.ExitStack() as stack:
    on_first(lambda: stack.enter_context(lock.hold(folder)) and None)
    rows = _run(loop, stages)
    if rows is None:
      return None
    result = {"stages": rows}
    if not jax.process_index():
      files.write_json(folder / REPORT, result)
    return result


def _run(loop, stages) -> list[dict[str, Any]] | None:
  """Returns the report's entry of each stage, None after a stop signal."""
  rows = []
  with StopSignal() as stop:  # between the trainings
    for stage in stages:
      pseudo = None
      try:
        stop.check()
        if stage.labels:
          log.info("%s: pseudo-labels by %s", stage.name, stage.teacher.name)
          pseudo = pseudo_label(
            str(stage.teacher),
            out=str(stage.labels),
            data_dir=stage.config.data_dir,
            before_batch=stop.check,
            **{key: loop[key] for key in _LABELLING},
          )
          stop.check()
      except Stopping:
        return None
      log.info("%s: training", stage.name)
      results = train(stage.config, stage.workdir)
      if results is None:
        return None
      rows.append(_describe(stage, pseudo, results))
  return rows


def _describe(stage, pseudo, results):
  """Returns the report's entry of a complete stage."""
  labelled = files.read_run(stage.workdir)["data"]["train"][0]
  return {
    "stage": stage.name,
    "workdir": str(stage.workdir),
    "model": stage.config.model.variant,
    "image_size": list(as_pair(stage.config.image_size)),
    "labelled": labelled["examples"],
    "pseudo": pseudo,
    "results": results,
  }


def format_table(result: dict[str, Any]) -> str:
  """Returns the result as a table, one row per stage.

  Kept images count once as pseudo-labels. "right" is the fraction of them whose
  pseudo-label agrees with the data set's label, if it has one.
  """
  rows = result["stages"]
  names = [n for n in rows[0]["results"] if n.split("/")[-1] not in runs.COUNTS]
  header = ("stage", "model", "size", "labelled", "pseudo-labels", "right")
  lines: list[Sequence[str]] = [(*header, *names, "test images")]
  for row in rows:
    height, width = row["image_size"]
    pseudo, right, results = row["pseudo"], None, row["results"]
    if pseudo:
      right = pseudo["agreement"]
      pseudo = f"{pseudo['distinct']:,} of {pseudo['examples']:,}"
    lines.append(
      (
        row["stage"],
        row["model"],
        str(height) if height == width else f"{height}x{width}",
        f"{row['labelled']:,}",
        pseudo or "-",
        "-" if right is None else f"{right:.1%}",
        *(f"{results[n]:.4f}" if n in results else "-" for n in names),
        f"{results.get('examples', 0):,}",
      )
    )
  return "\n".join(format_columns(lines, "<<>"))
