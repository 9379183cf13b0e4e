r"""AugReg (arXiv 2106.10270): `augreg.py:VARIANT,DATASET[,AUGMENTATION]`.

"How to train your ViT?": 300 epochs of ImageNet or of ImageNet-21k with as much
augmentation as the model and the data need, then fine-tuning at 224 px.

  # needs a Google Cloud account, the data, TPUs
  vit-jax train --config=configs/augreg.py:ViT-B_16,imagenet21k,medium1 \
    --workdir=gs://BUCKET/b16_augreg
  vit-jax train --config=configs/finetune.py:ViT-B_16,imagenet2012,224 \
    --workdir=gs://BUCKET/b16_augreg_224 \
    --config.init_from=gs://BUCKET/b16_augreg

DATASET is imagenet2012 or imagenet21k, AUGMENTATION a key of `AUGMENTATIONS`.
The default is that of `USUAL`, from big_vision's vit_i1k.py and vit_i21k.py,
where it is good on average. The table has the ImageNet accuracy of the public
files, fine-tuned at 224 px and measured by timm, and the pre-training settings
in their names. There, wd 0.1 is the weight decay here, wd 0.03 is 3e-5; do and
sd are model.dropout_rate and model.stochastic_depth_rate.

             imagenet2012                     imagenet21k
  ViT-Ti_16                                   75.5  none, wd 0.03
  ViT-S_32                                    76.0
  ViT-S_16   78.8  medium2, wd 0.1            81.4  light1, wd 0.03
  ViT-B_32   74.9                             80.7
  ViT-B_16   79.2  strong2, wd, do, sd 0.1    84.5  medium1, wd 0.1
  ViT-L_16                                    85.8  medium1, wd, do, sd 0.1

The cost is not published. Differences from big_vision: ImageNet-21k models use
the class token, as in the public files, where vit_i21k.py averages the patches;
the whole data set is shuffled. See also docs/differences.md.
"""

from common import get_config as get_common_config

from vit_jax.config import add_eval

# Name -> RandAugment's magnitude (None: off), mixup's alpha.
AUGMENTATIONS = {
  "none": (None, 0.0),
  "light1": (0, 0.0),  # not a no-op: solarize inverts all pixels
  "light2": (10, 0.2),
  "medium1": (15, 0.2),
  "medium2": (15, 0.5),
  "strong1": (20, 0.5),
  "strong2": (20, 0.8),
}
# Variant -> augmentation on imagenet2012, on imagenet21k.
USUAL = {
  "ViT-Ti_16": ("light1", "none"),
  "ViT-S_32": ("light2", "none"),
  "ViT-S_16": ("medium2", "light1"),
  "ViT-B_32": ("medium2", "light2"),
  "ViT-B_16": ("medium2", "light2"),
  "ViT-L_16": ("medium2", "medium2"),
}
DATASETS = ("imagenet2012", "imagenet21k")


def get_config(arg="ViT-B_16,imagenet21k"):
  """Returns the configuration of "VARIANT,DATASET[,AUGMENTATION]"."""
  variant, dataset, name, *more = [*arg.split(","), "", ""][:4]
  known = variant in USUAL and dataset in DATASETS
  if known and not name:
    name = USUAL[variant][DATASETS.index(dataset)]
  if not known or name not in AUGMENTATIONS or any(more):
    raise ValueError(
      f"augreg.py:{arg} is not VARIANT,DATASET[,AUGMENTATION] with VARIANT one "
      f"of {', '.join(USUAL)}, DATASET {' or '.join(DATASETS)} and "
      f"AUGMENTATION one of {', '.join(AUGMENTATIONS)}"
    )
  config = get_common_config()
  config.unlock()
  config.model.variant = variant
  config.total_epochs = 300.0
  set_data(config, dataset)
  magnitude, config.train.mixup_alpha = AUGMENTATIONS[name]
  if magnitude is not None:
    config.train.preprocess += f"|randaug(2, {magnitude}, contrast='augreg')"
  config.optimizer.accumulator_dtype = "bfloat16"
  config.optimizer.weight_decay = 1e-4
  config.optimizer.weight_decay_scaling = "schedule"
  config.optimizer.clip_norm = 1.0
  config.schedule.decay = "cosine"
  return config.lock()


def set_data(config, dataset):
  """Sets the data set, and the loss and the head that go with it."""
  config.train.dataset = dataset
  if dataset == "imagenet21k":
    config.train.split = "train[51200:]"
    config.eval.split = "train[25600:51200]"
    config.model.head_bias_init = -10.0
    return
  config.train.split = "train[:99%]"
  config.eval.split = "train[99%:]"
  config.loss.name = "softmax"
  config.model.representation_size = -1
  add_eval(config, "val", split="validation")
