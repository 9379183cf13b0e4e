r"""Fine-tuning on a task of VTAB-1k, as in the paper: `vtab.py:VARIANT,TASK`.

  # needs a download: the data; and a TPU or GPUs
  vit-jax train --config=configs/vtab.py:ViT-L_16,clevr_count \
    --workdir=runs/l16_clevr_count --config.init_from=runs/l16_i21k

TASK is one of the 19 listed by `vit-jax data list`, or one of the small tasks
in the same form that need no download, such as `mini:count`. All of them have
1,000 training images and the same hyper-parameters: SGD, 2,500 steps of 512
images, base learning rate 0.01, cosine decay, gradients clipped to norm 1,
384 px, and BiT's preprocessing, without crops or flips that would change the
label. To tune on 800 images and evaluate on the other 200:

  --config.train.split=train800 --config.eval.split=val200

Expected with ViT-L/16 and 90 epochs of ImageNet-21k: 72.7 %, the mean of the 19
tasks (Table 9). `vit-jax vtab` runs them all.
"""

from common import get_config as get_common_config

from vit_jax.data import benchmarks


def get_config(arg="ViT-B_16,caltech101"):
  """Returns the configuration of "VARIANT,TASK"."""
  variant, _, name = arg.partition(",")
  task = benchmarks.find_task(name if ":" in name else f"vtab:{name}")
  if task is None:
    raise ValueError(f"vtab.py:{arg} names no task; give VARIANT,caltech101")
  config = get_common_config()
  config.unlock()
  config.model.variant = variant
  # The largest multiple of H/14's patch size up to 384 is 378.
  config.image_size = 378 if variant.endswith("_14") else 384
  config.train.dataset = task.name
  config.train.split = "train800val200"
  config.train.preprocess = task.train_preprocess(config.image_size)
  config.eval.split = "test"
  config.eval.preprocess = task.eval_preprocess
  config.batch_size = 512
  config.total_steps = 2500
  config.loss.name = "softmax"
  config.optimizer.name = "sgd"
  config.optimizer.accumulator_dtype = "bfloat16"
  config.optimizer.clip_norm = 1.0
  config.schedule.base_lr = 0.01
  config.schedule.decay = "cosine"
  # Not in the paper; its authors used it for the same task with ViT-G.
  config.schedule.warmup_steps = 200
  config.eval_every = 0  # the test set is for the end
  return config.lock()
