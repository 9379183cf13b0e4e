r"""The quickstart's pre-training: a nano ViT on the JFT-like set at 24 px.

`make quickstart` prepares the data and runs it:

  vit-jax train --config=configs/quickstart_pretrain.py \
    --workdir=runs/quickstart/pretrain --config.data_dir=runs/quickstart/data

Expected on the test split: precision@1 0.984 and ranking precision 0.773, where
always predicting the most frequent class has a precision@1 of 0.49. About two
minutes on two otherwise idle CPU cores.
"""

from common import get_config as get_common_config


def get_config():
  """Returns the configuration; see common.py for every key."""
  config = get_common_config()
  with config.unlocked():
    config.image_size = 24

    config.model.variant = "ViT-N_8"
    config.model.classifier = "gap"  # learns faster than a token in short runs
    config.model.head_bias_init = -4.0
    config.model.dtype = "float32"  # faster on CPUs

    config.train.dataset = "jft_like"
    config.train.preprocess = "inception_crop(size, 70)"  # glyphs: no flips
    config.eval.split = "test"
    config.eval.preprocess = "resize(size)"

    config.batch_size = 64
    config.total_steps = 2400
    config.optimizer.b2 = 0.99  # 2,400 steps are too few for 0.999
    # Initialised at 0.02, they stay too small to matter for hundreds of steps.
    config.optimizer.lr_multipliers = (".*/pos_embedding=10",)
    config.schedule.base_lr = 2e-3
    config.schedule.warmup_steps = 50

    config.log_every = 100
    config.eval_every = 0
    config.checkpoint_every = 600
  return config
