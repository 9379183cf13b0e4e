"""Command-line parser and the flags that several commands share."""

import argparse
import json

from vit_jax.errors import UserError, suggest

SOURCE = (
  "a run folder or checkpoint, an npz or safetensors file, a Hugging Face or "
  "timm folder, a TensorFlow checkpoint (EfficientNet), a gs:// or https:// "
  "address, a published name, or a model of the Hugging Face hub (OWNER/NAME, "
  "hf:OWNER/NAME@REVISION, timm:NAME)"
)


class Parser(argparse.ArgumentParser):
  """A parser with one-line errors that adds defaults to the help texts."""

  def add_argument(self, *args, **kwargs):
    action = super().add_argument(*args, **kwargs)
    text, default = action.help or "", action.default
    hidden = default in (None, False, [], argparse.SUPPRESS)
    if not hidden and "default" not in text:
      action.help = f"{text} (default: {default})".strip()
    return action

  def error(self, message):
    self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parse(parser: Parser, argv: list[str] | None = None) -> argparse.Namespace:
  """Returns the parsed flags of a command line.

  Commands with `add_overrides` also get `overrides`, {"a.b": "text"}.

  Raises:
    SystemExit: --help, or an error that argparse found.
    UserError: an unknown flag.
  """
  args, rest = parser.parse_known_args(argv)
  if "overrides" in args:
    args.overrides = _parse_overrides(rest, args.parser)
  elif rest:
    raise _unknown(rest[0], args.parser)
  return args


def _parse_overrides(arguments, parser):
  """Returns {"a.b": "text"} of --config.a.b=text and --config.a.b text."""
  overrides = {}
  rest = list(arguments)
  while rest:
    argument = rest.pop(0)
    if not argument.startswith("--config."):
      raise _unknown(argument, parser)
    key, equals, value = argument.removeprefix("--config.").partition("=")
    if not equals:
      if not rest:
        raise UserError(f"{argument} needs a value: {argument}=VALUE")
      value = rest.pop(0)
    overrides[key] = value
  return overrides


def _unknown(argument, parser):
  """Returns the error, with the most similar option as a suggestion."""
  name = argument.partition("=")[0].partition(".")[0]
  options = [o for action in parser._actions for o in action.option_strings]
  return UserError(
    f"unknown argument {argument!r}; see {parser.prog} --help"
    f"{suggest(name, options)}"
  )


# Flags of the process and its output, not of the computation.
_OF_PROCESSES = {
  *("run", "parser", "connected", "json", "distributed", "coordinator"),
  *("num_processes", "process_id", "start_timeout", "lost_timeout"),
}


def options(args: argparse.Namespace, *without: str) -> dict:
  """Returns the flags that a command passes on as keyword arguments."""
  leave = _OF_PROCESSES.union(without)
  return {name: x for name, x in vars(args).items() if name not in leave}


# --- flags of several commands ---


def add_overrides(parser):
  """Accepts --config.KEY=VALUE, see `parse`."""
  parser.set_defaults(overrides={})


def add_config(parser, help="--config.key=value overrides one of its keys"):
  parser.add_argument(
    "--config",
    required=True,
    metavar="CONFIG[:ARG]",
    help=f"a file, or the name of one in configs/; {help}",
  )
  add_overrides(parser)


def add_workdir(parser, help="the run folder"):
  parser.add_argument("--workdir", required=True, help=help)


def add_stopped_exit_code(parser):
  parser.add_argument(
    "--stopped_exit_code",
    type=int,
    default=0,
    metavar="CODE",
    help="exit code if a signal stops the run after saving (default: 0)",
  )


def add_checkpoint(parser):
  parser.add_argument(
    "--checkpoint", required=True, metavar="SOURCE", help=SOURCE
  )


def add_classifier(parser):
  add_checkpoint(parser)
  parser.add_argument(
    "--class_names",
    metavar="FILE",
    help="a file with one name per line, for weights without class names",
  )


def add_grid(parser, help):
  parser.add_argument(
    "--grid", action="append", default=[], metavar="KEY=A,B,...", help=help
  )


def add_jobs(parser):
  parser.add_argument(
    "--executor", default="local", help="local (this machine) or slurm"
  )
  parser.add_argument(
    "--jobs",
    type=int,
    help="concurrent runs; they divide the GPUs or TPU chips of this machine "
    "(default: 1; with Slurm: all)",
  )
  parser.add_argument(
    "--slurm",
    action="append",
    default=[],
    metavar="KEY=VALUE",
    help="an option of sbatch under submitit's name: partition=gpu, "
    "time=MINUTES, gpus_per_node=1, cpus_per_task=8, mem=64GB",
  )


def add_dataset_name(parser):
  parser.add_argument(
    "name", metavar="NAME", help="a data set, a task or folder:PATH"
  )


def add_data_dir(parser):
  parser.add_argument(
    "--data_dir",
    help="folder of the data sets; default: the run's, else $TFDS_DATA_DIR or "
    "~/tensorflow_datasets",
  )


def add_image_size(parser, **kwargs):
  parser.add_argument(
    "--image_size", type=_parse_size, metavar="PIXELS|H,W", **kwargs
  )


def add_resize(parser):
  parser.add_argument(
    "--resize",
    metavar="METHOD",
    help="how position embeddings are resized: corner_aligned, timm, "
    "huggingface, dinov2, bilinear, bilinear_antialiased or cpe (default: the "
    "method of the checkpoint's authors)",
  )


def _parse_size(text):
  """Parses "48" to an integer or "48,96" to (height, width), for argparse."""
  words = text.split(",")
  sides = [int(word) if word.isdecimal() else 0 for word in words]
  if len(sides) > 2 or min(sides) < 1:
    raise argparse.ArgumentTypeError(
      f"{text!r} is neither a size such as 224 nor a height and width such as "
      "224,448"
    )
  return tuple(sides) if len(sides) == 2 else sides[0]


def add_features(parser):
  parser.add_argument(
    "--what",
    default="pooled",
    help="pooled (the input of the head), cls, mean, cls+mean or patches",
  )
  parser.add_argument(
    "--layers",
    type=lambda text: tuple(int(word) for word in text.split(",")),
    default=(-1,),
    metavar="I,J,...",
    help="blocks whose features are concatenated (default: -1, the last)",
  )


def add_json(parser):
  parser.add_argument(
    "--json", action="store_true", help="machine-readable output"
  )


def print_result(args, found, format) -> None:
  """Prints `found` as JSON with --json, else as formatted by `format`."""
  print(json.dumps(found) if args.json else format(found))
