"""The JFT-like set: the same bytes everywhere, many classes, a long tail."""

import hashlib

import numpy as np

from vit_jax.data.builders import jft_like


def test_an_image_depends_on_its_index_alone():
  together, labels = jft_like.draw_images(np.arange(40))
  alone, alone_labels = jft_like.draw_images(np.array([37, 5]))
  np.testing.assert_array_equal(alone, together[[37, 5]])
  np.testing.assert_array_equal(alone_labels, labels[[37, 5]])


def test_labels_are_many_named_and_long_tailed():
  names, glyphs = jft_like.CLASS_NAMES, jft_like.NUM_GLYPHS
  assert len(set(names)) == len(names) > 300
  _, labels = jft_like.draw_images(np.arange(1000))
  count = labels.sum(0)
  assert labels.sum(1).min() >= 5
  assert (count[glyphs:] > 0).all()
  # Every image has one or two glyphs, one texture and one weight of stroke.
  assert np.isin(labels[:, :glyphs].sum(1), (1, 2)).all()
  for group in (jft_like.TEXTURES, jft_like.STROKE_WEIGHTS):
    columns = [names.index(name) for name in group]
    np.testing.assert_array_equal(labels[:, columns].sum(1), 1)
  # A tenth of the glyphs makes up over a third of what is seen.
  frequent = np.sort(count[:glyphs])[::-1][: glyphs // 10]
  assert frequent.sum() > 0.33 * count[:glyphs].sum()


def test_parts_are_where_the_strokes_run():
  t = np.linspace(0, 1, 24)
  top_to_bottom = np.stack([0 * t - 0.9, 2 * t - 1], -1)
  left_to_right = np.stack([2 * t - 1, 0 * t + 0.9], -1)
  hidden = np.zeros_like(top_to_bottom)
  path = np.stack([top_to_bottom, left_to_right, hidden])[None]
  parts = jft_like.find_parts(path, np.array([[True, True, False]]))
  assert {jft_like.PARTS[p] for p in np.flatnonzero(parts[0])} == {
    "vertical_at_top_left",
    "vertical_at_middle_left",
    "vertical_at_bottom_left",
    "horizontal_at_bottom_left",
    "horizontal_at_bottom_center",
    "horizontal_at_bottom_right",
  }
  rising = np.stack([t, -t], -1)[None, None]
  parts = jft_like.find_parts(rising, np.ones((1, 1), bool))
  assert all("rising" in jft_like.PARTS[p] for p in np.flatnonzero(parts[0]))


def test_pixels_are_the_published_ones():
  """Golden: change VERSION when you change what is drawn."""
  images, _ = jft_like.draw_images(np.arange(64))
  digest = hashlib.sha256(images.tobytes()).hexdigest()
  assert digest[:16] == "ec3a05698edc7f1b"
