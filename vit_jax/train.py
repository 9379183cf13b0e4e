"""Training, in reading order: from a configuration to a run folder."""

import json
import logging
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from clu import parameter_overview
from jax.experimental import multihost_utils

from vit_jax import checkpoint, data, pretrained, sharding
from vit_jax import config as configuration
from vit_jax.errors import RunStopped, UserError
from vit_jax.metrics import MetricLog, NotFinite
from vit_jax.state import flatten, unflatten
from vit_jax.tasks import build, make_task
from vit_jax.warmstart import warm_start

log = logging.getLogger(__name__)


def train(config, workdir) -> dict[str, float]:
  """Trains as `config` says, in `workdir`; goes on where a run stopped.

  Args:
    config: a locked ConfigDict with the keys of configs/common.py.
    workdir: the run folder, a local path or a gs:// address.

  Returns:
    The metrics of the last evaluation; empty if the run was stopped early or
    evaluates nothing.

  Raises:
    UserError: a configuration that cannot be run; nothing has been written.
    RunStopped: the loss is not finite, or a checkpoint cannot be written.
  """
  # Machines.
  workdir = checkpoint.absolute(workdir)
  configuration.check_ranges(config)
  resuming = check_workdir(config, workdir)
  mesh = sharding.make_mesh(config.fsdp)
  sharding.check_batch_size(config.batch_size, mesh, config.micro_batches)

  # Data, and what is learnt from it.
  sources, test = open_sources(config)
  first = sources[0][0]
  examples = sum(source.num_examples for source, _ in sources)
  total_steps = configuration.count_steps(config, examples)
  task = make_task(config, first.class_names, first.multilabel)
  train_step, init_state = build(config, task, total_steps)
  evaluate = test and task.make_evaluate(
    source=test,
    mesh=mesh,
    batch_size=config.eval.batch_size or config.batch_size,
    preprocess=config.eval.preprocess,
  )

  # State: resumed, from other weights, or random, in that order.
  key = jax.random.key(config.seed)
  layout = sharding.tree_shardings(mesh, jax.eval_shape(init_state, key))
  checkpoints = checkpoint.Checkpoints(workdir, config.keep_checkpoints)
  state = restore(checkpoints, init_state, layout) if resuming else None
  if state is None:
    state = jax.jit(init_state, out_shardings=layout)(key)
    if config.init_from:
      state = start_from(
        config.init_from, state, task.model, config, task.class_names
      )
  step = int(state.step)
  if step == total_steps:
    log.info("the run is complete: %d steps in %s", step, workdir)
    return last_results(workdir)
  batches = read_batches(config, mesh, sources, step, total_steps)
  write_run_files(config, workdir, task, first.multilabel, state, total_steps)
  if resuming:
    log.info("going on from step %d of %d", step, total_steps)

  # The loop. Nothing in a step waits for the devices: metrics are fetched one
  # log interval late, or before something is saved.
  metrics = MetricLog(
    workdir,
    start_step=step,
    total_steps=total_steps,
    log_every=config.log_every,
    batch_size=config.batch_size,
  )
  train_step = sharding.jit_train_step(mesh, train_step, layout)
  results = {}
  try:
    with StopSignal() as stop:
      for step, batch in enumerate(batches, step + 1):  # noqa: B020
        profile(config, workdir, step, state)
        state, values = train_step(state, batch)
        metrics.add(step, values)
        is_last = step == total_steps
        stopping = stop.requested(step) and not is_last
        if step % config.log_every == 0:
          metrics.flush(step - config.log_every)
        if evaluate and (is_last or is_due(step, config.eval_every)):
          metrics.flush(step)
          params = state.params if state.ema is None else state.ema
          results = dict(evaluate(params))
          report(metrics, step, results)
          checkpoints.save_if_best(step, state, results[task.main_metric])
          metrics.restart_clock(step)
        if is_last or stopping or is_due(step, config.checkpoint_every):
          metrics.flush(step)
          checkpoints.save(step, state)
          metrics.restart_clock(step)
        if stopping:
          log.info("stopping: saved step %d; run again to go on", step)
          results = {}
          break
      checkpoints.close()
  except NotFinite as e:
    raise RunStopped(f"{e}; {advise(checkpoints)}") from e
  finally:
    metrics.close()
  if step == total_steps:
    log.info("the run is complete: %d steps in %s", step, workdir)
  return results


def open_sources(config):
  """Opens [(training source, weight)] and the test source, None for no test.

  Raises:
    UserError: unknown, missing or unsuitable data.
  """
  mixture = data.parse_mixture(config.train.dataset)
  sources = [
    (data.get_source(name, config.train.split, config.data_dir), weight)
    for name, weight in mixture
  ]
  for source, _ in sources:
    source.check_labels()
  if not config.eval.split:
    return sources, None
  name = config.eval.dataset or mixture[0][0]
  test = data.get_source(name, config.eval.split, config.data_dir)
  first = sources[0][0]
  labels_matter = config.objective == "classification"
  if labels_matter and test.class_names != first.class_names:
    raise UserError(
      f"eval.dataset {name} has {test.num_classes} classes, training has "
      f"{first.num_classes}, or their names differ; evaluate on the same "
      "classes, or set config.eval.split='' for no evaluation"
    )
  test.check_labels()
  return sources, test


def check_workdir(config, workdir) -> bool:
  """Returns whether `workdir` holds this run already.

  Raises:
    UserError: it holds a run of another configuration, or is no folder.
  """
  for folder in (workdir, *workdir.parents):
    if "://" not in str(workdir) and folder.exists() and not folder.is_dir():
      raise UserError(
        f"{folder} is a file, no folder; choose another --workdir"
      )
  file = workdir / "config.json"
  if not file.exists():
    return False
  old = json.loads(file.read_text())["config"]
  differences = configuration.differences(old, configuration.to_dict(config))
  if differences:
    raise UserError(
      f"{workdir} holds a run of another configuration "
      f"({'; '.join(differences)}); choose another --workdir, or go on with "
      "the configuration it was started with"
    )
  return True


def start_from(source, state, model, config, class_names):
  """Returns the state with other weights, and reports on them.

  Raises:
    UserError: nothing to read there, or another architecture.
  """
  weights = pretrained.fold_normalization(pretrained.read(source))
  pretrained.check_numerics(weights, config.model)
  given, changes = warm_start(
    flatten(state.params),
    weights.params,
    old_grid=weights.create_model().grid,
    new_grid=model.grid,
    same_classes=weights.class_names == class_names,
    source=weights.source,
    resize=weights.resize,
  )
  log.info("weights from %s\n%s", weights.source, changes)

  def place(path, old):
    if path not in given:
      return old
    new = given[path].read().astype(old.dtype)
    return jax.make_array_from_callback(
      old.shape, old.sharding, lambda index: new[index]
    )

  params = unflatten({p: place(p, x) for p, x in flatten(state.params).items()})
  ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
  return state._replace(params=params, ema=ema)


def write_run_files(config, workdir, task, multilabel, state, total_steps):
  """Writes config.json and parameters.txt of a new run."""
  if jax.process_index() or (workdir / "config.json").exists():
    return
  workdir.mkdir(parents=True, exist_ok=True)
  run = {
    "config": configuration.to_dict(config),
    "total_steps": total_steps,
    "class_names": task.class_names,
    "multilabel": multilabel,
  }
  overview = parameter_overview.get_parameter_overview(
    state.params, include_stats="sharding"
  )
  checkpoint.write_atomically(workdir / "parameters.txt", overview)
  checkpoint.write_atomically(
    workdir / "config.json", json.dumps(run, indent=1)
  )
  count = sum(x.size for x in jax.tree.leaves(state.params))
  log.info(
    "%s: %.2f M parameters (parameters.txt), %.3f GiB of state a device, "
    "devices: %d, %d steps of %d images",
    config.model.variant,
    count / 1e6,
    sharding.bytes_per_device(state) / 2**30,
    jax.device_count(),
    total_steps,
    config.batch_size,
  )


def restore(checkpoints, init_state, layout):
  """Returns the newest intact state, laid out so; None if there is none."""
  shapes = jax.eval_shape(init_state, jax.random.key(0))
  return checkpoints.restore(
    jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      layout,
    )
  )


def read_batches(config, mesh, sources, step, total_steps) -> Iterator:
  """Returns the batches of the steps to come, on their way to the devices."""
  rows = sharding.local_rows(mesh, config.batch_size)
  host_batches = read_rows(config, sources, rows, step, total_steps - step)
  return prefetch(
    sharding.put_batch(mesh, batch, config.batch_size) for batch in host_batches
  )


def read_rows(config, sources, rows, start_step, num_steps) -> Iterator:
  """Returns these rows of the run's batches, on the host."""
  return data.train_batches(
    sources,
    seed=config.seed,
    batch_size=config.batch_size,
    rows=rows,
    preprocess=config.train.preprocess,
    image_size=config.image_size,
    start_step=start_step,
    num_steps=num_steps,
  )


def prefetch(batches: Iterable, size: int = 2) -> Iterator:
  """Keeps `size` batches on their way to the devices ahead of the one used."""
  queue = deque()
  for batch in batches:
    queue.append(batch)
    if len(queue) > size:
      yield queue.popleft()
  yield from queue


def is_due(step: int, every: int) -> bool:
  """Returns whether something done `every` steps is done after this one."""
  return bool(every) and step % every == 0


def report(metrics, step, results):
  """Writes and prints the result of an evaluation."""
  metrics.write(step, {f"eval/{name}": x for name, x in results.items()})
  text = "  ".join(
    f"{name} {x}" if isinstance(x, int) else f"{name} {x:.4f}"
    for name, x in results.items()
  )
  log.info("evaluation at step %d  %s", step, text)


def last_results(workdir):
  """Returns the last evaluation in metrics.jsonl, {} if there is none."""
  results = {}
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    values = {
      name.removeprefix("eval/"): x
      for name, x in json.loads(line).items()
      if name.startswith("eval/")
    }
    results = values or results
  return results


def profile(config, workdir, step, state):
  """Starts or ends the profiler window before `step` runs."""
  if not config.profile_step:
    return
  if step == config.profile_step:
    jax.block_until_ready(state)
    jax.profiler.start_trace(str(workdir / "profile"))
  if step == config.profile_step + config.profile_steps:
    jax.block_until_ready(state)
    jax.profiler.stop_trace()
    log.info("profile of %d steps in %s", config.profile_steps, workdir)


def advise(checkpoints) -> str:
  """Says what is safe after a non-finite loss, and what to try."""
  checkpoints.wait()
  saved = checkpoints.steps()
  good = (
    f"the last good checkpoint is {checkpoints.workdir}/checkpoints/{saved[-1]}"
    if saved
    else "no checkpoint had been saved yet"
  )
  return (
    f"{good}; try in a new workdir: a lower schedule.base_lr, more "
    "schedule.warmup_steps, optimizer.clip_norm=1, or model.dtype=float32"
  )


class StopSignal:
  """SIGTERM or Ctrl-C ask the loop to stop after the step it is in.

  With several processes JAX's preemption service takes SIGTERM and makes all
  of them agree on the step; Ctrl-C is passed on to it.
  """

  def __enter__(self):
    self._received = False
    self._alone = jax.process_count() == 1
    signals = [signal.SIGINT] + [signal.SIGTERM] * self._alone
    self._previous = {s: signal.signal(s, self._handle) for s in signals}
    return self

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number, _):
    if self._received:
      raise KeyboardInterrupt
    self._received = True
    log.info("saving after this step; once more to quit at once")
    if not self._alone:
      os.kill(os.getpid(), signal.SIGTERM)

  def requested(self, step: int) -> bool:
    """Returns whether to stop after `step`, the same on every process."""
    if self._alone:
      return self._received
    return multihost_utils.reached_preemption_sync_point(step)
