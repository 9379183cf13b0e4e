"""A run of seconds, for the tests; they lay `common.py` beside it."""

from common import get_config as get_defaults


def get_config():
  """Returns a small ViT on a fifth of the digits."""
  config = get_defaults()
  config.image_size = 16
  config.model.variant = "ViT-N_8"
  config.model.dtype = "float32"
  config.model.dropout_rate = 0.1
  config.model.scan = True  # compiles in a quarter of the time
  config.train.dataset = "digits"
  config.train.split = "train[:200]"
  config.eval.split = "test[:40]"
  config.eval.preprocess = "resize(size)"
  config.batch_size = 16
  config.total_steps = 14
  config.loss.name = "softmax"
  config.optimizer.weight_decay = 0.1
  config.optimizer.clip_norm = 1.0
  config.schedule.warmup_steps = 2
  config.log_every = 1
  config.eval_every = 6
  config.checkpoint_every = 2
  config.keep_checkpoints = 4
  return config
