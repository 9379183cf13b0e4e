"""The JFT-like set: the same bytes everywhere, many classes, a long tail."""

import hashlib
import io

import numpy as np
import PIL.Image

from vit_jax.data.builders import jft_like


def test_an_image_depends_on_its_index_alone():
  together, labels = jft_like.draw_images(np.arange(40))
  alone, alone_labels = jft_like.draw_images(np.array([37, 5]))
  np.testing.assert_array_equal(alone, together[[37, 5]])
  assert alone_labels == [labels[37], labels[5]]
  other_seed, _ = jft_like.draw_images(np.arange(40), seed=1)
  assert (other_seed != together).any((1, 2, 3)).all()


def test_png_is_lossless_and_any_reader_reads_it():
  image = np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)
  png = jft_like.encode_png(image)
  np.testing.assert_array_equal(
    np.array(PIL.Image.open(io.BytesIO(png))), image
  )


def test_labels_are_many_named_and_long_tailed():
  assert len(set(jft_like.CLASS_NAMES)) == len(jft_like.CLASS_NAMES)
  assert len(jft_like.CLASS_NAMES) > 400
  _, labels = jft_like.draw_images(np.arange(2000))
  class_id = {name: k for k, name in enumerate(jft_like.CLASS_NAMES)}
  count = np.zeros(len(class_id), int)
  for names in labels:
    assert len(set(names)) == len(names) >= 6
    np.add.at(count, [class_id[name] for name in names], 1)
  glyphs = np.sort(count[: jft_like.NUM_GLYPHS])[::-1]
  assert (count[jft_like.NUM_GLYPHS :] > 0).all()
  # A tenth of the glyphs makes up over a third of what is seen.
  assert glyphs[: len(glyphs) // 10].sum() > 0.33 * glyphs.sum()


def test_pixels_are_the_published_ones():
  """Golden: change VERSION when you change what is drawn."""
  images, _ = jft_like.draw_images(np.arange(64))
  digest = hashlib.sha256(images.tobytes()).hexdigest()
  assert digest[:16] == "3489e99f33947283"
