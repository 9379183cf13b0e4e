"""The command line as a user meets it: mistakes, help, what is imported.

Every mistake ends with exit code 2 and one line, and leaves nothing behind.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import forks
import jax
import numpy as np
import pytest
from PIL import Image
from tiny_runs import REPO, snapshot

import vit_jax
from vit_jax import checkpoint, data
from vit_jax.__main__ import main, make_parser
from vit_jax.pretrained import embedded
from vit_jax.training import lock


@pytest.fixture
def fails(capsys):
  """Returns a function that runs a command and checks how it fails."""

  def run(args, *words):
    try:
      code = main(list(map(str, args)))
    except SystemExit as e:  # argparse
      code = e.code
    out, err = capsys.readouterr()
    assert code == 2
    assert not out
    (line,) = err.splitlines()
    assert line.startswith(("error: ", "vit-jax"))
    for word in words:
      assert word in line
    return line

  return run


# "key=value" of the configuration -> words of the line. The tiny run has eight
# devices, batches of 16, images of 16 pixels and 14 steps.
WRONG_VALUES = {
  "model.dropout_rat=0.1": "did you mean 'model.dropout_rate'?",
  "batch_size=12": "12 is not divisible by 8 devices; nearest valid: 16",
  "batch_size=many": "config.batch_size is int",
  "eval.batch_size=20": "20 is not divisible by 8 devices; nearest valid: 16",
  "fsdp=3": "fsdp 3 does not divide 8 devices; valid: 1, 2, 4, 8",
  "image_size=20": "20 is not divisible by the patch size 8",
  "model.variant=ViT-Ty_8": "did you mean 'ViT-Ti_16'?",
  "model.classifier=tokn": "map, token+gap; did you mean 'token'?",
  "train.dataset=digit": "did you mean 'digits'?",
  "train.dataset=jft_like": "run `vit-jax data prepare jft_like --data_dir=",
  "train.split=trian": "train (1,000)",
  "eval.dataset=jft_like": "data prepare jft_like",
  "train.preprocess=flip_lr": "16",
  "eval.preprocess=inception_crop(size)": "random, for training only",
  "eval.preprocess=resize(8)": "resize(8)",
  "total_steps=0": "set now: none",
  "loss.name=hinge": "sigmoid, softmax",
  "optimizer.momentum=0.8": "needs config.optimizer.name to be 'sgd'",
  "optimizer.weight_decay_params=nothing": "matches no parameter",
  "schedule.warmup_steps=100": "do not fit in a run of 14 steps",
  "train.mixup_alpha=-1": "train.mixup_alpha",
  "train.cutmix_alpha=-1": "train.cutmix_alpha",
  "optimizer.freeze_blocks=-1": "optimizer.freeze_blocks",
  "lora.rank=-1": "lora.rank",
  "lora.alpha=8": "needs config.lora.rank to be set",
  "log_every=0": "log_every",
  "seed=12345678901234567890": "config.seed is 12345678901234567890; it must",
  "init_from=/no/such/run": "no checkpoint at /no/such/run",
}


@pytest.mark.parametrize("override", WRONG_VALUES)
def test_a_wrong_value(override, runs, fails, tmp_path):
  workdir = tmp_path / "run"
  fails(runs.train_args(workdir, override), WRONG_VALUES[override])
  assert not workdir.exists()


@pytest.mark.parametrize(
  "override",
  [
    *("schedule.warmup_steps=100", "model.variant=ViT-Ty_8"),
    *("image_size=20", "eval.preprocess=resize(8)", "loss.name=hinge"),
    *("seed=12345678901234567890", "model.classifier=tokn"),
  ],
)
def test_mistakes_that_need_no_data(override, fails, monkeypatch, tmp_path):
  """Nothing that imports TensorFlow is imported."""
  for name in ("train", "tools.sweep", "data.catalog"):
    monkeypatch.setitem(sys.modules, f"vit_jax.{name}", None)
  (tmp_path / "configs").mkdir()
  for file in ("configs/common.py", "tests/tiny_config.py"):
    shutil.copy(REPO / file, tmp_path / "configs")
  config = f"--config={tmp_path}/configs/tiny_config.py"
  given = [config, f"--workdir={tmp_path}/run", f"--config.{override}"]
  for command in ("train", "sweep"):
    fails([command, *given], WRONG_VALUES[override])
  for select in ("acuracy", "eval/acuracy"):
    args = ["sweep", *given[:2], f"--select={select}"]
    fails(args, "did you mean 'accuracy'?")
  assert not (tmp_path / "run").exists()


def test_weights_of_another_architecture_need_no_data(
  fails, monkeypatch, tmp_path
):
  for name in ("train", "data.catalog"):
    monkeypatch.setitem(sys.modules, f"vit_jax.{name}", None)
  run = tmp_path / "run" / "config.json"
  run.parent.mkdir()
  run.write_text('{"config": {"model": {"variant": "ViT-B_32"}}}')
  given = ["train", "--config=configs/finetune.py", f"--workdir={tmp_path}/new"]
  monkeypatch.chdir(REPO)
  for source in ("ViT-N_8-digits", run.parent):
    path = embedded.MODELS.get(source, source)
    fails([*given, f"--config.init_from={path}"], str(path), "ViT-B_16 here")


def test_a_wrong_configuration_file(runs, fails, tmp_path):
  workdir = tmp_path / "run"

  def try_config(config, *words):
    fails(runs.train_args(workdir, config=config), *words)
    assert not workdir.exists()

  try_config(
    str(runs.config).replace("tiny", "tny"),
    "no configuration file",
    f"did you mean '{runs.config}'?",
  )
  misspelt = tmp_path / "misspelt.py"
  shutil.copy(REPO / "configs" / "common.py", tmp_path)
  misspelt.write_text(
    "from common import get_config as defaults\n"
    "def get_config():\n"
    "  config = defaults()\n"
    "  config.batchsize = 16\n"
    "  return config\n"
  )
  try_config(misspelt, 'Did you mean "batch_size" instead of "batchsize"?')


def test_a_workdir_of_another_configuration(runs, reference, fails):
  before = snapshot(reference.workdir)
  fails(
    runs.train_args(reference.workdir, "total_steps=30", "seed=1"),
    f"{reference.workdir} holds a run of another configuration",
    "(seed: 0 -> 1; total_steps: 14 -> 30)",
    f"to train for longer: --config.init_from={reference.workdir} starts it",
  )
  assert snapshot(reference.workdir) == before


def test_a_workdir_that_is_a_file(runs, fails, tmp_path):
  (tmp_path / "file").write_text("mine")
  fails(runs.train_args(tmp_path / "file"), f"{tmp_path}/file", "folder")
  fails(runs.train_args(tmp_path / "file" / "run"), f"{tmp_path}/file")
  assert (tmp_path / "file").read_text() == "mine"
  (tmp_path / "link").symlink_to("gone")
  fails(runs.train_args(tmp_path / "link"), f"{tmp_path}/link", "a broken link")


def test_a_second_run_in_a_workdir(runs, fails, tmp_path):
  with lock.hold(checkpoint.absolute(tmp_path / "run")):
    line = fails(runs.train_args(tmp_path / "run"), f"{tmp_path}/run; wait for")
  assert f"process {os.getpid()} on " in line


def test_an_image_that_cannot_be_decoded(fails, tmp_path):
  """It is named when it is read, with what names all others."""
  bad = make_folder(tmp_path / "images") / "cat" / "1.png"
  bad.write_bytes(bad.read_bytes()[:60])
  folder, output = f"folder:{tmp_path}/images", tmp_path / "show.png"
  fails(
    ["data", "show", folder, "--image_size=8", f"--output={output}"],
    f"{bad}: not a readable image",
    f"; `vit-jax data check {folder}` lists all such files",
  )
  assert not output.exists()


def make_folder(root):
  for name in ("cat", "dog"):
    (root / name).mkdir(parents=True)
    for i in range(12):
      pixels = np.full((9, 9, 3), 20 * i, np.uint8)
      Image.fromarray(pixels).save(root / name / f"{i}.png")
  return root


@pytest.mark.parametrize("split", ["train.split", "eval.split"])
def test_labels_out_of_range(split, runs, fails, tmp_path):
  """A data set that declares eight classes; `split` alone has others."""
  folder = shutil.copytree(runs.data_dir, tmp_path / "data") / "digits/1.0.0"
  (folder / "label.labels.txt").write_text("\n".join("01234567"))
  features = (folder / "features.json").read_text()
  assert '"numClasses": "10"' in features
  features = features.replace('"numClasses": "10"', '"numClasses": "8"')
  (folder / "features.json").write_text(features)
  good, bad = find_runs(runs, "train")
  workdir = tmp_path / "run"
  args = runs.train_args(
    workdir,
    f"data_dir={tmp_path}/data",
    f"train.split=train[{good}:{good + 1}]",
    f"eval.split=train[{good}:{good + 1}]",
    f"{split}=train[{bad - 1}:{bad + 2}]",
  )
  line = fails(args, " is out of range, 8 classes have labels 0 to 7")
  assert re.match(r"error: example \d+ of digits \S+: label [89] ", line)
  assert not workdir.exists()


def find_runs(runs, split):
  """Returns an example of a class below 8, and one that is not."""
  source = data.get_source("digits", split, str(runs.data_dir))
  records = source.read(np.arange(100))
  labels = np.array([source.parse(r)[1].numpy()[0] for r in records])
  return int(np.argmax(labels < 8)), int(1 + np.argmax(labels[1:] >= 8))


def test_wrong_arguments(runs, fails, tmp_path):
  fails([], "vit-jax --help")
  fails(["trian"], "'trian'", "train")
  fails(["train", f"--workdir={tmp_path}/run"], "--config")
  train = ["train", f"--config={runs.config}", f"--workdir={tmp_path}/run"]
  fails([*train, "--steps=3"], "unknown argument '--steps=3'")
  fails([*train, "--confg.seed=3"], "train --help; did you mean '--config'?")
  fails([*train, "--config.total_steps"], "--config.total_steps=VALUE")
  fails([*train, "--num_processes=2"], "are given together")
  fails(["evaluate"], "--workdir", "--checkpoint")
  fails(["predict", "--checkpoint=x"], "IMAGE")
  assert not (tmp_path / "run").exists()


def test_evaluate_without_what_it_needs(runs, reference, fails, tmp_path):
  fails(["evaluate", f"--workdir={tmp_path}/no"], "no checkpoint at")
  fails(["evaluate", f"--checkpoint={tmp_path}"], "is not a run")
  given = ["evaluate", f"--workdir={reference.workdir}"]
  fails([*given, "--batch_size=0"], "batch_size is 0")
  fails([*given, "--split=tset"], "train (1,000)")
  folder = make_folder(tmp_path / "images")
  fails([*given, f"--dataset=folder:{folder}", "--split=test"], "2 classes")
  fails([*given, f"--data_dir={tmp_path}"], "data prepare digits")
  assert not (tmp_path / "no").exists()


@pytest.mark.ci
def test_predict_without_what_it_needs(reference, fails, tmp_path):
  text = tmp_path / "text.jpg"
  text.write_text("not an image")
  good = make_folder(tmp_path / "images") / "cat" / "1.png"
  given = ["predict", f"--checkpoint={reference.workdir}"]
  fails([*given, text], f"{text}: not a readable image")
  fails([*given, tmp_path / "gone.png"], "gone.png", "No such file")
  (tmp_path / "empty").mkdir()
  fails([*given, tmp_path / "empty"], f"{tmp_path}/empty is a folder without")
  fails([*given, good, "--top=0"], "--top")
  fails(["predict", f"--checkpoint={tmp_path}", good], "is not a run")


@pytest.mark.ci
def test_predict_goes_on_after_a_bad_file(reference, capsys, tmp_path):
  folder = make_folder(tmp_path / "images")
  bad = folder / "cat" / "0.png"
  bad.write_bytes(b"no image")
  (folder / "notes.txt").write_text("not looked at")
  given = ["predict", f"--checkpoint={reference.workdir}", str(folder)]
  files = sorted(map(str, folder.rglob("*.png")))
  assert len(files) == 24
  assert main([*given, "--json"]) == 2
  out, err = capsys.readouterr()
  rows = json.loads(out)
  assert [row["image"] for row in rows] == files
  assert [row["image"] for row in rows if "classes" not in row] == [str(bad)]
  assert err.splitlines() == [f"error: {rows[0]['error']}"]
  assert str(bad) in err
  # One by one they get the same.
  assert main([given[0], given[1], files[-1], "--json"]) == 0
  (alone,) = json.loads(capsys.readouterr().out)
  assert [c["name"] for c in alone["classes"]] == [
    c["name"] for c in rows[-1]["classes"]
  ]


def test_output_that_its_reader_does_not_take(capsys, monkeypatch, tmp_path):
  """`| head`, and a terminal that has no letter for a name."""
  reading, writing = os.pipe()
  os.close(reading)
  with open(writing, "w") as unread:
    monkeypatch.setattr(sys, "stdout", unread)
    assert main(["tables"]) == 141
    monkeypatch.undo()
  names = tmp_path / "names.txt"
  # With a byte order mark, as some editors write it.
  names.write_text("\n".join(f"\u00e4{i}" for i in range(10)), "utf-8-sig")
  image = make_folder(tmp_path / "images") / "cat" / "0.png"
  narrow = io.TextIOWrapper(io.BytesIO(), "ascii")
  monkeypatch.setattr(sys, "stdout", narrow)
  given = ["predict", "--checkpoint=ViT-N_8-digits", f"--class_names={names}"]
  assert main([*given, "--top=10", str(image)]) == 0
  text = narrow.buffer.getvalue().decode()
  monkeypatch.undo()
  assert sorted(re.findall(r"% +(.*)", text)) == [
    f"\\xe4{i}" for i in range(10)
  ]
  assert not capsys.readouterr().err


_STRICT = {"rank": "raise", "dtype": "strict"}


@pytest.fixture
def strict(monkeypatch):
  """What JAX_NUMPY_RANK_PROMOTION=raise and ..._DTYPE_...=strict say."""
  for name, value in _STRICT.items():
    monkeypatch.setenv(f"JAX_NUMPY_{name.upper()}_PROMOTION", value)
    jax.config.update(f"jax_numpy_{name}_promotion", value)
  yield
  jax.config.update("jax_numpy_rank_promotion", "allow")
  jax.config.update("jax_numpy_dtype_promotion", "standard")


def test_a_model_in_strict_code(strict):
  model = vit_jax.load("ViT-N_8-digits", dtype="bfloat16")
  images = np.zeros((1, *model.config.image_size, 3), np.float32)
  assert model(images).shape == (1, 10)
  assert jax.config.jax_numpy_rank_promotion == "raise"


@pytest.mark.ci
def test_commands_in_a_strict_environment(strict, runs, tmp_path):
  image = make_folder(tmp_path / "images") / "cat" / "1.png"
  workdir = tmp_path / "run"
  options = ("total_steps=1", "schedule.warmup_steps=0", "model.dtype=bfloat16")
  assert main(runs.train_args(workdir, *options)) == 0
  assert main(["evaluate", f"--workdir={workdir}"]) == 0
  assert main(["predict", f"--checkpoint={workdir}", str(image)]) == 0


def test_sizes(fails):
  parser = make_parser()
  for command in (
    "linear --checkpoint=x --dataset=x",
    *("export x y --to=onnx", "figures --out=x", "data show x"),
    *("bench step", "bench input"),
  ):
    for text, wanted in (("48,96", (48, 96)), ("48", 48)):
      given = [*command.split(), f"--image_size={text}"]
      assert parser.parse_args(given).image_size == wanted
  for size in ("48,96,3", "0", "48,-1", "large", "4.5", ","):
    fails(["data", "show", "x", f"--image_size={size}"], "--image_size", size)


def test_data_without_what_it_needs(fails, tmp_path):
  where = f"--data_dir={tmp_path}"
  fails(["data"], "ACTION")
  fails(["data", "prepare", "digit", where], "did you mean 'digits'?")
  fails(["data", "show", "folder:/no/such"], "/no/such is not a folder")
  assert not list(tmp_path.iterdir())


def test_data_check_says_what_is_missing(capsys, tmp_path):
  assert main(["data", "check", "digits", f"--data_dir={tmp_path}"]) == 2
  out, err = capsys.readouterr()
  assert f"not ready (missing): {tmp_path}/digits" in out
  (line,) = err.splitlines()
  assert "data prepare digits" in line


# --- a process of its own ---


def run_python(*args):
  return subprocess.run(
    [sys.executable, *map(str, args)],
    cwd=REPO,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


def test_a_mistake_in_a_real_process(runs, tmp_path):
  args = runs.train_args(tmp_path / "run", "model.variant=ViT-Q_8")
  done = forks.run(["-m", "vit_jax", *args], cwd=REPO)
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: unknown model variant 'ViT-Q_8'; it is ViT-")
  assert not (tmp_path / "run").exists()


@pytest.mark.ci
def test_a_platform_that_is_not_there(fork_server, tmp_path):
  image = make_folder(tmp_path) / "cat" / "1.png"
  given = ["-m", "vit_jax", "predict", "--checkpoint=ViT-N_8-digits", image]
  environment = {**os.environ, "JAX_PLATFORMS": "rubbish"}
  done = forks.run(given, env=environment, cwd=REPO)
  assert (done.returncode, done.stdout) == (2, "")
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: JAX has no device with JAX_PLATFORMS='rubb")
  # What needs none does not look for it.
  given = ["-m", "vit_jax", "inspect", "ViT-N_8-digits"]
  done = forks.run(given, env=environment, cwd=REPO)
  assert (done.returncode, done.stderr) == (0, "")


def test_help():
  done = run_python("-m", "vit_jax", "--help")
  assert done.returncode == 0
  for command in ("train", "evaluate", "predict", "data", "quickstart"):
    assert re.search(rf"^ +{command}\s+\w", done.stdout, re.M)
  assert not done.stderr


HEAVY = ("tensorflow", "tensorflow_datasets", "clu", "sklearn")
PREDICT = """
import sys
from vit_jax.__main__ import main
assert main(sys.argv[1:]) == 0
print([name for name in %r if name in sys.modules])
"""


def test_importing_the_package_imports_nothing_heavy():
  code = "import sys, vit_jax; print([n for n in %r if n in sys.modules])"
  heavy = (*HEAVY, "jax", "flax", "orbax", "numpy")
  assert run_python("-c", code % (heavy,)).stdout == "[]\n"


@pytest.mark.ci
def test_predict_imports_no_tensorflow(reference, tmp_path):
  image = make_folder(tmp_path) / "cat" / "1.png"
  args = ["predict", f"--checkpoint={reference.workdir}", "--json", image]
  done = run_python("-c", PREDICT % (HEAVY,), *args)
  assert not done.stderr
  results, heavy = done.stdout.splitlines()
  assert heavy == "[]"
  assert json.loads(results)[0]["image"] == str(image)
