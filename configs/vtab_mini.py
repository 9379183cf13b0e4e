r"""Miniature VTAB, without a download, on a CPU: `vtab_mini.py:VARIANT,TASK`.

  vit-jax vtab --init_from=runs/quickstart/pretrain --workdir=runs/vtab_mini \
    --tasks=mini --jobs=2 --config.data_dir=runs/quickstart/data

TASK is one of `mini:digits`, `mini:tissue`, `mini:count`, `mini:distance`. Like
VTAB's, these tasks have 1,000 training images, of 32 pixels or, in digits, 8.
The schedule is a short one for small models; vtab.py has the paper's.
"""

from common import get_config as get_common_config

from vit_jax.data import benchmarks


def get_config(arg="ViT-N_8,mini:digits"):
  """Returns the configuration of "VARIANT,TASK"."""
  variant, _, name = arg.partition(",")
  task = benchmarks.find_task(name if ":" in name else f"mini:{name}")
  if task is None:
    raise ValueError(f"vtab_mini.py:{arg} has no task; give VARIANT,mini:count")
  config = get_common_config()
  config.unlock()
  config.model.variant = variant
  config.model.classifier = "gap"
  config.model.dtype = "float32"  # faster on CPUs
  config.image_size = 48
  config.train.dataset = task.name
  config.train.split = "train800val200"
  config.train.preprocess = task.train_preprocess(config.image_size)
  config.eval.split = "test"
  config.eval.preprocess = task.eval_preprocess
  config.batch_size = 32
  config.total_steps = 240
  config.loss.name = "softmax"
  config.optimizer.name = "sgd"
  config.optimizer.clip_norm = 1.0
  config.schedule.base_lr = 0.05
  config.schedule.decay = "cosine"
  config.schedule.warmup_steps = 15
  config.log_every = 20
  config.eval_every = 0  # the test set is for the end
  config.checkpoint_every = 0
  return config.lock()
