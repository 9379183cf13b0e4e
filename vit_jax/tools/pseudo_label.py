"""The `pseudo-label` command: a data set of images with a teacher's labels.

Filtering and balancing follow Noisy Student (arXiv 1911.04252). Only confident
images are kept, and of each class the most confident ones. Small classes are
filled up with duplicates.
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

_PART = 2**14  # examples saved at once; a killed command repeats at most these
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
  """Writes `pseudo:OUT`, a data set of images with a teacher's predictions.

  The teacher classifies each image once, without noise, at its own size and
  with its evaluation preprocessing. Its scores are saved beside `out` until the
  set is complete. Thus the same command resumes, and so does one with another
  selection of images. All processes must call it; the first one writes.

  Args:
    source: the teacher, whatever `vit_jax.load` reads.
    dataset, split, data_dir: the images, see `data.get_source`. Their own
      labels are used only for the report.
    out: a folder, or a gs:// address.
    soft: whether to store the ten most probable classes, or all if there are
      fewer, with their probabilities; else only the most probable class.
    min_confidence: least probability of the most probable class.
    per_class: most images of a class; the most confident ones are kept.
    balance: whether to repeat images of smaller classes, the most confident
      first, until all classes are as large as the largest.
    batch_size: images per batch, over all devices.
    before_batch: called before each batch; may raise to stop.

  Returns:
    The report, also in about.json: numbers of "examples", of "confident" and
    "kept" ones, and of "distinct" and "repeated" ones among these;
    "mean_confidence" of the kept ones; "classes". Of the classes with images,
    "per_class" has the least, median and most distinct images, and "largest"
    the most after balancing. "empty" has the other classes. "agreement" is the
    fraction of distinct images whose label agrees with the data set, or None.

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
  """Runs or resumes `pseudo_label`; returns the report.

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
  """Runs a function on the first process; returns its result on all.

  The result must be serialisable as JSON. All raise its UserError, and a
  RunStopped if it cannot write.
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
    UserError: there is anything else.
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
  """Returns whether a folder has only arrays of an incomplete set."""
  return {file.name for file in path.iterdir()} <= {*pseudo.ARRAYS}


# --- scores ---


def _count_parts(parts, about) -> int:
  """Returns the number of saved parts, after checking that they are ours."""
  files.open_parts(parts, about, "scores")
  return next(i for i in itertools.count() if not _part(parts, i).exists())


def _part(parts, number):
  return parts / f"{number:08}.npz"


def _score(weights, soft, parts, first, *, source, mesh, batch_size, **where):
  """Writes the scores by `_make_score`, from part `first` on."""
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
  """Returns (params, batch) -> scores of the images.

  Scores are the most probable classes "labels" i32[b l], their "probabilities"
  f32[b l], and "agrees" i32[b]: whether the first class is one of the image's
  own labels, -1 without any. Sigmoids are divided by their sum.
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
  """Returns the sorted indices of kept examples, i64[m], with repetitions.

  Args:
    labels: i32[n], the most probable class of each example.
    confidence: f32[n], its probability.
    num_classes: how many there are.
    min_confidence, per_class, balance: see `pseudo_label`. Among equally
      confident examples, the first ones are kept.
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
  """Returns the rows `chosen`, which are sorted, of an array in parts."""
  found, first = [], 0
  for part in scores:
    array = _read(part, name)
    i, j = np.searchsorted(chosen, [first, first + len(array)])
    found.append(array[chosen[i:j] - first])
    first += len(array)
  return np.concatenate(found)


def _report(chosen, labels, confidence, agrees, about):
  """Returns the report, see `pseudo_label`."""
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
