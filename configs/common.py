"""Every configuration key, its default and what it means.

Other config files start from `get_config()` and change what differs. The
result is locked: a misspelt key is an error. `config.batch_size` is the
global batch, over all hosts and devices.
"""

from typing import Any

import ml_collections
from ml_collections.config_dict import FieldReference, placeholder


# Any, because type checkers give every ConfigDict value a union of all types.
def get_config() -> Any:
  """Returns the defaults: the paper's ViT-B/16 pre-training on ImageNet-21k."""
  config = ml_collections.ConfigDict()

  # One integer decides the run: initialisation, data order, augmentation,
  # dropout and mixup are functions of (seed, step).
  config.seed = 0

  # Initial weights: a run folder (its best checkpoint if it kept one, else its
  # last) or anything else that `vit_jax.load` takes. The head is replaced if
  # the classes differ, the position embedding is resized, and the optimizer
  # starts fresh.
  config.init_from = placeholder(str)

  # "classification", or "masked_patches": self-supervised prediction of half of
  # an image's patches from the others (Appendix B.1.2).
  config.objective = "classification"
  # Prediction target of a masked patch: its "mean_colour" in 3 bits a channel,
  # that of each cell of a 4x4 "colour_grid", or its "pixels".
  config.masked_target = "mean_colour"

  # Size of the model's input in pixels: one integer or (height, width). `size`
  # in preprocessing strings stands for it.
  config.image_size = FieldReference(224, field_type=object)

  # --- model: the arguments of `vit_jax.models.create` ---
  config.model = ml_collections.ConfigDict()
  # "ViT-B_16", the hybrid "R50+ViT-B_16", the ResNet "R50x1",
  # "EfficientNet-B0", ...; convolutional models have few of the options below.
  config.model.variant = "ViT-B_16"
  # Pooling: the class "token", "gap" (the mean over the patches), "token+gap"
  # (both, concatenated) or "map" (attention pooling).
  config.model.classifier = "token"
  # Width of the tanh layer before the head (in the paper the hidden size for
  # pre-training, none for fine-tuning). -1: the hidden size, 0: none.
  config.model.representation_size = 0
  # "learned" (1-D), "2d", "sincos2d" (fixed), "relative" or "none"; added at
  # the "input", in "every_layer", or in "every_layer_shared" (Appendix D.4).
  config.model.pos_embedding = "learned"
  config.model.pos_embedding_at = "input"  # where it is added, see above
  # The paper has "gelu_tanh" and 1e-6. PyTorch weights need "gelu_erf",
  # "gelu_quick" or "silu", and some of Hugging Face's need 1e-12; `init_from`
  # checks both.
  config.model.activation = "gelu_tanh"
  config.model.layer_norm_epsilon = 1e-6  # see above
  # At the paper's places; in an EfficientNet before the head. 0: off.
  config.model.dropout_rate = 0.0
  config.model.attention_dropout_rate = 0.0  # of the attention weights
  # Drop-path rate of the last block; it grows linearly from 0 in the first one.
  config.model.stochastic_depth_rate = 0.0
  config.model.head_bias_init = 0.0  # initial logit of every class
  # Options of other encoders, not in the paper (docs/encoders.md). Extra
  # tokens: a class token that the classifier ignores, DeiT's distillation token
  # with its own head, DINOv2's registers. Of these, the class and distillation
  # "tokens" have learned positions, or "all", or "none".
  config.model.class_token = False
  config.model.distillation_token = False
  config.model.registers = 0
  config.model.prefix_positions = "tokens"
  config.model.rope = "none"  # "dinov3": rotary positions in each block
  config.model.rope_base = 100.0  # base of the rotary frequencies
  config.model.patch_bias = True  # CLIP's patch embedding has none
  config.model.pre_norm = False  # a LayerNorm before the blocks, as in CLIP
  config.model.qkv_bias = "all"  # "all", "none" or "qv" (none for the keys)
  config.model.qk_norm = False  # a LayerNorm of each head's queries and keys
  config.model.mlp = "plain"  # "gated": SwiGLU, with the activation "silu"
  config.model.layer_scale_init = 0.0  # LayerScale's initial value; 0: none
  # "pooled": the last LayerNorm is after the pooling, as in MAE; "none": it is
  # omitted, as in transformers' CLIP classifiers.
  config.model.final_norm = "tokens"
  config.model.map_heads = 0  # heads of "map"; 0: as many as the encoder has
  config.model.projection_size = 0  # CLIP's projection after pooling; 0: none
  # Matmuls run in this dtype; parameters, LayerNorm, softmax and loss stay in
  # float32.
  config.model.dtype = "bfloat16"
  config.model.scan = False  # trace one block instead of `num_layers`
  config.model.remat = "none"  # "none", "dots" or "full"; models/layers.py

  # --- data ---
  # Folder of TFDS data sets; unset: $TFDS_DATA_DIR or ~/tensorflow_datasets.
  config.data_dir = placeholder(str)
  config.train = ml_collections.ConfigDict()
  # A TFDS name, a task (`vtab:clevr_count`, with splits `train800`, ..., see
  # `vit-jax data list`), `folder:/path`, `pseudo:/path` (written by `vit-jax
  # pseudo-label`), or a weighted mixture `a=0.7,b=0.3`.
  config.train.dataset = "imagenet21k"
  # In TFDS syntax: "train[:98%]"; `pseudo:` sets are always used whole.
  config.train.split = "train"
  # Operations joined by "|", see `vit_jax.data.preprocess`.
  config.train.preprocess = "inception_crop(size)|flip_lr"
  # "all": an epoch is a permutation of single examples. "blocks": it permutes
  # blocks of neighbouring examples, each read in one request (docs/pods.md).
  # "auto": "blocks" for data in a bucket that does not fit in `buffer_gib`.
  config.train.shuffle = "auto"
  config.train.buffer_gib = 4.0  # at most, on each host, for a bucket's images
  # At an unusable training image, "stop" ends the run with an error that names
  # it; "replace" uses the next image, logs a warning and counts replacements.
  config.train.on_bad_example = "stop"
  # Repeated augmentation (arXiv 1902.05509): copies of each image in a batch,
  # augmented independently. Steps and epochs count all copies, so an epoch
  # shows 1 / repeats of the images, as in timm.
  config.train.repeats = 1
  config.train.mixup_alpha = 0.0  # Beta(alpha, alpha); 0: off
  # CutMix: a box of another image, 1 - Beta(alpha, alpha) of the area; 0: off.
  # If mixup is on too, each batch gets one of the two at random.
  config.train.cutmix_alpha = 0.0
  config.eval = ml_collections.ConfigDict()
  config.eval.dataset = placeholder(str)  # unset: the training data set
  config.eval.split = "validation"  # held-out images, or the test set
  # Deterministic; saved with the weights for `predict`. Resizes to 256 pixels
  # for 224. `method` is 'bilinear' or 'area'; with antialias=True, as in
  # Pillow, it is 'bilinear' or 'bicubic'.
  config.eval.preprocess = "resize_small(size * 8 / 7)|central_crop(size)"
  config.eval.batch_size = 0  # 0: the training batch size

  # Further named evaluations, added by `add_eval` of `vit_jax.config` or by
  # --config.evals.NAME.KEY. Keys: `type`, "fewshot" or unset for the
  # objective's own; `dataset`, `split`, `preprocess`, `batch_size` and `every`,
  # which default to `eval` and `eval_every`; `train_split` and `shots`, the
  # training images per class of a few-shot evaluation. Metrics are logged as
  # NAME/METRIC.
  config.evals = ml_collections.ConfigDict()
  # NAME/METRIC whose maximum selects the best checkpoint. Unset: the accuracy
  # of `eval`, or its prec@1 for multi-label data.
  config.best_metric = placeholder(str)

  # --- duration: exactly one of the three is set ---
  config.batch_size = 4096  # over all hosts and devices
  config.total_steps = 0  # updates
  config.total_epochs = 0.0  # of the training split
  config.total_examples = 0  # images, counted each time one is used

  # --- optimisation ---
  # The classification loss; masked patches have their own.
  config.loss = ml_collections.ConfigDict()
  config.loss.name = "sigmoid"  # "sigmoid" (sum over classes) or "softmax"
  config.loss.label_smoothing = 0.0  # 0: off
  # Knowledge distillation (docs/distillation.md). The source is whatever
  # `vit_jax.load` takes: a run folder, a file, a name; "": no teacher. Teacher
  # and student get the same input: the same crops, mixed in the same way.
  config.teacher = ml_collections.ConfigDict()
  config.teacher.source = ""
  # "kl" or "cross_entropy" to the teacher's softmax (the same gradient), or
  # "hard", cross-entropy to its top class.
  config.teacher.loss = "kl"
  # Divides the logits of both; the loss is multiplied by its square.
  config.teacher.temperature = 1.0
  config.teacher.weight = 0.5  # of this loss; that of the labels has the rest
  config.optimizer = ml_collections.ConfigDict()
  # "adam", "sgd", "rmsprop" (TensorFlow 1's) or "lamb" (arXiv 1904.00962), see
  # training/optim.py.
  config.optimizer.name = "adam"
  config.optimizer.b1 = 0.9  # Adam, LAMB
  config.optimizer.b2 = 0.999  # Adam, LAMB; RMSProp's decay of the mean square
  # Adam and LAMB add it outside the square root, RMSProp inside.
  config.optimizer.eps = 1e-8
  config.optimizer.momentum = 0.9  # SGD, RMSProp
  # dtype of the first moment of Adam and LAMB, or of the momentum: "float32" or
  # "bfloat16".
  config.optimizer.accumulator_dtype = "float32"
  config.optimizer.weight_decay = 0.0  # 0: none
  # "lr": decay * lr(t), as in the paper; "schedule": decay * lr(t)/base_lr, as
  # in big_vision (0.1 there = 0.1 / base_lr here). These two are decoupled;
  # "gradient" is L2 regularisation, decay / 2 * |p|^2 added to the loss.
  config.optimizer.weight_decay_scaling = "lr"
  # Regular expression: parameters whose whole path matches are decayed.
  config.optimizer.weight_decay_params = ".*/kernel"
  config.optimizer.clip_norm = 0.0  # global gradient norm; 0: no clipping
  # "regex=factor" pairs, first match wins; factor 0 freezes.
  config.optimizer.lr_multipliers = ()
  # Layer-wise learning-rate decay: the factor of the last block, its square for
  # the one before, and so on down to the patch embedding. 1: off.
  config.optimizer.layer_decay = 1.0
  # Freezes the first n blocks and all before them, such as the patch and
  # position embeddings. 0: nothing. Saves no time with `model.scan`.
  config.optimizer.freeze_blocks = 0
  # Devices over which the optimizer's moments and its work are split, while the
  # parameters stay whole (ZeRO-1); may differ when a run is resumed. 1: off.
  config.optimizer.shard_state = 1
  # LoRA: kernels get alpha / rank * A B added. Only A, B and the head are
  # trained, except where `lr_multipliers` matches. Loading the run returns
  # plain weights with the updates merged.
  config.lora = ml_collections.ConfigDict()
  config.lora.rank = 0  # columns of A, rows of B; 0: off
  config.lora.alpha = 16.0  # see above
  # Regular expression: kernels whose whole path matches. The default matches
  # all attention projections; the LoRA paper's is ".*/(query|value)/kernel".
  config.lora.params = ".*/MultiHeadDotProductAttention_0/.*/kernel"
  config.schedule = ml_collections.ConfigDict()
  config.schedule.base_lr = 1e-3  # the learning rate after the warm-up
  # "linear", "cosine", "rsqrt", "exponential" (a staircase) or "constant".
  config.schedule.decay = "linear"
  config.schedule.warmup_steps = 10_000  # linear from 0
  config.schedule.linear_end = 1e-5  # learning rate at the end of linear decay
  config.schedule.rsqrt_timescale = 10_000  # steps
  # Exponential decay: multiplied by the rate every so many steps; warm-up steps
  # count.
  config.schedule.exponential_rate = 0.97
  config.schedule.exponential_steps = 10_000.0
  config.schedule.cooldown_steps = 0  # linear to 0 at the end
  # Gradient accumulation: less memory, same result except for the random draws
  # of dropout and stochastic depth.
  config.micro_batches = 1
  config.ema_decay = 0.0  # Polyak averaging of the parameters; 0: off
  # Limits the decay to (1 + t) / (10 + t) after t updates (TensorFlow's
  # `num_updates`), so that the initial weights fade from the average early.
  config.ema_warmup = False

  # --- machines ---
  # Devices over which parameters and optimizer state are sharded; they are
  # replicated across the rest. 1: pure data parallelism.
  config.fsdp = 1

  # --- bookkeeping: may differ when a run is resumed ---
  config.log_every = 50  # steps
  config.eval_every = 5000  # steps; 0: at the end only
  config.checkpoint_every = 1000  # steps; 0: at the end only
  config.keep_checkpoints = 2  # the newest are kept, besides the best
  config.profile_step = 0  # first step of a profiler window; 0: none
  config.profile_steps = 5  # its length
  # Weights & Biases project to which metrics are also logged; "": none.
  config.wandb = ""
  return config.lock()
