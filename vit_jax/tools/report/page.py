"""Tables and charts for `page.html`."""

import collections
import datetime
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import jinja2

import vit_jax
from vit_jax import config as configuration
from vit_jax.errors import UserError
from vit_jax.tools import charts
from vit_jax.tools.paper import flops
from vit_jax.tools.report.details import Details
from vit_jax.tools.runs import COUNTS, Run

# Metrics that are shown as percentages.
_SHARES = ("accuracy", "accuracy@5", "prec@1", "lrap", "trivial_accuracy")
# With more runs than this, they are the rows of a table, not its columns.
_BESIDE = 3
# With more classes than this, the worst come first and there is no matrix.
_FEW_CLASSES = 20


def make_page(runs: Sequence[Run], found: dict[str, Details | str]) -> str:
  """Returns the page as HTML.

  Args:
    runs: at least one; only the first ones have colours.
    found: {name of an evaluated run: the result, or why there is none}.
  """
  environment = jinja2.Environment(
    autoescape=True,
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    lstrip_blocks=True,
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters["percent"] = percent
  coloured = runs[: len(charts.DASHES)]
  tested = [run for run in runs if run.name in found]
  return environment.get_template("page.html").render(
    charts=_draw_charts(runs),
    configurations=[
      (run.name, [(key, _show(run, key)) for key in sorted(run.config)])
      for run in coloured
    ],
    dashes=charts.DASHES,
    date=f"{datetime.date.today():%Y-%m-%d}",
    differences=_compare(runs),
    facts=_tabulate("Training", runs, _describe),
    few=_FEW_CLASSES,
    left_out=len(runs) - len(found),
    runs=runs,
    tests=[
      {"run": run} | _describe_test(run, found[run.name]) for run in tested
    ],
    title=f"Report: {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}",
    version=vit_jax.__version__,
  )


def _tabulate(caption, runs, describe):
  """Returns (caption, head, rows) of a table; a few runs are its columns."""
  made = [{"Run": run.name} | describe(run) for run in runs]
  rows = [[*made[0]], *([*facts.values()] for facts in made)]
  if len(runs) <= _BESIDE:
    rows = [*zip(*rows, strict=True)]
  return caption, rows[0], rows[1:]


def percent(x: float) -> str:
  """Returns a fraction as a percentage with two decimals."""
  return f"{x:.2%}".replace("%", "\u00a0%")


def _show_metric(name, x):
  """Returns a metric's value as text: a percentage, or with four digits."""
  if name.rpartition("/")[2] in _SHARES:
    return percent(x)
  return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


# --- runs ---


def _describe(run):
  config = run.config
  size = config["image_size"]
  size = " x ".join(map(str, size)) if isinstance(size, list) else size
  tests = [
    f"{key.split('.')[1]}: {value}"
    for key, value in sorted(config.items())
    if key.startswith("evals.") and key.endswith(".dataset") and value
  ]
  if split := config["eval.split"]:
    tests.insert(0, f"{configuration.find_test_set(config)}, {split}")
  images, seconds = run.step * config["batch_size"], measure_time(run)
  speed = time = "unknown"
  if seconds:
    speed = _show_metric("speed", images / seconds)
    time = str(datetime.timedelta(seconds=round(seconds)))
  try:
    cost = f"{flops.count_training(run.written, run.step):.3g}"
  except UserError as e:
    cost = str(e)
  source = config["init_from"]
  return {
    "State": f"{run.step:,} of {run.total_steps:,} steps",
    "Result": _describe_result(run),
    "Model": f"{config['model.variant']}, {size} pixels, {_find_task(run)}",
    "Trained on": f"{config['train.dataset']}, {config['train.split']}",
    "Tested on": "; ".join(tests) or "nothing",
    "Weights": f"from {source}" if source else "random",
    "Folder": str(run.path).removeprefix(f"{Path.cwd()}/"),
    "Images seen": f"{images:,}",
    "Images/s, mean": speed,
    "Training time": time,
    "ExaFLOPs": cost,
  }


def _find_task(run):
  if run.config["objective"] != "classification":
    target = run.config.get("masked_target", "")
    return f"masked patches {target}".replace("_", " ").strip()
  return f"classification with {run.config['loss.name']} loss"


def _describe_result(run):
  """Returns the last evaluations as text."""
  told = collections.defaultdict(list)
  for name, [*_, (step, x)] in run.series.items():
    evaluation, _, metric = name.partition("/")
    if evaluation not in ("train", "speed") and metric not in COUNTS:
      text = f"{name.removeprefix('eval/')} {_show_metric(name, x)}"
      told[f"at step {step:,}"].append(text)
  for texts in told.values():  # the main metrics come first
    texts.sort(key=lambda text: text.startswith(("loss", "trivial")))
  lines = [f"{', '.join(texts)} {step}" for step, texts in told.items()]
  return "; ".join(lines) or "not evaluated yet"


def measure_time(run: Run) -> float:
  """Returns the seconds of all training steps in metrics.jsonl, 0 if unknown.

  The time of a log interval is its images divided by their speed. Evaluations
  and saves are not included, because speed is measured from their end.
  """
  seconds, before = 0.0, 0
  for step, speed in run.series.get("speed/images_per_second", ()):
    seconds += (step - before) * run.config["batch_size"] / max(speed, 1e-9)
    before = step
  return seconds


# --- curves and configurations ---


def _draw_charts(runs):
  """Returns {task: [(title, SVG, its numbers)]}.

  Losses of different tasks are not comparable.
  """
  tasks = collections.defaultdict(list)
  for i, run in enumerate(runs):
    tasks[_find_task(run)].append((i, run))
  numbers = itertools.count(1)
  return {
    task: [
      _draw_chart(name, members, next(numbers))
      for name in charts.list_metrics([run for _, run in members])
    ]
    for task, members in tasks.items()
  }


def _draw_chart(name, members, number):
  numbers = []
  for i, run in members:
    if name in run.series and i < len(charts.DASHES):
      ys = [y for _, y in run.series[name]]
      shown = (_show_metric(name, y) for y in (ys[-1], min(ys), max(ys)))
      numbers.append((i, run.name, *shown))
  described = "; ".join(
    f"{run}: last {last}, lowest {low}, highest {high}"
    for _, run, last, low, high in numbers
  )
  svg = charts.draw_svg(name, members, described, number)
  return charts.TITLES.get(name, name), svg, numbers


def _compare(runs):
  """Returns the table of the keys whose values differ, or None."""
  keys = sorted({key for run in runs for key in run.config})
  keys = [key for key in keys if len({_show(run, key) for run in runs}) > 1]
  caption = "Keys that have different values"
  return keys and _tabulate(
    caption, runs, lambda run: {key: _show(run, key) for key in keys}
  )


def _show(run, key):
  value = run.config.get(key, "(not there)")
  return value if isinstance(value, str) and value else json.dumps(value)


# --- test sets ---


def _describe_test(run, found):
  """Returns the page's values for a run's test set."""
  if isinstance(found, str):
    return {"why_not": found}
  multilabel, names = found.source.multilabel, found.source.class_names
  tally = found.tally
  rows = _count_classes(tally.pairs, names, multilabel)
  if len(rows) > _FEW_CLASSES:
    # Among equally bad classes, those with more images come first.
    rows.sort(key=lambda row: (row[1] / row[2], -row[2]))
  mixed = [
    (names[label], names[given], n)
    for (label, given), n in tally.pairs.most_common()
    if label != given and not multilabel
  ]
  metric = "prec@1" if multilabel else "accuracy"
  step = int(found.checkpoint.split("/")[-1])
  return {
    "why_not": None,
    "details": found,
    "rows": rows,
    "matrix": len(names) <= _FEW_CLASSES and not multilabel,
    "mixed": mixed[:_FEW_CLASSES],
    "metric": metric,
    "share": tally.correct / max(tally.labelled, 1),
    "measured": dict(run.series.get(f"eval/{metric}", ())).get(step),
  }


def _count_classes(pairs, names, multilabel):
  """Returns [(name, correct, images, most frequent confusion)] by class.

  In a multi-label test set this is by predicted class, without confusions.
  """
  images, worst = collections.Counter(), {}
  for (label, given), n in sorted(pairs.items(), key=lambda item: item[1]):
    images[given if multilabel else label] += n
    if label != given:
      worst[label] = f"{names[given]} ({n:,})"
  return [
    (name, pairs[label, label], images[label], worst.get(label, "\u2013"))
    for label, name in enumerate(names)
    if images[label]
  ]
