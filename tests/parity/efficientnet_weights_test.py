"""EfficientNets of timm and TensorFlow: logits, a training step, files.

They need PyTorch and timm, but for Google's checkpoints, which TensorFlow
writes. `-s` prints the differences that docs/differences.md has.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mistakes import named
from random_models import random_weights

import vit_jax
from vit_jax import models, pretrained
from vit_jax.pretrained import archives, efficientnet
from vit_jax.state import flatten, unflatten

TOLERANCE = 1e-4  # of a standard deviation
SIZE = (72, 56)  # halved to odd numbers


@pytest.fixture(scope="module")
def libraries():
  """The libraries; imported here, as collecting this file needs none."""
  import torch_libraries

  return torch_libraries


def _make_images(batch=2, size=SIZE):
  """Returns f32[batch h w 3] in [-1, 1]."""
  shape = (batch, *size, 3)
  return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def _draw(libraries, model, seed=0):
  """Draws all parameters and running statistics of a module."""
  torch = libraries.torch
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, x in model.state_dict().items():
      if x.ndim > 1:
        inputs = x[0].numel()
        x.normal_(0, inputs**-0.5, generator=generator)
      elif name.endswith(("running_var", "weight")):
        x.uniform_(0.5, 1.5, generator=generator)
      elif x.is_floating_point():
        x.normal_(0, 0.3, generator=generator)
  return model


def _normalize(libraries, images):
  """Returns pixels as timm's models take them, f64[b 3 h w]."""
  pixels = (images.astype(np.float64) + 1) / 2
  pixels = (pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
  return libraries.torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _run_theirs(libraries, model, images):
  with libraries.torch.no_grad():
    return model.double().eval()(_normalize(libraries, images)).numpy()


def _difference(found, expected):
  assert found.shape == expected.shape
  return np.abs(found - expected).max() / expected.std()


# --- our names of timm's arrays, written by hand ---

_ENDS = {
  **{"conv_stem": "stem_conv", "bn1": "stem_norm", "conv_head": "head_conv"},
  **{"bn2": "head_norm", "classifier": "head"},
}
_EXCITE = {"se.conv_reduce": "se_reduce", "se.conv_expand": "se_expand"}
_FIRST = _EXCITE | {
  **{"conv_dw": "depthwise_conv", "bn1": "depthwise_norm"},
  **{"conv_pw": "project_conv", "bn2": "project_norm"},
}
_OTHERS = _EXCITE | {
  **{"conv_pw": "expand_conv", "bn1": "expand_norm"},
  **{"conv_dw": "depthwise_conv", "bn2": "depthwise_norm"},
  **{"conv_pwl": "project_conv", "bn3": "project_norm"},
}


def _to_ours(arrays):
  """{timm's name: array} -> {our path: array}."""
  places = {tuple(n.split(".")[1:3]) for n in arrays if n.startswith("blocks.")}
  order = sorted(places, key=lambda place: tuple(map(int, place)))
  found = {}
  for name, x in arrays.items():
    layer, _, leaf = name.rpartition(".")
    x = np.asarray(x, np.float64)
    if leaf == "num_batches_tracked":
      continue
    if layer.startswith("blocks."):
      _, stage, index, rest = layer.split(".", 3)
      number = order.index((stage, index))
      ours = (_FIRST if stage == "0" else _OTHERS)[rest]
      path = f"block{number:02d}/{ours}"
    else:
      path = ours = _ENDS[layer]
    if "norm" in ours:
      names = {"weight": "scale", "running_mean": "mean", "running_var": "var"}
      leaf = names.get(leaf, leaf)
    elif leaf == "weight":
      leaf = "kernel"
      x = (
        x.transpose(2, 3, 1, 0) if "conv" in ours else x.reshape(x.shape[:2]).T
      )
    found[f"{path}/{leaf}"] = x
  return found


def _with_pixels(params):
  return params | {
    "pixels/mean": 2 * np.array((0.485, 0.456, 0.406)) - 1,
    "pixels/std": 2 * np.array((0.229, 0.224, 0.225)),
  }


def _to_tree(params):
  return unflatten({path: x.astype(np.float32) for path, x in params.items()})


# --- values ---


@pytest.mark.ci
@pytest.mark.parametrize("size", ["b0", "b4"])
def test_logits_of_a_folder_of_timm_and_back(libraries, tmp_path, size):
  timm, images = libraries.timm, _make_images()
  name = f"tf_efficientnet_{size}"
  model = _draw(libraries, timm.create_model(name, num_classes=7))
  theirs, ours = str(tmp_path / "theirs"), str(tmp_path / "ours")
  timm.models._hub.save_for_hf(model, theirs, safe_serialization=True)
  expected = _run_theirs(libraries, model, images)
  loaded = vit_jax.load(theirs)
  difference = _difference(loaded(images), expected)
  print(f"| {name} | {difference:.1e} |")
  assert difference < TOLERANCE
  sides = {"b0": (224, 256), "b4": (380, 412)}[size]
  assert loaded.config.image_size == (sides[0],) * 2
  assert f"resize_small({sides[1]}" in loaded.config.preprocess
  if size != "b0":
    return
  assert pretrained.write(pretrained.read(theirs), ours, "timm") == []
  again = timm.create_model(f"local-dir:{ours}", pretrained=True)
  assert _difference(_run_theirs(libraries, again, images), expected) < 1e-9
  config = json.loads((tmp_path / "ours" / "config.json").read_text())
  assert config["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]
  assert (
    config["pretrained_cfg"]["crop_pct"] == model.pretrained_cfg["crop_pct"]
  )


@pytest.mark.ci
def test_first_stages_of_l2(libraries):
  """The others, 470 million parameters, are in neither library's memory."""
  torch, images = libraries.torch, _make_images(size=(40, 48))
  with torch.device("meta"):
    model = libraries.timm.create_model("tf_efficientnet_l2", num_classes=0)
  stages = [model.blocks[0], model.blocks[1], model.blocks[2][0]]
  parts = {"conv_stem": model.conv_stem, "bn1": model.bn1}
  parts |= {
    "blocks.0": stages[0],
    "blocks.1": stages[1],
    "blocks.2.0": stages[2],
  }
  arrays = {}
  for seed, (name, part) in enumerate(parts.items()):
    _draw(libraries, part.to_empty(device="cpu"), seed)
    for inner, x in part.state_dict().items():
      arrays[f"{name}.{inner}"] = x.numpy()
  x = _normalize(libraries, images)
  with torch.no_grad():
    for part in parts.values():
      x = part.double().eval()(x)
  ours = models.create(
    variant="EfficientNet-L2", num_classes=0, image_size=40, dtype="float32"
  )
  shapes = flatten(jax.eval_shape(ours.init, jax.random.key(0)))

  @jax.jit
  def run(params, images):
    params = {p: jnp.zeros(x.shape) for p, x in shapes.items()} | params
    _, out = ours.apply(unflatten(params), images, intermediates=True)
    return out["block17/out"]

  given = _with_pixels(_to_ours(arrays))
  assert len(given) == 2 + sum(
    path.startswith("stem") or (path[:5] == "block" and int(path[5:7]) <= 17)
    for path in shapes
  )
  found = run({p: x.astype(np.float32) for p, x in given.items()}, images)
  expected = x.permute(0, 2, 3, 1).numpy()
  assert _difference(found, expected) < TOLERANCE


def _train_theirs(libraries, model, images, targets):
  """Returns {name: gradient}, {name: new statistic}, {BatchNorm: examples}."""
  torch, counts = libraries.torch, {}

  def hook(name):
    def count(module, inputs, output):
      counts[name] = inputs[0].numel() // inputs[0].shape[1]

    return count

  model = model.double().train()
  for name, module in model.named_modules():
    if isinstance(module, torch.nn.BatchNorm2d):
      module.register_forward_hook(hook(name))
  logits = model(_normalize(libraries, images))
  (logits * torch.from_numpy(targets)).sum().backward()
  gradients = {name: x.grad.numpy() for name, x in model.named_parameters()}
  buffers = {name: x.numpy() for name, x in model.named_buffers()}
  return gradients, buffers, counts


@pytest.mark.nightly
def test_a_training_step(libraries):
  model = libraries.timm.models.efficientnet._gen_efficientnet(
    "tf_efficientnet_b0",
    channel_multiplier=0.25,
    depth_multiplier=0.4,
    bn_eps=1e-3,
    bn_momentum=0.01,  # of what is new
    pad_type="same",
    num_classes=7,
  )
  _draw(libraries, model)
  images = _make_images(batch=4)
  targets = np.random.default_rng(2).normal(size=(4, 7))
  old = {name: x.numpy().copy() for name, x in model.state_dict().items()}
  gradients, buffers, counts = _train_theirs(libraries, model, images, targets)
  for name, n in counts.items():  # PyTorch's variance is the unbiased one
    name = f"{name}.running_var"
    now = (buffers[name] - 0.99 * old[name]) / 0.01
    buffers[name] = 0.99 * old[name] + 0.01 * now * (n - 1) / n
  ours = models.create(
    variant="EfficientNet-N",
    num_classes=7,
    image_size=SIZE,
    dtype="float32",
    remat="full",
  )

  def loss(params, images):
    logits, new = ours.apply(
      params, images, train=True, key=jax.random.key(0), statistics=True
    )
    return (logits * targets.astype(np.float32)).sum(), new

  params = _to_tree(_with_pixels(_to_ours(old)))
  found, new = jax.jit(jax.grad(loss, has_aux=True))(params, images)
  found = flatten(found)
  expected = _to_ours(gradients)
  assert expected.keys() == {p for p in found if not models.is_statistic(p)}
  scale = max(np.abs(x).max() for x in expected.values())
  for path, x in expected.items():
    tolerance = TOLERANCE * np.abs(x).max() + 1e-7 * scale
    assert np.abs(found[path] - x).max() < tolerance, path
  expected = _to_ours(buffers)
  assert expected.keys() == new.keys()
  for path, x in expected.items():
    np.testing.assert_allclose(new[path], x, rtol=1e-5, atol=1e-6)


# --- Google's checkpoints ---

_BN = "tpu_batch_normalization"
_LEAVES = {"scale": "gamma", "bias": "beta", "mean": "moving_mean"}
_LEAVES |= {"var": "moving_variance"}


def _google_name(path):
  """Returns the variable of one of our paths, written by hand."""
  if path.startswith("head/"):
    return f"head/dense/{path[5:]}"
  *place, layer, leaf = path.split("/")
  if not place:
    place, role = layer.split("_")
    name = {"conv": "conv2d/kernel", "norm": f"{_BN}/{_LEAVES.get(leaf)}"}[role]
    return f"{place}/{name}"
  number = int(place[0][5:])
  names = {
    "expand_conv": "conv2d/kernel",
    "depthwise_conv": "depthwise_conv2d/depthwise_kernel",
    "project_conv": "conv2d_1/kernel" if number else "conv2d/kernel",
    "se_reduce": f"se/conv2d/{leaf}",
    "se_expand": f"se/conv2d_1/{leaf}",
  }
  norms = ["expand_norm", "depthwise_norm", "project_norm"]
  if layer in norms:
    i = norms[0 if number else 1 :].index(layer)
    return f"blocks_{number}/{_BN}{f'_{i}' if i else ''}/{_LEAVES[leaf]}"
  return f"blocks_{number}/{names[layer]}"


def _save_google(params, prefix, with_twins=True):
  """Writes a checkpoint as Google's code, with the slots of its optimizer."""
  import tensorflow as tf

  tensors = {"global_step": np.int64(3)}
  for path, x in params.items():
    if path.startswith("pixels/"):
      continue
    name = f"efficientnet-b0/{_google_name(path)}"
    if name.endswith("depthwise_kernel"):
      x = x.transpose(0, 1, 3, 2)
    elif "/se/" in name and name.endswith("kernel"):
      x = x[None, None]
    tensors[name] = x + 7 if with_twins else x
    tensors[f"{name}/RMSProp"] = np.ones_like(x)
    if with_twins:
      tensors[f"{name}/ExponentialMovingAverage"] = x
  tf.raw_ops.SaveV2(
    prefix=str(prefix),
    tensor_names=list(tensors),
    shape_and_slices=[""] * len(tensors),
    tensors=list(map(tf.constant, tensors.values())),
  )


@pytest.mark.ci
def test_googles_checkpoints(tmp_path):
  given = random_weights("EfficientNet-B0", 32)
  params = {path: x.read() for path, x in given.params.items()}
  for with_twins, source in ((True, "model.ckpt"), (False, "model.ckpt.index")):
    folder = tmp_path / str(with_twins)
    folder.mkdir()
    _save_google(params, folder / "model.ckpt", with_twins)
    weights = pretrained.read(str(folder / source))
    assert weights.model == {"variant": "EfficientNet-B0"}
    assert (weights.image_size, weights.num_classes) == ((224, 224), 10)
    assert weights.preprocess.startswith("resize_small(256, method='bicubic'")
    assert weights.params.keys() == params.keys()
    for path, x in weights.params.items():
      if not path.startswith("pixels/"):
        np.testing.assert_array_equal(x.read(), params[path], path)
  # The folder is enough; and timm reads what is written of it.
  weights = pretrained.read(str(folder))
  pretrained.write(weights, str(tmp_path / "timm"), "timm")
  found = archives.open_safetensors(tmp_path / "timm" / "model.safetensors")
  ours = _to_ours({name: x.read() for name, x in found.items()})
  for path, x in ours.items():
    np.testing.assert_array_equal(params[path], x.astype(np.float32), path)
  mean = weights.params["pixels/mean"].read()
  np.testing.assert_allclose((mean + 1) / 2, (0.485, 0.456, 0.406), rtol=1e-6)


@pytest.mark.ci
def test_other_checkpoints_of_tensorflow(tmp_path):
  import tensorflow as tf

  def save(name):
    tf.raw_ops.SaveV2(
      prefix=str(tmp_path / name),
      tensor_names=["dense/kernel"],
      shape_and_slices=[""],
      tensors=[tf.ones((2, 3))],
    )

  save("one")
  with named("one is not a checkpoint of an EfficientNet", "dense/kernel"):
    pretrained.read(str(tmp_path))
  save("two")
  with named("holds 2 checkpoints", "give one, such as", "two.index"):
    pretrained.read(str(tmp_path))
  (tmp_path / "one.index").write_bytes(b"x" * 100)
  with named("one: the checkpoint is corrupt"):
    pretrained.read(str(tmp_path / "one"))


# --- files of timm, without timm ---


def _save_small(monkeypatch, tmp_path, **changes):
  """Writes a small model as if timm had its size."""
  monkeypatch.setitem(efficientnet._SIZES, "N", 32)
  weights = random_weights("EfficientNet-N", 32)._replace(
    preprocess="resize_small(36, method='bicubic', antialias=True)"
    "|central_crop(size)"
  )
  folder = tmp_path / "timm"
  pretrained.write(weights, str(folder), "timm")
  config = json.loads((folder / "config.json").read_text())
  config |= changes
  (folder / "config.json").write_text(json.dumps(config))
  return weights, folder


@pytest.mark.ci
def test_writing_and_reading_keeps_everything(monkeypatch, tmp_path):
  monkeypatch.setattr(efficientnet, "_ARCHITECTURE", "tf_efficientnet_n")
  weights, folder = _save_small(monkeypatch, tmp_path)
  run = str(tmp_path / "run")
  pretrained.write(weights, run, "orbax")
  for again in map(pretrained.read, (str(folder), run)):
    assert again.params.keys() == weights.params.keys()
    for path, x in again.params.items():
      np.testing.assert_array_equal(x.read(), weights.params[path].read(), path)
  (folder / "config.json").unlink()
  (note,) = pretrained.read(str(folder)).notes
  assert "no config.json" in note
  assert "efficientnet_n has the same arrays" in note
  model = vit_jax.load(str(folder), num_classes=3)
  assert model.params["head"]["kernel"].shape == (320, 3)
  assert model.report.new == ["head/bias 3", "head/kernel 320x3"]


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"architecture": "efficientnet_b0"}, ["architecture 'efficientnet_b0'"]),
    ({"architecture": "tf_efficientnet_lite0"}, ["'tf_efficientnet_lite0'"]),
    (
      {"architecture": "tf_efficientnet_b0", "model_args": {"se_layer": "x"}},
      ["model argument se_layer='x'"],
    ),
  ],
)
def test_other_efficientnets_are_refused(monkeypatch, tmp_path, changes, words):
  monkeypatch.setattr(efficientnet, "_ARCHITECTURE", r"tf_efficientnet_\w\d?")
  _, folder = _save_small(monkeypatch, tmp_path, **changes)
  with named(*words):
    pretrained.read(str(folder))


def test_what_is_not_written(tmp_path):
  weights = random_weights("EfficientNet-N", 32)
  for to, words in (
    ("hf", "hf has no EfficientNets such as EfficientNet-N"),
    ("npz", "npz has no EfficientNets"),
    ("timm", "timm has no EfficientNet-N; --to=orbax keeps everything"),
  ):
    with named(words):
      pretrained.write(weights, str(tmp_path / "out"), to)
