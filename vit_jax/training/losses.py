"""Classification losses, computed in float32, one number per example.

Targets are multi-hot, and soft after mixup. A loss returns f32[b], not the
mean, so that callers can mask padding before they average.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from vit_jax.errors import UserError, check_choice

LossFn = Callable[[jax.Array, jax.Array], jax.Array]


def multi_hot(labels: jax.Array, num_classes: int) -> jax.Array:
  """Turns class ids int32[b l], padded with -1, into f32[b k] of 0 and 1.

  A label that is given twice counts once. Ids outside [0, k) are ignored.
  """
  # A comparison, not a scatter: index -1 would wrap to the last class, and XLA
  # fuses this into the reduction without ever making [b l k].
  classes = jnp.arange(num_classes)
  return (labels[..., None] == classes).any(axis=-2).astype(jnp.float32)


def soft_targets(
  labels: jax.Array, probabilities: jax.Array, num_classes: int
) -> jax.Array:
  """Returns the distributions f32[b k] with some known probabilities.

  The remaining probability is divided evenly among the other classes.

  Args:
    labels: i32[b l], classes, none twice in a row, padded with -1.
    probabilities: f32[b l], of these; 0 where there is no label.
    num_classes: k.
  """
  at = labels[..., None] == jnp.arange(num_classes)
  known = jnp.where(at, probabilities[..., None], 0).sum(-2)
  others = num_classes - (labels >= 0).sum(-1)
  rest = jnp.maximum(1 - probabilities.sum(-1), 0) / jnp.maximum(others, 1)
  return jnp.where(at.any(-2), known, rest[:, None])


def sigmoid_cross_entropy(
  logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
  """Binary cross-entropy summed over the classes: f32[b], in nats.

  Args:
    logits: [b k], any float dtype.
    targets: [b k], the probability of each class, independent of the others.
    label_smoothing: s; targets of 1 become 1 - s, of 0 s, linearly between.
  """
  # bfloat16 loses the tail of a sum over thousands of classes.
  logits, targets = (jnp.asarray(x, jnp.float32) for x in (logits, targets))
  targets = label_smoothing + (1 - 2 * label_smoothing) * targets
  # Two log-sigmoids, because log_sigmoid(-x) = log_sigmoid(x) - x cancels where
  # thousands of logits sit near the head bias of -10.
  positive = targets * jax.nn.log_sigmoid(logits)
  negative = (1 - targets) * jax.nn.log_sigmoid(-logits)
  return -(positive + negative).sum(axis=-1)


def softmax_cross_entropy(
  logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
  """Cross-entropy between targets and softmax(logits): f32[b], in nats.

  It is 0 for an image without any label.

  Args:
    logits: [b k], any float dtype.
    targets: [b k], not negative; each row is divided by its sum, so several
      labels of one image share its target evenly.
    label_smoothing: s; the target distribution t becomes (1 - s) t + s / k.
  """
  logits, targets = (jnp.asarray(x, jnp.float32) for x in (logits, targets))
  total = targets.sum(axis=-1, keepdims=True)
  labelled = total > 0
  targets = targets / jnp.where(labelled, total, 1)
  targets = optax.smooth_labels(targets, label_smoothing)
  targets = jnp.where(labelled, targets, 0)
  return -(targets * jax.nn.log_softmax(logits)).sum(axis=-1)


def sharpen(
  targets: jax.Array, name: str, label_smoothing: float = 0.0
) -> jax.Array:
  """Returns targets that label smoothing in the loss turns into the given ones.

  For targets that are not to be smoothed, in a batch with others that are. The
  result may be negative. Softmax targets [b k] must sum to 1.
  """
  s = label_smoothing
  if name == "sigmoid":
    return (targets - s) / (1 - 2 * s)
  return (targets - s / targets.shape[-1]) / (1 - s)


def get_loss(name: str, label_smoothing: float = 0.0) -> LossFn:
  """Returns `loss(logits [b k], targets [b k]) -> f32[b]`; see each of them.

  Args:
    name: "sigmoid" or "softmax".
    label_smoothing: in [0, 1) for softmax, in [0, 0.5) for sigmoid, where 0.5
      would make "on" and "off" the same.

  Raises:
    UserError: unknown name, smoothing out of range.
  """
  check_choice("config.loss.name", name, _LOSSES)
  loss, limit = _LOSSES[name]
  if not 0 <= label_smoothing < limit:
    raise UserError(
      f"label_smoothing {label_smoothing} is not in [0, {limit}), which the "
      f"{name} loss needs; use 0 for none"
    )
  return functools.partial(loss, label_smoothing=label_smoothing)


# Name -> (function, limit that label smoothing must stay below).
_LOSSES = {
  "sigmoid": (sigmoid_cross_entropy, 0.5),
  "softmax": (softmax_cross_entropy, 1.0),
}
