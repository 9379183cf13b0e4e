r"""Fine-tuning on your own images: `photos.py:FOLDER[,VARIANT]`.

  vit-jax train --config=configs/photos.py:photos,ViT-N_8 \
    --workdir=runs/photos_small

FOLDER has a folder of jpg, png or webp files for each class; a tenth of each is
held out as `test`, unless there are `train/` and `test/` with such folders.
VARIANT says which weights it starts from, one of `STARTS`: those of ViT-Ti_16,
the default, are downloaded once, those of ViT-N_8, which has seen nothing but
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
  if "ViT" not in variant:  # all of it is the folder's name
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
      config.model.classifier = "gap"  # as the quickstart trained it
      config.model.dtype = "float32"  # which a CPU computes faster
    config.train.dataset = f"folder:{folder.removeprefix('folder:')}"
    config.batch_size = 64
    config.schedule.warmup_steps = 50
    config.schedule.base_lr = rate
    config.eval_every = 100
    config.checkpoint_every = 100
  return config
