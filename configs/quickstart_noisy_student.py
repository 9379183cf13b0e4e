r"""Noisy Student in minutes: 50 labelled images, 750 without their labels.

With the data of `make quickstart`:

  vit-jax noisy-student --config=configs/quickstart_noisy_student.py \
    --workdir=runs/noisy_student --config.data_dir=runs/quickstart/data

The argument is "[DATA,]STAGE": DATA is `digits`, real ones, or `tissue`, drawn
by a program (`vit-jax data prepare mini_tissue`); the command adds STAGE.

All networks start at random, since one that has been pre-trained would bring
knowledge of other images than the 800. The students are as large as the
teacher, learn from larger batches and for longer, and have more noise: dropout,
stochastic depth, and smaller crops (digits) or RandAugment (tissue, whose crops
keep the scale, because that tells classes apart). These settings were chosen
with other seeds, on training images that no network learns from, see
benchmarks/noisy_student.py. Measured on the test images: docs/noisy_student.md.
"""

import ml_collections
from common import get_config as get_common_config

_STAGES = ("teacher", "student1", "student2")
_DATA = {
  "digits": {
    "dataset": "digits",
    "teacher": "inception_crop(size, 70)",
    "student": "inception_crop(size, 50)",
    "per_class": 90,
  },
  "tissue": {
    "dataset": "mini_tissue",
    "teacher": "resize(28)|random_crop(size)|flip_lr",
    "student": "resize(28)|random_crop(size)|flip_lr|randaug(1, 5)",
    "per_class": 150,
  },
}


def get_config(arg="digits,student1"):
  """Returns the configuration of "[DATA,]STAGE", of the loop or a training."""
  name, _, stage = arg.rpartition(",")
  about = _DATA.get(name or "digits")
  if not about or stage not in ("loop", *_STAGES):
    raise ValueError(
      f"quickstart_noisy_student.py:{arg} is not [DATA,]STAGE; data are "
      f"{', '.join(_DATA)}, stages loop, {', '.join(_STAGES)}"
    )
  return get_loop(about) if stage == "loop" else get_training(about, stage)


def get_loop(about):
  """Returns what vit-jax noisy-student does between the trainings."""
  loop = ml_collections.ConfigDict()
  loop.stages = _STAGES
  loop.dataset = about["dataset"]  # without its labels
  loop.split = "train[250:]"
  loop.ratio = 3.0  # pseudo-labelled images to each labelled one in a batch
  # As of `vit-jax pseudo-label`.
  loop.soft = True
  loop.min_confidence = 0.5
  loop.per_class = about["per_class"]
  loop.balance = True
  return loop.lock()


def get_training(about, stage):
  """Returns the configuration of a stage; see common.py for every key."""
  is_student = stage != "teacher"
  config = get_common_config()
  with config.unlocked():
    config.image_size = 24

    config.model.variant = "ViT-w64d3m128h2_6"
    config.model.classifier = "gap"
    config.model.dtype = "float32"  # CPUs compute faster in it
    config.model.scan = True  # compiles sooner

    config.train.dataset = about["dataset"]
    config.train.split = "train[:50]"
    config.train.preprocess = about["student" if is_student else "teacher"]
    config.eval.split = "test"
    config.eval.preprocess = "resize(size)"

    config.batch_size = 32
    config.total_steps = 300
    config.loss.name = "softmax"
    config.optimizer.b2 = 0.99
    config.optimizer.clip_norm = 1.0
    # Initialised at 0.02, it is too small to matter for hundreds of steps.
    config.optimizer.lr_multipliers = (".*/pos_embedding=10",)
    config.schedule.base_lr = 3e-3
    config.schedule.decay = "cosine"
    config.schedule.warmup_steps = 20

    if is_student:
      config.batch_size = 64  # 16 of them labelled
      config.total_steps = 400
      config.model.dropout_rate = 0.1
      config.model.stochastic_depth_rate = 0.1

    config.log_every = 20
    config.eval_every = 0
    config.checkpoint_every = 0
  return config
