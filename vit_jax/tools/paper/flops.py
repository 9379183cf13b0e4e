"""Compute of a model: multiply-adds of its forward pass, and exaFLOPs.

Operations are counted in the program that JAX traces, so that changes of a
model are included. Only matmuls and convolutions count; softmax, normalisation
and activation are left out.

Multiply-adds with padding are left out, as in XLA's own cost analysis. The
paper must have counted this way: with them its ResNets come out 3 to 5 % above
Table 6, without them within 1.4 %.
"""

import functools
import math
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.models import variants

# The backward pass has twice the FLOPs of the forward pass, and a multiply-add
# is two FLOPs, as in Table 6.
OPERATIONS = 3 * 2


def count_multiply_adds(
  variant: str,
  image_size: int = 224,
  num_classes: int = 0,
  hidden: bool = False,
  **options: Any,
) -> int:
  """Returns the multiply-adds of one image's forward pass.

  Args:
    variant: of the model, such as "ViT-B_16".
    image_size: pixels.
    num_classes: of the head; 0 for none.
    hidden: whether the head has the tanh layer of pre-training.
    **options: others of `models.create`.

  Raises:
    UserError: an unknown variant, or a size that its patches do not divide.
  """
  has_layer = hidden and variants.parse(variant).encoder
  return _count_model(
    variant=variant,
    image_size=image_size,
    num_classes=num_classes,
    representation_size=-1 if has_layer else 0,
    **options,
  )


@functools.cache
def _count_model(**options):
  """Returns a model's multiply-adds; `options` are those of `models.create`."""
  if variants.parse(options["variant"]).encoder:
    options["scan"] = True  # the loop body is traced only once
  # Not bfloat16, which computes padding for TPUs.
  model, params = _create(**options | {"dtype": "float32"})
  image = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32)
  return count_in_jaxpr(jax.make_jaxpr(model.apply)(params, image).jaxpr)


def _create(**options):
  model = models.create(**options)
  return model, jax.eval_shape(model.init, jax.random.key(0))


@functools.cache
def count_parameters(variant: str, num_classes: int = 0) -> int:
  """Returns the parameters of a model for 224 pixels, without a tanh layer."""
  _, params = _create(variant=variant, num_classes=num_classes, image_size=224)
  return sum(x.size for x in jax.tree.leaves(params))


def count_exaflops(multiply_adds: int, images: float) -> float:
  """Returns the exaFLOPs of training on `images` images, as in Table 6."""
  return OPERATIONS * multiply_adds * images / 1e18


def count_training(written: dict, steps: int) -> float:
  """Returns the exaFLOPs of a run's first steps, as in Table 6.

  Args:
    written: the content of the run's config.json.
    steps: their number.

  Raises:
    UserError: masked patches, or an incomplete file.
  """
  config = written["config"]
  if config.get("objective", "classification") != "classification":
    raise UserError("not counted for masked patches")
  try:
    size = config["image_size"]
    size = tuple(size) if isinstance(size, list) else size
    classes = len(written["class_names"])
    options = {"image_size": size, "num_classes": classes}
    multiply_adds = _count_model(**config["model"] | options)
  except (UserError, KeyError, TypeError) as e:
    raise UserError(f"this model cannot be counted: {e}") from e
  return count_exaflops(multiply_adds, steps * config["batch_size"])


def count_in_jaxpr(jaxpr) -> int:
  """Returns the multiply-adds of a jaxpr, of a loop in all its iterations."""
  total = 0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name == "dot_general":
      total += _count_dot(equation)
    elif name == "conv_general_dilated":
      total += _count_convolution(equation)
    else:
      assert name != "while", "a while loop has no known trip count"
      times = equation.params["length"] if name == "scan" else 1
      inner = jax.extend.core.jaxprs_in_params(equation.params)
      total += times * sum(map(count_in_jaxpr, inner))
  return total


def _count_dot(equation):
  """Returns the multiply-adds of a dot_general."""
  (contracted, _), _ = equation.params["dimension_numbers"]
  left = equation.invars[0].aval.shape
  summed = math.prod(left[axis] for axis in contracted)
  return summed * math.prod(equation.outvars[0].aval.shape)


def _count_convolution(equation):
  """Returns the multiply-adds of a convolution, without those with padding."""
  params = equation.params
  assert set(params["lhs_dilation"] + params["rhs_dilation"]) == {1}
  numbers = params["dimension_numbers"]
  image, kernel = (x.aval.shape for x in equation.invars)
  out = equation.outvars[0].aval.shape
  # Specs name the axes (batch, features, space...), of a kernel (out, in, ...).
  batch, features, *out_space = (out[axis] for axis in numbers.out_spec)
  _, inputs, *kernel_space = (kernel[axis] for axis in numbers.rhs_spec)
  total = batch * features * inputs
  for i, axis in enumerate(numbers.lhs_spec[2:]):
    # The number of kernel taps inside the image along one axis.
    starts = np.arange(out_space[i]) * params["window_strides"][i]
    taps = (
      starts[:, None] - params["padding"][i][0] + np.arange(kernel_space[i])
    )
    total *= int(np.sum((taps >= 0) & (taps < image[axis])))
  return total
