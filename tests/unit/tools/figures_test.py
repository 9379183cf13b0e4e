"""Figures: their numbers against other code, their files as people get them."""

import csv
import json

import fake_runs
import numpy as np
import pytest
import random_models
from PIL import Image
from random_models import models_are_kept  # noqa: F401 - a fixture
from scipy.spatial import distance
from sklearn import decomposition

from vit_jax import __main__, pretrained
from vit_jax.data.preprocess import preprocess_image
from vit_jax.evaluation import attention_maps
from vit_jax.tools import figures
from vit_jax.training.steps import normalize

_VARIANT = "ViT-w8d2m12h2_8"
_OF_RUNS = "ViT-w64d2m256h2_32"


def write(path, variant=_VARIANT, **options):
  """Writes a tiny model with random weights in the published format."""
  weights = random_models.random_weights(variant, **options)
  pretrained.write(weights, str(path), "npz")
  return str(path)


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
  """Drawing pixels is most of the time."""
  monkeypatch.setattr(figures, "_DPI", 30)


@pytest.fixture
def pictures(tmp_path):
  """Three pictures of different sizes."""
  rng = np.random.default_rng(0)
  paths = [str(tmp_path / f"{i}.png") for i in range(3)]
  for path, shape in zip(paths, ((20, 30), (16, 16), (9, 50)), strict=True):
    pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
  return paths


@pytest.fixture
def run(capsys, caplog):
  """Runs `vit-jax figures`; returns (exit code, stdout, stderr, log)."""

  def run_one(*args):
    caplog.clear()
    code = __main__.main(["figures", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err, caplog.text

  return run_one


def read_csv(path):
  with open(path, newline="") as f:
    return list(csv.DictReader(f))


def write_run(path, losses, accuracy=None, init_from=None):
  """Makes a run folder as `train` leaves it."""
  total = len(losses)
  config = fake_runs.load(
    "finetune.py:ViT-B_32,cifar10",
    model__variant=_OF_RUNS,
    image_size=224,
    batch_size=1000,
    init_from=init_from or "",
  )
  lines = [{"step": i + 1, "train/loss": x} for i, x in enumerate(losses)]
  if accuracy is not None:
    lines.append({"step": total, "eval/accuracy": accuracy})
  return fake_runs.write(
    path,
    config,
    lines,
    total_steps=total,
    unfinished='{"step',
    class_names=["a"] * 9,
  )


@pytest.mark.ci
def test_several_checkpoints_have_a_panel_each(run, pictures, tmp_path):
  plain = write(tmp_path / "plain.npz")
  hybrid = write(tmp_path / "hybrid.npz", f"RN+{_VARIANT}", image_size=32)
  resnet = write(tmp_path / "resnet.npz", "RNx1", image_size=32)
  sources = [f"--checkpoint={path}" for path in (plain, hybrid, resnet)]
  out = tmp_path / "figures"
  code, said, err, log = run(*sources, *pictures, f"--out={out}")
  assert (code, log) == (0, ""), err
  names = ("rollout", "filters", "positions", "distances")
  files = [out / f"{n}.{kind}" for n in names for kind in ("png", "svg", "csv")]
  assert said.split() == [str(file) for file in files]
  assert sorted(out.iterdir()) == sorted(files)
  tables = {}
  for name in names:
    with Image.open(out / f"{name}.png") as image:
      image.load()
    assert "<svg" in (out / f"{name}.svg").read_text()
    for row in read_csv(out / f"{name}.csv"):
      rows = tables.setdefault(name, {}).setdefault(row["checkpoint"], [])
      rows.append(float([*row.values()][-1]))
  both = ["plain.npz", "hybrid.npz"]
  assert {name: [*found] for name, found in tables.items()} == {
    **dict.fromkeys(names, both),
    "filters": both[:1],
  }

  model = pretrained.load(plain)
  about = model.config
  pixels = [
    preprocess_image(p, about.preprocess, about.image_size) for p in pictures
  ]
  looks = attention_maps.make_look(model)(normalize(np.stack(pixels)))
  for name, expected in (
    ("rollout", looks.maps),
    ("distances", looks.distances.mean(0)),
  ):
    found = tables[name]["plain.npz"]
    np.testing.assert_allclose(found, expected.ravel(), rtol=1e-4, atol=1e-6)
  assert len(tables["positions"]["plain.npz"]) == 2**4
  assert tables["positions"]["plain.npz"][0] == pytest.approx(1)

  # Twice the same is the same to the byte, and nothing is overwritten.
  again = tmp_path / "again"
  run(*sources, *pictures, f"--out={again}", "--only=positions")
  for file in again.iterdir():
    assert file.read_bytes() == (out / file.name).read_bytes()
  code, _, err, _ = run(*sources, f"--out={out}")
  assert code == 2
  assert "rollout.png exists; nothing is overwritten" in err
  code, _, err, _ = run(
    sources[2], *pictures, f"--out={tmp_path}", "--only=rollout"
  )
  assert code == 2
  assert err.startswith("error: cannot be drawn: rollout: it needs images, and")


def test_components_are_those_of_another_library():
  rng = np.random.default_rng(0)
  filters = rng.normal(size=(4, 4, 3, 40)) * rng.uniform(size=(4, 4, 3, 1))
  found, variance = figures.find_components(filters, 5)
  pca = decomposition.PCA(5).fit(filters.reshape(48, 40).T)
  expected = pca.components_
  signs = np.sign(np.sum(found.reshape(5, 48) * expected, axis=1))
  np.testing.assert_allclose(
    found.reshape(5, 48), expected * signs[:, None], atol=1e-9
  )
  np.testing.assert_allclose(variance, pca.explained_variance_ratio_)
  assert (found.max(axis=(1, 2, 3)) == np.abs(found).max(axis=(1, 2, 3))).all()


def test_similarities_are_cosines():
  positions = np.random.default_rng(0).normal(size=(2, 3, 5))
  found = figures.compare_positions(positions)
  flat = positions.reshape(6, 5)
  expected = 1 - distance.cdist(flat, flat, "cosine")
  np.testing.assert_allclose(found.reshape(6, 6), expected, atol=1e-12)


@pytest.mark.parametrize(
  ("kind", "at", "classifier"),
  [
    ("learned", "input", "token"),
    ("2d", "input", "gap"),
    ("sincos2d", "input", "token"),
    ("learned", "every_layer", "gap"),
  ],
)
def test_positions_are_what_the_model_adds(kind, at, classifier):
  weights = random_models.random_weights(
    "ViT-w8d1m12h2_8",
    (16, 24),
    classifier=classifier,
    pos_embedding=kind,
    pos_embedding_at=at,
  )
  model = pretrained.assemble(weights)
  about = model.config
  params = {path: x.read() for path, x in weights.params.items()}
  found = figures.read_positions(params, about)
  images = random_models.random_images(model.model, 1)
  if at == "input":
    _, out = random_models.jit(model.model)(
      model.params, images, intermediates=True
    )
    added = out["embedded"][0, -6:] - out["stem"].reshape(6, -1)
  else:
    name = "Transformer/encoderblock_0/posembed/pos_embedding"
    added = params[name][0, -6:]
  np.testing.assert_allclose(found.reshape(6, -1), added, atol=1e-5)


def test_curves_and_compute_of_runs(run, tmp_path):
  runs = tmp_path / "runs"
  origin = write_run(runs / "big" / "pretrain", [3.0, 2.0, 1.0])
  file = origin / "metrics.jsonl"
  for step in (1, 3):  # of config.evals.few
    line = {"step": step, "few/5shot": step / 4, "few/examples": 100}
    file.write_text(f"{json.dumps(line)}\n{file.read_text()}")
  write_run(runs / "cifar10", [1.0, 0.5], 0.9, init_from=origin)
  out = tmp_path / "out"
  code, said, err, _ = run(f"--runs={runs}", f"--out={out}")
  assert code == 0, err
  assert len(said.split()) == 6
  curves = {}
  for row in read_csv(out / "curves.csv"):
    if row["run"] == "big/pretrain":
      points = curves.setdefault(row["name"], [])
      points.append((int(row["step"]), float(row["value"])))
  assert curves == {
    "train/loss": [(1, 3), (2, 2), (3, 1)],
    "few/5shot": [(1, 0.25), (3, 0.75)],
  }
  rows = read_csv(out / "compute.csv")

  # Three steps of 1,000 images, 6 x the multiply-adds by the usual formula,
  # n d (4 d + 2 n + 8 d) a layer and the patches.
  def count(n, d=64):
    products = 2 * n * d * (4 * d + 2 * n + 8 * d) + 49 * 3072 * d + 9 * d
    return pytest.approx(6 * 3000 * products / 1e18)

  mine = next(row for row in rows if row["whose"] == "ours")
  assert float(mine["exaflops"]) == count(50)
  assert float(mine["accuracy"]) == 90
  assert mine["dataset"] == "cifar10"
  # The paper's 18 models beside it.
  papers = [row for row in rows if row["whose"] == "the paper"]
  assert len(papers) == 18
  assert {row["kind"] for row in papers} == {"ViT", "hybrid", "ResNet"}


def test_names_are_not_formulas_and_tell_checkpoints_apart(run, tmp_path):
  for folder in ("a $x_{", "b"):
    (tmp_path / folder).mkdir()
    write(tmp_path / folder / "m.npz")
  sources = [f"--checkpoint={tmp_path}/{f}/m.npz" for f in ("a $x_{", "b")]
  for i in range(12):  # more than have colours
    write_run(tmp_path / "runs" / f"_é $x_{{$ {i}", [2.0, 1.0])
  out = tmp_path / "out"
  only = "--only=positions,curves"
  code, _, err, _ = run(
    *sources, f"--runs={tmp_path}/runs", only, f"--out={out}"
  )
  assert code == 0, err
  labels = {row["checkpoint"] for row in read_csv(out / "positions.csv")}
  assert labels == {"a $x_{/m.npz", "b/m.npz"}
  rows = read_csv(out / "curves.csv")
  assert {row["run"] for row in rows} == {f"_é $x_{{$ {i}" for i in range(12)}


def test_a_disk_without_room_leaves_nothing(run, tmp_path, monkeypatch):
  source, out = write(tmp_path / "vit.npz"), tmp_path / "out"

  def fail(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(figures.csv, "writer", fail)
  code, _, err, _ = run(f"--checkpoint={source}", f"--out={out}")
  assert code == 2
  assert "No space left on device" in err
  assert not list(out.iterdir())


@pytest.mark.parametrize(
  ("args", "said"),
  [
    (["--only=rolout"], "did you mean 'rollout'?"),
    ([], "nothing to draw from; give --checkpoint=SOURCE or --runs="),
    (["--checkpoint=/no/such"], "/no/such"),
    (["--runs=/no/such"], "no such folder"),
    (["--runs=/no/such", "a.png"], "give --checkpoint=SOURCE"),
    # All that was asked for, or nothing.
    (["--only=filters,rollout", "--checkpoint="], "rollout: it needs images"),
    (["--only=filters,curves", "--checkpoint="], "curves: it needs runs"),
  ],
)
def test_mistakes(run, args, said, tmp_path):
  if args[-1:] == ["--checkpoint="]:
    args = [*args[:-1], f"--checkpoint={write(tmp_path / 'vit.npz')}"]
  code, _, err, _ = run(*args, f"--out={tmp_path / 'out'}")
  assert code == 2
  assert said in err
  assert err.count("\n") == 1
  assert not (tmp_path / "out").exists()
