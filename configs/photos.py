r"""Fine-tuning on your own images: `photos.py:FOLDER[,VARIANT]`.

  vit-jax train --config=configs/photos.py:photos,ViT-N_8 \
    --workdir=runs/photos_small

FOLDER has a sub-folder of jpg, png or webp files for each class. A tenth of
each is held out as `test`, unless FOLDER has `train/` and `test/` with such
sub-folders. VARIANT, one of `STARTS`, selects the initial weights. Those of
ViT-Ti_16, the default, are downloaded once; those of ViT-N_8, a classifier of
digits, are in the package.

The recipe is the paper's for small data sets (`finetune.py`): SGD with
momentum, a cosine schedule, no weight decay, gradients clipped to norm 1, a new
head of zeros, 500 steps.
"""

from finetune import get_config as get_finetune_config

# Variant -> weights, image size, learning rate.
STARTS = {
  "ViT-N_8": ("ViT-N_8-digits", 48, 0.05),
  "ViT-Ti_16": ("ViT-Ti_16-augreg", 224, 0.01),
  "ViT-S_16": ("ViT-S_16-augreg", 224, 0.01),
  "ViT-B_16": ("ViT-B_16-augreg", 224, 0.01),
  "ViT-L_16": ("ViT-L_16-augreg", 224, 0.01),
}


def get_config(arg=""):
  """Returns the configuration of "FOLDER[,VARIANT]"."""
  folder, _, variant = arg.rpartition(",")
  if "ViT" not in variant:  # all of `arg` is the folder's name
    folder, variant = arg, "ViT-Ti_16"
  if not folder or variant not in STARTS:
    raise ValueError(
      f"photos.py:{arg} is not photos.py:FOLDER[,VARIANT] with a folder of "
      f"images and VARIANT one of {', '.join(STARTS)}"
    )
  weights, size, rate = STARTS[variant]
  config = get_finetune_config(f"{variant},oxford_iiit_pet,{size}")
  with config.unlocked():
    config.init_from = weights
    if variant == "ViT-N_8":
      config.model.classifier = "gap"  # as in the quickstart
      config.model.dtype = "float32"  # faster on CPUs
    config.train.dataset = f"folder:{folder.removeprefix('folder:')}"
    config.batch_size = 64
    config.schedule.warmup_steps = 50
    config.schedule.base_lr = rate
    config.eval_every = 100
    config.checkpoint_every = 100
  return config
