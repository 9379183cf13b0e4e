r"""Fine-tuning MAE's encoders on ImageNet: `mae.py:SIZE[,MODEL]`.

  # needs a download, the data, a Google Cloud account, TPUs
  vit-jax train --config=configs/mae.py:B --workdir=gs://BUCKET/mae_b16 \
    --config.init_from=hf:facebook/vit-mae-base \
    --config.model.layer_norm_epsilon=1e-12

SIZE is B, L (patches of 16 pixels) or H (14). MODEL is anything that
`vit_jax.load` takes, as in mae.py:B,hf:facebook/vit-mae-base, and replaces the
last two lines. The epsilon is that of Hugging Face's files; the authors' is
1e-6. Published accuracy after 1,600 epochs of pre-training, and cost (the
FINETUNE.md of github.com/facebookresearch/mae; arXiv 2111.06377):

  B   83.66   100 epochs, 7:11 hours on 32 V100
  L   85.95   50 epochs, 8:52 hours on 32 V100
  H   86.93   50 epochs, 13:09 hours on 64 V100

The recipe is `adamw` of finetune.py with the authors' batch, epochs and sizes.
Differences from their code, theirs in parentheses: There is no random erasing,
which they find to matter less than the seed. RandAugment has this project's
operations and a fixed magnitude. Crops are bilinear (bicubic), the learning
rate ends at 0 (1e-6), and the head starts at zero.
"""

from finetune import get_config as get_finetune_config

IMAGES = 1_281_167
# Size -> patch, epochs, learning rate per 256 images, layer decay, drop-path.
SIZES = {
  "B": (16, 100, 5e-4, 0.65, 0.1),
  "L": (16, 50, 1e-3, 0.75, 0.2),
  "H": (14, 50, 1e-3, 0.75, 0.3),
}


def get_config(arg="B"):
  """Returns the configuration of "SIZE[,MODEL]"."""
  size, _, model = arg.partition(",")
  if size not in SIZES:
    raise ValueError(
      f"mae.py:{arg} is not mae.py:SIZE[,MODEL] with SIZE one of "
      f"{', '.join(SIZES)}"
    )
  patch, epochs, rate, layer_decay, drop_path = SIZES[size]
  model = f'"{model}"' if model else f"ViT-{size}_{patch}"
  config = get_finetune_config(f"{model},imagenet2012,224,adamw")
  with config.unlocked():
    if not config.init_from:
      config.model.activation = "gelu_erf"
      config.model.class_token = True
    # The mean over the patches, followed by its own LayerNorm.
    config.model.classifier = "gap"
    config.model.final_norm = "pooled"
    config.model.stochastic_depth_rate = drop_path
    config.batch_size = 1024
    config.total_steps = round(epochs * IMAGES / config.batch_size)
    config.schedule.warmup_steps = round(5 * IMAGES / config.batch_size)
    config.schedule.base_lr = rate * config.batch_size / 256
    config.optimizer.layer_decay = layer_decay
    config.train.preprocess = "inception_crop(size, 8)|flip_lr|randaug(2, 9)"
    config.eval.preprocess = (
      "resize_small(size * 8 / 7, method='bicubic', antialias=True)|"
      "central_crop(size)"
    )
  return config
