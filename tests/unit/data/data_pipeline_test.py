"""Batch k is a function of (seed, k): on any hosts, after any restart."""

import gc

import numpy as np
import pytest
import tensorflow as tf
from pictures import encode
from PIL import Image
from tensorflow.python.data.ops.iterator_ops import OwnedIterator

from vit_jax import data
from vit_jax.data import pipeline
from vit_jax.data.order import Order, Shuffle, make_order
from vit_jax.errors import UserError

CROPPED = "inception_crop(size)|flip_lr"
AUGMENTED = CROPPED + "|randaug(1, 10)"  # seconds to trace


class Numbers(data.Source):
  """In memory; example i is a plain image of the colour i, and of class i % k.

  Labels may be given: lists of any length. A record is the number of labels,
  a byte, the labels, four bytes each, and a PNG.
  """

  split = "all"

  def __init__(self, size, num_classes=10, labels=None, name="numbers"):
    self.dataset = name
    self.num_examples = size
    self.num_classes = num_classes
    self.class_names = [str(k) for k in range(num_classes)]
    self.multilabel = labels is not None
    self.labels = labels or [[i % num_classes] for i in range(size)]
    self.max_labels = max(map(len, self.labels))
    self.images = [self._encode(i) for i in range(size)]

  def _encode(self, i):
    colour = (i % 256, i // 256, 77)
    pixels = np.full((6, 8, 3), colour, np.uint8)
    pixels[:, :2] = 255 - pixels[:, :2]  # something to flip and to crop
    return encode(pixels, "PNG")

  def read(self, indices):
    return [
      bytes([len(self.labels[i])])
      + np.array(self.labels[i], "<i4").tobytes()
      + self.images[i]
      for i in np.asarray(indices)
    ]

  def parse_image(self, record):
    count = tf.cast(tf.io.decode_raw(record, tf.uint8)[0], tf.int32)
    return tf.strings.substr(record, 1 + 4 * count, -1)

  def parse_labels(self, record):
    count = tf.cast(tf.io.decode_raw(record, tf.uint8)[0], tf.int32)
    return tf.io.decode_raw(tf.strings.substr(record, 1, 4 * count), tf.int32)


def _train(sources, rows, **kwargs):
  if not isinstance(sources, list):
    sources = [(sources, 1.0)]
  defaults = {
    "seed": 5,
    "batch_size": 8,
    "preprocess": "resize(size)",
    "image_size": 8,
    "start_step": 0,
    "num_steps": 6,
  }
  return list(
    data.train_batches(sources, rows=np.array(rows), **(defaults | kwargs))
  )


def _colours(batches):
  """Which examples the images are: the colour of their last column."""
  pixels = np.concatenate([b["image"] for b in batches])[:, 0, -1].astype(int)
  return (pixels[:, 0] + 256 * pixels[:, 1]).tolist()


def _assert_same(batch, other):
  assert batch.keys() == other.keys()
  for key in batch:
    np.testing.assert_array_equal(batch[key], other[key])


# --- batches ---


def test_training_batches():
  source = Numbers(50)
  batches = _train(source, range(8), num_steps=7)
  assert len(batches) == 7
  assert batches[0]["image"].shape == (8, 8, 8, 3)
  assert batches[0]["image"].dtype == np.uint8
  assert batches[0]["labels"].shape == (8, 1)
  assert batches[0]["labels"].dtype == np.int32
  seen = _colours(batches)
  assert sorted(seen[:50]) == list(range(50))
  assert seen[:50] != list(range(50))
  _, expected = Order(5, [50], [1.0])(np.arange(56))
  assert seen == expected.tolist()
  labels = np.concatenate([b["labels"] for b in batches])[:, 0]
  assert labels.tolist() == [i % 10 for i in seen]


@pytest.mark.ci
@pytest.mark.parametrize(
  ("text", "hosts"),
  [
    (AUGMENTED, [range(4), range(4, 8)]),
    (CROPPED, [range(i, 8, 4) for i in range(4)]),  # interleaved
  ],
)
def test_hosts_recombine_to_the_same_batches(text, hosts):
  mixture = [(Numbers(40), 0.7), (Numbers(30), 0.3)]
  whole = _train(mixture, range(8), preprocess=text)
  for rows in hosts:
    part = _train(mixture, rows, preprocess=text)
    for ours, batch in zip(part, whole, strict=True):
      _assert_same(ours, {key: v[rows] for key, v in batch.items()})


def test_blocks_recombine_and_go_on_the_same():
  mixture = [(Numbers(40), 0.7), (Numbers(30), 0.3)]
  shuffle = BLOCKS._replace(blocks=[3, 4])
  whole = _train(mixture, range(8), shuffle=shuffle)
  order = make_order(shuffle, 5, [40, 30], [0.7, 0.3], 8)
  _, expected = order(np.arange(48))
  assert _colours(whole) == expected.tolist()
  for rows in ([0, 1, 2], [3, 4, 5, 6, 7]):
    options = {"start_step": 2, "num_steps": 4, "shuffle": shuffle}
    for k, batch in enumerate(_train(mixture, rows, **options), 2):
      _assert_same(batch, {key: v[rows] for key, v in whole[k].items()})


@pytest.mark.parametrize(
  ("text", "starts"),
  [(CROPPED, [1, 5]), pytest.param(AUGMENTED, [4], marks=pytest.mark.ci)],
)
def test_restart_at_any_step_goes_on_the_same(text, starts):
  source = Numbers(21)
  whole = _train(source, range(8), preprocess=text)
  for start in starts:
    steps = {"start_step": start, "num_steps": 6 - start}
    rest = _train(source, range(8), preprocess=text, **steps)
    for a, b in zip(rest, whole[start:], strict=True):
      _assert_same(a, b)


def test_augmentation_differs_by_row_step_and_seed():
  source = Numbers(1)
  noise = np.random.RandomState(0).randint(0, 256, (40, 40, 3), np.uint8)
  source.images = [encode(noise, "PNG")]
  crop = "inception_crop(size)"
  batches = _train(source, range(8), preprocess=crop, num_steps=3)
  images = np.concatenate([b["image"] for b in batches])
  assert len({image.tobytes() for image in images}) == 24
  other = _train(source, range(8), preprocess=crop, num_steps=3, seed=6)
  assert any(
    not np.array_equal(a["image"], b["image"])
    for a, b in zip(batches, other, strict=True)
  )


@pytest.mark.parametrize("blocks", [False, True])
def test_repeats_are_the_same_image_and_other_windows(blocks):
  """On any hosts, also such that share an image, and after any restart."""
  mixture = [(Numbers(40), 0.7), (Numbers(30), 0.3)]
  shuffle = BLOCKS._replace(blocks=[3, 4]) if blocks else Shuffle()
  options = {"batch_size": 12, "repeats": 3, "shuffle": shuffle}
  whole = _train(mixture, range(12), **options)
  order = make_order(shuffle, 5, [40, 30], [0.7, 0.3], 4)
  _, expected = order(np.arange(24))
  assert _colours(whole) == np.repeat(expected, 3).tolist()
  for rows in ([0, 1], range(2, 12), range(1, 12, 4)):
    part = _train(mixture, rows, start_step=2, num_steps=4, **options)
    for ours, batch in zip(part, whole[2:], strict=True):
      _assert_same(ours, {key: v[list(rows)] for key, v in batch.items()})


def test_each_repeat_is_read_once_and_augmented_on_its_own(monkeypatch):
  source, read = Numbers(50), []
  noise = np.random.RandomState(0).randint(0, 256, (40, 40, 3), np.uint8)
  source.images = [encode(np.roll(noise, i), "PNG") for i in range(50)]
  records = source.read
  monkeypatch.setattr(source, "read", lambda x: (read.extend(x), records(x))[1])
  options = {"batch_size": 12, "preprocess": "inception_crop(size)"}
  batches = _train(source, range(12), num_steps=2, repeats=3, **options)
  assert len(set(read)) == len(read) == 8
  images = np.concatenate([b["image"] for b in batches])
  assert len({image.tobytes() for image in images}) == 24
  # Row 5 of a step draws what it draws without repeats.
  plain = _train(source, range(12), num_steps=2, **options)
  shown = [x["labels"][0] for x in (batches[0], plain[0])]
  np.testing.assert_array_equal(*shown)
  np.testing.assert_array_equal(batches[0]["image"][0], plain[0]["image"][0])


def test_seed_may_be_any_integer():
  for seed in (0, -1, 2**31, 2**64 + 3):
    assert len(_train(Numbers(5), range(8), seed=seed, num_steps=1)) == 1


def test_multilabel_is_padded():
  source = Numbers(4, labels=[[3], [], [1, 2, 9], [0, 4]])
  [batch] = _train(source, range(8), num_steps=1)
  expected = [[3, -1, -1], [-1, -1, -1], [1, 2, 9], [0, 4, -1]]
  for labels, i in zip(
    batch["labels"].tolist(), _colours([batch]), strict=True
  ):
    assert labels == expected[i]


def test_mixture_of_single_and_multilabel_sets():
  mixture = [(Numbers(4, labels=[[3, 4]] * 4), 0.5), (Numbers(9), 0.5)]
  labels = np.concatenate([b["labels"] for b in _train(mixture, range(8))])
  assert labels.shape == (48, 2)
  assert {tuple(x) for x in labels.tolist()} > {(3, 4), (0, -1)}


@pytest.mark.parametrize(
  ("labels", "words"),
  [
    ([[1], [10], [2]], r"example 1 of numbers all: label 10 is out of range"),
    ([[1], [-1], [2]], "label -1 is out of range.*has no labels"),
  ],
)
def test_label_out_of_range_names_the_example(labels, words):
  for multilabel in (False, True):
    source = Numbers(3, labels=labels)
    source.multilabel = multilabel
    with pytest.raises(UserError, match=words):
      _train(source, range(8))
    with pytest.raises(UserError, match=words):
      list(_evaluate(source, 8, range(8)))


def test_more_labels_than_declared():
  source = Numbers(3, labels=[[1], [1, 2, 3], [2]])
  source.max_labels = 2
  with pytest.raises(UserError, match=r"example 1 .*: 3 labels, .* at most 2"):
    _train(source, range(8))


def test_undecodable_image_names_the_example():
  source = Numbers(20)
  source.images[13] = b"\xff\xd8\xff nothing more"
  with pytest.raises(UserError, match="example 13 of numbers all: not a read"):
    _train(source, range(8), preprocess=CROPPED)
  with pytest.raises(UserError, match="example 13 of numbers all: not a read"):
    list(_evaluate(source, 8, range(8)))


BLOCKS = Shuffle(blocks=[3], window=2, streams=4)


@pytest.mark.ci
@pytest.mark.parametrize(
  "shuffle", [Shuffle(), pytest.param(BLOCKS, marks=pytest.mark.ci)]
)
def test_the_next_example_is_shown_in_the_place_of_a_bad_one(shuffle, caplog):
  source, mended = Numbers(20), Numbers(20)
  for i, other in {13: 15, 14: 15, 19: 0, 5: 6}.items():
    source.images[i] = b"\xff\xd8\xff nothing more"
    mended.images[i] = mended.images[other]
    mended.labels[i] = mended.labels[other]
  source.images[5], source.labels[5] = mended.images[5], [10]
  options = {"preprocess": CROPPED, "num_steps": 9, "shuffle": shuffle}
  expected = _train(mended, range(8), **options)
  for first, rows in ((0, range(8)), (3, range(8)), (0, range(4, 8))):
    options |= {"start_step": first, "num_steps": 9 - first}
    found = _train(source, rows, **options, on_bad_example="replace")
    order = make_order(shuffle, 5, [20], [1.0], 8)
    for k, batch in enumerate(found, first):
      _, examples = order(8 * k + np.array(rows))
      replaced = batch.pop("replaced").tolist()
      assert replaced == [int(i in (13, 14, 19, 5)) for i in examples]
      _assert_same(batch, {n: x[list(rows)] for n, x in expected[k].items()})
  assert "example 13 of numbers all: not a readable image" in caplog.text
  assert "example 5 of numbers all: label 10 is out" in caplog.text


def test_each_repeat_of_a_bad_example_is_replaced():
  source = Numbers(8)
  source.images[5] = b"nothing"
  options = {"num_steps": 2, "on_bad_example": "replace", "repeats": 2}
  batches = _train(source, range(8), **options)
  seen = _colours(batches)
  assert 5 not in seen
  assert seen.count(6) == 4
  assert seen[::2] == seen[1::2]
  assert sum(batch["replaced"].sum() for batch in batches) == 2


@pytest.mark.ci
def test_bad_neighbours_are_replaced_whichever_is_shown_first():
  source = Numbers(20)
  source.images[13] = source.images[14] = b"nothing"
  options = {"batch_size": 1, "num_steps": 40, "on_bad_example": "replace"}
  for seed in range(4):
    seen = _colours(_train(source, [0], **options, seed=seed))
    assert not {13, 14} & {*seen}
    assert seen.count(15) == 6  # twice for itself, in two epochs


def test_no_example_is_shown_if_all_are_bad():
  source = Numbers(3)
  source.images = [b"nothing"] * 3
  with pytest.raises(UserError, match="not a readable image"):
    _train(source, range(8), on_bad_example="replace")


@pytest.mark.ci
@pytest.mark.parametrize(
  "text", ["resize_small(256)|central_crop(size)", "central_crop(size)"]
)
def test_image_that_grows_too_large_is_named(text):
  # To 256 x 230,400,000 pixels, or 224 x 201,600,000: it would fill the memory.
  source = Numbers(8)
  source.images[5] = encode(Image.new("L", (900_000, 1)), "PNG")
  words = r"example 5 of numbers all: 900000x1 pixels .* too many pixels"
  with pytest.raises(UserError, match=words) as e:
    list(_evaluate(source, 8, range(8), preprocess=text, image_size=224))
  assert "\n" not in str(e.value)


def _count_iterators():
  gc.collect()  # those of other tests
  return sum(isinstance(x, OwnedIterator) for x in gc.get_objects())


@pytest.mark.ci
def test_no_iterator_outlives_its_batches():
  """One that lives when Python ends may wait for ever, for its reader."""
  source = Numbers(20)
  before = _count_iterators()
  held = _evaluate(source, 8, range(8))
  next(held)
  assert _count_iterators() == before + 1
  pipeline._close_all()
  assert _count_iterators() == before
  source.images[13] = b"no image"
  with pytest.raises(UserError) as error:
    list(_evaluate(source, 8, range(8)))
  assert error.value.__context__.__traceback__  # whose frames had it
  assert _count_iterators() == before


def test_file_that_vanishes_is_named(tmp_path):
  for i in range(8):
    (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
    file = tmp_path / "ab"[i % 2] / f"{i}.png"
    Image.new("RGB", (9, 9)).save(file)
  source = data.get_source(f"folder:{tmp_path}", "train+test")
  (tmp_path / "a" / "4.png").unlink()
  with pytest.raises(UserError, match=r"a/4\.png: cannot be read: No such"):
    _train(source, range(8), preprocess=CROPPED)


# --- evaluation ---


def _evaluate(source, batch_size, rows, **kwargs):
  kwargs = {"preprocess": "resize(size)", "image_size": 8} | kwargs
  return data.eval_batches(
    source, batch_size=batch_size, rows=np.array(rows), **kwargs
  )


@pytest.mark.parametrize(("size", "hosts"), [(16, 1), (21, 2), (1, 4)])
def test_evaluation_has_every_example_once(size, hosts):
  source = Numbers(size)
  seen = []
  for rows in np.arange(8).reshape(hosts, -1):
    batches = list(_evaluate(source, 8, rows))
    assert len(batches) == -(-size // 8)  # the same on every host
    for k, batch in enumerate(batches):
      mask = batch["mask"]
      assert mask.dtype == bool
      assert batch["image"].shape == (len(rows), 8, 8, 3)
      assert mask.tolist() == [8 * k + r < size for r in rows]
      assert (batch["labels"][~mask] == -1).all()
      assert not batch["image"][~mask].any()
      found = _colours([{"image": batch["image"][mask]}])
      assert found == [8 * k + r for r in rows[mask]]
      assert batch["labels"][mask, 0].tolist() == [i % 10 for i in found]
      seen += found
  assert sorted(seen) == list(range(size))
