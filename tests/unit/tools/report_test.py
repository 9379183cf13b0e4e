"""The report on runs: what is read, what is counted, what the page shows."""

import collections
import html.parser
import itertools
import json
import re
import types

import fake_runs
import numpy as np
import pytest
from browser import PHONE
from matplotlib.figure import Figure

from vit_jax.__main__ import main
from vit_jax.tools import charts
from vit_jax.tools import report as report_package
from vit_jax.tools.paper import flops
from vit_jax.tools.report import by_class, details, page, report
from vit_jax.tools.runs import find_runs

_BAD_NAME = "<script>alert('&\"')</script>"


def write_run(path, total_steps=40, steps=40, losses=None, **overrides):
  """Makes a run folder as `train` leaves it, without checkpoints."""
  given = {"batch_size": 32, **overrides}
  lines = [
    {
      "step": step,
      "train/loss": (losses or {}).get(step, 8 / step),
      "train/learning_rate": 0.1 * (1 - step / total_steps),
      "speed/images_per_second": {10: 64.0, 20: 128.0}.get(step, 256.0),
      "eval/examples": 5,
      "eval/accuracy": 1 - 1 / step,
    }
    for step in range(10, steps + 1, 10)
  ]
  return fake_runs.write(
    path,
    fake_runs.load("quickstart_finetune.py", **given),
    lines,
    total_steps=total_steps,
    class_names=[str(i) for i in range(10)],
    multilabel=False,
  )


# --- reading ---


def test_a_run_in_progress_is_told_as_far_as_it_is(tmp_path):
  run = write_run(tmp_path / "run", steps=20, losses={10: float("nan")})
  (found,) = find_runs([str(run)])
  text = page.make_page([found], {found.name: "no checkpoint"})
  assert "20 of 40 steps" in text
  assert "Values that are not finite are left out: train/loss." in text
  assert "accuracy 95.00\u00a0% at step 20" in text
  (run / "metrics.jsonl").unlink()
  (found,) = find_runs([str(run)])
  text = page.make_page([found], {found.name: "no checkpoint"})
  for words in ("not evaluated yet", "nothing to draw yet", "unknown"):
    assert words in text


def test_the_cost_is_that_of_the_steps(tmp_path):
  (run,) = find_runs([str(write_run(tmp_path / "run"))])
  # 10 steps of 32 images each: 320/64 + 320/128 + twice 320/256 seconds.
  assert page.measure_time(run) == pytest.approx(5 + 2.5 + 2 * 1.25)
  exaflops = flops.count_training(run.written, run.step)
  # The quickstart's model has no class token; the table's has, a token of 37.
  paper = flops.count_multiply_adds("ViT-N_8", 48, 10)
  assert exaflops == pytest.approx(6 * paper * 1280 / 1e18, rel=0.04)
  rows = _Reader(page.make_page([run], {})).rows
  assert ["Images seen", "1,280"] in rows
  assert ["Images/s, mean", "128"] in rows
  assert ["Training time", "0:00:10"] in rows
  assert ["ExaFLOPs", f"{exaflops:.3g}"] in rows


# --- drawing ---


def test_a_line_lies_where_its_numbers_say(tmp_path):
  losses = {10: 1.0, 20: 3.0, 30: 2.0, 40: 1.0}
  (run,) = find_runs([str(write_run(tmp_path / "run", losses=losses))])
  svg = charts.draw_svg("train/loss", [(0, run)], "a < b", 7)
  assert '<desc id="text7">a &lt; b</desc>' in svg
  (path,) = re.findall(r'<path d="([^"]+)"[^>]*stroke: var\(--c0\)', svg)[:1]
  points = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), float)
  steps, heights = (points - points[0]).T
  np.testing.assert_allclose(steps / steps[-1], [0, 1 / 3, 2 / 3, 1], atol=1e-3)
  np.testing.assert_allclose(heights / heights[1], [0, 1, 0.5, 0], atol=1e-3)
  assert heights[1] < 0  # SVG's y points down


def test_a_last_learning_rate_near_zero_does_not_stretch_the_axis():
  def draw(name, values):
    axis = Figure().subplots()
    points = list(enumerate(values, 1))
    run = types.SimpleNamespace(name="run", series={name: points})
    charts.plot(axis, name, [(0, run)])
    return axis.get_yscale(), axis.get_ylim()[0]

  decay = np.cos(np.linspace(0, 1.57, 12)) ** 2  # the last is 6e-7
  assert draw("train/learning_rate", decay)[0] == "linear"
  assert draw("train/loss", np.geomspace(1, 1e-3, 12))[0] == "log"
  scale, lowest = draw("train/learning_rate", [*decay * 1e3, *decay])
  assert scale == "log"
  assert lowest > 1e-5


def test_a_long_line_becomes_means():
  xs, ys = charts._average([(i, i % 2) for i in range(100_000)])
  assert len(xs) == 250
  np.testing.assert_allclose(ys, 0.5)  # the mean of 400


# --- the page ---


def _make_details(names, multilabel=False, attends=True):
  """Made-up counts: of class i, i of 50 images are taken for the next one."""
  pairs = collections.Counter()
  for i in range(len(names)):
    pairs[i, i] += 50 - i
    if i:
      pairs[-1 if multilabel else i, (i + 1) % len(names)] += i
  pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
  picture = details.encode(pixels)
  mistakes = [
    by_class.Mistake(0.9 - i / 100, 1000 + i, [i + 1], i, 0.05, pixels)
    for i in range(3)
  ]
  attention = picture if attends else None
  shown: dict = {"labels": names[1], "picture": picture, "attention": attention}
  shown["name"] = "photos/b/1 & more.jpg"
  source = types.SimpleNamespace(
    dataset="made_up", split="test", class_names=names, multilabel=multilabel
  )
  tally = by_class.Tally(pairs, mistakes)
  return details.Details("best/40", source, tally, [shown] * 3)


def _make_page(folder):
  """Returns a page with everything: few and many classes, several labels."""
  for name, overrides in {
    "few": {},
    "many": {"schedule__base_lr": 0.5, "loss__name": "sigmoid"},
    "multi": {"steps": 20},
    "none": {"steps": 10, "seed": 7},
  }.items():
    write_run(folder / name, **overrides)
  many = [f"class {i}" for i in range(30)]
  found = {
    "few": _make_details([_BAD_NAME, *"bcdefghij"]),
    "many": _make_details(many, attends=False),
    "multi": _make_details(many, multilabel=True),
    "none": "There is no checkpoint.",
  }
  return page.make_page(find_runs([str(folder)]), found)


class _Reader(html.parser.HTMLParser):
  """Reads a page: its elements, and the cells of each row of its tables."""

  def __init__(self, text):
    super().__init__()
    self.elements, self.rows, self._in_cell = [], [], False
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag == "tr":
      self.rows.append([])
    if tag in ("th", "td"):
      self.rows[-1].append("")
      self._in_cell = True

  def handle_endtag(self, tag):
    if tag in ("th", "td"):
      self.rows[-1][-1] = " ".join(self.rows[-1][-1].split())
      self._in_cell = False

  def handle_data(self, data):
    if self._in_cell:
      self.rows[-1][-1] += data

  def all(self, tag):
    return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return _make_page(tmp_path_factory.mktemp("page"))


def test_the_page_is_self_contained_and_accessible(text):
  read = _Reader(text)
  assert "<script" not in text
  assert "&lt;script&gt;" in text
  for _, attrs in read.elements:
    for key in ("src", "href", "xlink:href"):
      assert attrs.get(key, "#").startswith(("data:", "#")), attrs[key]
  assert all(match.startswith("#") for match in re.findall(r"url\((.)", text))
  assert read.all("html") == [{"lang": "en"}]
  assert len(read.all("main")) == len(read.all("h1")) == 1
  ids = [attrs["id"] for _, attrs in read.elements if "id" in attrs]
  assert len(ids) == len({*ids})
  assert {attrs["href"][1:] for attrs in read.all("a")} <= {*ids}
  assert len(read.all("table")) == len(read.all("caption")) > 5
  assert {attrs.get("scope") for attrs in read.all("th")} == {"col", "row"}
  assert all(attrs["alt"] for attrs in read.all("img"))
  assert len(read.all("img")) == 2 * 3 + 3 + 2 * 3
  for attrs in read.all("svg"):
    labels = attrs.get("aria-labelledby", "").split()
    assert attrs.get("aria-hidden") or (labels and {*labels} <= {*ids})


def test_the_page_shows_what_was_counted(text):
  rows = _Reader(text).rows
  assert ["c", "48 of 50", "96.00 %", "d (2)"] in rows
  # The confusion matrix: "j" is taken for the first class 9 of 50 times.
  assert ["j", "9", *["0"] * 8, "41"] in rows
  # Of many classes: the pair that is mixed up most often.
  assert ["class 29", "class 0", "29"] in rows
  assert "photos/b/1 &amp; more.jpg" in text
  assert "There is no checkpoint." in text
  # 40 steps measured 97.5 %, and 455 of 500 are right.
  assert "455 of 500 labelled images correct" in text
  assert "The run itself measured 97.50\u00a0%" in text
  assert {"few", "many", "multi", "none"} <= {row[0] for row in rows}
  assert ["Run", "loss.name", "schedule.base_lr", "seed"] in rows
  assert ["many", "sigmoid", "0.5", "0"] in rows
  # The loss's numbers beside its chart.
  assert ["few", "0.2", "0.2", "0.8"] in rows


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    ({"objective": "masked_patches"}, "predicts masked patches"),
    ({"eval__split": ""}, "has no test set"),
    ({}, "The run has no checkpoint yet"),
  ],
)
def test_what_cannot_be_evaluated_is_said(tmp_path, overrides, words):
  write_run(tmp_path / "run", **overrides)
  out = tmp_path / "report.html"
  assert report([str(tmp_path / "run")], str(out)) == out
  assert words in out.read_text()


def test_of_many_runs_the_best_have_colours(tmp_path, monkeypatch):
  for i in range(10):
    write_run(tmp_path / "runs" / f"run{i}", steps=10 + 10 * (i % 4))
  seen = []

  def evaluate(run, data_dir, mistakes):
    seen.append((run.name, mistakes))
    return "not now"

  monkeypatch.setattr(report_package, "evaluate", evaluate)
  out = tmp_path / "report.html"
  report([str(tmp_path / "runs")], str(out))
  # The more steps the better; run0, run4 and run8 have the fewest.
  assert [name for name, _ in seen] == [
    *("run3", "run7", "run2", "run6", "run1", "run5", "run9", "run0")
  ]
  assert {mistakes for _, mistakes in seen} == {5}
  text = out.read_text()
  assert "The test sets of 2 more runs were not evaluated" in text
  assert "stroke: var(--other)" in text


def test_mistakes_of_users_are_one_line(tmp_path, capsys):
  write_run(tmp_path / "run")
  (tmp_path / "there.html").write_text("mine")
  (tmp_path / "empty").mkdir()
  for run, out, words in (
    ("run", "there.html", "exists; nothing is overwritten"),
    ("run", "no/r.html", "is not a writable folder"),
    ("nowhere", "r.html", "no such folder"),
    ("empty", "r.html", "has no run in it"),
  ):
    assert main(["report", f"{tmp_path}/{run}", f"--out={tmp_path}/{out}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
  assert (tmp_path / "there.html").read_text() == "mine"


# --- a real run ---


@pytest.mark.ci
def test_classes_of_a_real_run_add_up_to_its_accuracy(
  runs, reference, tmp_path, monkeypatch
):
  out = tmp_path / "report.html"
  assert main(["report", str(reference.workdir), f"--out={out}"]) == 0
  assert out.stat().st_size < 2e6
  text = out.read_text()
  rows = _Reader(text).rows
  counts = [
    [int(n) for n in match.groups()]
    for row in rows
    if len(row) == 4 and (match := re.fullmatch(r"(\d+) of (\d+)", row[1]))
  ]
  right, images = (sum(column) for column in zip(*counts, strict=True))
  assert images == 40
  # The best checkpoint's step: that with the highest accuracy, the first one.
  lines = (reference.workdir / "metrics.jsonl").read_text().splitlines()
  measured = [
    x for line in lines if (x := json.loads(line).get("eval/accuracy"))
  ]
  assert right / images == max(measured)
  assert f"The run itself measured {page.percent(max(measured))}." in text
  assert text.count("<img ") == 2 * min(12, images - right)
  assert text.count(" of digits test[:40]<") == min(12, images - right)

  # Its data are gone.
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  gone = tmp_path / "gone.html"
  report([str(reference.workdir)], str(gone), data_dir=str(tmp_path))
  assert "The test set could not be evaluated: data set" in gone.read_text()


# --- how it looks ---


def _luminance(colour):
  """WCAG 2's relative luminance of 0..255."""
  c = colour / 255
  linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
  return linear @ [0.2126, 0.7152, 0.0722]


def test_every_text_can_be_read(text):
  light, dark = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
  for mode in (light, dark):
    found = re.findall(r"--(\w+): #(\w+);", mode)
    colours = {name: np.array([*bytes.fromhex(x)]) for name, x in found}
    # The last is the darkest cell of a matrix.
    behind = {"back": colours["back"], "panel": colours["panel"]}
    behind["cell"] = 0.37 * colours["wrong"] + 0.63 * colours["back"]
    for name, place in (
      *itertools.product(("text", "soft", "accent"), ("back", "panel")),
      ("text", "cell"),
    ):
      dim, bright = sorted(map(_luminance, (colours[name], behind[place])))
      assert (bright + 0.05) / (dim + 0.05) >= 4.5, (name, place)


@pytest.mark.ci
def test_on_a_phone_in_the_dark_and_aloud(open_page, text, tmp_path):
  file = tmp_path / "report.html"
  file.write_text(text, encoding="utf-8")
  shown = open_page(file.as_uri(), PHONE, dark=True)
  back = "getComputedStyle(document.body).backgroundColor"
  assert shown.evaluate(back) == "rgb(20, 23, 28)"
  width = "document.documentElement.scrollWidth"
  assert shown.evaluate(width) == PHONE[0]  # it never scrolls sideways
  told = shown.locator("body").aria_snapshot()
  for line in (
    'heading "Report: 4 runs" [level=1]',
    'navigation "Sections"',
    "main",
    'heading "Test set: few" [level=2]',
    'img "Training loss few: last 0.2, lowest 0.2, highest 0.8',
    'table "Training"',
    'rowheader "few"',
    'columnheader "Result"',
    'img "Test image 1002: b"',
    'img "The same, darkened where attention is low"',
  ):
    assert line in told, line
  shown.evaluate(
    "document.querySelectorAll('details').forEach(d => d.open = 1)"
  )
  assert shown.evaluate(width) == PHONE[0]
