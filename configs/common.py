"""Every configuration key, its default and what it means.

Other config files start from `get_config()` and change what differs. The
result is locked: a misspelt key is an error. `config.batch_size` is the
global batch, over all hosts and devices.
"""

from typing import Any

import ml_collections
from ml_collections.config_dict import FieldReference, placeholder


# Any: a type checker takes each value of a ConfigDict for all that it may hold.
def get_config() -> Any:
  """Returns the defaults: ViT-B/16 pre-training on ImageNet-21k, the paper."""
  config = ml_collections.ConfigDict()

  # One integer decides the run: initialisation, data order, augmentation,
  # dropout and mixup are functions of (seed, step).
  config.seed = 0

  # A run folder whose weights this run starts from (its best checkpoint where
  # it kept one, else its last). The head is replaced where the classes differ,
  # the position embedding is resized, the optimizer starts fresh.
  config.init_from = placeholder(str)

  # "classification", or "masked_patches": no labels, but half of an image's
  # patches to predict from the others (Appendix B.1.2).
  config.objective = "classification"
  # What of a masked patch: its "mean_colour" in 3 bits a channel, that of a
  # "colour_grid" of 4x4 cells, or its "pixels".
  config.masked_target = "mean_colour"

  # Height and width of the images that the model sees, in pixels: one integer
  # or (height, width). `size` in preprocessing strings means this.
  config.image_size = FieldReference(224, field_type=object)

  # --- model: the arguments of `vit_jax.models.create` ---
  config.model = ml_collections.ConfigDict()
  # "ViT-B_16", the hybrid "R50+ViT-B_16", the ResNet "R50x1", ...
  config.model.variant = "ViT-B_16"
  # What becomes the image's vector: the class "token", "gap" (the mean over the
  # patches), "token+gap" (both, side by side) or "map" (attention).
  config.model.classifier = "token"
  # Width of the tanh layer before the head (the paper: hidden size while
  # pre-training, none while fine-tuning). -1: the hidden size, 0: none.
  config.model.representation_size = 0
  # "learned" (1-D), "2d", "sincos2d" (fixed), "relative" or "none"; added at
  # the "input", in "every_layer", or in "every_layer_shared" (Appendix D.4).
  config.model.pos_embedding = "learned"
  config.model.pos_embedding_at = "input"  # where it is added, see above
  # "gelu_tanh" and 1e-6 are the paper's; weights from PyTorch need "gelu_erf",
  # "gelu_quick" or "silu", and some of Hugging Face's 1e-12. Loaded weights say
  # which.
  config.model.activation = "gelu_tanh"
  config.model.layer_norm_epsilon = 1e-6  # see above
  config.model.dropout_rate = 0.0  # where the paper has it; 0: off
  config.model.attention_dropout_rate = 0.0  # of the attention weights
  # Drop-path by depth: the rate of the last block; the others have it linearly
  # from 0 in the first one.
  config.model.stochastic_depth_rate = 0.0
  config.model.head_bias_init = 0.0  # every class's logit at the beginning
  # What other encoders have and the paper's do not (docs/encoders.md). More
  # tokens: a class token that the classifier ignores, DeiT's distillation
  # token with a head of its own, DINOv2's registers. Learned positions are
  # those of the class and distillation "tokens", of "all", or of "none" of
  # them, beside those of the patches.
  config.model.class_token = False
  config.model.distillation_token = False
  config.model.registers = 0
  config.model.prefix_positions = "tokens"
  config.model.rope = "none"  # "dinov3": rotary positions in each block
  config.model.rope_base = 100.0  # of its frequencies
  config.model.patch_bias = True  # CLIP's patch embedding has none
  config.model.pre_norm = False  # a LayerNorm before the blocks, as CLIP
  config.model.qkv_bias = "all"  # "all", "none" or "qv" (not of the keys)
  config.model.qk_norm = False  # a LayerNorm of each head's queries and keys
  config.model.mlp = "plain"  # "gated": SwiGLU, with the activation "silu"
  config.model.layer_scale_init = 0.0  # of LayerScale; 0: none
  # "pooled": the last LayerNorm comes after the pooling, as in MAE; "none": it
  # is left out, as in transformers' classifiers of CLIP.
  config.model.final_norm = "tokens"
  config.model.map_heads = 0  # of "map"; 0: as many as the encoder's
  config.model.projection_size = 0  # of CLIP's matrix after pooling; 0: none
  # Matrix products run in this dtype; parameters, LayerNorm, softmax and loss
  # stay in float32.
  config.model.dtype = "bfloat16"
  config.model.scan = False  # one traced block instead of `num_layers` of them
  config.model.remat = "none"  # "none", "dots" or "full", see models/vit.py

  # --- data ---
  # Where TFDS data sets live; unset: $TFDS_DATA_DIR or ~/tensorflow_datasets.
  config.data_dir = placeholder(str)
  config.train = ml_collections.ConfigDict()
  # A TFDS name, a task (`vtab:clevr_count`, with splits `train800`, ..., see
  # `vit-jax data list`), `folder:/path`, `pseudo:/path` (of `vit-jax
  # pseudo-label`), or a weighted mixture `a=0.7,b=0.3`.
  config.train.dataset = "imagenet21k"
  # As TFDS writes it: "train[:98%]"; `pseudo:` sets are always whole.
  config.train.split = "train"
  # Operations joined by "|", see `vit_jax.data.preprocess`.
  config.train.preprocess = "inception_crop(size)|flip_lr"
  # "all": an epoch is a permutation of all examples, each read by itself.
  # "blocks": one of blocks of neighbours, each read at once, see docs/pods.md.
  # "auto": "blocks" for data in a bucket that do not fit into `buffer_gib`.
  config.train.shuffle = "auto"
  config.train.buffer_gib = 4.0  # of a bucket's images, on each host at most
  # What a training image that cannot be used does: "stop" ends the run with its
  # name; "replace" shows the next one in its place, names it and counts such.
  config.train.on_bad_example = "stop"
  config.train.mixup_alpha = 0.0  # Beta(alpha, alpha); 0: off
  # A box of another image, 1 - Beta(alpha, alpha) of the area; 0: off. With
  # mixup on as well each batch gets one of the two, by chance.
  config.train.cutmix_alpha = 0.0
  config.eval = ml_collections.ConfigDict()
  config.eval.dataset = placeholder(str)  # unset: the training data set
  config.eval.split = "validation"  # held-out images, or the test set
  # Nothing random; kept with the weights, for `predict`. 256 pixels for 224.
  # `method` may be 'bilinear' or 'area', or with antialias=True, as by Pillow,
  # 'bilinear' or 'bicubic'.
  config.eval.preprocess = "resize_small(size * 8 / 7)|central_crop(size)"
  config.eval.batch_size = 0  # 0: the training batch size

  # More evaluations, each under a name: `add_eval` of `vit_jax.config`, or
  # --config.evals.NAME.KEY. The keys: `type`, "fewshot" or unset for the
  # objective's own; `dataset`, `split`, `preprocess`, `batch_size`, `every`, as
  # `eval` and `eval_every` where they are unset; `train_split` and `shots`, the
  # images of each class that a few-shot evaluation learns from. Results are
  # logged as NAME/METRIC.
  config.evals = ml_collections.ConfigDict()
  # NAME/METRIC that decides which checkpoint is kept as the best, more is
  # better. Unset: accuracy of `eval`, for several labels an image its prec@1.
  config.best_metric = placeholder(str)

  # --- duration: exactly one of the three is set ---
  config.batch_size = 4096  # over all hosts and devices
  config.total_steps = 0  # updates
  config.total_epochs = 0.0  # of the training split
  config.total_examples = 0  # images, each time one is seen

  # --- optimisation ---
  # The loss of a classification; masked patches have one of their own.
  config.loss = ml_collections.ConfigDict()
  config.loss.name = "sigmoid"  # "sigmoid" (sum over classes) or "softmax"
  config.loss.label_smoothing = 0.0  # 0: off
  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.name = "adam"  # "adam" or "sgd"
  config.optimizer.b1 = 0.9  # Adam
  config.optimizer.b2 = 0.999  # Adam
  config.optimizer.eps = 1e-8  # Adam
  config.optimizer.momentum = 0.9  # SGD
  # dtype of Adam's first moment or SGD's momentum: "float32" or "bfloat16".
  config.optimizer.accumulator_dtype = "float32"
  config.optimizer.weight_decay = 0.0  # decoupled; 0: none
  # "lr": decay * lr(t), as in the paper; "schedule": decay * lr(t)/base_lr, as
  # in big_vision (0.1 there = 0.1 / base_lr here).
  config.optimizer.weight_decay_scaling = "lr"
  # Regular expression: parameters whose whole path matches are decayed.
  config.optimizer.weight_decay_params = ".*/kernel"
  config.optimizer.clip_norm = 0.0  # global gradient norm; 0: no clipping
  # "regex=factor" pairs, first match wins; factor 0 freezes.
  config.optimizer.lr_multipliers = ()
  # Layer-wise decay: the last block learns at this times the learning rate, the
  # one before it at its square, and so on down to the patch embedding. 1: off.
  config.optimizer.layer_decay = 1.0
  # Freezes the first n blocks and all before them, such as the patch and
  # position embeddings. 0: nothing. `model.scan` then saves no time.
  config.optimizer.freeze_blocks = 0
  # Low-rank updates (LoRA): kernels get alpha / rank * A B added; A, B and the
  # head alone are trained, but for what `lr_multipliers` says. Who reads the
  # run gets plain weights, with the products added.
  config.lora = ml_collections.ConfigDict()
  config.lora.rank = 0  # columns of A, rows of B; 0: off
  config.lora.alpha = 16.0  # see above
  # Regular expression: the kernels whose whole path matches; all projections of
  # the attention. ".*/(query|value)/kernel" is the LoRA paper's choice.
  config.lora.params = ".*/MultiHeadDotProductAttention_0/.*/kernel"
  config.schedule = ml_collections.ConfigDict()
  config.schedule.base_lr = 1e-3  # the learning rate after the warm-up
  config.schedule.decay = "linear"  # "linear", "cosine", "rsqrt", "constant"
  config.schedule.warmup_steps = 10_000  # from 0 in a straight line
  config.schedule.linear_end = 1e-5  # learning rate at the end of linear decay
  config.schedule.rsqrt_timescale = 10_000  # steps
  config.schedule.cooldown_steps = 0  # linear to 0 at the end
  # Gradient accumulation: less memory and the same result, but for the draws of
  # dropout and stochastic depth.
  config.micro_batches = 1
  config.ema_decay = 0.0  # Polyak averaging of the parameters; 0: off

  # --- machines ---
  # Devices over which parameters and optimizer are sharded; the others hold
  # copies. 1: pure data parallelism.
  config.fsdp = 1

  # --- bookkeeping: may differ when a run is resumed ---
  config.log_every = 50  # steps
  config.eval_every = 5000  # steps; 0: at the end only
  config.checkpoint_every = 1000  # steps; 0: at the end only
  config.keep_checkpoints = 2  # the newest that are kept, beside the best
  config.profile_step = 0  # first step of a profiler window; 0: none
  config.profile_steps = 5  # its length
  # A project of Weights & Biases that gets the metrics as well; "": none.
  config.wandb = ""
  return config.lock()
