"""The page: what it says, in reading order."""

import collections
import datetime
import json
import math
from collections.abc import Sequence
from pathlib import Path

import vit_jax
from vit_jax import config as configuration
from vit_jax.errors import UserError
from vit_jax.tools.paper import flops
from vit_jax.tools.report import charts, results
from vit_jax.tools.report.details import Details
from vit_jax.tools.report.speed import SPEED, measure_speed
from vit_jax.tools.report.tags import (
  Raw,
  escape,
  fold,
  join,
  percent,
  table,
  tag,
  transpose,
)
from vit_jax.tools.runs import COUNTS, Run

# Metric -> its title; in this order.
_TITLES = {
  "train/loss": "Training loss",
  "eval/accuracy": "Accuracy on the test set",
  "eval/accuracy@5": "Top-5 accuracy on the test set",
  "eval/prec@1": "Precision at 1 on the test set",
  "eval/lrap": "Label ranking average precision on the test set",
  "eval/r2": "Explained variance on the test set",
  "eval/loss": "Loss on the test set",
  "train/learning_rate": "Learning rate",
  "train/gradient_norm": "Gradient norm",
  SPEED: "Images per second",
}
# What is no curve, beside counts: constants, and what another one shows.
_NO_CURVE = (
  "eval/trivial_loss",
  "eval/trivial_accuracy",
  "speed/images_per_second_per_device",
)
# Shares, which are shown as percent.
_SHARES = ("accuracy", "accuracy@5", "prec@1", "lrap", "trivial_accuracy")
# Longest runs of a chart that share an axis of steps, as a ratio.
_SIMILAR = 3
# With more runs than these they are rows, one below the other.
_BESIDE = 3
# What comes from nowhere else: a page cannot fetch, nor run, anything.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


_HEAD = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
"""


def make_page(runs: Sequence[Run], looks: dict[str, Details | str]) -> str:
  """Returns the page as HTML.

  Args:
    runs: to tell of, at least one; the first `charts.COLOURS` have colours.
    looks: by the names of the runs that were looked at: what was found, or why
      nothing was.
  """
  sections = [
    ("runs", "Runs", _tell_runs(runs)),
    ("curves", "Curves", _draw_curves(runs)),
    ("cost", "Speed and cost", _tell_cost(runs)),
    ("configurations", "Configurations", _compare(runs)),
    *(
      (f"run{i}", f"Test set: {run.name}", results.tell(run, looks[run.name]))
      for i, run in enumerate(runs)
      if run.name in looks
    ),
  ]
  title = f"Report: {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}"
  main = [_make_section(*section) for section in sections]
  left_out = len(runs) - len(looks)
  if left_out:
    note = (
      f"The test sets of {left_out} more runs were not looked at: give their "
      "folders to see their mistakes."
    )
    main.append(tag("p", note))
  style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
  body = [
    tag("a", "Skip to the report", class_="skip", href="#report"),
    _make_header(title, sections),
    tag("main", *main, id="report", tabindex=-1),
  ]
  head = [tag("title", title), tag("style", Raw(f"\n{style}")), "</head>"]
  return _HEAD + "\n".join([*head, tag("body", join(body)), "</html>\n"])


def _make_header(title, sections):
  links = [
    tag("li", tag("a", heading, href=f"#{name}"))
    for name, heading, _ in sections
  ]
  today = f"{datetime.date.today():%Y-%m-%d}"
  return tag(
    "header",
    tag("h1", title),
    tag("p", f"Made by vit_jax {vit_jax.__version__} on {today}."),
    tag("nav", tag("ul", *links), aria_label="Sections"),
  )


def _make_section(name, heading, content):
  return tag(
    "section",
    tag("h2", heading, id=f"{name}-heading"),
    content,
    id=name,
    aria_labelledby=f"{name}-heading",
  )


# --- runs ---


def _tell_runs(runs):
  head = (
    "Run",
    "State",
    "Result",
    "Model",
    "Trained on",
    "Tested on",
    "Weights",
  )
  notes = [
    tag("p", tag("strong", f"{run.name}: "), note)
    for run in runs
    for note in run.notes
  ]
  folders = tag("p", "Folders: ", join((show_path(r.path) for r in runs), ", "))
  facts = _tell_facts("What was trained", head, runs, _describe)
  return join([facts, *notes, folders])


def _tell_facts(caption, head, runs, describe):
  """Returns a table; few runs stand side by side in it, many are rows."""
  rows = [(run.name, *describe(run)) for run in runs]
  if len(runs) > _BESIDE:
    return table(caption, head, rows, None)
  return table(caption, *transpose(head, rows), "facts")


def show_path(path) -> Raw:
  """Returns a path as HTML, from the current folder if it is below that."""
  text = str(path).removeprefix(f"{Path.cwd()}/")
  return tag("code", text)


def _describe(run):
  config = run.config
  state = f"complete: {run.step:,} steps"
  if run.step < run.total_steps:
    state = (
      f"{run.step:,} of {run.total_steps:,} steps: in progress, or stopped"
    )
  size = config["image_size"]
  size = " x ".join(map(str, size)) if isinstance(size, list) else size
  task = ""
  if config["objective"] != "classification":
    task = f", {config['objective'].replace('_', ' ')}"
  data = f"{config['train.dataset']}, {config['train.split']}"
  tests = []
  if config["eval.split"]:
    tests.append(
      f"{configuration.find_test_set(config)}, {config['eval.split']}"
    )
  tests += [
    f"{key.split('.')[1].replace('_', ' ')}: {value}"
    for key, value in sorted(config.items())
    if key.startswith("evals.") and key.endswith(".dataset") and value
  ]
  return (
    state,
    _describe_result(run),
    f"{config['model.variant']}, {size} pixels{task}",
    data,
    "; ".join(tests) or "nothing",
    f"from {config['init_from']}" if config.get("init_from") else "random",
  )


def _describe_result(run):
  """Returns the last evaluations as text."""
  others = [
    f"{name.replace('_', ' ')} {show_metric(name.partition('/')[2], x)}, at "
    f"step {step:,}"
    for name, [*_, (step, x)] in run.other_series.items()
  ]
  if not run.evaluations:
    return "; ".join(others) or "not evaluated yet"
  step, found = list(run.evaluations.items())[-1]
  told = [
    f"{name.replace('_', ' ')} {show_metric(name, x)}"
    for name, x in found.items()
    if math.isfinite(x) and name not in COUNTS
  ]
  # What runs are compared by stands first.
  told.sort(key=lambda text: text.startswith(("loss", "trivial")))
  examples = found.get("examples")
  images = f" on {examples:,.0f} images" if examples else ""
  main = f"{', '.join(told)}{images}, at step {step:,}"
  return "; ".join([main, *others])


def show_metric(name: str, x: float) -> str:
  """Returns a metric's value, shares as percent."""
  return percent(x) if name in _SHARES else charts.format_value(x)


# --- curves ---


def _draw_curves(runs):
  """Returns the charts; losses of other kinds are not drawn together."""
  kinds = collections.defaultdict(list)
  for i, run in enumerate(runs):
    style = i if i < charts.COLOURS else None
    kinds[_find_kind(run)].append((run, style))
  parts = []
  if len(runs) > charts.COLOURS:
    parts.append(
      tag(
        "p",
        f"The first {charts.COLOURS} runs of the table have colours, the "
        "others are grey.",
      )
    )
  for kind, members in kinds.items():
    if len(kinds) > 1:
      parts.append(tag("h3", kind))
    parts += _draw_kind(members)
  return join(parts)


def _find_kind(run):
  if run.config["objective"] != "classification":
    target = run.config.get("masked_target", "")
    return f"Masked patches, {target.replace('_', ' ')}"
  return f"Classification, {run.config['loss.name']} loss"


def _draw_kind(members):
  found = dict.fromkeys(_TITLES, 0)
  for run, _ in members:
    for name, values in run.series.items():
      found[name] = max(found.get(name, 0), len(values))
  names = [
    name
    for name in found
    if name not in _NO_CURVE and name.rpartition("/")[2] not in COUNTS
  ]
  figures = [_draw_figure(n, members) for n in names if found[n] > 1]
  single = [_title(n) for n in names if found[n] == 1]
  parts = [tag("div", *figures, class_="charts")] if figures else []
  if single:
    parts.append(
      tag("p", f"Measured once, and so no curve: {'; '.join(single)}.")
    )
  if not parts:
    parts.append(tag("p", "metrics.jsonl has nothing to draw yet."))
  return parts


def _title(name: str) -> str:
  return _TITLES.get(name, name)


def _draw_figure(name, members):
  drawn = [(r, style) for r, style in members if name in r.series]
  totals = [run.total_steps for run, _ in drawn]
  as_share = max(totals) > _SIMILAR * min(totals)
  lines = []
  for run, style in drawn:
    scale = 100 / run.total_steps if as_share else 1
    xs = [step * scale for step, _ in run.series[name]]
    ys = [value for _, value in run.series[name]]
    lines.append(charts.Line(run.name, xs, ys, style))
  label = "percent of the run's steps" if as_share else "step"
  chart = charts.draw(_title(name), label, lines)
  remarks = ["logarithmic"] * chart.logarithmic
  if chart.averaged > 1:
    remarks.append(f"each point the mean of up to {chart.averaged} values")
  remark = tag("span", f" ({', '.join(remarks)})") if remarks else ""
  legend = [
    tag(
      "li",
      Raw(charts.draw_sample(style)),
      run.name,
      *_tell_last(run, name),
    )
    for run, style in drawn
    if style is not None
  ]
  return tag(
    "figure",
    tag("figcaption", tag("strong", _title(name)), remark),
    Raw(chart.svg),
    tag("ul", *legend, class_="legend"),
  )


def _tell_last(run, name):
  """Returns what stands behind a run's name; the last speed says nothing."""
  if name == SPEED:
    return ()
  return " ends at ", tag(
    "b", show_metric(name.partition("/")[2], run.series[name][-1][1])
  )


# --- cost ---


def _tell_cost(runs):
  head = (
    "Run",
    "Images seen",
    "Images/s, mean",
    "Images/s, lowest to highest",
    "Devices",
    "Training time, estimated",
    "Device time, estimated",
    "ExaFLOPs, counted",
  )
  note = (
    "Times are estimated from the steps and speeds in metrics.jsonl: they are "
    "those of the training steps and their compilation, without starting, "
    "evaluating and saving. The mean speed is all images over all of this "
    "time; the first interval is slow because it compiles. ExaFLOPs are six "
    "times the multiply-adds of the model's forward pass for each image seen, "
    "as the paper counts them; evaluations are not in them."
  )
  title = "Speed and cost of each run"
  return join([_tell_facts(title, head, runs, _describe_cost), tag("p", note)])


def _describe_cost(run):
  speed = measure_speed(run)
  try:
    cost = f"{flops.count_training(run.written, run.step):.3g}"
  except UserError as e:
    cost = str(e)
  images = f"{run.step * run.config['batch_size']:,}"
  if not speed:
    unknown = "metrics.jsonl has no speed"
    return images, unknown, unknown, unknown, unknown, unknown, cost
  return (
    images,
    charts.format_value(speed.mean),
    f"{charts.format_value(speed.least)} to {charts.format_value(speed.most)}",
    f"{speed.devices}" if speed.devices else "unknown",
    show_time(speed.seconds),
    show_time(speed.device_seconds) if speed.devices else "unknown",
    cost,
  )


def show_time(seconds: float) -> str:
  """Returns an estimated time, two or three digits of it."""
  for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
    if seconds >= 2 * length:
      return f"{seconds / length:,.1f} {unit}"
  return f"{seconds:.0f} seconds"


# --- configurations ---


def _compare(runs):
  configs = [run.config for run in runs]
  keys = sorted({key for config in configs for key in config})
  different = [
    key for key in keys if len({_show(config, key) for config in configs}) > 1
  ]
  parts = []
  if len(runs) == 1:
    parts.append(tag("p", "There is one run: nothing to compare."))
  elif not different:
    parts.append(tag("p", "The configurations are the same."))
  else:
    head = ("Key", *(run.name for run in runs))
    rows = [
      (tag("code", key), *(_show(config, key) for config in configs))
      for key in different
    ]
    caption = f"{len(different)} of {len(keys)} keys have different values"
    if len(runs) > _BESIDE:
      head, rows = transpose(("Run", *head[1:]), rows)
    parts.append(table(caption, head, rows))
  for run, config in list(zip(runs, configs, strict=True))[: charts.COLOURS]:
    rows = [(tag("code", key), _show(config, key)) for key in sorted(config)]
    parts.append(
      fold(
        f"All of {run.name}",
        table(f"Configuration of {run.name}", ("Key", "Value"), rows),
      )
    )
  if len(runs) > charts.COLOURS:
    rest = "The other runs differ from these in what the table says alone."
    parts.append(tag("p", rest))
  return join(parts)


def _show(config, key):
  if key not in config:
    return "(not there)"
  value = config[key]
  text = value if isinstance(value, str) else json.dumps(value)
  return escape(text or "(empty)")
