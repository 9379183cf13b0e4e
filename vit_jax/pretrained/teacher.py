"""The teacher of a run: `config.teacher`."""

import functools
import logging
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from vit_jax import distributed, pretrained, sharding
from vit_jax.errors import UserError
from vit_jax.training.teacher import Teacher

log = logging.getLogger(__name__)


class Teaching(NamedTuple):
  """The teacher of a run, and its parameters; all empty without one.

  Attributes:
    teacher: what an objective needs of it.
    params: on the devices.
    about: its entry in config.json.
  """

  teacher: Teacher | None = None
  params: Any = None
  about: Mapping[str, Any] = types.MappingProxyType({})

  def add_to(self, batches: Iterator[dict]) -> Iterator[dict]:
    """Returns batches that have the teacher's parameters, if there is one.

    As an argument of the step they are not constants of its program.
    """
    if self.teacher is None:
      return batches
    return ({**batch, "teacher": self.params} for batch in batches)


def read_teacher(config, mesh, class_names: list[str], run) -> Teaching:
  """Returns the teacher that a configuration names, on the devices.

  Args:
    config: that of the run.
    mesh: the teacher's parameters are sharded as those of a model of the run.
    class_names: of the training data.
    run: config.json of a run that is resumed, else None.

  Raises:
    UserError: nothing to read there, a model that has no head, other classes,
      or cannot take the images; or not the one that the run began with.
  """
  how = config.teacher.to_dict()
  source = how.pop("source")
  if not source:
    return Teaching()
  try:
    weights = pretrained.read(source)
    _check_classes(weights, class_names)
    about = {"source": weights.source, "digest": weights.digest()}
    _check_same(about, run)
    model = pretrained.assemble(
      weights,
      image_size=config.image_size,
      dtype=config.model.dtype,
      place=functools.partial(_place, mesh),
    )
  except UserError as e:
    raise UserError(f"config.teacher.source={source}: {e}") from e
  log.info("the teacher is %s from %s", model.config.variant, weights.source)
  return Teaching(
    Teacher(model.model.apply, **how), model.params, {"teacher": about}
  )


def _place(mesh, path, x) -> jax.Array:
  """Returns an array on the mesh, where that of a model with this name lies."""
  layout = sharding.tree_shardings(mesh, {path: x})[path]
  return jax.make_array_from_callback(x.shape, layout, lambda index: x[index])


def _check_classes(weights, class_names: Sequence[str]) -> None:
  """Raises a UserError unless a teacher has these classes in this order.

  Weights that were not trained here may name their classes otherwise or not at
  all; then the same number is taken to mean the same order.
  """
  if not weights.num_classes:
    raise UserError("it has no head, and so no logits; fine-tune it first")
  known = weights.class_names or []
  if known == class_names:
    return
  place = {name: i for i, name in enumerate(known)}
  ordered = all(place.get(x, i) == i for i, x in enumerate(class_names))
  # A converted checkpoint has a config.json as well, but was not trained here.
  is_ours = known and weights.run and "train" in weights.run["config"]
  if weights.num_classes != len(class_names) or not ordered or is_ours:
    unknown = [
      repr(name) for name in class_names if known and name not in place
    ]
    why = f"; it has no {', '.join(unknown[:3])}" if unknown else ""
    if sorted(known) == sorted(class_names):
      why = ", in another order"
    raise UserError(
      f"it has {weights.num_classes:,} classes, the training data "
      f"{len(class_names):,}{why}; choose a teacher of the same classes in the "
      "same order"
    )
  log.warning(
    "%s does not name its classes as the training data do; taken to be in the "
    "same order",
    weights.source,
  )


def _check_same(about, run) -> None:
  """Raises a UserError unless all processes, and the run so far, have it."""
  distributed.check_same({"the teacher": about["digest"]})
  before = (run or {"teacher": about})["teacher"]
  if before["digest"] != about["digest"]:
    raise UserError(
      f"the weights have changed since the run began: they were of "
      f"{before['source']} ({before['digest']}) and are of {about['source']} "
      f"({about['digest']}); restore those, or choose another --workdir"
    )
