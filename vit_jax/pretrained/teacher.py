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
    teacher: the part that an objective needs.
    params: on the devices.
    about: its entry in config.json.
  """

  teacher: Teacher | None = None
  params: Any = None
  about: Mapping[str, Any] = types.MappingProxyType({})

  def add_to(self, batches: Iterator[dict]) -> Iterator[dict]:
    """Adds the teacher's parameters, if there is one, to each batch.

    As arguments of the step they are not constants of the compiled program.
    """
    if self.teacher is None:
      return batches
    return ({**batch, "teacher": self.params} for batch in batches)


def read_teacher(config, mesh, class_names: list[str], run) -> Teaching:
  """Returns the teacher that a configuration names, on the devices.

  Args:
    config: the run's configuration.
    mesh: the teacher's parameters are sharded over it like those of a student.
    class_names: of the training data.
    run: config.json of a resumed run, else None.

  Raises:
    UserError: the teacher cannot be read, has no head or other classes, does
      not take the images, or is not the one that the run began with.
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
  """Returns an array on the mesh, sharded like a model's array of that name."""
  layout = sharding.tree_shardings(mesh, {path: x})[path]
  return jax.make_array_from_callback(x.shape, layout, lambda index: x[index])


def _check_classes(weights, class_names: Sequence[str]) -> None:
  """Raises a UserError unless a teacher has these classes in this order.

  Weights from elsewhere may have other class names or none. The same number of
  classes is then assumed to mean the same order.
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
    "%s does not have the class names of the training data; the classes are "
    "assumed to be in the same order",
    weights.source,
  )


def _check_same(about, run) -> None:
  """Raises a UserError unless all processes and the run so far share it."""
  distributed.check_same({"the teacher": about["digest"]})
  before = (run or {"teacher": about})["teacher"]
  if before["digest"] != about["digest"]:
    raise UserError(
      f"the weights have changed since the run began: they were of "
      f"{before['source']} ({before['digest']}) and are of {about['source']} "
      f"({about['digest']}); restore those, or choose another --workdir"
    )
