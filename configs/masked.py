r"""Self-supervised pre-training, Appendix B.1.2: `masked.py:VARIANT,DATASET`.

  # needs a Google Cloud account, the data, TPUs
  vit-jax train --config=configs/masked.py:ViT-B_16,jft --workdir=gs://BUCKET/mpp
  vit-jax train --config=configs/finetune.py:ViT-B_16,imagenet2012 \
    --workdir=gs://BUCKET/mpp_imagenet --config.init_from=gs://BUCKET/mpp

VARIANT is any ViT; DATASET is imagenet2012, imagenet21k or jft, as in
pretrain.py. Labels are not used. From the paper: Adam, base learning rate 2e-4,
10,000 warm-up steps, cosine decay, batch 4096, 1,000,000 steps (14 epochs of
JFT), mean colours as the target. The paper reports diminishing returns after
100,000 steps, and similar gains with ImageNet:

  --config.total_steps=100000

In the paper the other targets are about as good, pixels slightly worse:

  --config.masked_target=colour_grid

Expected with ViT-B/16 on JFT: 79.9 % on ImageNet after fine-tuning, 2 points
above training from scratch and 4 below pre-training with labels. This
configuration has not been run with this code.
"""

from common import get_config as get_common_config

# Data set -> training split, held-out split.
SPLITS = {
  "imagenet2012": ("train[:99%]", "train[99%:]"),
  "imagenet21k": ("train[102400:]", "train[:102400]"),
  "jft": ("train", "validation"),
}


def get_config(arg="ViT-B_16,jft"):
  """Returns the configuration of "VARIANT,DATASET"."""
  variant, _, dataset = arg.partition(",")
  if dataset not in SPLITS:
    raise ValueError(
      f"masked.py:{arg} names no known data set; choices: VARIANT,DATASET with "
      f"DATASET one of {', '.join(SPLITS)}"
    )
  config = get_common_config()
  config.unlock()
  config.objective = "masked_patches"
  config.model.variant = variant
  config.train.dataset = dataset
  config.train.split, config.eval.split = SPLITS[dataset]
  config.total_steps = 1_000_000
  config.schedule.base_lr = 2e-4
  config.schedule.decay = "cosine"
  return config.lock()
