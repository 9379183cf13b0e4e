r"""Pre-training as in the paper's Table 3: `pretrain.py:VARIANT,DATASET`.

  vit-jax train --config=configs/pretrain.py:ViT-B_16,imagenet21k \
    --workdir=gs://BUCKET/b16_i21k

VARIANT is one of Table 3's: ViT-B_32, ViT-B_16, ViT-L_32, ViT-L_16, ViT-H_14.
DATASET is

  imagenet2012  300 epochs
  imagenet21k   90 epochs
  jft           7 epochs (H/14: 14); private, 18,291 classes. Any multi-label
                TFDS data set of that name in --config.data_dir will do.

Common to all: Adam (0.9, 0.999), batch 4096, 10,000 warm-up steps, 224 px, a
tanh layer before the head, sigmoid cross-entropy with the head's bias at -10.
Expected precision@1 on held-out images, from the training of the released
files: on ImageNet-21k B/16 47.9 %, B/32 44.0 %, L/16 49.9 %, L/32 45.4 %; on
ImageNet B/16 74.8 %, B/32 69.2 %, L/16 72.6 %, L/32 66.9 %.
Cost in TPUv3-core-days, as the paper prints it: L/16 on ImageNet-21k 230, on
JFT 680; H/14 on JFT 2,500.
"""

from common import get_config as get_common_config

# (variants, data set) -> epochs, base learning rate.
TABLE_3 = {
  ("ViT-B_16", "jft"): (7, 8e-4),
  ("ViT-B_32", "jft"): (7, 8e-4),
  ("ViT-L_32", "jft"): (7, 6e-4),
  ("ViT-L_16", "jft"): (7, 4e-4),
  ("ViT-H_14", "jft"): (14, 3e-4),
  ("ViT-B_16", "imagenet21k"): (90, 1e-3),
  ("ViT-B_32", "imagenet21k"): (90, 1e-3),
  ("ViT-L_16", "imagenet21k"): (90, 1e-3),
  ("ViT-L_32", "imagenet21k"): (90, 1e-3),
  ("ViT-B_16", "imagenet2012"): (300, 3e-3),
  ("ViT-B_32", "imagenet2012"): (300, 3e-3),
  ("ViT-L_16", "imagenet2012"): (300, 3e-3),
  ("ViT-L_32", "imagenet2012"): (300, 3e-3),
}


def get_config(arg="ViT-B_16,imagenet21k"):
  """Returns the configuration of "VARIANT,DATASET"."""
  variant, _, dataset = arg.partition(",")
  if (variant, dataset) not in TABLE_3:
    choices = ", ".join(sorted({",".join(key) for key in TABLE_3}))
    raise ValueError(
      f"pretrain.py:{arg} is not in the paper's Table 3; choices: {choices}"
    )
  config = get_common_config()
  config.unlock()
  config.total_epochs, config.schedule.base_lr = map(
    float, TABLE_3[variant, dataset]
  )
  config.model.variant = variant
  config.model.representation_size = -1
  config.model.head_bias_init = -10.0
  # 24 layers and more compile faster as a loop.
  config.model.scan = variant in ("ViT-L_16", "ViT-L_32", "ViT-H_14")
  config.train.dataset = dataset
  {"imagenet2012": imagenet2012, "imagenet21k": imagenet21k, "jft": jft}[
    dataset
  ](config)
  return config.lock()


def imagenet2012(config):
  """1,281,167 images, 1,000 classes; the last 1 % is the development set."""
  config.train.split = "train[:99%]"
  config.eval.split = "train[99%:]"
  config.loss.label_smoothing = 1e-4
  config.schedule.decay = "cosine"
  config.optimizer.weight_decay = 0.3
  config.optimizer.clip_norm = 1.0
  config.model.dropout_rate = 0.1


def imagenet21k(config):
  """14.2 M images, 21,843 classes; the first 102,400 are held out."""
  config.train.split = "train[102400:]"
  config.eval.split = "train[:102400]"
  config.optimizer.weight_decay = 0.03
  config.model.dropout_rate = 0.1


def jft(config):
  """303 M images, 18,291 classes, several labels an image."""
  config.train.split = "train"
  config.eval.split = "validation"
  config.optimizer.weight_decay = 0.1
