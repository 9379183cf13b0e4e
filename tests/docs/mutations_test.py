"""Deliberate faults: the suite is not blind.

Each is put into a copy of the package, and the test that is named beside it has
to fail there. The named tests belong to the default suite, where they pass.
"""

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
from checkout import copy


class Fault(NamedTuple):
  """A fault, and what notices it.

  Attributes:
    file: below vit_jax/.
    right: text that is there exactly once.
    wrong: what takes its place.
    test: a test of the default suite, below tests/.
  """

  file: str
  right: str
  wrong: str
  test: str


_FAULTS = {
  # The model.
  "the epsilon of LayerNorm": Fault(
    "models/layers.py",
    "variance, 0) + epsilon)",
    "variance, 0) + 10 * epsilon)",
    "unit/models/models_test.py::test_logits_and_intermediates_equal_numpy",
  ),
  "GELU without its tanh approximation": Fault(
    "models/vit.py",
    '"gelu_tanh": lambda x: nn.gelu(x, approximate=True)',
    '"gelu_tanh": lambda x: nn.gelu(x, approximate=False)',
    "unit/models/models_test.py::test_logits_and_intermediates_equal_numpy",
  ),
  "positions resized from pixel centres": Fault(
    "pretrained/positions.py",
    "np.linspace(0, length_in - 1, length_out)",
    "(np.arange(length_out) + 0.5) * (length_in / length_out) - 0.5",
    "unit/pretrained/positions_test.py::test_resized_grid_equals_scipy",
  ),
  # The step.
  "pixels that do not reach 1": Fault(
    "training/steps.py",
    "- 127.5) / 127.5",
    "- 127.5) / 128",
    "unit/training/steps_test.py::test_normalize_maps_bytes_onto_minus_one_to_one",
  ),
  "the same dropout at each step": Fault(
    "training/steps.py",
    "jax.random.fold_in(key, state.step)",
    "jax.random.fold_in(key, 0)",
    "unit/training/steps_test.py::test_randomness_is_a_function_of_key_and_step",
  ),
  "a dropped EMA": Fault(
    "training/steps.py",
    "ema = optax.incremental_update(params, state.ema, new)",
    "ema = state.ema",
    "unit/training/steps_test.py::test_polyak_average_equals_its_formula",
  ),
  "gradients of micro-batches added, not averaged": Fault(
    "training/steps.py",
    "lambda x: x / micro_batches, total",
    "lambda x: x, total",
    "unit/training/steps_test.py::test_micro_batches_give_the_update_of_the_large_batch",
  ),
  "padding that is evaluated": Fault(
    "training/objectives.py",
    "labelled = mask & (",
    "labelled = (",
    "unit/training/steps_test.py::test_evaluation_sums_equal_numpy_and_sklearn",
  ),
  "the smaller part of mixup first": Fault(
    "training/steps.py",
    "a = jnp.maximum(a, 1 - a)",
    "a = jnp.minimum(a, 1 - a)",
    "unit/training/steps_test.py::test_mixup_mixes_each_row_with_its_neighbour",
  ),
  # The optimizer.
  "a warm-up that is one step ahead": Fault(
    "training/optim.py",
    "jnp.minimum(1, t / warmup_steps)",
    "jnp.minimum(1, (t + 1) / warmup_steps)",
    "unit/training/optim_test.py::test_schedule_equals_formula_at_every_step",
  ),
  "weight decay of every parameter": Fault(
    "training/optim.py",
    "add_decayed_weights(decay, mask)",
    "add_decayed_weights(decay)",
    "unit/training/optim_test.py::test_optimizer_equals_formula_at_every_step",
  ),
  "no gradient clipping": Fault(
    "training/optim.py",
    "  if clip_norm:\n",
    "  if clip_norm > 1e9:\n",
    "unit/training/optim_test.py::test_optimizer_equals_formula_at_every_step",
  ),
  "a kernel split along another axis": Fault(
    "sharding.py",
    '(r"Dense_1/kernel", P(None, "fsdp"))',
    '(r"Dense_1/kernel", P("fsdp", None))',
    "unit/sharding_test.py",
  ),
  # The data.
  "images flipped upside down": Fault(
    "data/ops.py",
    "tf.reverse(image, [1])",
    "tf.reverse(image, [0])",
    "unit/data/data_ops_test.py::test_flip_mirrors_half_of_the_images",
  ),
  "rows that begin anew after a resume": Fault(
    "data/pipeline.py",
    "tf.data.Dataset.range(steps.start, steps.stop)",
    "tf.data.Dataset.range(0, len(steps))",
    "unit/data/data_pipeline_test.py::test_restart_at_any_step_goes_on_the_same",
  ),
  "the same order in each epoch": Fault(
    "data/order.py",
    "self._sizes[i], i, epoch)",
    "self._sizes[i], i, 0)",
    "unit/data/order_test.py",
  ),
  "the farthest object's distance": Fault(
    "data/benchmarks.py",
    'tf.reduce_min(objects["pixel_coords"][:, 2])',
    'tf.reduce_max(objects["pixel_coords"][:, 2])',
    "unit/data/data_tasks_test.py::test_distance_of_the_closest_object",
  ),
  "groups of values that are one too wide": Fault(
    "data/benchmarks.py",
    "tf.cast(value, tf.int32) * num_classes // num_values",
    "tf.cast(value, tf.int32) * num_classes // (num_values - 1)",
    "unit/data/data_tasks_test.py::test_dsprites_merge_neighbouring_values",
  ),
  # Files.
  "files that are not renamed when they are whole": Fault(
    "files.py",
    'partial = path.with_name(path.name + ".tmp")',
    "partial = path",
    "integration/train_test.py::test_a_run_killed_here_ends_as_if_it_had_not_been",
  ),
  "a fingerprint that does not see the order": Fault(
    "checkpoint.py",
    "(position * jnp.uint32(0x9E3779B9))",
    "(position * jnp.uint32(0))",
    "unit/checkpoint_test.py::test_fingerprint_changes_with_the_order",
  ),
  "the oldest checkpoint instead of the newest": Fault(
    "checkpoint.py",
    "for step in reversed(self.steps()):",
    "for step in self.steps():",
    "unit/checkpoint_test.py",
  ),
  "a resumed run that reads from the beginning": Fault(
    "training/inputs.py",
    "config, inputs, shuffle, rows, step, total_steps - step",
    "config, inputs, shuffle, rows, 0, total_steps - step",
    "integration/train_test.py",
  ),
  "queries in the place of keys": Fault(
    "pretrained/torch_folders.py",
    "(inputs[0], (i, 3)) if joined",
    "(inputs[0], ((i + 1) % 3, 3)) if joined",
    "parity/timm_test.py::test_logits",
  ),
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
  """A copy of the project, for faults."""
  return copy(tmp_path_factory.mktemp("faults"))


@pytest.mark.nightly
@pytest.mark.parametrize("name", _FAULTS)
def test_a_fault_is_noticed(name, checkout):
  fault = _FAULTS[name]
  file = checkout / "vit_jax" / fault.file
  text = file.read_text()
  assert text.count(fault.right) == 1
  file.write_text(text.replace(fault.right, fault.wrong))
  try:
    done = subprocess.run(
      [sys.executable, "-m", "pytest", "-x", f"tests/{fault.test}"],
      cwd=checkout,
      env={**os.environ, "PYTHONPATH": str(checkout)},
      capture_output=True,
      text=True,
      check=False,
    )
  finally:
    file.write_text(text)
  # A failed test: not an error of collection, and not "no tests".
  assert done.returncode == 1, done.stdout + done.stderr
  assert "1 failed" in done.stdout, done.stdout
