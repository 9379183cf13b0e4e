"""ObjectNet (Barbu et al. 2019): a test set for models of ImageNet-1k.

It is not in TFDS. `objectnet:PATH` reads the folder `images` of its archive. Of
its 313 classes, 113 are in ImageNet, and the others are left out. If a class is
several classes of ImageNet, each of these is correct.

Its licence forbids training on it. Its images have a red frame, which is
cropped.
"""

from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from vit_jax.data import ops
from vit_jax.data.folder import (
  FolderSource,
  find_folder,
  find_images,
  take_split,
)
from vit_jax.errors import UserError

OBJECTNET = "objectnet:"
_FRAME = 2  # pixels

# Folder -> ImageNet-1k classes, from the archive's `mappings`.
CLASSES = {
  "alarm_clock": (409, 530), "backpack": (414,), "banana": (954,),
  "band_aid": (419,), "basket": (790,), "beer_bottle": (440,), "bench": (703,),
  "bicycle": (671, 444), "binder_closed": (446,), "bottle_cap": (455,),
  "bread_loaf": (930,), "broom": (462,), "bucket": (463,),
  "butchers_knife": (499,), "can_opener": (473,), "candle": (470,),
  "cellphone": (487,), "chair": (423, 559, 765), "clothes_hamper": (588,),
  "coffee_french_press": (550,), "combination_lock": (507,),
  "computer_mouse": (673,), "desk_lamp": (846,), "doormat": (539,),
  "dress": (578,), "dress_shoe_men": (630,), "drill": (740,),
  "drinking_cup": (968,), "drying_rack_for_dishes": (729,), "envelope": (549,),
  "fan": (545,), "frying_pan": (567,), "full_sized_towel": (434,),
  "hair_dryer": (589,), "hammer": (587,), "hand_towel_or_rag": (533,),
  "helmet": (560, 518), "iron_for_clothes": (606,), "jeans": (608,),
  "keyboard": (508,), "ladle": (618,), "lampshade": (619,),
  "laptop_open": (620,), "lemon": (951,), "letter_opener": (623,),
  "lighter": (626,), "lipstick": (629,), "match": (644,),
  "measuring_cup": (647,), "microwave": (651,), "mixing_salad_bowl": (659,),
  "monitor": (664,), "mug": (504,), "nail_fastener": (677,), "necklace": (679,),
  "orange": (950,), "padlock": (695,), "paintbrush": (696,),
  "paper_towel": (700,), "pen": (418, 749, 563), "pill_bottle": (720,),
  "pillow": (721,), "pitcher": (725,), "plastic_bag": (728,), "plate": (923,),
  "plunger": (731,), "pop_can": (737,), "portable_heater": (811,),
  "printer": (742,), "remote_control": (761,), "ruler": (769,),
  "running_shoe": (770,), "safety_pin": (772,), "salt_shaker": (773,),
  "sandal": (774,), "screw": (783,), "shovel": (792,), "skirt": (601, 655, 689),
  "sleeping_bag": (797,), "soap_dispenser": (804,), "sock": (806,),
  "soup_bowl": (809,), "spatula": (813,), "speaker": (632,),
  "still_camera": (732, 759), "strainer": (828,), "stuffed_animal": (850,),
  "suit_jacket": (834,), "sunglasses": (837,), "sweater": (841,),
  "swimming_trunks": (842,), "t-shirt": (610,), "teapot": (849,),
  "tennis_racket": (752,), "tie": (457, 906), "toaster": (859,),
  "toilet_paper_roll": (999,), "trash_bin": (412,), "tray": (868,),
  "tv": (851,), "umbrella": (879,), "vacuum_cleaner": (882,), "vase": (883,),
  "wallet": (893,), "watch": (531,), "water_bottle": (898,),
  "weight_exercise": (543,), "weight_scale": (778,), "wheel": (479, 694),
  "whistle": (902,), "wine_bottle": (907,), "winter_glove": (658,),
  "wok": (909,),
}  # fmt: skip


class ObjectNetSource(FolderSource):
  """The images of the 113 classes; the only split is `test`.

  A record is `max_labels` classes (four bytes each, little endian, padded with
  -1) followed by the file.
  """

  multilabel = True
  max_labels = max(map(len, CLASSES.values()))

  def __init__(self, dataset: str, split: str):
    self.dataset, self.split = dataset, split
    imagenet = tfds.builder("imagenet2012").info.features
    self.class_names = list(imagenet["label"].names)  # pyright: ignore
    self.num_classes = len(self.class_names)
    # Checked when read, because there are thousands of files of megabytes.
    self._files = take_split({"test": _find_files(dataset)}, dataset, split)
    self.num_examples = len(self._files)

  def _read_one(self, index):
    path, which = self._files[index]
    found = list(CLASSES.values())[which]
    classes = np.full(self.max_labels, -1, "<i4")
    classes[: len(found)] = found
    return classes.tobytes() + Path(path).read_bytes()

  def parse_image(self, record):
    encoded = tf.strings.substr(record, 4 * self.max_labels, -1)
    pixels = ops.decode(encoded, precise=True)
    inside = pixels[_FRAME:-_FRAME, _FRAME:-_FRAME]
    return tf.io.encode_png(inside, compression=0)

  def parse_labels(self, record):
    packed = tf.strings.substr(record, 0, 4 * self.max_labels)
    classes = tf.io.decode_raw(packed, tf.int32)
    return classes[classes >= 0]


def _find_files(dataset):
  """Returns [(path, index in CLASSES)]."""
  root = find_folder(dataset, OBJECTNET)
  missing = [name for name in CLASSES if not (root / name).is_dir()]
  if missing:
    raise UserError(
      f"{dataset!r}: {root} has no folder {missing[0]!r}"
      f"{f' nor {len(missing) - 1} others' if len(missing) > 1 else ''}; give "
      "the folder `images` of ObjectNet's archive"
    )
  return find_images(root, list(CLASSES))[0]
