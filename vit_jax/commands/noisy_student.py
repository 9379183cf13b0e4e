"""`vit-jax noisy-student`: iterate teacher, pseudo-labels and student."""

from vit_jax.commands import distributed, flags

EXTRA = "train"


def add_flags(parser):
  flags.add_config(
    parser,
    "its get_config takes [ARG,]loop and [ARG,]STAGE; --config.key=value "
    "overrides a key of the loop or of all stages",
  )
  flags.add_workdir(parser, "folder with one subfolder per stage")
  flags.add_stopped_exit_code(parser)
  flags.add_json(parser)
  distributed.add_flags(parser)


def run(args):
  import jax

  from vit_jax.tools import noisy_student

  loop, configs = noisy_student.load(args.config, args.overrides)
  distributed.connect(args)
  result = noisy_student.noisy_student(loop, configs, args.workdir)
  if result is None:
    return args.stopped_exit_code
  if not jax.process_index():
    flags.print_result(args, result, noisy_student.format_table)
  return 0
