"""Features of image files: what is taken, written, and resumed."""

import numpy as np
import pytest
from mistakes import named
from PIL import Image
from pyarrow import parquet
from random_models import random_weights

import vit_jax
from vit_jax import pretrained
from vit_jax.data import preprocess
from vit_jax.evaluation import embed as embedding

_SOURCE = "ViT-N_8-digits"


@pytest.fixture
def pictures(tmp_path):
  """A folder of nine images and a file that is none."""
  folder = tmp_path / "pictures"
  folder.mkdir()
  rng = np.random.default_rng(0)
  for i in range(9):
    pixels = rng.integers(0, 256, (30, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / f"{i}.png")
  (folder / "broken.png").write_bytes(b"not an image")
  return folder


def _expect(pictures, **choice):
  """What `Pretrained.features` gives for one image after the other."""
  model = vit_jax.load(_SOURCE)
  about = model.config
  names = [str(pictures / f"{i}.png") for i in range(9)]
  pixels = [
    preprocess.preprocess_image(name, about.preprocess, about.image_size)
    for name in names
  ]
  images = np.float32(pixels) / 127.5 - 1
  return names, np.asarray(model.features(images, **choice))


@pytest.mark.ci
def test_a_killed_command_resumes(pictures, tmp_path, monkeypatch):
  monkeypatch.setattr(embedding, "_PART", 4)
  out = tmp_path / "features.npz"
  choice = {"what": "mean", "layers": (-1, 0)}
  read, seen = preprocess.preprocess_image, []

  def killed(path, *args):
    seen.append(path)
    if len(seen) == 6:
      raise KeyboardInterrupt
    return read(path, *args)

  monkeypatch.setattr(preprocess, "preprocess_image", killed)
  with pytest.raises(KeyboardInterrupt):
    embedding.embed(_SOURCE, [str(pictures)], str(out), **choice)
  assert not out.exists()
  with named("features.npz.parts", "other what"):
    embedding.embed(_SOURCE, [str(pictures)], str(out), what="mean")
  seen.extend([""] * 10)  # never six again
  again = len(seen)
  found = embedding.embed(_SOURCE, [str(pictures)], str(out), **choice)
  assert len(seen) - again == 6, "the first four were done"
  names, features = _expect(pictures, **choice)
  arrays = np.load(out)
  assert arrays["images"].tolist() == names
  np.testing.assert_allclose(arrays["features"], features, atol=1e-5)
  assert found["shape"] == [9, 256]
  (line,) = found["errors"]
  assert str(pictures / "broken.png") in line
  assert sorted(p.name for p in tmp_path.iterdir()) == [out.name, "pictures"]
  with named("features.npz exists"):
    embedding.embed(_SOURCE, [str(pictures)], str(out))


@pytest.mark.ci
def test_parquet_has_a_row_an_image(pictures, tmp_path):
  out = tmp_path / "features.parquet"
  embedding.embed(_SOURCE, [str(pictures)], str(out), what="patches")
  table = parquet.read_table(out)
  names, features = _expect(pictures, what="patches")
  assert features.shape == (9, 6, 6, 128)
  assert table["image"].to_pylist() == names
  np.testing.assert_allclose(
    np.array(table["features"].to_pylist()), features.reshape(9, -1), atol=1e-5
  )


@pytest.mark.ci
def test_parquet_of_no_image_at_all(pictures, tmp_path):
  out = tmp_path / "features.parquet"
  broken = str(pictures / "broken.png")
  found = embedding.embed(_SOURCE, [broken], str(out))
  assert found["shape"] == [0, 128]
  assert parquet.read_table(out).num_rows == 0


@pytest.mark.ci
def test_images_that_changed_are_not_joined_with_others(
  pictures, tmp_path, monkeypatch
):
  out = str(tmp_path / "features.npz")
  with monkeypatch.context() as patch:
    patch.setattr(embedding, "_join", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      embedding.embed(_SOURCE, [str(pictures)], out)
  (pictures / "3.png").write_bytes((pictures / "4.png").read_bytes())
  with named("features.npz.parts", "other images"):
    embedding.embed(_SOURCE, [str(pictures)], out)


@pytest.mark.parametrize(
  ("out", "words"),
  [
    ("features.csv", ".npz or .parquet"),
    ("gs://bucket/features.npz", "give a local file"),
  ],
)
def test_another_place_is_named(pictures, out, words):
  with named(out, words):
    embedding.embed(_SOURCE, [str(pictures)], out)


# --- which features ---


@pytest.mark.ci
def test_features_are_parts_of_the_tokens():
  weights = random_weights("ViT-w16d2m24h2_4", registers=2)
  model = pretrained.assemble(weights)
  images = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3))
  _, out = model.model.apply(model.params, images, intermediates=True)
  tokens = np.asarray(out["encoded"], np.float64)
  cls, patches = tokens[:, 0], tokens[:, 3:]
  expected = {
    "pooled": cls,
    "cls": cls,
    "mean": patches.mean(1),
    "cls+mean": np.concatenate([cls, patches.mean(1)], 1),
    "patches": patches.reshape(3, 4, 4, 16),
  }
  for what, x in expected.items():
    found = model.features(images, what=what)
    np.testing.assert_allclose(found, x, atol=1e-4, err_msg=what)
  both = model.features(images, what="cls", layers=(-1, -2))
  np.testing.assert_allclose(both[:, :16], cls, atol=1e-4)
  # The block before the last one, through the last LayerNorm.
  x = np.asarray(out["block00/out"], np.float64)[:, 0]
  x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
  norm = model.params["Transformer"]["encoder_norm"]
  x = x * np.asarray(norm["scale"]) + np.asarray(norm["bias"])
  np.testing.assert_allclose(both[:, 16:], x, atol=1e-4)


@pytest.mark.parametrize(
  ("options", "choice", "words"),
  [
    ({}, {"what": "all"}, "pooled, cls, mean"),
    ({"classifier": "gap"}, {"what": "cls"}, "no class token for 'cls'"),
    ({}, {"what": "cls", "layers": (2,)}, "some of 0 to 1"),
    ({}, {"layers": (-2,)}, "'pooled' is of the last"),
  ],
)
def test_what_a_model_does_not_have_is_named(options, choice, words):
  model = pretrained.assemble(random_weights("ViT-w16d2m24h2_4", **options))
  with named(words):
    model.features(np.zeros((1, 16, 16, 3), np.float32), **choice)
