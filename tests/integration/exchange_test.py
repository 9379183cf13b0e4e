"""Weights of any origin through the commands: train, evaluate, predict, ..."""

import json
import resource

import numpy as np
import pytest
from PIL import Image
from random_models import random_weights

import vit_jax
from vit_jax import pretrained
from vit_jax.__main__ import main
from vit_jax.data import preprocess
from vit_jax.pretrained.weights import as_lazy
from vit_jax.state import flatten
from vit_jax.tools import demo, export, figures
from vit_jax.training.steps import normalize

SMALL = "w32d2m64h2"


@pytest.fixture
def run(capsys):
  """Returns a function that runs a command and returns (code, out, err)."""

  def run_command(*args):
    code = main(list(map(str, args)))
    out, err = capsys.readouterr()
    return code, out, err

  return run_command


def _write(path, variant, to="npz", size=16, **options):
  """Writes random weights for the ten digits; returns {path: array}."""
  weights = random_weights(variant, size, **options)
  pretrained.write(weights, str(path), to)
  return {name: x.read() for name, x in weights.params.items()}


@pytest.mark.parametrize(
  ("variant", "resized"),
  [
    pytest.param(f"ViT-{SMALL}_8", True, marks=pytest.mark.ci),
    pytest.param(f"RN+ViT-{SMALL}_8", True, marks=pytest.mark.nightly),
    pytest.param("RNx1", False, marks=pytest.mark.nightly),
  ],
)
def test_fine_tuning_from_a_file(variant, resized, runs, run, tmp_path, caplog):
  source = tmp_path / "weights.npz"
  params = _write(source, variant)
  workdir = tmp_path / "run"
  overrides = [
    f"init_from={source}",
    f"model.variant={variant}",
    f"model.scan={resized}",
    "model.dropout_rate=0.0",
    "image_size=32",
    "total_steps=3",
    "schedule.warmup_steps=0",
    "schedule.base_lr=1e-5",
    "schedule.linear_end=1e-5",
  ]
  with caplog.at_level("INFO", logger="vit_jax"):
    code, _, err = run(*runs.train_args(workdir, *overrides))
  assert code == 0, err
  assert "new: head/kernel" in caplog.text
  positions = "resized: Transformer/posembed_input/pos_embedding 2x2 -> 4x4"
  assert (positions in caplog.text) == resized
  # Three small steps of Adam: the file's weights, and each has moved a little.
  after = flatten(vit_jax.load(str(workdir)).params)
  if resized:
    lazy = {path: as_lazy(np.asarray(x)) for path, x in after.items()}
    unrolled = pretrained.match_layout(lazy, scan=False)
    after = {path: x.read() for path, x in unrolled.items()}
  for path, x in params.items():
    if path.startswith("head/") or path.endswith("pos_embedding"):
      continue
    np.testing.assert_allclose(after[path], x, atol=2e-4, err_msg=path)
    # A shift of all keys changes no softmax.
    assert (after[path] != x).any() or path.endswith("key/bias"), path
  code, out, err = run("evaluate", f"--workdir={workdir}", "--json")
  assert (code, json.loads(out)["examples"]) == (0, 40), err


@pytest.mark.nightly
def test_a_converted_run_trains_like_the_run(runs, reference, run, tmp_path):
  converted = tmp_path / "weights"
  code, _, err = run("convert", reference.workdir, converted, "--to=orbax")
  assert code == 0, err
  results = []
  for i, source in enumerate((reference.workdir, converted)):
    workdir = tmp_path / f"run{i}"
    overrides = ["total_steps=2", "schedule.warmup_steps=0", "image_size=32"]
    code, _, err = run(
      *runs.train_args(workdir, f"init_from={source}", *overrides)
    )
    assert code == 0, err
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    results.append([_without_times(json.loads(line)) for line in lines])
  assert results[0] == results[1]
  assert results[0][0]["train/loss"] < 3


def _without_times(values):
  return {
    k: x for k, x in values.items() if "second" not in k and "time" not in k
  }


@pytest.mark.ci
def test_evaluate_and_predict_take_a_converted_run(
  runs, reference, run, tmp_path
):
  source = tmp_path / "weights.npz"
  code, out, _ = run("convert", reference.workdir, source, "--to=npz")
  lost = (
    "note: npz does not keep the class names; after conversion it is none\n"
  )
  assert (code, out) == (0, f"{lost}{source}: {reference.workdir} as npz\n")
  where = f"--data_dir={runs.data_dir}"
  code, out, _ = run(
    "evaluate", f"--workdir={reference.workdir}", where, "--json"
  )
  expected = json.loads(out)
  data = ["--dataset=digits", "--split=test[:40]", where]
  code, out, _ = run("evaluate", f"--checkpoint={source}", *data, "--json")
  found = json.loads(out)
  assert found["examples"] == 40
  assert found["accuracy"] == expected["accuracy"]
  assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
  # Every result says how it was come by.
  assert expected["preprocess"] == found["preprocess"] == "resize(size)"
  assert expected["image_size"] == found["image_size"]

  image = tmp_path / "digit.png"
  _save_digit(runs, image)
  answers = []
  for checkpoint in (reference.workdir, source):
    code, out, _ = run("predict", f"--checkpoint={checkpoint}", image, "--json")
    answers.append(json.loads(out)[0]["classes"])
  for mine, theirs in zip(*answers, strict=True):
    assert theirs["name"] == f"class {mine['name']}"
    assert theirs["probability"] == pytest.approx(mine["probability"], rel=1e-4)

  names = tmp_path / "names.txt"
  names.write_text("\n".join(f"digit {i}" for i in range(10)))
  given = ["predict", f"--checkpoint={source}", image]
  code, out, _ = run(*given, f"--class_names={names}")
  assert f"digit {answers[0][0]['name']}\n" in out
  names.write_text("one\ntwo\n")
  code, _, err = run(*given, f"--class_names={names}")
  assert code == 2
  assert "has 2 lines; the head has 10 classes" in err


def _save_digit(runs, file):
  from vit_jax import data

  source = data.get_source("digits", "test", str(runs.data_dir))
  encoded, _ = source.parse(source.read(np.array([0]))[0])
  file.write_bytes(encoded.numpy())
  assert Image.open(file).size == (8, 8)


@pytest.mark.ci
@pytest.mark.parametrize("known", ["ecba", "cab"])  # "e" has no images
def test_classes_are_matched_by_name(known, run, tmp_path):
  photos = tmp_path / "photos"
  rng = np.random.default_rng(0)
  for name in "abc":
    (photos / name).mkdir(parents=True)
    for i in range(8):
      pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
      Image.fromarray(pixels).save(photos / name / f"{i}.png")
  source = tmp_path / "weights"
  weights = random_weights(f"ViT-{SMALL}_8", num_classes=len(known))
  pretrained.write(weights._replace(class_names=[*known]), str(source), "hf")
  given = f"--checkpoint={source}"
  code, out, _ = run("predict", given, "--json", photos)
  rows = json.loads(out)
  assert (code, len(rows)) == (0, 24)
  right = [row["classes"][0]["name"] in row["image"].split("/") for row in rows]
  data = [f"--dataset=folder:{photos}", "--split=train+test", "--json"]
  code, out, err = run("evaluate", given, *data)
  assert code == 0, err
  assert json.loads(out)["accuracy"] == np.mean(right, dtype=np.float32)


@pytest.mark.ci
@pytest.mark.parametrize("size", [16, pytest.param(32, marks=pytest.mark.ci)])
def test_all_commands_prepare_an_image_alike(size, run, tmp_path):
  """At the weights' own size, 16, and at another, where it shows as much."""
  text = "resize_small(24)|central_crop(size)"
  same_part = f"resize_small({24 * size // 16})|central_crop({size})"
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (40, 28, 3), np.uint8)
  for name in "ab":
    (tmp_path / "photos" / name).mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "photos" / name / "0.png")
  file = tmp_path / "photos" / "a" / "0.png"
  weights = random_weights(f"ViT-{SMALL}_8", num_classes=2)._replace(
    class_names=["a", "b"], preprocess=text
  )
  source = str(tmp_path / "weights")
  pretrained.write(weights, source, "orbax")
  model = vit_jax.load(source, image_size=size)
  prepared = preprocess.preprocess_image(pixels, same_part, size)
  expected = np.asarray(model.probabilities(normalize(prepared[None])))[0]
  assert expected.min() > 1e-3  # both classes are in it

  found = {}
  viewed, *_ = demo.Viewer(source).view(str(file), "", (size, size))
  found["demo"] = {c["name"]: c["probability"] for c in viewed}
  drawn = figures._read(source, "", [str(file)], size, None)
  np.testing.assert_array_equal(drawn.pictures[0], prepared)
  told = "|".join(
    f"{x.pop('op')}({', '.join(f'{k}={x[k]!r}' for k in x)})"
    for x in export.describe(model)["preprocessing"]
  )
  said = preprocess.preprocess_image(pixels, told, size)
  np.testing.assert_array_equal(said, prepared)
  data = [f"--dataset=folder:{tmp_path}/photos", "--json"]
  splits = ["--train_split=train+test", "--test_split=train+test"]
  given = [f"--checkpoint={source}", *data]
  code, out, err = run(
    "linear", *given, *splits, f"--image_size={size}", "--shots=1"
  )
  assert code == 0, err
  said = preprocess.preprocess_image(
    pixels, json.loads(out)["preprocess"], size
  )
  np.testing.assert_array_equal(said, prepared)
  if size == 16:
    _, out, _ = run("predict", given[0], file, "--json")
    (row,) = json.loads(out)
    found["predict"] = {c["name"]: c["probability"] for c in row["classes"]}
    _, out, _ = run("evaluate", *given, "--split=train+test")
    loss = -np.log(expected).mean()
    assert json.loads(out)["loss"] == pytest.approx(loss, rel=1e-4)
  for command, classes in found.items():
    for i, name in enumerate("ab"):
      assert classes[name] == pytest.approx(expected[i], rel=1e-4), command


def test_positions_are_resized_in_the_way_that_is_given(run, tmp_path):
  source, out = tmp_path / "weights", tmp_path / "dinov2"
  _write(source, f"ViT-{SMALL}_8", "orbax")
  code, _, err = run("convert", source, out, "--to=orbax", "--resize=dinov2")
  assert code == 0, err
  found = vit_jax.load(str(out), image_size=32)
  expected = vit_jax.load(str(source), image_size=32, resize="dinov2")
  assert found.config.resize == expected.config.resize == "dinov2"
  found, expected = flatten(found.params), flatten(expected.params)
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name], x, err_msg=name)
  for name in "ab":
    (tmp_path / "photos" / name).mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / name / "0.png")
  data = [f"--dataset=folder:{tmp_path}/photos", "--test_split=train+test"]
  for command in (
    ["convert", source, tmp_path / "out", "--to=npz"],
    ["export", source, tmp_path / "out", "--to=saved_model"],
    ["figures", f"--checkpoint={source}", f"--out={tmp_path}/figures"],
    ["linear", f"--checkpoint={source}", *data, "--train_split=train+test"],
    ["embed", source, tmp_path / "photos", f"--out={tmp_path}/out.npz"],
  ):
    code, _, err = run(*command, "--resize=dinov3")
    assert code == 2
    assert "resize is 'dinov3'; choose from corner_aligned, timm, " in err


def test_evaluate_needs_to_know_the_data(reference, runs, run, tmp_path):
  source = tmp_path / "weights.npz"
  _write(source, f"ViT-{SMALL}_8")
  code, _, err = run("evaluate", f"--checkpoint={source}")
  assert code == 2
  assert "does not name its data; give --dataset=NAME and --split" in err


def test_another_arithmetic_is_refused(runs, run, tmp_path):
  source = tmp_path / "weights"
  variant = f"ViT-{SMALL}_8"
  _write(source, variant, "orbax", activation="gelu_erf")
  workdir = tmp_path / "run"
  args = runs.train_args(
    workdir, f"init_from={source}", f"model.variant={variant}"
  )
  code, _, err = run(*args)
  assert code == 2
  assert "add --config.model.activation=gelu_erf" in err
  assert not workdir.exists()


def test_inspect(run, tmp_path):
  source = tmp_path / "weights.npz"
  params = _write(source, f"ViT-{SMALL}_8", representation_size=16)
  code, out, _ = run("inspect", source, "--json")
  assert code == 0
  found = json.loads(out)
  assert found["origin"] == "vision_transformer"
  assert found["variant"] == f"ViT-{SMALL}_8"
  assert found["image_size"] == [16, 16]
  assert found["head"] == "trained"
  assert found["num_parameters"] == sum(x.size for x in params.values())
  rows = {row["path"]: row for row in found["parameters"]}
  assert rows.keys() == params.keys()
  for path, x in params.items():
    assert rows[path]["shape"] == list(x.shape)
    assert rows[path]["mean"] == pytest.approx(x.mean(), abs=1e-6)
  code, out, _ = run("inspect", source)
  for words in (
    "patch 8, grid 2x2",
    "TRAINED, from token through a tanh",
    "cls",
  ):
    assert words in out


def test_inspect_alone_lists_the_published_names(run):
  code, out, _ = run("inspect")
  assert code == 0
  assert "gs://vit_models/imagenet21k/ViT-B_16.npz" in out


def test_bad_files_are_one_line_and_exit_code_2(run, tmp_path):
  good = tmp_path / "good.npz"
  _write(good, f"ViT-{SMALL}_8")
  truncated = tmp_path / "truncated.npz"
  truncated.write_bytes(good.read_bytes()[:-100])
  text = tmp_path / "text.npz"
  text.write_text("not weights")
  pickled = tmp_path / "pickled.npz"
  np.savez(pickled, **{"embedding/kernel": np.array([{}], dtype=object)})
  other = tmp_path / "bert"
  _write(other, f"ViT-{SMALL}_8", to="hf")
  config = (other / "config.json").read_text()
  (other / "config.json").write_text(config.replace('"vit"', '"bert"'))
  for source in (truncated, text, pickled, other, tmp_path / "gone.npz"):
    for command in (
      ["inspect", source],
      ["convert", source, tmp_path / "out", "--to=npz"],
      ["predict", f"--checkpoint={source}", "image.png"],
    ):
      code, out, err = run(*command)
      assert (code, out) == (2, ""), command
      (line,) = err.splitlines()
      assert line.startswith("error: ")
      assert str(source) in line
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["npz", "hf", "orbax"])
def test_convert_to_what_cannot_be_written(to, run, tmp_path):
  source = tmp_path / "weights.npz"
  _write(source, f"ViT-{SMALL}_8")
  before = {file.name for file in tmp_path.iterdir()}
  (tmp_path / "link").symlink_to(tmp_path / "gone")
  code, _, err = run("convert", source, tmp_path / "link", f"--to={to}")
  assert (code, len(err.splitlines())) == (2, 1)
  assert f"{tmp_path}/link is a link to {tmp_path}/gone" in err
  (tmp_path / "link").unlink()
  code, _, err = run("convert", source, source / "out", f"--to={to}")
  assert code in (1, 2)
  assert len(err.splitlines()) == 1
  assert f"{source}/out" in err
  # A full disk, in other words: nothing may become larger than this.
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
  try:
    code, _, err = run("convert", source, tmp_path / "out", f"--to={to}")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert (code, len(err.splitlines())) == (1, 1), err
  assert err.startswith(f"stopped: could not write {tmp_path}/out: ")
  assert {file.name for file in tmp_path.iterdir()} == before


def test_convert_overwrites_nothing(run, tmp_path):
  source = tmp_path / "weights.npz"
  _write(source, f"ViT-{SMALL}_8")
  out = tmp_path / "mine"
  out.write_text("mine")
  for to in pretrained.FORMATS:
    code, _, err = run("convert", source, out, f"--to={to}")
    assert (code, out.read_text()) == (2, "mine")
    assert str(out) in err
  code, _, err = run("convert", source, tmp_path / "x", "--to=npzz")
  assert code == 2
  assert "did you mean 'npz'?" in err
