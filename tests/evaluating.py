"""An evaluation on a mesh of some of the test process's devices."""

import jax

from vit_jax import sharding
from vit_jax.evaluation.devices import replicate
from vit_jax.evaluation.evaluators import make_evaluate


def evaluate(objective, params, source, devices, batch_size):
  """Returns the results, which have to be the same a second time."""
  mesh = sharding.make_mesh(1, jax.devices()[:devices])
  run = make_evaluate(
    objective,
    source,
    mesh=mesh,
    batch_size=batch_size,
    preprocess="resize(size)",
  )
  params = replicate(mesh, params)
  first = list(run(params))
  assert list(run(params)) == first, "an evaluation can be repeated"
  return dict(first)
