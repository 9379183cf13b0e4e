"""Training, from a configuration to a run folder."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax

from vit_jax import checkpoint, distributed, sharding
from vit_jax import config as configuration
from vit_jax.errors import RunStopped, one_line
from vit_jax.evaluation import evaluators as evaluation
from vit_jax.pretrained.start import start_from
from vit_jax.pretrained.teacher import read_teacher
from vit_jax.state import make_key
from vit_jax.training import (
  inputs,
  lock,
  objectives,
  optim,
  run_folder,
  steps,
  wandb_run,
)
from vit_jax.training.metrics import MetricLog, NotFinite
from vit_jax.training.profiler import Profiler, check_profile
from vit_jax.training.stop import Stopping, StopSignal

log = logging.getLogger(__name__)


def train(config, workdir) -> dict[str, float] | None:
  """Trains a configuration in `workdir`, or resumes the run there.

  Args:
    config: a locked ConfigDict with the keys of configs/common.py.
    workdir: the run folder, a local path or a gs:// address.

  Returns:
    The metrics of the last evaluation, those of `config.evals` as NAME/METRIC;
    {} without one; None if a signal stopped the run before its end.

  Raises:
    UserError: an invalid configuration; nothing has been written.
    RunStopped: the loss is not finite, a checkpoint or the data could not be
      read or written, or an evaluation failed.
  """
  with StopSignal() as stop, contextlib.ExitStack() as stack:
    workdir = checkpoint.absolute(workdir)
    run = check_configuration(config, workdir)
    shard_state = config.optimizer.shard_state
    mesh = sharding.make_mesh(config.fsdp, shard_state=shard_state)
    sharding.check_batch_size(config.batch_size, mesh, config.micro_batches)

    # Data, objective and evaluators.
    opened = inputs.open_inputs(config)
    total_steps = run_folder.count_steps(config, run, opened, workdir)
    check_profile(config, total_steps)
    names = opened.first.class_names
    teaching = read_teacher(config, mesh, names, run)
    objective = objectives.create(config, names, teaching.teacher)
    train_step, init_state = make_step(config, objective, total_steps)
    evaluators = evaluation.make_evaluators(
      config, opened.evals, objective, mesh=mesh, before_batch=stop.check
    )
    best = evaluation.find_best(config, evaluators)

    # State: resumed, else from other weights, else random.
    own = run_folder.take(config, workdir, run, opened, stack)
    checkpoints = checkpoint.Checkpoints(workdir, config.keep_checkpoints)
    state, layout = make_state(
      config, mesh, objective, init_state, run and checkpoints
    )
    step = int(state.step)
    distributed.check_same({"the step to resume from": step})
    done = run_folder.read_results(workdir, step)
    if step == total_steps and all(e.find(done) for e in evaluators):
      results = {k: x for e in evaluators for k, x in e.find(done).items()}
      return report_end(workdir, step, results)
    shuffle = inputs.choose_shuffle(config, opened, run)
    batches = inputs.read_batches(
      config, mesh, opened, shuffle, step, total_steps
    )
    batches = teaching.add_to(batches)
    if run:
      checkpoints.open()
      log.info("resuming from step %d of %d", step, total_steps)
    else:
      about = {"total_steps": total_steps, "shuffle": shuffle._asdict()}
      about |= teaching.about
      run_folder.write(config, workdir, about, objective, opened, state)
    step_program = sharding.jit_train_step(mesh, train_step, layout)
    loop = Loop(
      config, total_steps, evaluators, best, checkpoints, own, stop, step, state
    )
    return loop.run(step_program, batches, done)


def check_configuration(config, workdir) -> dict | None:
  """Returns config.json of the run in `workdir`, None for a new one.

  Raises:
    UserError: an invalid configuration, one that differs from that run's, or
      different ones on different processes.
  """
  distributed.check_same(
    {
      "the source code of vit_jax": distributed.digest_package(),
      **distributed.read_versions(),
      "--workdir": str(workdir),
      **configuration.flatten(config),
    }
  )
  configuration.check_ranges(config)
  wandb_run.check(config)
  evaluation.check_types(config)
  run = run_folder.check(config, workdir)
  if not run:  # older versions accepted unused keys
    configuration.check_unused(config)
  return run


def make_step(config, objective: objectives.Objective, total_steps: int):
  """Returns train_step(state, batch) and init_state(key), both pure."""
  schedule = optim.make_schedule(**config.schedule, total_steps=total_steps)
  params = jax.eval_shape(objective.model.init, jax.random.key(0))
  optimizer = optim.make_optimizer(
    **config.optimizer,
    schedule=schedule,
    base_lr=config.schedule.base_lr,
    params=params,
  )
  both = {"optimizer": optimizer, "ema_decay": config.ema_decay}
  train_step = functools.partial(
    steps.train_step,
    objective=objective,
    schedule=schedule,
    micro_batches=config.micro_batches,
    ema_warmup=config.ema_warmup,
    **both,
    frozen=optim.list_frozen(params, **config.optimizer),
  )
  init_state = functools.partial(
    steps.init_state, model=objective.model, **both
  )
  return train_step, init_state


def make_state(config, mesh, objective, init_state, checkpoints):
  """Returns the state to start from, and its shardings.

  `checkpoints` are those of the run, None for a new one.
  """
  key = make_key(config.seed)
  shapes = jax.eval_shape(init_state, key)
  layout = sharding.tree_shardings(mesh, shapes)
  if checkpoints:
    placed = jax.tree.map(lambda x, s: x.update(sharding=s), shapes, layout)
    state = checkpoints.restore(placed)
    if state is not None:
      return state, layout
  if config.init_from:
    how = (init_state, key, layout, objective, config.model)
    return start_from(config.init_from, *how), layout
  return jax.jit(init_state, out_shardings=layout)(key), layout


@dataclasses.dataclass
class Loop:
  """The training loop: its state, and the work between steps."""

  config: Any
  total_steps: int
  evaluators: list[evaluation.Evaluator]
  best: str | None  # the EVALUATION/METRIC that picks the best checkpoint
  checkpoints: checkpoint.Checkpoints
  own: lock.Lock | None  # of the run folder; None except on process 0
  stop: StopSignal
  step: int  # the last one taken
  state: Any  # after it

  def run(self, train_step, batches: Iterator, done):
    """Takes the remaining steps; returns as `train`.

    Steps do not wait for the devices, because metrics are fetched one log
    interval late, or before a save. A state is saved before it is evaluated,
    so that a failed evaluation does not lose it. `train_step` is jitted;
    `done` has the results of this step that are in the run folder.
    """
    config, workdir = self.config, self.checkpoints.workdir
    self.saved, self.results = self.step, {}
    wandb = wandb_run.start(config, workdir)
    self.metrics = MetricLog(
      config, workdir, self.step, self.total_steps, wandb
    )
    profiler = Profiler(config, workdir)
    try:
      self.evaluate(done)  # the run may have stopped before or during it
      self.stop.check()
      for batch in batches:
        self.step += 1
        profiler.before(self.step, self.state)
        self.state, values = train_step(self.state, batch)
        self.metrics.add(self.step, values)
        if self.step % config.log_every == 0:
          self.metrics.flush(self.step - config.log_every)
        if self.is_due(config.checkpoint_every):
          self.save()
        self.evaluate({})
        if self.step < self.total_steps:
          self.stop.check()
      profiler.close(self.state, self.step + 1)
      self.checkpoints.close()
    except Stopping:
      profiler.close(self.state, self.step + 1)
      self.save()
      self.checkpoints.close()
      at = f"saved step {self.step}" if self.step else "before the first step"
      log.info("stopping: %s; run again to resume", at)
      return None
    except (NotFinite, inputs.DataFailed, EvaluationFailed) as e:
      advice = (
        "fix that and run the same command again, or evaluate what is saved "
        "with vit-jax evaluate"
      )
      if isinstance(e, NotFinite):
        advice = (
          "try in a new workdir: a lower schedule.base_lr, more "
          "schedule.warmup_steps, optimizer.clip_norm=1, or model.dtype=float32"
        )
      elif jax.process_count() == 1:  # others may not fail or save now
        self.save()
      self.checkpoints.wait()
      saved = "no checkpoint had been saved yet"
      if newest := self.checkpoints.steps()[-1:]:
        saved = f"the last checkpoint is {workdir}/checkpoints/{newest[0]}"
      raise RunStopped(f"{e}; {saved}; {advice}") from e
    except BaseException:
      with contextlib.suppress(RunStopped):  # keep the first error
        self.checkpoints.wait()
      raise
    finally:
      self.metrics.close()
    return report_end(workdir, self.step, self.results)

  def is_due(self, every: int) -> bool:
    """Returns whether this step is a multiple of `every`, or the last one."""
    due = bool(every) and self.step % every == 0
    return self.step > 0 and (due or self.step == self.total_steps)

  def save(self):
    """Saves the state, unless it is saved already."""
    if self.saved == self.step:
      return
    if self.own:
      self.own.check()
    self.metrics.flush(self.step)
    self.metrics.sync()  # a resumed run keeps the lines up to its checkpoint
    self.checkpoints.save(self.step, self.state)
    self.metrics.restart_clock(self.step)
    self.saved = self.step

  def evaluate(self, done):
    """Runs evaluations that are due and not `done`; keeps the best state."""
    for evaluator in self.evaluators:
      if not self.is_due(evaluator.every):
        continue
      results = evaluator.find(done)
      if not results:
        self.metrics.flush(self.step)
        state = self.state
        params = state.params if state.ema is None else state.ema
        results = run_evaluation(evaluator, params, self.step)
        self.metrics.write_results(evaluator.name, self.step, results)
      metric = results.get(self.best or "")
      if metric is not None and self.checkpoints.is_best(metric):
        self.save()
        self.checkpoints.keep_best(self.step, metric)
      self.metrics.restart_clock(self.step)
      self.results |= results


class EvaluationFailed(RunStopped):
  """A test set could not be evaluated."""


def run_evaluation(evaluator, params, step) -> dict[str, float]:
  """Returns {NAME/METRIC: value}; errors name the step."""
  name = evaluator.name
  try:
    return {f"{name}/{metric}": x for metric, x in evaluator.run(params)}
  except Stopping:
    raise
  except Exception as e:
    what = "" if name == "eval" else f" {name}"
    raise EvaluationFailed(
      f"the evaluation{what} at step {step} failed: {one_line(e)}"
    ) from e


def report_end(workdir, step, results) -> dict[str, float]:
  """Logs the end of a run; returns its results as `train` does."""
  log.info("the run is complete: %d steps in %s", step, workdir)
  return {key.removeprefix("eval/"): x for key, x in results.items()}
