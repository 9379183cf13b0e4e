r"""Noisy Student on ImageNet: `noisy_student.py:[MODEL[,UNLABELLED],]STAGE`.

The paper's settings (arXiv 1911.04252). Without STAGE, one command runs all
stages:

  # needs a Google Cloud account, the data, TPUs
  vit-jax noisy-student --config=configs/noisy_student.py:L2 \
    --workdir=gs://BUCKET/noisy_student

MODEL is B0 to B7 (a teacher and a student of this size) or L2: a B7 teacher and
three L2 students, each taught by the previous model, the last one fine-tuned at
800 px. STAGE is loop, teacher, student1 and so on, or finetune. The labelled
images are ImageNet's. UNLABELLED is a data set, by default jft. JFT-300M is
private; any TFDS data set of that name in --config.data_dir will do. jft_like
is synthetic, to test the loop; imagenet21k and images:FOLDER are real images.

Published ImageNet accuracy of Google's files, trained with JFT-300M: the README
of EfficientNet in github.com/tensorflow/tpu, then timm's measurement. The other
columns are the paper's image size, RandAugment magnitude (none: only crop and
flip), unlabelled images per labelled one, and epochs of the labelled images.

  B0  78.8  78.68   224 px  none   1  700
  B1  81.5  81.39   240 px  none   3  700
  B2  82.4  82.41   260 px     6   3  700
  B3  84.1  84.05   300 px    12   3  700
  B4  85.3  85.16   380 px    15   3  700
  B5  86.1  86.10   456 px    18   3  350
  B6  86.4  86.48   528 px    24   3  350
  B7  86.9  86.85   600 px    27   3  350
  L2  88.4  88.36   475 px    27  14  350; later students 14, 28; finally 800 px

The three L2 students reach 87.6, 88.1 and 88.4. An L2 takes 6 days on a TPU v3
pod of 2,048 cores.

Differences from github.com/google-research/noisystudent, theirs in parentheses:
The loss is the mean over labelled and unlabelled images together, 1 / (1 +
ratio) of theirs. RMSProp's epsilon (by the square) and the weight decay are
scaled likewise, so all updates except the first equal theirs. Labels are stored
with 10 classes, not computed in the step. Batch normalisation is over the
global batch (groups of 8 cores or more). RandAugment has their operations,
including Cutout, but its distances grow with the image (100 and 40 pixels at
any size). Crops are bilinear (bicubic). Classes are filled up to the largest
one (130,000 images). The teacher of B0 to B7 is trained like the student, for
350 epochs.
For fine-tuning, the paper specifies neither the frozen layers nor the learning
rate. Here the stem and the first 28 of 88 blocks, whose outputs are the
largest, are frozen, except for their running statistics. The learning rate is
the last one of the preceding training.
"""

import ml_collections
from common import get_config as get_common_config

IMAGES = 1_281_167  # labelled, of ImageNet
LABELLED = 2048  # labelled images in a batch
# Model -> image size, dropout, RandAugment's magnitude (None: off), unlabelled
# images per labelled one for each student, epochs of a student.
MODELS = {
  "B0": (224, 0.2, None, (1.0,), 700),
  "B1": (240, 0.2, None, (3.0,), 700),
  "B2": (260, 0.3, 6, (3.0,), 700),
  "B3": (300, 0.3, 12, (3.0,), 700),
  "B4": (380, 0.4, 15, (3.0,), 700),
  "B5": (456, 0.4, 18, (3.0,), 350),
  "B6": (528, 0.5, 24, (3.0,), 350),
  "B7": (600, 0.5, 27, (3.0,), 350),
  "L2": (475, 0.5, 27, (14.0, 14.0, 28.0), 350),
}
TEACHER_EPOCHS = 350
FINETUNE_SIZE, FINETUNE_EPOCHS = 800, 1.5  # of L2
# Convolutions, and dense layers with their biases; not BatchNorm.
DECAYED = r".*/kernel|(head|.*/se_\w+)/bias"
FIXED = r"(stem_\w+|block([01]\d|2[0-7]))/.*=0"


def get_config(arg="L2,loop"):
  """Returns the configuration of "[MODEL[,UNLABELLED],]STAGE"."""
  model, unlabelled, stage = split(arg)
  *_, ratios, epochs = MODELS[model]
  stages = list_stages(model)
  if stage == "loop":
    return ml_collections.ConfigDict(
      {
        "stages": stages,
        "dataset": unlabelled,
        "split": "train",
        "min_confidence": 0.3,
        "per_class": 130_000,
        "soft": True,
        "balance": True,
        "ratio": ratios if len(ratios) > 1 else ratios[0],
      }
    )
  config = get_common_config()
  config.unlock()
  set_common(config)
  if stage == "teacher":
    set_model(config, "B7" if model == "L2" else model)
    set_optimizer(config, TEACHER_EPOCHS, ratio=0)
  elif stage == "finetune":
    set_model(config, model)
    finetune(config, epochs)
  else:
    set_model(config, model)
    set_optimizer(config, epochs, ratios[stages.index(stage) - 1])
  return config.lock()


def split(arg):
  """Returns (model, the name of the unlabelled data set, stage)."""
  model, *middle, stage = arg.split(",") if "," in arg else ("L2", arg)
  if stage in MODELS and "," not in arg:  # the loop's argument
    model, stage = stage, "loop"
  if model not in MODELS or stage not in ("loop", *list_stages(model)):
    raise ValueError(
      f"noisy_student.py:{arg} is not [MODEL[,UNLABELLED],]STAGE with MODEL "
      f"one of {', '.join(MODELS)} and STAGE loop or one of "
      f"{', '.join(list_stages('L2'))}; only L2 has more than one student and "
      "a finetune"
    )
  return model, ",".join(middle) or "jft", stage


def list_stages(model):
  """Returns the stages of a loop that train a model, in order."""
  students = [f"student{i + 1}" for i in range(len(MODELS[model][3]))]
  return ("teacher", *students, *(["finetune"] if model == "L2" else []))


def set_common(config):
  """Sets what all stages share."""
  config.train.dataset = "imagenet2012"
  config.loss.name = "softmax"
  config.loss.label_smoothing = 0.1  # for hard labels only
  config.optimizer.name = "rmsprop"
  config.optimizer.b2 = 0.9
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay_scaling = "gradient"
  config.optimizer.weight_decay_params = DECAYED
  config.ema_decay = 0.9999
  config.ema_warmup = True


def set_model(config, model):
  """Sets a model and its noise in training."""
  size, dropout, magnitude, *_ = MODELS[model]
  config.image_size = size
  config.model.variant = f"EfficientNet-{model}"
  config.model.dropout_rate = dropout
  config.model.stochastic_depth_rate = 0.2
  config.train.preprocess = "inception_crop(size, 8)|flip_lr"
  if magnitude is not None:
    config.train.preprocess += f"|randaug(2, {magnitude}, contrast='augreg')"
  config.eval.preprocess = evaluate_at(size)


def evaluate_at(size):
  """Returns a bicubic resize and a crop of size / (size + 32) of the side."""
  return (
    f"resize_small(size * {size + 32} / {size}, method='bicubic', "
    "antialias=True)|central_crop(size)"
  )


def set_optimizer(config, epochs, ratio):
  """Sets the optimizer for `ratio` unlabelled images per labelled one.

  Epochs are of the labelled images.
  """
  config.batch_size = round(LABELLED * (1 + ratio))
  config.total_steps = round(epochs * IMAGES / LABELLED)
  # Equivalent to the sum of two means, the unlabelled one times the ratio.
  config.optimizer.eps = 1e-3 / (1 + ratio) ** 2
  config.optimizer.weight_decay = 1e-5 / (1 + ratio)
  config.schedule.base_lr = 0.016 * LABELLED / 256
  config.schedule.decay = "exponential"
  config.schedule.exponential_rate = 0.97
  config.schedule.exponential_steps = 2.4 * epochs / 350 * IMAGES / LABELLED
  config.schedule.warmup_steps = int(5 * IMAGES / LABELLED)


def finetune(config, epochs):
  """Sets the last stage: larger images without augmentation."""
  config.image_size = FINETUNE_SIZE
  config.eval.preprocess = evaluate_at(FINETUNE_SIZE)
  config.train.preprocess = config.eval.preprocess
  set_optimizer(config, epochs, ratio=0)
  config.total_steps = round(FINETUNE_EPOCHS * IMAGES / LABELLED)
  config.optimizer.lr_multipliers = (FIXED,)
  steps = (epochs - FINETUNE_EPOCHS) / 2.4 // 1
  config.schedule.base_lr *= 0.97**steps
  config.schedule.decay = "constant"
  config.schedule.exponential_steps = 10_000.0
  config.schedule.warmup_steps = 0
