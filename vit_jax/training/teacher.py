"""Knowledge distillation: the loss of a student that imitates a teacher.

It is from arXiv 1503.02531; the same crop and mixup for both models are from
arXiv 2106.05237, and the distillation token is from arXiv 2012.12877 (DeiT).
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError, check_choice
from vit_jax.training.losses import softmax_cross_entropy

LOSSES = ("kl", "cross_entropy", "hard")


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A teacher and the distillation loss, with the values of `config.teacher`.

  Attributes:
    apply: (params, images f32[b h w 3] in [-1, 1]) -> logits [b k].
    temperature: T, which divides both models' logits before the softmax.
    weight: of the distillation loss, in [0, 1]; the loss with the labels has
      the rest.
    loss: one of `LOSSES`, see `distill`.

  Raises:
    UserError: an invalid value.
  """

  apply: Callable
  temperature: float = 1.0
  weight: float = 0.5
  loss: str = "kl"

  def __post_init__(self):
    check_choice("config.teacher.loss", self.loss, LOSSES)
    if not 0 < self.temperature < math.inf:
      raise UserError(
        f"config.teacher.temperature is {self.temperature}; it must be above 0"
      )
    if not 0 <= self.weight <= 1:
      raise UserError(
        f"config.teacher.weight is {self.weight}; it must be between 0 and 1"
      )
    if self.loss == "hard" and self.temperature != 1:
      raise UserError(
        f"config.teacher.temperature is {self.temperature} and has no effect: "
        "the teacher's best class, of config.teacher.loss 'hard', is the same "
        "at any temperature; leave it at 1.0"
      )

  def predict(self, params, images) -> jax.Array:
    """Returns the teacher's logits f32[b k], computed as in an evaluation."""
    return self.apply(params, images).astype(jnp.float32)

  def distill(self, logits, taught) -> jax.Array:
    """Returns the distillation loss f32[b] of each image, in nats.

    "kl" is T^2 KL(p || q) with p = softmax(taught / T) and q = softmax(logits /
    T). "cross_entropy" is T^2 times that of p and q, whose gradient is the
    same. T^2 compensates for gradients, which scale as 1 / T^2. "hard" is the
    cross-entropy with the teacher's best class.

    Args:
      logits: the student's, [b k].
      taught: the teacher's, f32[b k].
    """
    if self.loss == "hard":
      targets = jax.nn.one_hot(jnp.argmax(taught, -1), taught.shape[-1])
      return softmax_cross_entropy(logits, targets)
    log_p = jax.nn.log_softmax(taught / self.temperature)
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32) / self.temperature)
    entropy = 0 if self.loss == "cross_entropy" else log_p
    loss = (jnp.exp(log_p) * (entropy - log_q)).sum(-1)
    return self.temperature**2 * loss

  def mix(self, labelled, logits, taught) -> jax.Array:
    """Returns f32[b], the weighted sum of `labelled` and of `distill`.

    Args:
      labelled: the student's loss with the labels, f32[b].
      logits, taught: see `distill`.
    """
    distilled = self.distill(logits, taught)
    return (1 - self.weight) * labelled + self.weight * distilled
