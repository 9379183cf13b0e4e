r"""The quickstart's fine-tuning: 300 real handwritten digits at 48 px.

`make quickstart` prepares the data and runs it:

  vit-jax train --config=configs/quickstart_finetune.py \
    --workdir=runs/quickstart/finetune --config.data_dir=runs/quickstart/data \
    --config.init_from=runs/quickstart/pretrain

Without --config.init_from, it trains from scratch.

Expected on the 797 test images: 96 % from pre-training and about 83 % from
scratch. With 200 labels it is 94 % and 76 to 79 % (learning rates 0.03 to 0.2).
About 40 seconds each on two otherwise idle CPU cores.
"""

from common import get_config as get_common_config


def get_config():
  """Returns the configuration; see common.py for every key."""
  config = get_common_config()
  with config.unlocked():
    config.image_size = 48

    config.model.variant = "ViT-N_8"
    config.model.classifier = "gap"
    config.model.dtype = "float32"

    config.train.dataset = "digits"
    config.train.split = "train[:300]"
    config.train.preprocess = "inception_crop(size, 80)"
    config.eval.split = "test"
    config.eval.preprocess = "resize(size)"

    config.batch_size = 32
    config.total_steps = 240
    config.loss.name = "softmax"
    config.optimizer.name = "sgd"
    config.optimizer.clip_norm = 1.0
    config.schedule.base_lr = 0.05
    config.schedule.decay = "cosine"
    config.schedule.warmup_steps = 15

    config.log_every = 20
    config.eval_every = 0
    config.checkpoint_every = 0
  return config
