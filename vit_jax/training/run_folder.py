"""Run folders: the lock, checks of an existing run, a new run's files."""

import logging
import shlex

import jax
from clu import parameter_overview

from vit_jax import checkpoint, distributed, files, sharding
from vit_jax import config as configuration
from vit_jax.data import preprocess
from vit_jax.errors import UserError, check_folder
from vit_jax.state import flatten, is_statistic
from vit_jax.training import lock
from vit_jax.training.inputs import Inputs

log = logging.getLogger(__name__)


def take(config, workdir, run, opened: Inputs, stack) -> lock.Lock | None:
  """Holds the run folder's lock on process 0 until `stack` is closed.

  Raises:
    UserError: another run has it, or it cannot be written, or processes have
      different runs or data.
  """
  try:
    is_first = jax.process_index() == 0
    own = stack.enter_context(lock.hold(workdir)) if is_first else None
  except OSError as e:
    raise UserError(
      f"cannot write to {workdir}: {e.strerror or e}; choose another --workdir"
    ) from e
  if check(config, workdir) != run:
    raise UserError(f"another run has just ended in {workdir}; start again")
  distributed.check_same({"config.json": run, "the data": opened.describe()})
  # After that all-gather process 0 has the lock, so the token is current.
  token = own.token if own else lock.read_token(workdir)
  distributed.check_same({"the lock in --workdir": token})
  return own


def check(config, workdir) -> dict | None:
  """Returns config.json of the run that `workdir` holds, None for none.

  Raises:
    UserError: it holds a run of another configuration, checkpoints without
      one, or a file where a folder should be; or a new run's preprocessing
      would enlarge images that it has shrunk.
  """
  checkpoint.check_address(workdir)
  inside = [workdir / name for name in ("checkpoints", "best", "tensorboard")]
  for folder in inside if not files.is_remote(workdir) else ():
    check_folder(folder)
  if not files.has_run(workdir):
    if checkpoint.list_steps(workdir):
      raise UserError(
        f"{workdir} has checkpoints and no config.json, which describes "
        "their run; restore it, or choose another --workdir"
      )
    texts = {e.preprocess for e in configuration.list_evals(config)}
    for text in (config.train.preprocess, *sorted(texts)):
      preprocess.check_crops(text, config.image_size)
    return None
  advice = "restore it from a copy, or choose another --workdir"
  run = files.read_run(workdir, advice)
  new = configuration.to_dict(config)
  if differences := "; ".join(configuration.differences(run["config"], new)):
    raise UserError(
      f"{workdir} holds a run of another configuration ({differences}); resume "
      "with the configuration that it was started with, or choose another "
      "--workdir, also to train for longer: "
      f"--config.init_from={shlex.quote(str(workdir))} starts it from these "
      "weights, without the optimizer's state and the step"
    )
  return run


def count_steps(config, run, inputs: Inputs, workdir) -> int:
  """Returns the steps of the whole run; checks the data of a resumed one."""
  if not run:
    return configuration.count_steps(config, inputs.num_examples)
  check_data(config, run, inputs, workdir)
  return run["total_steps"]


def check_data(config, run, inputs: Inputs, workdir) -> None:
  """Raises a UserError if the data are not those that the run began with.

  The data of a changed entry of `config.evals` may differ.
  """
  names = inputs.first.class_names
  if run["class_names"] and run["class_names"] != names:
    old, new = set(run["class_names"]), set(names)
    raise UserError(
      f"the classes of the training data are not those of the run in {workdir}"
      f": gone {sorted(old - new)[:5]}, new {sorted(new - old)[:5]}; restore "
      "the data, or choose another --workdir"
    )
  found = inputs.describe()
  before = run["config"].get("evals", {})
  now = configuration.to_dict(config)["evals"]
  for kind, entries in run.get("data", {}).items():  # older runs have none
    if before.get(kind) != now.get(kind):
      continue
    for old, new in zip(entries, found.get(kind, []), strict=True):
      if old != new:
        raise UserError(
          f"{new['dataset']} ({kind}) has changed since the run in {workdir} "
          f"began: it had {old['examples']:,} examples ({old['identity']}) and "
          f"has {new['examples']:,} ({new['identity']}); restore the data, or "
          "choose another --workdir"
        )


def write(config, workdir, about, objective, opened: Inputs, state):
  """Writes config.json and parameters.txt of a new run.

  `about` has derived values, such as "total_steps" and "shuffle".
  """
  if jax.process_index():
    return
  workdir.mkdir(parents=True, exist_ok=True)
  run = {
    "config": configuration.to_dict(config),
    **about,
    "class_names": objective.class_names,
    "multilabel": opened.first.multilabel,
    "data": opened.describe(),
  }
  overview = parameter_overview.get_parameter_overview(
    state.params, include_stats="sharding"
  )
  files.write_atomically(workdir / "parameters.txt", overview)
  files.write_json(workdir / "config.json", run)
  sizes = {path: x.size for path, x in flatten(state.params).items()}
  millions = sum(n for path, n in sizes.items() if not is_statistic(path)) / 1e6
  gib = sharding.bytes_per_device(state) / 2**30
  log.info(
    f"{config.model.variant}: {millions:.2f} M parameters (parameters.txt), "
    f"{gib:.3f} GiB of state a device, devices: {jax.device_count()}, "
    f"{about['total_steps']} steps of {config.batch_size} images"
  )


def read_results(workdir, step: int) -> dict[str, float]:
  """Returns {NAME/METRIC: value} of all lines of a step in metrics.jsonl."""
  lines, _ = files.read_metrics(workdir)
  lines = [values for values in lines if values["step"] == step]
  return {key: x for values in lines for key, x in values.items()}
