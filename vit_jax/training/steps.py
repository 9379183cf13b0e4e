"""The jitted steps: pure functions of values, with no input or output."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vit_jax.models import masking
from vit_jax.state import KEY_IMPL, TrainState, make_key
from vit_jax.training.losses import multi_hot
from vit_jax.training.optim import polyak


def normalize(images):
  """u8[b h w 3] -> f32 in [-1, 1]; pixels travel to the device as uint8."""
  return (images.astype(jnp.float32) - 127.5) / 127.5


def mixup(key, images, targets, alpha):
  """Mixes each example with its neighbour in the global batch.

  One weight a ~ Beta(alpha, alpha) a batch, the larger of a and 1 - a, so that
  the first image dominates (arXiv 1710.09412; AugReg, arXiv 2106.10270).
  """
  a = jax.random.beta(key, alpha, alpha)
  a = jnp.maximum(a, 1 - a)
  return tuple(
    a * x + (1 - a) * jnp.roll(x, 1, axis=0) for x in (images, targets)
  )


def split_micro_batches(tree, count):
  """[b ...] -> [count b/count ...] without moving a row between devices.

  Micro-batch j takes every count-th row, so each device contributes equally.
  """
  return jax.tree.map(
    lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), tree
  )


class Objective(NamedTuple):
  """What a training step minimises, as two pure functions.

  Attributes:
    prepare: (batch, key) -> examples, a pytree of arrays [b ...]. What it
      draws is drawn for the whole batch, before that is split.
    loss: (params, examples, key) -> f32[], a mean over the examples. The key
      feeds dropout and stochastic depth.
  """

  prepare: Callable[[Any, jax.Array], Any]
  loss: Callable[[Any, Any, jax.Array], jax.Array]


def make_classification(
  *, apply, loss_fn, num_classes: int, mixup_alpha: float = 0.0
) -> Objective:
  """Returns the objective of naming an image's classes.

  Args:
    apply: a model's forward function, see `models.Model`.
    loss_fn: (logits f32[b k], targets f32[b k]) -> f32[b].
    num_classes: k.
    mixup_alpha: of `mixup`; 0 for none.
  """

  def prepare(batch, key):
    images = normalize(batch["image"])
    targets = multi_hot(batch["labels"], num_classes)
    if mixup_alpha:
      images, targets = mixup(key, images, targets, mixup_alpha)
    return images, targets

  def loss(params, examples, key):
    images, targets = examples
    logits = apply(params, images, train=True, key=key)
    return jnp.mean(loss_fn(logits, targets))

  return Objective(prepare, loss)


def make_masked_patches(*, apply, patch_size: int, target: str) -> Objective:
  """Returns the objective of predicting corrupted patches, see `masking`.

  Args:
    apply: the forward function of `models.create_masked`.
    patch_size: p.
    target: what of a patch is predicted, one of `masking.TARGETS`.
  """

  def prepare(batch, key):
    keys = jax.random.split(key, len(batch["image"]))
    return corrupt(batch["image"], keys, patch_size, target)

  def loss(params, examples, key):
    images, corruption, targets = examples
    predictions = apply(params, images, corruption, train=True, key=key)
    return jnp.mean(masking.prediction_loss(predictions, targets, target))

  return Objective(prepare, loss)


def corrupt(images, keys, patch_size: int, target: str):
  """Returns (images f32[b h w 3], their corruption, the targets [b m ...]).

  Args:
    images: u8[b h w 3].
    keys: PRNG keys [b], one for each image.
    patch_size: p.
    target: one of `masking.TARGETS`.
  """
  targets = masking.make_targets(images, patch_size, target)
  corruption = masking.draw_corruption(keys, targets.shape[1])
  targets = masking.take_patches(targets, corruption.corrupted)
  return normalize(images), corruption, targets


def make_train_step(
  *,
  objective: Objective,
  optimizer,
  schedule,
  micro_batches: int = 1,
  ema_decay: float = 0.0,
):
  """Returns train_step(state, batch) -> (state, metrics).

  Args:
    objective: what to minimise.
    optimizer: an optax gradient transformation.
    schedule: step -> learning rate, for the metrics only.
    micro_batches: the gradient is the mean over that many pieces.
    ema_decay: of the Polyak average; 0 for none.

  `batch` is {"image": u8[b h w 3], "labels": i32[b l]} with -1 for no label.
  All randomness is a function of (state.rng, state.step).
  """

  def mean_gradient(params, examples, key):
    """Mean loss and gradient over the batch, one micro-batch at a time."""
    gradient = jax.value_and_grad(objective.loss)
    if micro_batches == 1:
      return gradient(params, examples, key)
    pieces = split_micro_batches(examples, micro_batches)
    keys = jax.random.split(key, micro_batches)

    def add(total, piece):
      return jax.tree.map(jnp.add, total, gradient(params, *piece)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zero, (pieces, keys))
    return jax.tree.map(lambda x: x / micro_batches, total)

  def train_step(state: TrainState, batch):
    key = jax.random.wrap_key_data(state.rng, impl=KEY_IMPL)
    key = jax.random.fold_in(key, state.step)
    loss_key, prepare_key = jax.random.split(key)
    examples = objective.prepare(batch, prepare_key)
    loss, gradient = mean_gradient(state.params, examples, loss_key)
    updates, opt_state = optimizer.update(
      gradient, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    ema = polyak(state.ema, params, ema_decay) if ema_decay else None
    metrics = {
      "loss": loss,
      "gradient_norm": optax.tree.norm(gradient),
      "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
    }
    new = TrainState(state.step + 1, params, opt_state, ema, state.rng)
    return new, metrics

  return train_step


_TOP_5_CLASSES = 10  # of fewer, five are no achievement


def make_eval_step(*, apply, loss_fn, num_classes: int):
  """Returns eval_step(params, batch) -> sums over the unmasked examples.

  The sums: "examples", "labelled" (examples with at least one label), and over
  those alone "loss", "correct" (the top class is one of the labels) and
  "ranking_precision" (label ranking average precision, see below). With one
  label an image and ten classes or more also "correct@5" (the label is one of
  the five top classes).
  """

  def eval_step(params, batch):
    logits = apply(params, normalize(batch["image"]))
    targets = multi_hot(batch["labels"], num_classes)
    mask = batch["mask"]
    labelled = mask & (targets.sum(-1) > 0)
    top = jnp.argmax(logits, -1)
    correct = jnp.take_along_axis(targets, top[:, None], 1)[:, 0] > 0
    sums = {}
    if batch["labels"].shape[1] == 1 and num_classes >= _TOP_5_CLASSES:
      _, best = jax.lax.top_k(logits, 5)
      among = jnp.any(best == batch["labels"], -1)
      sums["correct@5"] = jnp.sum(labelled & among)
    return sums | {
      "examples": jnp.sum(mask),
      "labelled": jnp.sum(labelled),
      "loss": jnp.sum(jnp.where(labelled, loss_fn(logits, targets), 0)),
      "correct": jnp.sum(labelled & correct),
      "ranking_precision": jnp.sum(
        jnp.where(labelled, ranking_precision(logits, batch["labels"]), 0)
      ),
    }

  return eval_step


def make_masked_eval_step(*, apply, patch_size: int, target: str):
  """Returns eval_step(params, batch) -> sums over the unmasked examples.

  `batch` is {"image": u8[b h w 3], "mask": bool[b], "index": i32[b]}; the index
  of an image in its data set decides what of it is corrupted.

  The sums: "examples" and "loss". Of the m corrupted patches of each, for
  colours: "correct" (predictions, one a cell) and "colours" f32[cells 512], how
  often each was the target; for pixels: their number "patches", and "sum" and
  "squares" of what was to predict, f32[3pp] each.
  """

  def eval_step(params, batch):
    fold_in = functools.partial(jax.random.fold_in, make_key(0))
    images, corruption, targets = corrupt(
      batch["image"], jax.vmap(fold_in)(batch["index"]), patch_size, target
    )
    predictions = apply(params, images, corruption)
    loss = masking.prediction_loss(predictions, targets, target)
    sums = {
      "examples": jnp.sum(batch["mask"]),
      "loss": jnp.sum(jnp.where(batch["mask"], loss, 0)),
    }
    mask = batch["mask"][:, None, None]
    if target == "pixels":
      patches = jnp.sum(mask) * targets.shape[1]
      targets = jnp.where(mask, targets, 0)
      return sums | {
        "patches": patches,
        "sum": targets.sum((0, 1)),
        "squares": (targets**2).sum((0, 1)),
      }
    found = jnp.argmax(masking.split_cells(predictions), -1)
    is_colour = targets[..., None] == jnp.arange(masking.COLOURS)
    return sums | {
      "correct": jnp.sum(mask & (found == targets)),
      "colours": jnp.sum(mask[..., None] & is_colour, (0, 1)),
    }

  return eval_step


def ranking_precision(logits, labels):
  """Label ranking average precision of each example, f32[b].

  For each label: the fraction of true labels among the classes that score at
  least as high; then the mean over the labels (Tsoumakas et al., "Mining
  Multi-label Data", 2010). With one label it is the reciprocal rank.

  Args:
    logits: f32[b k].
    labels: i32[b l], -1 for none, no label twice.
  """
  present = labels >= 0
  scores = jnp.take_along_axis(logits, jnp.maximum(labels, 0), 1)
  above = (logits[:, None, :] >= scores[:, :, None]).sum(-1)
  true_above = (
    (scores[:, None, :] >= scores[:, :, None]) & present[:, None, :]
  ).sum(-1)
  precision = jnp.where(present, true_above / above, 0)
  return precision.sum(-1) / jnp.maximum(present.sum(-1), 1)
