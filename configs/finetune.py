r"""Fine-tuning as in the paper's Table 4: `finetune.py:MODEL,DATASET`.

  # needs a Google Cloud account, the data, TPUs
  vit-jax train --config=configs/finetune.py:ViT-B_16,cifar100 \
    --workdir=gs://BUCKET/b16_cifar100 \
    --config.init_from=gs://BUCKET/b16_i21k

DATASET is one of the paper's: imagenet2012, cifar10, cifar100, oxford_iiit_pet
or oxford_flowers102; for others see below. Common to all: SGD with momentum 0.9
kept in bfloat16, batch 512, no weight decay, gradients clipped to norm 1,
cosine decay, 384 px, a new zero-initialised head, no tanh layer. The paper
tunes the learning rate over `LEARNING_RATES` on a held-out part of the training
set. It then trains on the whole set and evaluates once on the test set. The
default here is one of the middle rates. To try another one on the held-out
part:

  # needs a Google Cloud account, the data, TPUs
  vit-jax train --config=configs/finetune.py:ViT-B_16,cifar100,held_out \
    --workdir=gs://BUCKET/b16_cifar100_lr001 \
    --config.init_from=gs://BUCKET/b16_i21k --config.schedule.base_lr=0.01

A number after the data set is the image size. On ImageNet above 384, the Polyak
averaging of the paper's Table 2 is on: `ViT-L_16,imagenet2012,512`,
`ViT-H_14,imagenet2012,518`.

Expected after 90 epochs of pre-training on ImageNet-21k (the paper's Table 5):
ViT-B/16 91.67 % on CIFAR-100, 98.95 % on CIFAR-10, 83.97 % on ImageNet, 94.43 %
on Pets, 99.38 % on Flowers. `vit-jax tables` has the rest.

MODEL may also be anything that `vit_jax.load` takes. The run then starts from
these weights and has their architecture, without a tanh layer; their image size
is the default. DATASET may also be any TFDS name, `folder:PATH` or a mixture.
Data sets not in the paper get 2,500 steps with 200 of warm-up, as in VTAB, the
learning rate 0.01 and the splits `train` and `test`; `held_out` takes the last
tenth of `train`.

  vit-jax train --workdir=runs/photos_adamw \
    --config=configs/finetune.py:ViT-N_8-digits,folder:photos,adamw

From the Hugging Face hub: `hf:facebook/dinov2-small,beans,224,adamw`. A path or
a mixture that contains a comma goes in double quotes:
`"runs/a,b","cifar10=0.7,cifar100=0.3"`.

`adamw` is MAE's fine-tuning recipe (arXiv 2111.06377, Table 9; learning rate
and layer decay from its code for ViT-B), for self-supervised encoders. It has
AdamW, layer-wise learning-rate decay, drop-path, label smoothing, mixup and
CutMix, RandAugment, 5 % of the steps for warm-up and no clipping. Random
erasing is left out, and the steps are those above instead of 100 epochs.
"""

import csv

from common import get_config as get_common_config

from vit_jax.errors import UserError
from vit_jax.models import RATES, variants

# Data set -> steps, warm-up steps, test split. Warm-up is not in the paper; the
# public code has 500 steps, and 100 in a run of 500.
TABLE_4 = {
  "imagenet2012": (20_000, 500, "validation"),
  "cifar10": (10_000, 500, "test"),
  "cifar100": (10_000, 500, "test"),
  "oxford_iiit_pet": (500, 100, "test"),
  "oxford_flowers102": (500, 100, "test"),
}
LEARNING_RATES = {
  "imagenet2012": (0.003, 0.01, 0.03, 0.06),
  "cifar10": (0.001, 0.003, 0.01, 0.03),
  "cifar100": (0.001, 0.003, 0.01, 0.03),
  "oxford_iiit_pet": (0.001, 0.003, 0.01, 0.03),
  "oxford_flowers102": (0.001, 0.003, 0.01, 0.03),
}
# For any other data set.
OTHERS = (2_500, 200, "test")
# Start of the held-out part of the training set; 90 % for any other data set.
HOLD_OUT = {
  "imagenet2012": "99%",
  "cifar10": "98%",
  "cifar100": "98%",
  "oxford_iiit_pet": "90%",
  "oxford_flowers102": "90%",
}


# Options that are not taken from the initial weights.
NOT_TAKEN = (
  *("representation_size", "head_bias_init", "dtype", "scan", "remat"),
  *RATES,
)


def get_config(arg="ViT-B_16,cifar10"):
  """Returns the configuration of "MODEL,DATASET[,SIZE][,held_out][,adamw]"."""
  model, dataset, *options = [*next(csv.reader([arg])), ""]
  if not dataset:
    raise ValueError(
      f"finetune.py:{arg} has no data set; give MODEL,DATASET with DATASET one "
      f"of the paper's ({', '.join(TABLE_4)}), of TFDS or folder:PATH"
    )
  config = get_common_config()
  config.unlock()
  set_model(config, model, arg)
  config.batch_size = 512
  steps, warmup_steps, test = TABLE_4.get(dataset, OTHERS)
  config.total_steps = steps
  config.schedule.warmup_steps = warmup_steps
  config.schedule.decay = "cosine"
  config.schedule.base_lr = LEARNING_RATES.get(dataset, (0, 0, 0.01))[2]
  config.train.dataset = dataset
  config.eval.split = test
  # Test images are resized to a square, not cropped.
  config.eval.preprocess = "resize(size)"
  config.loss.name = "softmax"
  config.optimizer.name = "sgd"
  config.optimizer.accumulator_dtype = "bfloat16"
  config.optimizer.clip_norm = 1.0
  config.eval_every = 0  # the test set is for the end
  config.checkpoint_every = min(1000, steps)
  for option in filter(None, options):
    change(config, option, arg)
  return config.lock()


def set_model(config, model, arg):
  """Sets the model and image size of a variant or of weights."""
  try:
    variants.parse(model)
  except UserError:
    from vit_jax import pretrained  # takes a second to import

    try:
      weights = pretrained.read(model, arrays=False)
    except UserError as e:
      raise ValueError(
        f"finetune.py:{arg}: {model!r} is not a variant such as ViT-B_16, nor "
        f'weights: {e}; a name with a comma goes in double quotes, "..."'
      ) from e
    config.init_from = model
    config.model.update(
      {k: v for k, v in weights.model.items() if k not in NOT_TAKEN}
    )
    height, width = (
      side - cut
      for side, cut in zip(weights.image_size, weights.cut_off(), strict=True)
    )
    config.image_size = height if height == width else (height, width)
    return
  config.model.variant = model
  # The largest multiple of H/14's patch size up to 384 is 378.
  config.image_size = 378 if model.endswith("_14") else 384


def change(config, option, arg):
  """Applies an option that follows the data set."""
  dataset = config.train.dataset
  if option == "held_out":
    begin = HOLD_OUT.get(dataset, "90%")
    config.train.split = f"train[:{begin}]"
    config.eval.split = f"train[{begin}:]"
  elif option.isdigit():
    config.image_size = int(option)
    if dataset == "imagenet2012" and config.image_size > 384:
      config.ema_decay = 0.9999
  elif option == "adamw":
    use_adamw(config)
  else:
    raise ValueError(
      f"finetune.py:{arg} has {option!r}, which is neither an image size nor "
      'held_out nor adamw; a name with a comma goes in double quotes, "..."'
    )


def use_adamw(config):
  """Sets the recipe of MAE's fine-tuning."""
  config.optimizer.name = "adam"
  config.optimizer.accumulator_dtype = "float32"
  config.optimizer.clip_norm = 0.0
  config.optimizer.weight_decay = 0.05
  config.optimizer.layer_decay = 0.65
  config.schedule.base_lr = 5e-4 * config.batch_size / 256
  config.schedule.warmup_steps = config.total_steps // 20
  config.model.stochastic_depth_rate = 0.1
  config.loss.label_smoothing = 0.1
  config.train.mixup_alpha = 0.8
  config.train.cutmix_alpha = 1.0
  config.train.preprocess = "inception_crop(size)|flip_lr|randaug(2, 9)"
