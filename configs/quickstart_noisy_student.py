r"""Noisy Student in minutes: 50 labelled images, the others without labels.

  vit-jax noisy-student --config=configs/quickstart_noisy_student.py \
    --workdir=runs/noisy_student --config.data_dir=runs/quickstart/data
"""

from common import get_config as get_common_config
import ml_collections

STAGES = ("teacher", "student1", "student2")


def get_config(arg="loop"):
  """Returns the configuration of "[DATA,]STAGE"."""
  name, _, stage = arg.rpartition(",")
  name = name or "digits"
  if name not in ("digits", "tissue"):
    raise ValueError(f"quickstart_noisy_student.py:{arg}: digits or tissue")
  dataset = {"digits": "digits", "tissue": "mini_tissue"}[name]
  if stage == "loop":
    return ml_collections.ConfigDict(
      {
        "stages": STAGES,
        "dataset": dataset,
        "split": "train[250:]",
        "min_confidence": 0.3,
        "per_class": 100,
        "soft": True,
        "balance": True,
        "ratio": 3.0,
      }
    )
  if stage not in STAGES:
    raise ValueError(f"quickstart_noisy_student.py:{arg}: stage")
  config = get_common_config()
  config.unlock()
  config.image_size = 24
  config.model.variant = "ViT-w96d4m192h3_6"
  config.model.classifier = "gap"
  config.model.dtype = "float32"
  config.model.scan = True

  config.train.dataset = dataset
  config.train.split = "train[:50]"
  config.train.preprocess = "inception_crop(size, 70)"
  config.eval.split = "test"
  config.eval.preprocess = "resize(size)"

  config.batch_size = 32
  config.total_steps = 300
  config.loss.name = "softmax"
  config.optimizer.b2 = 0.99
  config.optimizer.lr_multipliers = (".*/pos_embedding=10",)
  config.optimizer.clip_norm = 1.0
  config.schedule.base_lr = 1e-3
  config.schedule.decay = "cosine"
  config.schedule.warmup_steps = 20
  config.log_every = 50
  config.eval_every = 0
  config.checkpoint_every = 0
  return config.lock()
