"""The command line: `python -m vit_jax COMMAND`, or `vit-jax COMMAND`."""

import sys

from vit_jax.commands import (
  bench_input,
  bench_run,
  bench_step,
  convert,
  data_build,
  data_check,
  data_list,
  data_prepare,
  data_show,
  demo,
  embed,
  evaluate,
  export,
  figures,
  flags,
  inspect,
  linear,
  noisy_student,
  plan,
  predict,
  preflight,
  process,
  pseudo_label,
  quickstart,
  report,
  sweep,
  tables,
  train,
  verify,
  vtab,
)

# {name: (module with `add_flags` and `run`, help text)}.
COMMANDS = {
  "train": (train, "train a model, or resume a run"),
  "preflight": (preflight, "check a run's requirements on all its hosts"),
  "plan": (plan, "estimate a run's time, memory and cost on TPUs"),
  "sweep": (sweep, "train with every value of some keys"),
  "noisy-student": (noisy_student, "run Noisy Student's training loop"),
  "vtab": (vtab, "fine-tune on VTAB's tasks, 1,000 images each"),
  "evaluate": (evaluate, "evaluate saved weights"),
  "linear": (linear, "evaluate features: few-shot, linear probe, k-NN"),
  "pseudo-label": (pseudo_label, "label images with a trained model"),
  "predict": (predict, "classify image files"),
  "embed": (embed, "write features of image files"),
  "demo": (demo, "classify pictures on a web page"),
  "inspect": (inspect, "describe a file of weights"),
  "verify": (verify, "compare features with published values"),
  "convert": (convert, "write weights in another format"),
  "export": (export, "write a model that runs without this package"),
  "tables": (tables, "print the paper's tables beside your runs"),
  "figures": (figures, "draw the paper's figures for any weights"),
  "report": (report, "write an HTML page about runs"),
  "data list": (data_list, "list data sets, built-in and prepared"),
  "data prepare": (data_prepare, "make, download or convert a data set"),
  "data build": (data_build, "make a data set of your own labelled images"),
  "data check": (data_check, "validate and describe a data set"),
  "data show": (data_show, "draw augmented training images"),
  "bench step": (bench_step, "measure the train step on the local devices"),
  "bench input": (bench_input, "measure this host's input pipeline"),
  "bench run": (bench_run, "measure the parts of a short training run"),
  "quickstart": (quickstart, "pre-train, fine-tune and predict, in minutes"),
}
# First words of the two-word commands.
GROUPS = {
  "data": "list, prepare, build, check, show data",
  "bench": "measure this machine",
}


def make_parser() -> flags.Parser:
  """Returns the parser of all commands; `flags.parse` uses it."""
  parser = flags.Parser(
    prog="vit-jax",
    description="Vision Transformers: pre-train, fine-tune, use.",
    allow_abbrev=False,
  )
  options = {"required": True, "parser_class": flags.Parser}
  top = parser.add_subparsers(metavar="COMMAND", **options)
  groups = {"": top}
  for name, (module, text) in COMMANDS.items():
    group, _, action = name.rpartition(" ")
    if group not in groups:
      within = top.add_parser(group, help=GROUPS[group], allow_abbrev=False)
      groups[group] = within.add_subparsers(metavar="ACTION", **options)
    command = groups[group].add_parser(action, help=text, allow_abbrev=False)
    module.add_flags(command)
    command.set_defaults(run=module.run, parser=command)
  return parser


def main(argv: list[str] | None = None) -> int:
  """Runs one command; returns the exit code, see `commands.process.run`."""
  return process.run(make_parser(), argv)


if __name__ == "__main__":
  sys.exit(main())
