"""`vit-jax train`: train a model, or resume a run."""

from vit_jax.commands import distributed, flags


def add_flags(parser):
  flags.add_config(parser)
  flags.add_workdir(parser)
  flags.add_stopped_exit_code(parser)
  distributed.add_flags(parser)


def run(args):
  from vit_jax import config
  from vit_jax.training import early

  loaded = config.load(args.config, args.overrides)
  early.check(loaded)  # first, the errors that can be found without data
  distributed.connect(args)
  from vit_jax.train import train

  stopped = train(loaded, args.workdir) is None
  return args.stopped_exit_code if stopped else 0
