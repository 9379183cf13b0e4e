"""Training objectives: a model, its loss, and the sums of an evaluation.

An objective is a frozen dataclass of pure functions:

  prepare(batch, key): the examples of a batch, a pytree of arrays [b ...]. It
    draws random numbers for the whole batch, before that is split.
  loss(params, examples, key): (f32[], a mean over the examples; {path: running
    statistic after them}). The key feeds dropout and stochastic depth.
  eval_step(params, batch): sums over the examples whose mask is set.
  summarize(totals, multilabel): yields (metric, value) from the sums over a
    test set, with one label an image or several. Missing sums are 0.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from vit_jax import models
from vit_jax.training.lora import adapt
from vit_jax.training.losses import (
  get_loss,
  multi_hot,
  sharpen,
  soft_targets,
)
from vit_jax.training.masked import MaskedPatches
from vit_jax.training.steps import cutmix, mixup, normalize
from vit_jax.training.teacher import Teacher

_TOP_5_CLASSES = 10  # top-5 accuracy of fewer means little


@dataclasses.dataclass(frozen=True)
class Classification:
  """Image classification."""

  model: models.Model
  class_names: list[str]
  loss_fn: Callable  # (logits f32[b k], targets f32[b k]) -> f32[b]
  mixup_alpha: float = 0.0  # of `mixup`; 0 for none
  cutmix_alpha: float = 0.0  # of `cutmix`; 0 for none
  repeats: int = 1  # of an image in a row; mixing skips over them
  # Undoes the smoothing of soft targets, see `losses.sharpen`.
  sharpen: Callable = lambda targets: targets
  teacher: Teacher | None = None  # its parameters are batch["teacher"]
  two_heads: bool = False  # the model has one for the distillation token

  def prepare(self, batch, key):
    examples = self._mix(batch, key)
    if self.teacher is None:
      return examples
    return *examples, self.teacher.predict(batch["teacher"], examples[0])

  def _mix(self, batch, key):
    images = normalize(batch["image"])
    targets = multi_hot(batch["labels"], len(self.class_names))
    if "probabilities" in batch:
      given = batch["probabilities"]
      soft = soft_targets(batch["labels"], given, len(self.class_names))
      is_soft = (given > 0).any(-1, keepdims=True)
      targets = jnp.where(is_soft, self.sharpen(soft), targets)
    mixes = [
      functools.partial(mix, alpha=alpha, shift=self.repeats)
      for mix, alpha in ((mixup, self.mixup_alpha), (cutmix, self.cutmix_alpha))
      if alpha
    ]
    if len(mixes) > 1:  # one of the two a batch, as timm does
      key, choice = jax.random.split(key)
      use_mixup = jax.random.bernoulli(choice)
      return jax.lax.cond(use_mixup, *mixes, key, images, targets)
    return mixes[0](key, images, targets) if mixes else (images, targets)

  def loss(self, params, examples, key):
    images, targets, *taught = examples
    options = {"train": True, "key": key}
    statistics, out = {}, {}
    if self.model.has_statistics:
      logits, statistics = self.model.apply(
        params, images, statistics=True, **options
      )
    elif self.teacher and self.two_heads:
      _, out = self.model.apply(
        params, images, intermediates="tokens", **options
      )
      logits = out["logits_cls"]
    else:
      logits = self.model.apply(params, images, **options)
    loss = self.loss_fn(logits, targets)
    if self.teacher:
      distilled = out.get("logits_dist", logits)
      loss = self.teacher.mix(loss, distilled, *taught)
    return jnp.mean(loss), statistics

  def eval_step(self, params, batch):
    """Returns sums over the unmasked examples.

    They are "examples", "labelled" (examples with at least one label), and over
    these only "loss", "correct" (the top class is one of the labels) and
    "ranking_precision". With one label an image and ten classes or more also
    "correct@5" (the label is one of the five top classes).
    """
    logits = self.model.apply(params, normalize(batch["image"]))
    targets = multi_hot(batch["labels"], len(self.class_names))
    mask = batch["mask"]
    labelled = mask & (targets.sum(-1) > 0)
    top = jnp.argmax(logits, -1)
    correct = jnp.take_along_axis(targets, top[:, None], 1)[:, 0] > 0
    sums = {}
    if batch["labels"].shape[1] == 1 and targets.shape[1] >= _TOP_5_CLASSES:
      _, best = jax.lax.top_k(logits, 5)
      among = jnp.any(best == batch["labels"], -1)
      sums["correct@5"] = jnp.sum(labelled & among)
    ranking = ranking_precision(logits, batch["labels"])
    return sums | {
      "examples": jnp.sum(mask),
      "labelled": jnp.sum(labelled),
      "loss": jnp.sum(jnp.where(labelled, self.loss_fn(logits, targets), 0)),
      "correct": jnp.sum(labelled & correct),
      "ranking_precision": jnp.sum(jnp.where(labelled, ranking, 0)),
    }

  def summarize(self, totals, multilabel) -> Iterator[tuple[str, float]]:
    """Turns the sums of `eval_step` over a test set into metrics.

    Yields "examples", the number of all, and "loss". For single-label sets
    "accuracy" and, of ten classes or more, "accuracy@5". For multi-label sets
    "labelled", the number with a label, "prec@1" (the top class is one of the
    labels) and "lrap" (label ranking average precision). Means are over
    examples with a label, which some of ImageNet-ReaL lack.
    """
    labelled = max(totals["labelled"], 1)
    yield "examples", int(totals["examples"])
    yield "loss", float(totals["loss"] / labelled)
    if multilabel:
      yield "labelled", int(totals["labelled"])
      yield "prec@1", float(totals["correct"] / labelled)
      yield "lrap", float(totals["ranking_precision"] / labelled)
    else:
      yield "accuracy", float(totals["correct"] / labelled)
      if "correct@5" in totals:
        yield "accuracy@5", float(totals["correct@5"] / labelled)


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
  true_above = (scores[:, None, :] >= scores[:, :, None]) & present[:, None, :]
  precision = jnp.where(present, true_above.sum(-1) / above, 0)
  return precision.sum(-1) / jnp.maximum(present.sum(-1), 1)


Objective = Classification | MaskedPatches


def create(
  config, class_names: list[str], teacher: Teacher | None = None
) -> Objective:
  """Returns the objective of a configuration, for these classes.

  `teacher` is that of a classification, for a training step.

  Raises:
    UserError: an invalid model or loss.
  """
  options = {"image_size": config.image_size, **config.model}
  # Older runs have none of these.
  lora = config.get("lora", {})
  cutmix_alpha = config.train.get("cutmix_alpha", 0.0)
  if config.objective == "classification":
    model = models.create(num_classes=len(class_names), **options)
    return Classification(
      model=adapt(model, **lora),
      class_names=class_names,
      loss_fn=get_loss(**config.loss),
      sharpen=functools.partial(sharpen, **config.loss),
      mixup_alpha=config.train.mixup_alpha,
      cutmix_alpha=cutmix_alpha,
      repeats=config.train.get("repeats", 1),
      teacher=teacher,
      two_heads=config.model.get("distillation_token", False),
    )
  target = config.masked_target
  model = models.create_masked(target=target, **options)
  return MaskedPatches(adapt(model, **lora), target)
