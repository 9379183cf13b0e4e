"""The paper's tables beside made-up runs: values, commands, formats."""

import json
import re
import shlex
import statistics
from pathlib import Path

import fake_runs
import pytest

from vit_jax import config as configuration
from vit_jax.__main__ import main, make_parser
from vit_jax.commands import flags
from vit_jax.data import benchmarks as data_tasks
from vit_jax.tools import sweep
from vit_jax.tools.paper import cells, data, flops, protocol, tables

_REPO = Path(__file__).parents[3]
_RESULTS = (2, 5, 6, 7, 8, 9)
_PUBLIC = {"name": "ViT-L/16", "pretraining": "ImageNet-21k", "epochs": 90}


def _write_run(path, spec, accuracy=None, *, steps=None, **overrides):
  """Makes a run folder as `train` leaves it, complete unless told otherwise."""
  config = fake_runs.load(spec, **overrides)
  total = config["total_steps"] or 1000
  lines = [{"step": 1, "train/loss": 3.0}]
  last = {"step": total if steps is None else steps}
  if accuracy is not None:
    lines.append({"step": 1, "eval/accuracy": 0.01})
    last["eval/accuracy"] = accuracy
  return fake_runs.write(path, config, [*lines, last], total_steps=total)


def _finetune(runs, name, accuracy, dataset="cifar10", **overrides):
  """Makes a fine-tuning of ViT-B/32."""
  overrides = {"init_from": runs / "b32"} | overrides
  spec = f"finetune.py:ViT-B_32,{dataset}"
  return _write_run(runs / name, spec, accuracy, **overrides)


@pytest.fixture
def runs(tmp_path):
  """A pre-training and three fine-tunings from it."""
  runs = tmp_path / "runs"
  _write_run(runs / "b32", "pretrain.py:ViT-B_32,jft,7", 0.4)
  for seed, accuracy in enumerate((0.98, 0.985, 0.99)):
    _finetune(runs, f"cifar10_{seed}", accuracy, seed=seed)
  return runs


def _find_row(rows, name, pretraining="JFT-300M", epochs=7):
  wanted = {"name": name, "pretraining": pretraining, "epochs": epochs}
  (row,) = (row for row in rows if wanted.items() <= row.items())
  return row


def _cell(runs, table="table5", column="CIFAR-10", name="ViT-B/32", **kwargs):
  rows = tables.make_table(table, str(runs))
  return _find_row(rows, name, **kwargs)["cells"][column]


# --- what is computed from models ---


@pytest.mark.ci
def test_table_1_is_exact():
  keys = ("layers", "hidden_size", "mlp_dim", "num_heads", "params_M")
  found = [[row[key] for key in keys] for row in tables.make_table("table1")]
  assert found == [
    [12, 768, 3072, 12, 86],
    [24, 1024, 4096, 16, 307],
    [32, 1280, 5120, 16, 632],
  ]
  # What the first row says of another way to count.
  assert flops.count_parameters("ViT-B_16", 1000) == 86_567_656


def test_table_6_has_18_rows_with_exaflops(monkeypatch):
  monkeypatch.setattr(flops, "count_multiply_adds", lambda *_, **__: 10**10)
  rows = tables.make_table("table6")
  assert len(rows) == 18
  paper = {(row["name"], row["epochs"]): row["paper_exaflops"] for row in rows}
  assert paper["ViT-B/32", 7] == 55
  assert paper["ViT-H/14", 14] == 4262
  for row in rows:
    expected = 3 * 2 * 1e10 * 303e6 * row["epochs"] / 1e18
    assert row["exaflops"] == pytest.approx(expected, rel=1e-3)


# --- what runs say ---


def test_runs_become_mean_spread_and_difference(runs):
  cell = _cell(runs)
  assert cell["paper"] == 98.61
  assert cell["ours"] == pytest.approx(98.5)
  assert cell["spread"] == pytest.approx(statistics.stdev([98, 98.5, 99]))
  assert cell["difference"] == pytest.approx(98.5 - 98.61)
  assert cell["runs"] == [str(runs / f"cifar10_{seed}") for seed in range(3)]
  assert not cell["differs"]
  assert "commands" not in cell
  # It is nobody else's cell.
  rows = tables.make_table("table5", str(runs))
  made = tables._list_cells(rows)
  filled = [title for title, other in made if other["ours"] is not None]
  assert filled == ["ViT-B/32, JFT-300M*, 7 epochs; CIFAR-10"]


@pytest.mark.parametrize(
  "overrides",
  [
    {"dataset": "cifar10,held_out"},
    {"steps": 9000},
    {"image_size": 224},
    {"ema_decay": 0.9999},
    {"model__variant": "ViT-B_16"},
    {"dataset": "cifar100"},
    {"init_from": ""},
    {"init_from": "ViT-B_32-imagenet21k"},
    {"init_from": "elsewhere"},
    # The setting with most runs is taken, not the best.
    {"accuracy": 0.999, "schedule__base_lr": 0.003, "seed": 0},
  ],
)
def test_other_runs_are_not_counted(runs, overrides):
  _finetune(runs, "other", **{"accuracy": 0.5, "seed": 3} | overrides)
  assert _cell(runs)["ours"] == pytest.approx(98.5)


def test_another_protocol_is_named(runs):
  _finetune(runs, "short", 0.9, "cifar100", total_steps=500)
  cell = _cell(runs, column="CIFAR-100")
  assert cell["ours"] == pytest.approx(90)
  assert cell["differs"] == ["total_steps 500 (protocol: 10000)"]
  text = tables.format_table("table5", tables.make_table("table5", str(runs)))
  assert "90.49 | 90.00 (-0.49)!" in text
  assert "98.61 | 98.50 ±0.50 (-0.11)" in text
  title = "! ViT-B/32, JFT-300M*, 7 epochs; CIFAR-100: "
  assert f"{title}total_steps 500 (protocol: 10000)" in text.splitlines()


@pytest.mark.parametrize(
  ("overrides", "differs"),
  [
    (
      {
        "model__classifier": "gap",
        "optimizer__weight_decay": 0.1,
        "schedule__base_lr": 0.2,
      },
      {
        "model.classifier gap (protocol: token)",
        "optimizer.weight_decay 0.1 (protocol: 0.0)",
        "schedule.base_lr 0.2 (protocol: 0.001 or 0.003 or 0.01 or 0.03)",
      },
    ),
    # Of the machine and the books, and another of the paper's rates.
    (
      {"seed": 7, "fsdp": 8, "model__scan": True, "schedule__base_lr": 0.001},
      set(),
    ),
  ],
)
def test_every_key_is_compared_with_the_protocol(runs, overrides, differs):
  _finetune(runs, "other", 0.9, "cifar100", **overrides)
  assert set(_cell(runs, column="CIFAR-100")["differs"]) == differs


def test_the_pretraining_of_a_cell_is_compared_too(runs):
  file = runs / "b32" / "config.json"
  written = json.loads(file.read_text())
  written["config"]["optimizer"]["weight_decay"] = 0.0
  written["config"]["train"]["mixup_alpha"] = 0.2
  written["config"]["eval"]["split"] = "test"
  file.write_text(json.dumps(written))
  expected = [
    "optimizer.weight_decay 0.0 (protocol: 0.1)",
    "train.mixup_alpha 0.2 (protocol: 0.0)",
  ]
  found = _cell(runs)["differs"]
  assert found == [f"pre-training: {x}" for x in expected]
  rows = tables.make_table("table3", str(runs))
  assert _find_row(rows, "ViT-B/32")["differs"] == expected
  text = tables.format_table("table3", rows)
  assert f"! ViT-B/32, JFT-300M*, 7 epochs: {'; '.join(expected)}" in text
  (line,) = (x for x in text.splitlines() if x.startswith("ViT-B/32, JFT"))
  assert line.endswith(" 1!")


def test_published_weights_are_those_of_90_epochs(tmp_path):
  source, spec = "ViT-B_16-imagenet21k", "finetune.py:ViT-B_16,cifar100"
  _write_run(tmp_path / "b16", spec, 0.92, init_from=source)
  public = _PUBLIC | {"name": "ViT-B/16"}
  cell = _cell(tmp_path, column="CIFAR-100", **public)
  assert cell["ours"] == pytest.approx(92)
  # It also stands in for the row that needs JFT, beside its own paper value.
  row = _find_row(tables.make_table("table5", str(tmp_path)), "ViT-B/16")
  assert row["private"]
  stand_in = row["stand_in"]["cells"]["CIFAR-100"]
  assert stand_in["ours"] == pytest.approx(92)
  assert stand_in["paper"] == 91.67
  assert row["cells"]["CIFAR-100"]["ours"] is None


def test_a_set_without_test_images_is_the_same_set():
  assert protocol.plain_name("imagenet21k_clean:1.0.0") == "imagenet21k"


def test_epochs_tell_pretrainings_apart(tmp_path, monkeypatch):
  monkeypatch.setattr(flops, "count_multiply_adds", lambda *_, **__: 1)
  for epochs, accuracy in ((7, 0.86), (14, 0.87)):
    spec = f"pretrain.py:ViT-L_16,jft,{epochs}"
    origin = _write_run(tmp_path / f"l16_{epochs}", spec)
    path, spec = tmp_path / f"{epochs}", "finetune.py:ViT-L_16,imagenet2012"
    _write_run(path, spec, accuracy, init_from=origin)
  row = {"name": "ViT-L/16", "table": "table6", "column": "ImageNet"}
  assert _cell(tmp_path, **row)["ours"] == pytest.approx(86)
  assert _cell(tmp_path, epochs=14, **row)["ours"] == pytest.approx(87)


def test_real_is_read_from_the_finetuned_run(runs):
  _finetune(runs, "imagenet", 0.8, "imagenet2012")
  (command,) = _cell(runs, column="ImageNet ReaL")["commands"]
  assert f"--workdir={runs / 'imagenet'} " in command
  (runs / "imagenet" / "imagenet2012_real.json").write_text('{"prec@1": 0.86}')
  assert _cell(runs, column="ImageNet ReaL")["ours"] == pytest.approx(86)
  assert _cell(runs, column="ImageNet")["ours"] == pytest.approx(80)


def test_few_shot_is_read_from_the_pretraining(tmp_path):
  two_d = {"model__pos_embedding": "2d"}
  spec = "pretrain.py:ViT-B_16,jft"
  for name, overrides in (("one", {}), ("two", two_d)):
    path = _write_run(tmp_path / name, spec, **overrides)
    shots = [{"shots": 5, "accuracies": [0.6, 0.62] if overrides else [0.5]}]
    text = json.dumps({"results": shots, "preprocess": "resize(size)"})
    (path / "linear_imagenet2012.json").write_text(text)
  cell = {"table": "table8", "column": "at the input"}
  found = _cell(tmp_path, name="2-D", **cell)
  assert found["paper"] == 64.001
  assert found["ours"] == pytest.approx(61)
  (differs,) = found["differs"]
  assert differs.startswith("preprocess resize(size) (protocol: resize(256)|")
  assert _cell(tmp_path, name="1-D", **cell)["ours"] == pytest.approx(50)
  other = _cell(tmp_path, name="2-D", **cell | {"column": "every layer"})
  assert other["ours"] is None
  # The default of big_vision's few-shot evaluator, read in its code.
  words = shlex.split(other["commands"][-1])
  assert "--preprocess=resize(256)|central_crop(size)" in words
  assert "--image_size=224" in words


def test_vtab_is_the_mean_of_its_19_tasks(tmp_path):
  mean = _PUBLIC | {"table": "table9", "column": "VTAB (19 tasks)"}
  for i, task in enumerate(data.load()["vtab"]["tasks"].values()):
    if i == 18:
      assert _cell(tmp_path, **mean)["ours"] is None
    path, spec = tmp_path / task, f"vtab.py:ViT-L_16,{task}"
    _write_run(path, spec, 0.5 + i / 100, init_from="ViT-L_16-imagenet21k")
  assert _cell(tmp_path, **mean)["ours"] == pytest.approx(50 + 9)
  one = mean | {"column": "sNORB-Elev"}
  assert _cell(tmp_path, **one)["ours"] == pytest.approx(50 + 18)


def test_the_average_of_table_7(tmp_path):
  origin = _write_run(tmp_path / "r50", "pretrain.py:R50x1,jft")
  datasets = ("imagenet2012", "cifar10", "cifar100", "oxford_iiit_pet")
  for i, name in enumerate((*datasets, "oxford_flowers102")):
    path, spec = tmp_path / name, f"finetune.py:R50x1,{name}"
    _write_run(path, spec, 0.5 + 0.1 * i, init_from=origin)
  adam, sgd = (
    _cell(tmp_path, "table7", "Average", f"ResNet50 {kind}")
    for kind in ("Adam", "SGD")
  )
  assert adam["ours"] == pytest.approx(70)
  assert sgd["ours"] is None


def _write_loop(runs, students=3, **overrides):
  """Makes what `vit-jax noisy-student` leaves, with fewer students maybe."""
  spec = "noisy_student.py:L2,"
  _write_run(runs / "teacher", f"{spec}teacher", 0.85)
  for i in range(1, students + 1):
    labels = f"pseudo:{runs}/labels_student{i}={28.0 if i == 3 else 14.0}"
    data = {"train__dataset": f"imagenet2012=1,{labels}"}
    path, spec_i = runs / f"student{i}", f"{spec}student{i}"
    _write_run(path, spec_i, 0.87 + i / 1000, **data, **overrides)
  return runs / f"student{students}"


_NOISY = "Noisy Student EfficientNet-L2"


def _loop_cell(runs, column="ImageNet"):
  rows = tables.make_table("table2", str(runs))
  (row,) = (row for row in rows if row["name"] == _NOISY)
  return row["cells"][column]


def test_the_last_of_a_loop_fills_the_column_of_noisy_student(tmp_path):
  student = _write_loop(tmp_path)
  # A B7 of the same data is not an L2; a plain L2 is not of a loop.
  spec = "noisy_student.py:L2,finetune"
  _write_run(tmp_path / "plain", spec, 0.8)
  cell = _loop_cell(tmp_path)
  assert cell["ours"] == pytest.approx(87.3)
  assert cell["differs"] == ["no finetune"]
  assert cell["runs"] == [str(student)]
  last = tmp_path / "finetune"
  _write_run(last, spec, 0.884, init_from=student)
  _write_run(tmp_path / "early", spec, 0.9, init_from=tmp_path / "student2")
  cell = _loop_cell(tmp_path)
  assert (cell["paper"], cell["runs"]) == (88.4, [str(last)])
  assert cell["difference"] == pytest.approx(0)
  assert not cell["differs"]
  assert "commands" not in cell
  (command,) = _loop_cell(tmp_path, "ImageNet ReaL")["commands"]
  assert f"--workdir={last} " in command
  (last / "imagenet2012_real.json").write_text('{"prec@1": 0.905}')
  real = _loop_cell(tmp_path, "ImageNet ReaL")
  assert (real["paper"], real["ours"]) == (90.55, pytest.approx(90.5))
  # It fills nothing else.
  made = tables._list_cells(tables.make_table("table2", str(tmp_path)))
  filled = [title for title, x in made if x.get("ours") is not None]
  expected = [f"{_NOISY}; ImageNet{x}" for x in ("", " ReaL")]
  assert filled == expected


def test_another_loop_is_named(tmp_path):
  student = _write_loop(tmp_path, students=2, ema_decay=0.999)
  spec = "noisy_student.py:L2,finetune"
  _write_run(tmp_path / "finetune", spec, 0.88, init_from=student, steps=938)
  _write_run(tmp_path / "other", spec, 0.88, init_from=student, batch_size=8)
  _write_run(tmp_path / "o2", spec, 0.87, init_from=student, batch_size=8,
             seed=1)  # fmt: skip
  cell = _loop_cell(tmp_path)
  # Of two settings the one with most runs.
  assert cell["ours"] == pytest.approx(87.5)
  assert "batch_size 8 (protocol: 2048)" in cell["differs"]
  assert "student2 is the last (protocol: student3)" in cell["differs"]
  assert "student3: ema_decay 0.999 (protocol: 0.9999)" in cell["differs"]
  assert any(
    x.startswith("student3: batch_size 30720") for x in cell["differs"]
  )


# --- what would fill the cells ---


@pytest.mark.parametrize(
  "number",
  [
    pytest.param(x, marks=pytest.mark.ci if x in (5, 6) else ())
    for x in (3, *_RESULTS)
  ],
)
def test_every_command_is_one(number, monkeypatch):
  monkeypatch.setattr(flops, "count_multiply_adds", lambda *_, **__: 1)
  made = tables._list_cells(tables.make_table(f"table{number}"))
  commands = {x for _, cell in made for x in cell.get("commands", ())}
  assert commands
  monkeypatch.chdir(_REPO)
  for command in commands:
    words = shlex.split(command)
    assert words.pop(0) == "vit-jax"
    if ">" in words:
      assert len(words) - words.index(">") == 2
      words = words[: words.index(">")]
    args = flags.parse(make_parser(), words)
    if words[0] == "sweep":
      grid = sweep.parse_grids(args.grid)
      setting = {key: values[0] for key, values in grid.items()}
      for spec in (args.config, args.final):
        configuration.load(spec, args.overrides | setting)
    elif words[0] == "train":
      config = configuration.load(args.config, args.overrides)
      configuration.check_unused(config)
    elif words[0] == "vtab":
      tasks = data_tasks.list_tasks("vtab:")
      assert {t.name for t in tasks} >= set(args.tasks.split(","))


def test_commands_make_what_is_looked_for(tmp_path):
  """Does what the commands of a cell say; then the cell is filled."""
  runs = tmp_path / "runs"
  _write_run(runs / "another", "finetune.py:ViT-B_16,cifar10", 0.1)
  row = {"name": "ViT-L/16", "table": "table2", "epochs": 14}
  for column in ("ImageNet", "Oxford-IIIT Pets"):
    plan = _cell(runs, column=column, **row)
    for command in plan["commands"]:
      words = shlex.split(command)[1:]
      args = flags.parse(make_parser(), words)
      specs = {Path(args.workdir): args.config}
      if words[0] == "sweep":
        specs = {
          Path(args.workdir) / "final" / f"seed={seed}": args.final
          for seed in range(args.seeds)
        }
      for seed, (path, spec) in enumerate(specs.items()):
        spec = spec.removeprefix("configs/")
        _write_run(path, spec, 0.9, **args.overrides | {"seed": seed})
    cell = _cell(runs, column=column, **row)
    assert cell["values"] == pytest.approx([90] * 3)
    assert "commands" not in cell
    # The weights are there now: the next cell needs no pre-training.
    images = plan["images"]
    pretraining = 14 * 303_000_000 if column == "ImageNet" else 0
    steps = 20_000 if column == "ImageNet" else 500
    # Four learning rates are tried, then the best one has three seeds.
    assert images == pretraining + (4 + 3) * steps * 512


def test_the_images_of_a_selection_and_of_its_final_runs():
  public = cells.Pretraining("ViT-L_16", "imagenet21k", 90)
  cell = cells.Cell("finetune", public, "cifar10")
  # Weights are published: four learning rates, then the best one.
  assert cells.plan(cell, [], "runs").images == (4 + 1) * 10_000 * 512
  mean = cells.Cell("vtab_mean", public, seeds=3)
  plan = cells.plan(mean, [], "runs")
  # Two rates with 500 and with 2,500 steps, then 2,500 with each seed.
  assert plan.images == 19 * (2 * 3000 + 3 * 2500) * 512
  assert len(plan.commands) == 1
  one = mean._replace(kind="vtab", dataset="vtab:dtd", seeds=1)
  assert cells.plan(one, [], "runs").images == 2 * 2500 * 512


@pytest.mark.parametrize(
  ("only", "sets", "commands"),
  [
    ("ViT-B/16, ImageNet-21k, 90 epochs; CIFAR-10", ["cifar10"], ["sweep"]),
    ("ViT-B/16; ImageNet-21k; CIFAR-100", ["cifar100"], ["sweep"]),
    (
      "ViT-B/32, ImageNet, ImageNet ReaL",
      ["imagenet2012", "imagenet2012_real"],
      ["train", "sweep", "evaluate"],
    ),
  ],
)
def test_all_commands_of_one_cell(only, sets, commands, capsys):
  assert main(["tables", "table5", f"--only={only}"]) == 0
  count, *printed = capsys.readouterr().out.splitlines()
  assert re.fullmatch("# [0-9,]+ training images", count)
  lines = [shlex.split(x) for x in printed]
  assert lines[: len(sets)] == [["vit-jax", "data", "prepare", x] for x in sets]
  assert [words[1] for words in lines[len(sets) :]] == commands


def test_private_data_are_said_to_be():
  first, second = cells.prepare(["jft", "cifar10"])
  assert first.startswith("# jft is private")
  assert second == "vit-jax data prepare cifar10"


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["table5", "--only=ViT-B/16"], "fits 18 cells"),
    (["table5", "--only=ViT-B/16, CIFAR-1000"], "did you mean 'CIFAR-100'"),
    (["table5", "--only=ViT-B/16, Pets"], "'Pets'; choose from 14 epochs, "),
    (["table5", "--only=ViT-B/16, 14 epochs, ImageNet-21k"], "fits 0 cells"),
    (["table7", "--only=ResNet50 SGD; JFT-300M; Average"], "no command fills"),
    (["--only=ViT-B/16"], "NAME"),
    (["table5", "--only=ViT-B/16", "--commands"], "omit --commands"),
    (["tabel5"], "did you mean 'table5'"),
    (["table5", "--runs=nowhere"], "no such folder; without --runs the table"),
    (["table5", "--runs=configs"], "has no run in it"),
  ],
)
def test_mistakes(args, words, capsys, monkeypatch):
  monkeypatch.chdir(_REPO)
  assert main(["tables", *args]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert words in line


# --- formats ---


def test_the_list_of_tables(capsys):
  assert main(["tables"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines] == list(tables.NAMES)
  assert main(["tables", "--json"]) == 0
  assert len(json.loads(capsys.readouterr().out)) == 9


@pytest.mark.ci
@pytest.mark.parametrize("number", [1, 3, 4, 7, 9])
def test_text_markdown_and_json(number, capsys):
  name = f"table{number}"
  assert main(["tables", name]) == 0
  text = capsys.readouterr().out
  assert text.startswith(f"Table {number}: ")
  assert main(["tables", name, "--markdown"]) == 0
  rows = [x for x in capsys.readouterr().out.splitlines() if x[:1] == "|"]
  assert len({row.count("|") for row in rows}) == 1
  assert rows[1].replace("|", "").split() == ["---"] * (rows[0].count("|") - 1)
  assert main(["tables", name, "--json"]) == 0
  assert isinstance(json.loads(capsys.readouterr().out), list)


def test_every_paper_value_is_shown():
  for number in (2, 5, 7, 8, 9):
    name = f"table{number}"
    text = tables.format_table(name, tables.make_table(name))
    for row in data.load()[name]["rows"]:
      for paper in row["values"].values():
        value = paper[0] if isinstance(paper, list) else paper
        assert f"{value:.2f}" in text
