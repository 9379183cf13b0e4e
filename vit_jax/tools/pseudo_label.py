"""Pseudo-labels: a teacher classifies images, and the best become a data set.

The filter and the balance are those of Noisy Student (arXiv 1911.04252): images
of which the teacher is confident, the most confident of each class, and
duplicates in classes that have fewer.
"""

import io
import itertools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import checkpoint, data, distributed, files, pretrained, sharding
from vit_jax.data import pseudo
from vit_jax.data.relabelled import allow_unlabelled
from vit_jax.errors import (
  RunStopped,
  UserError,
  check_folder,
  check_free,
  one_line,
)
from vit_jax.evaluation import devices
from vit_jax.evaluation.sums import fetch, make_sums
from vit_jax.training.steps import normalize

log = logging.getLogger(__name__)

_PART = 2**14  # examples that are kept at once; what a killed command repeats
_STORED = 10  # classes of a soft label


def pseudo_label(
  source: str,
  dataset: str,
  split: str,
  out: str,
  *,
  data_dir: str | None = None,
  soft: bool = False,
  min_confidence: float = 0.3,
  per_class: int = 130_000,
  balance: bool = True,
  batch_size: int = 64,
  before_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Writes `pseudo:OUT`: images with the classes that a teacher gives them.

  The teacher sees each image once, without noise: at its own size and with its
  evaluation preprocessing. Its scores are kept beside `out` until the set is
  there, so that the same command resumes; also one with another choice of
  images. All processes of a run have to call it, and the first one writes.

  Args:
    source: the teacher, whatever `vit_jax.load` reads.
    dataset, split, data_dir: the images, see `data.get_source`. Labels that
      they have are not used.
    out: a folder, or a gs:// address.
    soft: whether an image gets the ten most probable classes with their
      probabilities, all if there are fewer; else the most probable one.
    min_confidence: least probability of the most probable class.
    per_class: most images of a class, the most confident ones.
    balance: whether classes with fewer images than the largest one repeat
      theirs until they have as many, the most confident first.
    batch_size: images at once, on all devices.
    before_batch: may raise, to end between two batches.

  Returns:
    The report, also in about.json: numbers of "examples" seen, "confident"
    ones, "kept" ones, of these "distinct" and "repeated" ones;
    "mean_confidence" of what is kept; "classes"; "per_class", the
    least, median and most distinct images of a class that has any; "largest",
    what each such class has after balancing; "empty", the other classes;
    "agreement", the part of the distinct images with the label that the data
    set gives them, None where it has none of these classes.

  Raises:
    UserError: no classes, no images, none confident enough, or another set at
      `out`.
  """
  check_options(min_confidence, per_class)
  options = {"soft": soft, "min_confidence": min_confidence}
  options |= {"per_class": per_class, "balance": balance}
  weights = pretrained.read(source)
  images = data.get_source(dataset, split, data_dir)
  about = {
    "dataset": dataset,
    "split": split,
    "identity": images.identity(),
    "teacher": weights.source,
    "teacher_digest": weights.digest(),
    "class_names": _name_classes(weights, images),
    "options": options,
  }
  return _label(out, weights, images, about, batch_size, before_batch)


def check_options(min_confidence: float, per_class: int) -> None:
  """Raises a UserError for options of `pseudo_label` that are out of range."""
  if not 0 <= min_confidence <= 1:
    raise UserError(
      f"min_confidence is {min_confidence}; it must be from 0 to 1"
    )
  if per_class < 1:
    raise UserError(f"per_class is {per_class}; it must be 1 or more")


def _label(out, weights, images, about, batch_size, before_batch):
  """Does what is left to do of `pseudo_label`; returns the report.

  `about` is about.json without the report.
  """
  path, soft = checkpoint.absolute(out), about["options"]["soft"]
  distributed.check_same({**about, "--out": str(path)})
  done = on_first(lambda: _find_report(path, about))
  if done:
    log.info("%s is complete", path)
    return done
  parts = path.with_name(path.name + ".parts")
  mesh = sharding.make_mesh()
  size = devices.round_up(batch_size, mesh)
  scored = {k: x for k, x in about.items() if k != "options"}
  scored |= {"soft": soft, "images_a_part": max(1, _PART // size) * size}
  first = on_first(lambda: _count_parts(parts, scored))
  images = allow_unlabelled(images, about["class_names"])
  where = {"source": images, "mesh": mesh, "batch_size": size}
  _score(weights, soft, parts, first, before_batch=before_batch, **where)
  return on_first(lambda: _finish(path, parts, about))


def _name_classes(weights, images) -> list[str]:
  """Returns the names of the teacher's classes."""
  if weights.num_classes < 2:
    raise UserError(
      f"{weights.source} has {weights.num_classes} classes; a teacher needs 2 "
      "or more: fine-tune it on the labelled images"
    )
  if weights.class_names:
    return list(weights.class_names)
  if images.num_classes == weights.num_classes:
    log.warning(
      "%s does not name its classes; taken to be those of %s, in their order",
      *(weights.source, images.dataset),
    )
    return list(images.class_names)
  raise UserError(
    f"{weights.source} does not name its {weights.num_classes:,} classes; "
    "fine-tune it on the labelled images, the run has their names"
  )


def on_first(run: Callable) -> Any:
  """Runs a function on the first process; all get what it returns.

  It is of JSON's types. All raise its UserError, and a RunStopped where it
  cannot write.
  """
  found, error, is_disk = None, None, False
  if not jax.process_index():
    try:
      found = run()
    except UserError as e:
      error = str(e)
    except OSError as e:
      error, is_disk = one_line(e), True
  found, error, is_disk = distributed.gather([found, error, is_disk])[0]
  if is_disk:
    raise RunStopped(f"cannot write: {error}; the same command resumes")
  if error:
    raise UserError(error)
  return found


def _find_report(path, about):
  """Returns the report of a complete set at `path`, None if there is nothing.

  Raises:
    UserError: there is something else.
  """
  if not (path / pseudo.ABOUT).exists():
    is_remote = files.is_remote(path)
    if not (is_remote and path.exists() and _is_half_written(path)):
      check_free(path)
    if not is_remote:
      check_folder(path, "--out")
    return None
  old = pseudo.read_about(path)
  pairs = [(old, about), (old["options"], about["options"])]
  other = [k for a, b in pairs for k in b if k != "options" and a[k] != b[k]]
  if other:
    raise UserError(
      f"{path} has pseudo-labels with other {', '.join(other)}; nothing is "
      "overwritten, choose another --out"
    )
  return old["report"]


def _is_half_written(path) -> bool:
  """Returns whether a folder has nothing but arrays of such a set."""
  return {file.name for file in path.iterdir()} <= {*pseudo.ARRAYS}


# --- scores ---


def _count_parts(parts, about) -> int:
  """Returns how many parts of the scores are there, after checking whose."""
  files.open_parts(parts, about, "scores")
  return next(i for i in itertools.count() if not _part(parts, i).exists())


def _part(parts, number):
  return parts / f"{number:08}.npz"


def _score(weights, soft, parts, first, *, source, mesh, batch_size, **where):
  """Writes the parts from `first` on: see `_make_score`, for each example."""
  teacher = pretrained.assemble(weights)
  steps = max(1, _PART // batch_size)
  batches = make_sums(
    _make_score(teacher, soft),
    model=teacher.model,
    source=source,
    mesh=mesh,
    batch_size=batch_size,
    preprocess=teacher.config.preprocess,
    start_step=first * steps,
    **where,
  )
  params = devices.replicate(mesh, jax.tree.map(np.asarray, teacher.params))
  scores = fetch(batches(params))
  total = source.num_examples
  for number in range(first, -(-total // (steps * batch_size))):
    found = list(itertools.islice(scores, steps))
    start = number * steps * batch_size
    arrays = {
      name: np.concatenate([batch[name] for batch in found])[: total - start]
      for name in found[0]
    }
    if not np.isfinite(arrays["probabilities"]).all():
      raise UserError(
        f"{weights.source} gives probabilities that are not finite; choose "
        "another checkpoint"
      )
    on_first(lambda: _write(_part(parts, number), arrays))  # noqa: B023
    log.info("%d of %d images", start + len(arrays["labels"]), total)


def _write(part, arrays):
  with files.atomic_file(part) as partial, open(partial, "wb") as f:
    np.savez(f, **arrays)


def _make_score(teacher, soft):
  """Returns (params, batch) -> what is kept of the images.

  It is the most probable classes "labels" i32[b l], their "probabilities"
  f32[b l], and "agrees" i32[b]: whether the first one is a given label; -1
  without one. Sigmoids are divided by their sum.
  """
  model, loss = teacher.model, teacher.config.loss
  count = min(_STORED, teacher.config.num_classes) if soft else 1

  def score(params, batch):
    logits = model.apply(params, normalize(batch["image"]))
    if loss == "sigmoid":  # whose sum may be too small for float32
      logits = jax.nn.log_sigmoid(logits)
    probabilities, labels = jax.lax.top_k(jax.nn.softmax(logits), count)
    given = batch["labels"]
    agrees = (given == labels[:, :1]).any(-1)
    agrees = jnp.where((given >= 0).any(-1), agrees, -1)
    return {"labels": labels, "probabilities": probabilities, "agrees": agrees}

  return score


def _read(part, name) -> np.ndarray:
  """Returns an array of a part."""
  remote = files.is_remote(part)
  with np.load(io.BytesIO(part.read_bytes()) if remote else part) as arrays:
    return arrays[name]


# --- selection ---


def select(
  labels: np.ndarray,
  confidence: np.ndarray,
  num_classes: int,
  *,
  min_confidence: float,
  per_class: int,
  balance: bool,
) -> np.ndarray:
  """Returns which examples are kept, i64[m], rising; repeated ones repeatedly.

  Args:
    labels: i32[n], the most probable class of each example.
    confidence: f32[n], its probability.
    num_classes: how many there are.
    min_confidence, per_class, balance: see `pseudo_label`. Of equally confident
      examples the first ones are taken.
  """
  good = np.flatnonzero(confidence >= min_confidence)
  # By class and then by confidence; the sort is stable.
  order = good[np.lexsort((-confidence[good], labels[good]))]
  counts = np.bincount(labels[good], minlength=num_classes)
  starts = np.cumsum(counts) - counts
  kept = np.minimum(counts, per_class)
  wanted = np.where(kept, kept.max(), 0) if balance else kept
  classes = np.repeat(np.arange(num_classes), wanted)
  ranks = np.arange(wanted.sum()) - np.repeat(
    np.cumsum(wanted) - wanted, wanted
  )
  return np.sort(order[starts[classes] + ranks % kept[classes]])


def _finish(path, parts, about) -> dict[str, Any]:
  """Writes the set from all scores; returns its report."""
  options = about["options"]
  scores = [_part(parts, i) for i in range(_count_parts(parts, {}))]
  labels, confidence = (
    np.concatenate([_read(part, name)[:, 0] for part in scores])
    for name in ("labels", "probabilities")
  )
  choice = {k: x for k, x in options.items() if k != "soft"}
  chosen = select(labels, confidence, len(about["class_names"]), **choice)
  if not len(chosen):
    raise UserError(
      f"none of the {len(labels):,} images has a class with a probability of "
      f"{options['min_confidence']} or more, the highest is "
      f"{confidence.max():.6g}; lower --min_confidence"
    )
  agrees = np.concatenate([_read(part, "agrees") for part in scores])
  report = _report(chosen, labels, confidence, agrees, about)
  arrays = [_take(scores, chosen, "labels")]
  if options["soft"]:
    arrays.append(_take(scores, chosen, "probabilities"))
  pseudo.write(path, {**about, "report": report}, chosen, *arrays)
  parts.rmtree()
  return report


def _take(scores, chosen, name):
  """Returns rows of an array that is in parts: of `chosen`, which rises."""
  found, first = [], 0
  for part in scores:
    array = _read(part, name)
    i, j = np.searchsorted(chosen, [first, first + len(array)])
    found.append(array[chosen[i:j] - first])
    first += len(array)
  return np.concatenate(found)


def _report(chosen, labels, confidence, agrees, about):
  """Returns what is reported, see `pseudo_label`."""
  names = about["class_names"]
  distinct = np.unique(chosen)
  counts = np.bincount(labels[distinct], minlength=len(names))
  some = counts[counts > 0]
  largest = np.bincount(labels[chosen]).max()
  known = agrees[distinct]
  known = known[known >= 0]
  least = about["options"]["min_confidence"]
  return {
    "examples": len(labels),
    "confident": int((confidence >= least).sum()),
    "kept": len(chosen),
    "distinct": len(distinct),
    "repeated": len(chosen) - len(distinct),
    "mean_confidence": float(confidence[chosen].mean(dtype=np.float64)),
    "classes": len(names),
    "per_class": {
      "min": int(some.min()),
      "median": float(np.median(some)),
      "max": int(some.max()),
    },
    "largest": int(largest),
    "empty": [names[k] for k in np.flatnonzero(counts == 0)],
    "agreement": float(known.mean()) if len(known) else None,
  }
