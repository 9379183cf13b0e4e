r"""Better plain ViT-S/16 baselines on ImageNet (arXiv 2205.01580).

  # needs a Google Cloud account, the data, TPUs
  vit-jax train --config=configs/plain_vit.py:90 --workdir=gs://BUCKET/s16_90

`plain_vit.py:EPOCHS`. Published accuracy on ImageNet's validation images, here
logged as val/accuracy, and cost, both from big_vision's vit_s16_i1k.py:

  90    76.5 %  6 to 7 hours on a TPU v3-8
  150   78.5 %
  300   80.0 %

Changes to the original ViT: the mean over the patches instead of the class
token, fixed 2-D positions, batch 1024, no dropout, RandAugment and mixup. The
difference from big_vision is that the whole data set is shuffled; see also
docs/differences.md.
"""

from augreg import get_config as get_augreg_config

EPOCHS = ("90", "150", "300")


def get_config(arg="90"):
  """Returns the configuration of "EPOCHS"."""
  if arg not in EPOCHS:
    raise ValueError(
      f"plain_vit.py:{arg} is not plain_vit.py:EPOCHS with EPOCHS one of "
      f"{', '.join(EPOCHS)}; for others add --config.total_epochs"
    )
  config = get_augreg_config("ViT-S_16,imagenet2012,light2")
  with config.unlocked():
    config.batch_size = 1024
    config.total_epochs = float(arg)
    config.model.classifier = "gap"
    config.model.pos_embedding = "sincos2d"
  return config
