"""Downstream tasks by name: their data sets, splits and labels.

`vtab:NAME` is one of VTAB-1k's 19 tasks (Zhai et al. 2019), with its standard
splits of 800 and 200 training examples and its test set. `mini:NAME` is one of
a few tasks in the same form that need no download. Some TFDS data sets are here
too, such as those whose label is not the feature `label`.

A task adds to its data set: names for splits (`train800`, `val200`,
`train800val200`, `test`), a label that is computed from other features, and
the augmentations that would change that label.
"""

import dataclasses
import itertools
from collections.abc import Callable

import tensorflow as tf

from vit_jax.data import preprocess
from vit_jax.errors import UserError, suggest

NATURAL, SPECIALIZED, STRUCTURED = GROUPS = (
  "natural",
  "specialized",
  "structured",
)
VTAB, MINI = "vtab:", "mini:"

# VTAB at a size of 384 pixels crops from 448, BiT's and the paper's ratio.
_CROP_FROM = 448 / 384


@dataclasses.dataclass(frozen=True)
class Task:
  """One downstream task.

  Attributes:
    name: its name in configurations: "vtab:clevr_count".
    title: its name in the paper's tables.
    group: one of GROUPS; "" for plain TFDS data sets.
    dataset: the TFDS name, with VTAB's version.
    splits: {name: TFDS split string}; other split strings are unchanged.
    num_classes: the number of classes.
    feature: the TFDS feature that has the label.
    derive: that feature's value -> int32 scalar, in TensorFlow; None if it is
      already the label.
    class_names: of derived labels; None for those of the feature.
    max_labels: of one image, at most; None for one, or to be counted.
    scale_pixels: the factor that brings the stored pixels to 0..255.
    crop, flip: whether crops and mirror images keep their label.
  """

  name: str
  title: str
  group: str
  dataset: str
  splits: dict[str, str]
  num_classes: int
  feature: str = "label"
  derive: Callable | None = None
  class_names: tuple[str, ...] | None = None
  max_labels: int | None = None
  scale_pixels: int = 1
  crop: bool = True
  flip: bool = True

  def resolve_split(self, split: str) -> str:
    """Returns the TFDS string of a split of this task or of a sum of them."""
    parts = [part.strip() for part in split.split("+")]
    return "+".join(self.splits.get(part, part) for part in parts)

  def train_preprocess(self, image_size: int | tuple[int, int]) -> str:
    """Returns the training preprocessing: BiT's for VTAB, at any size.

    Resize (aspect ignored), crop, flip, unless that would change the label.
    Source: Kolesnikov et al. 2020, "Big Transfer", appendix F.
    """
    ops = ["resize(size)"]
    if self.crop:
      pair = preprocess.as_pair(image_size)
      larger = tuple(round(side * _CROP_FROM) for side in pair)
      size = larger[0] if larger[0] == larger[1] else larger
      ops = [f"resize({size})", "random_crop(size)"]
    return "|".join(ops + ["flip_lr"] * self.flip)

  # Evaluation uses the whole image.
  eval_preprocess = "resize(size)"


# --- labels that are computed ---


def count_objects(objects) -> tf.Tensor:
  """Returns CLEVR's class for a count: 3 to 10 objects are 0 to 7."""
  return tf.shape(objects["size"])[0] - 3


CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0)


def bin_closest_object(objects) -> tf.Tensor:
  """Returns CLEVR's class for the least object depth, in renderer units."""
  return _bin(tf.reduce_min(objects["pixel_coords"][:, 2]), CLEVR_DISTANCES)


KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)
_KITTI_VEHICLES = 3  # the first types: car, van, truck
_NO_VEHICLE = 1000.0  # metres


def bin_closest_vehicle(objects) -> tf.Tensor:
  """Returns KITTI's class for metres to a car, van or truck; the last: none."""
  depth = objects["location"][:, 2]
  is_vehicle = objects["type"] < _KITTI_VEHICLES
  depth = tf.where(is_vehicle, depth, _NO_VEHICLE)
  nearest = tf.reduce_min(tf.concat([depth, [_NO_VEHICLE]], 0))
  return _bin(nearest, KITTI_DISTANCES)


def _bin(value, thresholds):
  """Returns the index of the last threshold below; ties go to the lower bin."""
  below = tf.constant(thresholds, tf.float32) < tf.cast(value, tf.float32)
  return tf.reduce_sum(tf.cast(below, tf.int32)) - 1


def _merge(num_values, num_classes):
  """Groups neighbouring values: k is class floor(k * classes / values)."""

  def derive(value):
    return tf.cast(value, tf.int32) * num_classes // num_values

  return derive


def _name_bins(thresholds, unit):
  bounds = [f"{x:g}" for x in thresholds[1:]]
  middle = [f"{a} to {b}{unit}" for a, b in itertools.pairwise(bounds)]
  return (f"up to {bounds[0]}{unit}", *middle, f"over {bounds[-1]}{unit}")


def _name_groups(num_values, num_classes):
  groups = [[] for _ in range(num_classes)]
  for value in range(num_values):
    groups[value * num_classes // num_values].append(value)
  return tuple(f"{group[0]} to {group[-1]}" for group in groups)


# --- the tables ---


def _splits(train, val, test):
  return {
    "train800": train,
    "val200": val,
    "train800val200": f"{train}+{val}",
    "test": test,
  }


def _vtab(name, title, group, dataset, val, test, num_classes, **kwargs):
  splits = _splits("train[:800]", val, test)
  return Task(VTAB + name, title, group, dataset, splits, num_classes, **kwargs)


_VALIDATION = "validation[:200]"
_CLEVR = ("clevr:3.*.*", "train[63000:63200]", "validation")
_DSPRITES = ("dsprites:2.*.*", "train[589824:590024]", "train[663552:]")
_NORB = ("smallnorb:2.*.*", "test[:200]", "test[50%:]")

# In the order of the paper's Table 9. Splits and labels are those of the
# published task_adaptation code; `tests/unit/data/data_tasks_test.py` has a
# second copy.
_VTAB_TASKS = (
  _vtab("caltech101", "Caltech101", NATURAL, "caltech101:3.*.*",
        "train[2754:2954]", "test", 102),
  _vtab("cifar100", "CIFAR-100", NATURAL, "cifar100:3.*.*",
        "train[45000:45200]", "test", 100),
  _vtab("dtd", "DTD", NATURAL, "dtd:3.*.*", _VALIDATION, "test", 47),
  _vtab("oxford_flowers102", "Flowers102", NATURAL, "oxford_flowers102:2.*.*",
        _VALIDATION, "test", 102),
  # VTAB used version 3, which TFDS replaced by 4: the same images, some of them
  # repaired.
  _vtab("oxford_iiit_pet", "Pets", NATURAL, "oxford_iiit_pet:4.*.*",
        "train[2944:3144]", "test", 37),
  _vtab("sun397", "Sun397", NATURAL, "sun397/tfds:4.*.*", _VALIDATION, "test",
        397),
  _vtab("svhn", "SVHN", NATURAL, "svhn_cropped:3.*.*", "train[65931:66131]",
        "test", 10),
  _vtab("patch_camelyon", "Camelyon", SPECIALIZED, "patch_camelyon:2.*.*",
        _VALIDATION, "test", 2),
  _vtab("eurosat", "EuroSAT", SPECIALIZED, "eurosat/rgb:2.*.*",
        "train[16200:16400]", "train[21600:]", 10),
  _vtab("resisc45", "Resisc45", SPECIALIZED, "resisc45:3.*.*",
        "train[18900:19100]", "train[25200:]", 45),
  _vtab("diabetic_retinopathy", "Retinopathy", SPECIALIZED,
        "diabetic_retinopathy_detection/btgraham-300:3.*.*", _VALIDATION,
        "test", 5),
  _vtab("clevr_count", "Clevr-Count", STRUCTURED, *_CLEVR, 8, crop=False,
        feature="objects", derive=count_objects,
        class_names=tuple(f"{n} objects" for n in range(3, 11))),
  _vtab("clevr_distance", "Clevr-Dist", STRUCTURED, *_CLEVR, 6, crop=False,
        feature="objects", derive=bin_closest_object,
        class_names=_name_bins(CLEVR_DISTANCES, "")),
  _vtab("dmlab", "DMLab", STRUCTURED, "dmlab:2.0.1", _VALIDATION, "test", 6,
        crop=False),
  # Pixels are stored as 0 and 1.
  _vtab("dsprites_location", "dSpr-Loc", STRUCTURED, *_DSPRITES, 16,
        crop=False, flip=False, scale_pixels=255, feature="label_x_position",
        derive=_merge(32, 16), class_names=_name_groups(32, 16)),
  _vtab("dsprites_orientation", "dSpr-Ori", STRUCTURED, *_DSPRITES, 16,
        flip=False, scale_pixels=255, feature="label_orientation",
        derive=_merge(40, 16), class_names=_name_groups(40, 16)),
  _vtab("kitti_distance", "KITTI-Dist", STRUCTURED, "kitti:3.1.0", _VALIDATION,
        "test", 4, crop=False, feature="objects", derive=bin_closest_vehicle,
        class_names=(*_name_bins(KITTI_DISTANCES[:3], " m"), "no vehicle")),
  _vtab("smallnorb_azimuth", "sNORB-Azim", STRUCTURED, *_NORB, 18, flip=False,
        feature="label_azimuth"),
  _vtab("smallnorb_elevation", "sNORB-Elev", STRUCTURED, *_NORB, 9,
        feature="label_elevation"),
)  # fmt: skip


def _mini(name, title, group, dataset, num_classes, **kwargs):
  splits = _splits("train[:800]", "train[800:]", "test")
  return Task(MINI + name, title, group, dataset, splits, num_classes, **kwargs)


_MINI_TASKS = (
  _mini("digits", "Digits", NATURAL, "digits", 10, flip=False),
  _mini("tissue", "Tissue", SPECIALIZED, "mini_tissue", 6),
  _mini("count", "Count", STRUCTURED, "mini_scenes", 6, crop=False,
        feature="label_count"),
  _mini("distance", "Distance", STRUCTURED, "mini_scenes", 5, crop=False,
        feature="label_distance"),
)  # fmt: skip


def _plain(name, title, num_classes, dataset=None, splits=None, **kwargs):
  return Task(
    name, title, "", dataset or name, splits or {}, num_classes, **kwargs
  )


_PLAIN_TASKS = (
  # By convention, its test images are those of TFDS's `validation`; TFDS's
  # `test` has no labels.
  _plain("imagenet2012", "ImageNet", 1000),
  # 3,163 of its 50,000 images show none of the classes and do not count.
  _plain("imagenet2012_real", "ImageNet ReaL", 1000,
         splits={"test": "validation"}, feature="real_label", max_labels=9),
  _plain("imagenet_v2", "ImageNet-V2", 1000,
         dataset="imagenet_v2/matched-frequency"),
  _plain("cifar10", "CIFAR-10", 10),
  _plain("cifar100", "CIFAR-100", 100),
  _plain("oxford_iiit_pet", "Pets", 37),
  _plain("oxford_flowers102", "Flowers102", 102),
)  # fmt: skip

# Files and folders that TFDS does not download, by data set, for its folder
# `downloads/manual` ("a or b": one is enough).
BY_HAND = {
  "imagenet21k": (
    "fall11_whole.tar or winter21_whole.tar.gz or fall11_whole/ or "
    "winter21_whole/",
  ),
  "imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"),
  "imagenet2012_real": ("ILSVRC2012_img_val.tar",),
  "resisc45": ("NWPU-RESISC45",),
  "diabetic_retinopathy_detection": (
    *("sample", "train", "test", "trainLabels.csv"),
  ),
}
TASKS = {t.name: t for t in (*_VTAB_TASKS, *_MINI_TASKS, *_PLAIN_TASKS)}


def list_tasks(prefix: str) -> list[Task]:
  """Returns the tasks of VTAB or MINI, in the order of the paper's tables."""
  return [task for name, task in TASKS.items() if name.startswith(prefix)]


def find_task(dataset: str) -> Task | None:
  """Returns the task of a data set's name, or None.

  A version or configuration in a TFDS name overrides that of the task.

  Raises:
    UserError: unknown `vtab:` or `mini:` name (with a suggestion).
  """
  if dataset in TASKS:
    return TASKS[dataset]
  for prefix in (VTAB, MINI):
    if dataset.startswith(prefix):
      names = [task.name for task in list_tasks(prefix)]
      raise UserError(
        f"unknown task {dataset!r}{suggest(dataset, names)}; there are "
        f"{', '.join(names)}"
      )
  task = TASKS.get(dataset.partition(":")[0].partition("/")[0])
  return task and dataclasses.replace(task, dataset=dataset)
