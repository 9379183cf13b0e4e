"""The handwritten digits that ship with scikit-learn, as a TFDS data set.

1,797 real images of 8x8 pixels and 17 grey levels: the test half of the UCI
"Optical Recognition of Handwritten Digits", written by 13 people.
"""

from typing import Any

import numpy as np
import tensorflow_datasets as tfds

NUM_TEST = 797


class Digits(tfds.core.GeneratorBasedBuilder):
  """`train` (1,000) and `test` (797); both and their slices are stratified."""

  name = "digits"
  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      disable_shuffling=True,  # the order on disk is that of the keys
      description=__doc__,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
          "label": tfds.features.ClassLabel(names=[str(d) for d in range(10)]),
        }
      ),
      supervised_keys=("image", "label"),
      homepage="https://archive.ics.uci.edu/dataset/80",
      citation="E. Alpaydin and C. Kaynak, 1998. doi:10.24432/C50P49",
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download
    from sklearn import datasets  # takes a second; only when generating

    digits: Any = datasets.load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    in_test = choose_test(digits.target)
    return {
      split: self._generate_examples(images, digits.target, indices)
      for split, indices in (
        ("train", interleave(digits.target, ~in_test)),
        ("test", interleave(digits.target, in_test)),
      )
    }

  def _generate_examples(self, images, labels, indices):
    for key, i in enumerate(indices):
      yield key, {"image": images[i], "label": int(labels[i])}


def choose_test(labels: np.ndarray) -> np.ndarray:
  """Returns bool[n] with NUM_TEST True, each class in proportion.

  Counts are by largest remainder. RandomState is used because NumPy guarantees
  that its stream never changes.
  """
  rng = np.random.RandomState(0)
  quotas = np.bincount(labels) * NUM_TEST / len(labels)
  counts = np.floor(quotas).astype(int)
  short = NUM_TEST - counts.sum()
  counts[np.argsort(counts - quotas, kind="stable")[:short]] += 1
  in_test = np.zeros(len(labels), bool)
  for label, count in enumerate(counts):
    in_test[rng.permutation(np.flatnonzero(labels == label))[:count]] = True
  return in_test


def interleave(labels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
  """Returns the chosen indices, shuffled in rounds of one index per class.

  The first n of a split thus have n / 10 of each class while these last.
  """
  rng = np.random.RandomState(1)
  shuffled = rng.permutation(np.flatnonzero(chosen))
  rank = np.zeros(len(shuffled), int)  # within the class
  for label in np.unique(labels):
    mine = labels[shuffled] == label
    rank[mine] = np.arange(mine.sum())
  return shuffled[np.argsort(rank, kind="stable")]
