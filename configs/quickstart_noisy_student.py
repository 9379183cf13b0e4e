r"""Noisy Student in minutes, with 50 labelled and 750 unlabelled images.

With the data of `make quickstart`:

  vit-jax noisy-student --config=configs/quickstart_noisy_student.py \
    --workdir=runs/noisy_student --config.data_dir=runs/quickstart/data

The argument is "[DATA,]STAGE". DATA is `digits`, which are real, or `tissue`,
which is synthetic (`vit-jax data prepare mini_tissue`). The command adds STAGE.

All networks are initialised at random, because pre-training would add
information from images other than the 800. The teacher is trained like the
students, equally long and with the same noise (crops, RandAugment for tissue,
dropout, stochastic depth), so they differ only by the pseudo-labels. Crops of
tissue keep the scale, because it distinguishes the classes. The settings were
tuned with other seeds, on training images that no network learns from and on
the labels of the 750; see benchmarks/noisy_student.py. Results on the test
images are in docs/noisy_student.md.
"""

import ml_collections
from common import get_config as get_common_config

_STAGES = ("teacher", "student1", "student2")
# Data set, augmentation, maximum number of pseudo-labels per class.
_DATA = {
  "digits": ("digits", "inception_crop(size, 50)", 90),
  "tissue": (
    "mini_tissue",
    "resize(28)|random_crop(size)|flip_lr|randaug(1, 5)",
    150,
  ),
}


def get_config(arg="digits,student1"):
  """Returns the configuration of "[DATA,]STAGE", of the loop or one stage."""
  name, _, stage = arg.rpartition(",")
  about = _DATA.get(name or "digits")
  if not about or stage not in ("loop", *_STAGES):
    raise ValueError(
      f"quickstart_noisy_student.py:{arg} is not [DATA,]STAGE; data are "
      f"{', '.join(_DATA)}, stages loop, {', '.join(_STAGES)}"
    )
  dataset, noise, per_class = about
  if stage == "loop":
    return get_loop(dataset, per_class)
  return get_training(dataset, noise)


def get_loop(dataset, per_class):
  """Returns the settings of vit-jax noisy-student between the stages."""
  loop = ml_collections.ConfigDict()
  loop.stages = _STAGES
  loop.dataset = dataset  # without its labels
  loop.split = "train[250:]"
  loop.ratio = 3.0  # pseudo-labelled images per labelled one in a batch
  # Options of `vit-jax pseudo-label`.
  loop.soft = True
  loop.min_confidence = 0.5
  loop.per_class = per_class
  loop.balance = True
  return loop.lock()


def get_training(dataset, noise):
  """Returns the configuration of every stage; see common.py for every key."""
  config = get_common_config()
  with config.unlocked():
    config.image_size = 24

    config.model.variant = "ViT-w64d3m128h2_6"
    config.model.classifier = "gap"
    config.model.dtype = "float32"  # faster on CPUs
    config.model.scan = True  # compiles faster
    config.model.dropout_rate = 0.1
    config.model.stochastic_depth_rate = 0.1

    config.train.dataset = dataset
    config.train.split = "train[:50]"
    config.train.preprocess = noise
    config.eval.split = "test"
    config.eval.preprocess = "resize(size)"

    config.batch_size = 64  # 16 of them labelled for a student
    config.total_steps = 800
    config.loss.name = "softmax"
    config.optimizer.b2 = 0.99
    config.optimizer.clip_norm = 1.0
    # Initialised at 0.02, they stay too small to matter for hundreds of steps.
    config.optimizer.lr_multipliers = (".*/pos_embedding=10",)
    config.schedule.base_lr = 3e-3
    config.schedule.decay = "cosine"
    config.schedule.warmup_steps = 20

    config.log_every = 50
    config.eval_every = 0
    config.checkpoint_every = 0
  return config
