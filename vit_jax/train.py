"""Training, in reading order: from a configuration to a run folder."""

import contextlib
import json
import logging
import os
import shlex
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from clu import parameter_overview
from jax.experimental import multihost_utils

from vit_jax import checkpoint, data, distributed, pretrained, sharding
from vit_jax import config as configuration
from vit_jax.data import preprocess
from vit_jax.data.relabelled import relabel
from vit_jax.errors import RunStopped, UserError, check_folder
from vit_jax.pretrained.warmstart import warm_start
from vit_jax.state import flatten, make_key, unflatten
from vit_jax.training import lock
from vit_jax.training.metrics import MetricLog, NotFinite
from vit_jax.training.objectives import build, make_task

log = logging.getLogger(__name__)


def train(config, workdir) -> dict[str, float] | None:
  """Trains as `config` says, in `workdir`; resumes where a run stopped.

  Args:
    config: a locked ConfigDict with the keys of configs/common.py.
    workdir: the run folder, a local path or a gs:// address.

  Returns:
    The metrics of the last evaluation, {} for a run that evaluates nothing;
    None if the run was told to stop, and is to be resumed.

  Raises:
    UserError: a configuration that cannot be run; nothing has been written.
    RunStopped: the loss is not finite, a checkpoint or the data could not be
      read or written, or an evaluation failed.
  """
  with StopSignal() as stop, contextlib.ExitStack() as stack:
    return _train(config, workdir, stop, stack)


def _train(config, workdir, stop, stack):
  # Machines.
  workdir = checkpoint.absolute(workdir)
  distributed.check_same(
    {
      "the source code of vit_jax": distributed.digest_package(),
      "--workdir": str(workdir),
      **configuration.flatten(config),
    }
  )
  configuration.check_ranges(config)
  run = check_workdir(config, workdir)
  if not run:  # what older versions took is resumed
    configuration.check_unused(config)
  mesh = sharding.make_mesh(config.fsdp)
  sharding.check_batch_size(config.batch_size, mesh, config.micro_batches)

  # Data, and what is learnt from it.
  sources, test = open_sources(config)
  first = sources[0][0]
  examples = sum(source.num_examples for source, _ in sources)
  if run:
    check_data(run, sources, test, workdir)
    total_steps = run["total_steps"]
  else:
    total_steps = configuration.count_steps(config, examples)
  check_profile(config, total_steps)
  task = make_task(config, first.class_names, first.multilabel)
  train_step, init_state = build(config, task, total_steps)
  evaluate = test and task.make_evaluate(
    source=test,
    mesh=mesh,
    batch_size=config.eval.batch_size or config.batch_size,
    preprocess=config.eval.preprocess,
    before_batch=stop.check,
  )

  # State: resumed, from other weights, or random, in that order.
  key = make_key(config.seed)
  layout = sharding.tree_shardings(mesh, jax.eval_shape(init_state, key))
  own = take_workdir(workdir, stack)
  if check_workdir(config, workdir) != run:
    raise UserError(f"another run has just ended in {workdir}; start again")
  distributed.check_same(
    {"config.json": run, "the data": describe_data(sources, test)}
  )
  token = own.token if own else lock.read_token(workdir)
  distributed.check_same({"the lock in --workdir": token})
  checkpoints = checkpoint.Checkpoints(workdir, config.keep_checkpoints)
  state = restore(checkpoints, init_state, layout) if run else None
  if state is None:
    state = jax.jit(init_state, out_shardings=layout)(key)
    if config.init_from:
      state = start_from(
        config.init_from, state, task.model, config, task.class_names
      )
  step = int(state.step)
  distributed.check_same({"the step to resume from": step})
  if step == total_steps and (not test or read_results(workdir, step)):
    log.info("the run is complete: %d steps in %s", step, workdir)
    return read_results(workdir, step)
  batches = read_batches(config, mesh, sources, step, total_steps)
  if run:
    checkpoints.clear_unfinished()
    log.info("resuming from step %d of %d", step, total_steps)
  else:
    record = {
      "total_steps": total_steps,
      "class_names": task.class_names,
      "multilabel": first.multilabel,
      "data": describe_data(sources, test),
    }
    write_run_files(config, workdir, record, state)
  metrics = MetricLog(
    workdir,
    start_step=step,
    total_steps=total_steps,
    log_every=config.log_every,
    batch_size=config.batch_size,
  )
  train_step = sharding.jit_train_step(mesh, train_step, layout)
  profiler = Profiler(config, workdir)

  def save(step, state):
    if own:
      own.check()
    metrics.flush(step)
    checkpoints.save(step, state)
    metrics.restart_clock(step)

  def assess(step, state, results=None):
    """Evaluates, unless that has been done, and keeps the best state."""
    if not results:
      metrics.flush(step)
      params = state.params if state.ema is None else state.ema
      results = run_evaluation(evaluate, params, step)
      report(metrics, step, results)
    checkpoints.save_if_best(step, state, results[task.main_metric])
    metrics.restart_clock(step)
    return results

  def evaluation_is_due(step):
    is_last = step == total_steps
    return test and step and (is_last or is_due(step, config.eval_every))

  # The loop. Nothing in a step waits for the devices: metrics are fetched one
  # log interval late, or before something is saved. A state is saved before it
  # is evaluated, so that no evaluation can cost it.
  results, saved = {}, step
  try:
    if evaluation_is_due(step):  # the run may have stopped before it, or in it
      results = assess(step, state, read_results(workdir, step))
    stop.check()
    for step, batch in enumerate(batches, step + 1):  # noqa: B020
      profiler.before(step, state)
      state, values = train_step(state, batch)
      metrics.add(step, values)
      if step % config.log_every == 0:
        metrics.flush(step - config.log_every)
      if step == total_steps or is_due(step, config.checkpoint_every):
        save(step, state)
        saved = step
      if evaluation_is_due(step):
        results = assess(step, state)
      if step < total_steps:
        stop.check()
    profiler.close(state, step + 1)
    checkpoints.close()
  except Stopping:
    profiler.close(state, step + 1)
    if saved != step:
      save(step, state)
    checkpoints.close()
    where = f"saved step {step}" if step else "before the first step"
    log.info("stopping: %s; run again to resume", where)
    return None
  except NotFinite as e:
    raise RunStopped(f"{e}; {advise(checkpoints)}") from e
  except (DataFailed, EvaluationFailed) as e:
    # Another process may not have failed, and would not save with this one.
    if saved != step and jax.process_count() == 1:
      save(step, state)
    raise RunStopped(f"{e}; {say_saved(checkpoints)}") from e
  except BaseException:
    with contextlib.suppress(RunStopped):  # another error is on its way
      checkpoints.wait()
    raise
  finally:
    metrics.close()
  log.info("the run is complete: %d steps in %s", step, workdir)
  return results


def take_workdir(workdir, stack) -> lock.Lock | None:
  """Holds the run folder's lock on process 0 until `stack` is closed.

  Raises:
    UserError: another run has it, or the folder cannot be written.
  """
  if jax.process_index():
    return None
  try:
    return stack.enter_context(lock.hold(workdir))
  except OSError as e:
    raise UserError(
      f"cannot write to {workdir}: {e.strerror or e}; choose another --workdir"
    ) from e


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
  labels_matter = config.objective == "classification"
  if labels_matter:
    data.check_mixture([source for source, _ in sources])
  if not config.eval.split:
    return sources, None
  name = config.eval.dataset or mixture[0][0]
  test = data.get_source(name, config.eval.split, config.data_dir)
  first = sources[0][0]
  test.check_labels()
  for source, _ in sources:
    shared = data.count_shared(source, test)
    if shared:
      log.warning(
        "%d of the %d test images of %s are training images too: %s and %s "
        "overlap",
        *(shared, test.num_examples, name, source.split, test.split),
      )
  if not labels_matter:
    return sources, test
  relabelled = relabel(test, first.class_names)
  if relabelled is None:
    unknown = [x for x in test.class_names if x not in first.class_names]
    raise UserError(
      f"eval.dataset {name} has {test.num_classes} classes, training "
      f"{first.num_classes}; {unknown[:3]} are not among these; evaluate on "
      "classes of training, or set config.eval.split='' for no evaluation"
    )
  return sources, relabelled


def check_workdir(config, workdir) -> dict | None:
  """Returns config.json of the run that `workdir` holds, None for none.

  Raises:
    UserError: it holds a run of another configuration, checkpoints without
      one, or a file where a folder should be; a new run would enlarge its
      images again.
  """
  inside = [workdir / name for name in ("checkpoints", "best", "tensorboard")]
  for folder in inside if "://" not in str(workdir) else ():
    check_folder(folder)
  if not (workdir / "config.json").exists():
    if checkpoint.list_steps(workdir):
      raise UserError(
        f"{workdir} has checkpoints and no config.json, which says what run "
        "they are of; restore it, or choose another --workdir"
      )
    for text in (config.train.preprocess, config.eval.preprocess):
      preprocess.check_crops(text, config.image_size)
    return None
  run = read_run(workdir)
  differences = configuration.differences(
    run["config"], configuration.to_dict(config)
  )
  if differences:
    longer = (
      "; to train for longer, start another --workdir with "
      f"--config.init_from={shlex.quote(str(workdir))}: it takes the weights, "
      "and neither the optimizer's state nor the step"
      if any(text.startswith("total_") for text in differences)
      else ""
    )
    raise UserError(
      f"{workdir} holds a run of another configuration "
      f"({'; '.join(differences)}); choose another --workdir, or resume with "
      f"the configuration that it was started with{longer}"
    )
  return run


def read_run(workdir) -> dict:
  """Returns the contents of a run's config.json.

  Raises:
    UserError: it is cut off or empty.
  """
  try:
    return json.loads((workdir / "config.json").read_text())
  except ValueError as e:
    raise UserError(
      f"{workdir}/config.json is not whole ({e}); restore it from a copy, or "
      "choose another --workdir"
    ) from None


def describe_data(sources, test) -> dict:
  """Returns what must be the same when a run is resumed: identities of data."""

  def describe(source):
    return {
      "dataset": source.dataset,
      "examples": source.num_examples,
      "identity": source.identity(),
    }

  return {
    "train": [describe(source) for source, _ in sources],
    "eval": [describe(test)] if test else [],
  }


def check_data(run, sources, test, workdir) -> None:
  """Raises a UserError if the data are not those that the run began with."""
  names = sources[0][0].class_names
  if run["class_names"] and run["class_names"] != names:
    old, new = set(run["class_names"]), set(names)
    raise UserError(
      f"the classes of the training data are not those of the run in {workdir}"
      f": gone {sorted(old - new)[:5]}, new {sorted(new - old)[:5]}; restore "
      "the data, or choose another --workdir"
    )
  found = describe_data(sources, test)
  for kind, entries in run.get("data", {}).items():  # older runs have none
    for old, new in zip(entries, found[kind], strict=True):
      if old != new:
        raise UserError(
          f"{new['dataset']} ({kind}) has changed since the run in {workdir} "
          f"began: it had {old['examples']:,} examples ({old['identity']}) and "
          f"has {new['examples']:,} ({new['identity']}); restore the data, or "
          "choose another --workdir"
        )


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


def write_run_files(config, workdir, record, state):
  """Writes config.json and parameters.txt of a new run."""
  if jax.process_index():
    return
  workdir.mkdir(parents=True, exist_ok=True)
  run = {"config": configuration.to_dict(config), **record}
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
    record["total_steps"],
    config.batch_size,
  )


def restore(checkpoints, init_state, layout):
  """Returns the newest intact state, laid out so; None if there is none."""
  shapes = jax.eval_shape(init_state, make_key(0))
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
    sharding.put_batch(mesh, batch, config.batch_size)
    for batch in name_failures(host_batches)
  )


class DataFailed(RunStopped):
  """Training data could not be read."""


def name_failures(batches: Iterable) -> Iterator:
  """Yields batches; what goes wrong with them becomes a DataFailed."""
  try:
    yield from batches
  except Exception as e:
    raise DataFailed(
      f"could not read the training data: {checkpoint.first_line(e)}"
    ) from e


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


def read_results(workdir, step: int) -> dict[str, float]:
  """Returns the evaluation at `step` in metrics.jsonl, {} if there is none."""
  file = workdir / "metrics.jsonl"
  for line in file.read_text().splitlines() if file.exists() else ():
    try:
      values = json.loads(line)
    except ValueError:  # a kill may leave half a line
      continue
    results = {
      name.removeprefix("eval/"): x
      for name, x in values.items()
      if name.startswith("eval/")
    }
    if results and values["step"] == step:
      return results
  return {}


class EvaluationFailed(RunStopped):
  """A test set could not be evaluated."""


def run_evaluation(evaluate, params, step) -> dict[str, float]:
  """Returns the results of an evaluation; what goes wrong names its step."""
  try:
    return dict(evaluate(params))
  except Stopping:
    raise
  except Exception as e:
    raise EvaluationFailed(
      f"the evaluation at step {step} failed: {checkpoint.first_line(e)}"
    ) from e


def check_profile(config, total_steps):
  """Raises a UserError for a profiler window that the run never comes to."""
  if config.profile_step > total_steps:
    raise UserError(
      f"profile_step {config.profile_step} is past the last step, "
      f"{total_steps}; choose one up to that, or 0 for no profile"
    )


class Profiler:
  """The profiler window of a run; a run that resumes in it traces the rest."""

  def __init__(self, config, workdir):
    self._first = config.profile_step
    self._end = self._first + config.profile_steps if self._first else 0
    self._folder = workdir / "profile"
    self._started = None

  def before(self, step, state):
    """Starts or ends the trace before a step runs."""
    if self._first <= step < self._end and self._started is None:
      jax.block_until_ready(state)
      jax.profiler.start_trace(str(self._folder))
      self._started = step
    elif step >= self._end:
      self.close(state, step)

  def close(self, state, step):
    """Ends the trace, if there is one, before `step`."""
    if self._started is None:
      return
    jax.block_until_ready(state)
    jax.profiler.stop_trace()
    log.info(
      "profile of %d steps from step %d in %s",
      step - self._started,
      self._started,
      self._folder.parent,
    )
    self._started, self._end = None, 0


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


def say_saved(checkpoints) -> str:
  """Says which checkpoint is safe, and how to evaluate it and to resume."""
  checkpoints.wait()
  saved = checkpoints.steps()
  if not saved:
    return "nothing was saved; mend that and run the same command again"
  folder = checkpoints.workdir / "checkpoints" / str(saved[-1])
  return (
    f"step {saved[-1]} is saved; mend that and run the same command again, or "
    f"evaluate it: vit-jax evaluate --checkpoint={shlex.quote(str(folder))}"
  )


class Stopping(Exception):
  """The run was told to stop."""


class StopSignal:
  """SIGTERM, SIGHUP or Ctrl-C ask a run to save its state and stop.

  More of them change nothing, as whoever sends one may send another; but Ctrl-C
  again, a second later or more, quits at once. With several processes JAX's
  preemption service takes SIGTERM and makes all of them agree on where to stop;
  the others are passed on to it.
  """

  def __enter__(self):
    self._since = None
    self._stops = False
    self._polls = 0
    self._alone = jax.process_count() == 1
    signals = [signal.SIGINT] + [signal.SIGTERM] * self._alone
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
      signals.append(signal.SIGHUP)
    self._previous = {s: signal.signal(s, self._handle) for s in signals}
    return self

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number, _):
    now = time.monotonic()
    if self._since is None:
      self._since = now
      log.info("saving, then stopping; Ctrl-C again quits at once")
      if not self._alone:
        os.kill(os.getpid(), signal.SIGTERM)
    elif number == signal.SIGINT and now - self._since > 1:
      raise KeyboardInterrupt

  def check(self) -> None:
    """Raises Stopping if the run is to stop here, on every process alike.

    All processes have to come here equally often.
    """
    if self._alone:
      self._stops = self._since is not None
    else:
      self._polls += 1
      self._stops |= multihost_utils.reached_preemption_sync_point(self._polls)
    if self._stops:
      raise Stopping
