"""The inputs of a run: its data sets, and batches for the devices."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from vit_jax import data, sharding
from vit_jax.config import Eval, list_evals
from vit_jax.data.relabelled import class_error, relabel
from vit_jax.errors import RunStopped, UserError, one_line

log = logging.getLogger(__name__)


class Inputs(NamedTuple):
  """The data sets of a run."""

  train: list[tuple[data.Source, float]]  # with the weights of a mixture
  # {evaluation: [test set]}, or [training set, test set] if few-shot; in the
  # order of `list_evals`.
  evals: dict[str, list[data.Source]]

  @property
  def first(self) -> data.Source:
    """The first training set, whose classes are the run's."""
    return self.train[0][0]

  @property
  def num_examples(self) -> int:
    """Training examples of an epoch."""
    return sum(source.num_examples for source, _ in self.train)

  def describe(self) -> dict[str, list[dict]]:
    """Returns the identities of the data, which a resumed run must match."""

    def identify(source):
      found = {"dataset": source.dataset, "examples": source.num_examples}
      return found | {"identity": source.identity()}

    sets = {"train": [source for source, _ in self.train], **self.evals}
    return {name: [*map(identify, found)] for name, found in sets.items()}


def open_inputs(config) -> Inputs:
  """Opens the data sets of a run.

  Raises:
    UserError: unknown, missing or unsuitable data.
  """
  mixture = data.parse_mixture(config.train.dataset)
  stops = config.train.on_bad_example == "stop"
  train = [
    _open(config, name, config.train.split, check=stops) for name, _ in mixture
  ]
  if config.objective == "classification":
    data.check_mixture(train)
  evals = {e.name: _open_eval(config, e, train) for e in list_evals(config)}
  weights = [weight for _, weight in mixture]
  return Inputs(list(zip(train, weights, strict=True)), evals)


def _open(config, name, split, check=True) -> data.Source:
  if not name:
    raise UserError(
      "the training images are pseudo-labelled: set config.eval.dataset (and "
      "that of config.evals), or config.eval.split='' for no evaluation"
    )
  source = data.get_source(name, split, config.data_dir)
  if not source.class_names and config.objective == "classification":
    raise UserError(
      f"{name!r} has no labels; label it with vit-jax pseudo-label, and take "
      "the set pseudo:PATH that it writes"
    )
  if check:
    source.check_labels()
  return source


def _open_eval(config, e: Eval, train: Sequence[data.Source]):
  """Returns the data sets of an evaluation, for `Inputs.evals`."""
  if e.type == "fewshot":
    return [_open(config, e.dataset, x) for x in (e.train_split, e.split)]
  test = _open(config, e.dataset, e.split)
  for source in train:
    if shared := data.count_shared(source, test):
      log.warning(
        f"{shared} of the {test.num_examples} test images of {e.dataset} are "
        f"training images too: {source.split} and {test.split} overlap"
      )
  if config.objective != "classification":
    return [test]
  names = train[0].class_names
  if relabelled := relabel(test, names):
    return [relabelled]
  none = f"leave out config.{e.key}"
  if e.name == "eval":
    none = "set config.eval.split='' for no evaluation"
  advice = f"choose another {e.key}.dataset, of classes of training, or {none}"
  raise class_error(test, names, train[0].num_classes, "training", advice)


def choose_shuffle(config, inputs: Inputs, run: dict | None) -> data.Shuffle:
  """Returns how a run shuffles; a resumed run follows its config.json."""
  if run:
    # Runs from before this key used permutations of 4 rounds.
    return data.Shuffle(**{"rounds": 4, **run.get("shuffle", {})})
  sources = [source for source, _ in inputs.train]
  return data.choose_shuffle(
    config.train.shuffle,
    sources,
    config.batch_size // config.train.repeats,
    count_memory(config),
  )


def count_memory(config) -> int:
  """Returns the bytes that a host may hold of a bucket's training images."""
  return int(config.train.buffer_gib * 2**30)


def read_batches(config, mesh, inputs, shuffle, step, total_steps) -> Iterator:
  """Returns the batches of the remaining steps, prefetched to the devices."""
  size = config.batch_size
  rows = sharding.local_rows(mesh, size)
  batches = read_rows(config, inputs, shuffle, rows, step, total_steps - step)

  def read():
    try:
      yield from batches
    except Exception as e:
      why = one_line(e)
      raise DataFailed(f"could not read the training data: {why}") from e

  return prefetch(sharding.put_batch(mesh, batch, size) for batch in read())


class DataFailed(RunStopped):
  """Training data could not be read."""


def read_rows(config, inputs, shuffle, rows, start_step, num_steps) -> Iterator:
  """Returns these rows of the run's batches, on the host."""
  return data.train_batches(
    inputs.train,
    seed=config.seed,
    batch_size=config.batch_size,
    rows=rows,
    preprocess=config.train.preprocess,
    image_size=config.image_size,
    start_step=start_step,
    num_steps=num_steps,
    shuffle=shuffle,
    memory=count_memory(config),
    on_bad_example=config.train.on_bad_example,
    repeats=config.train.repeats,
  )


def prefetch(batches: Iterable, size: int = 2) -> Iterator:
  """Yields batches, while the next `size` are on their way to the devices."""
  queue = deque()
  for batch in batches:
    queue.append(batch)
    if len(queue) > size:
      yield queue.popleft()
  yield from queue
