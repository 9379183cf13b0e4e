"""The command line: `python -m vit_jax COMMAND`, or `vit-jax COMMAND`.

The only place with flags. Each command imports what it needs when it runs, so
that `--help` is quick and `predict` never meets TensorFlow.
"""

import argparse
import io
import json
import logging
import os
import select
import sys
import traceback

from vit_jax.errors import RunStopped, UserError, suggest

_SOURCE = (
  "a run folder or checkpoint, an npz or safetensors file, a Hugging Face or "
  "timm folder, a gs:// or https:// address, or a published name"
)


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one line, and what an option is by default."""

  def add_argument(self, *args, **kwargs):
    action = super().add_argument(*args, **kwargs)
    text, default = action.help or "", action.default
    unsaid = default not in (None, False, [], argparse.SUPPRESS)
    if unsaid and "default" not in text:
      action.help = f"{text} (default: {default})".strip()
    return action

  def error(self, message):
    self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
  """Runs one command; returns the exit code.

  0: done (also, unless train's --stopped_exit_code says otherwise: stopped by
  a signal, and saved). 1: the run cannot go on.
  2: something that was given cannot be used. 69: another process of the run is
  lost. When one ends with an error, the others end with its code. 141: nobody
  reads the output any more, as after `| head`; shells give that code, too.
  """
  for stream in (sys.stdout, sys.stderr):
    # A name that the terminal's encoding lacks is escaped, not an error.
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
      stream.reconfigure(errors="backslashreplace")
  try:
    try:
      return _main(argv)
    finally:
      sys.stdout.flush()  # the interpreter would do it where nobody can catch
  except BrokenPipeError:
    if not _is_unread(sys.stdout) and not _is_unread(sys.stderr):
      raise  # another pipe of the program
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return 141


def _is_unread(stream) -> bool:
  """Returns whether a stream is a pipe whose reader is gone."""
  poll = select.poll()
  poll.register(stream.fileno(), 0)
  return any(event & select.POLLERR for _, event in poll.poll(0))


def _main(argv):
  """Runs one command; returns the exit code, see `main`."""
  # TensorFlow only reads and decodes images here; it need not introduce itself.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  logging.basicConfig(format="%(message)s", stream=sys.stderr)
  # Orbax logs each failure several times, with traces; what matters arrives as
  # an exception.
  for name in ("absl", "asyncio", "concurrent.futures"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  logging.getLogger("vit_jax").setLevel(logging.INFO)
  sys.unraisablehook = _print_unless_stray
  args, rest = _make_parser().parse_known_args(argv)
  args.lifeline = None  # to the other processes of a run
  try:
    overrides = _parse_overrides(rest, args.parser)
    if overrides and args.run not in _OVERRIDDEN:
      raise _unknown(rest[0], args.parser)
    args.overrides = overrides
    if args.run in _WITHOUT_DEVICE:
      _use_cpu()
    code = _run(args) or 0
    if args.lifeline:
      args.lifeline.leave()
    return code
  except UserError as e:
    return _fail(args.lifeline, f"error: {e}", 2)
  except RunStopped as e:
    return _fail(args.lifeline, f"stopped: {e}", 1)
  except KeyboardInterrupt:
    return _fail(args.lifeline, "", 130, "interrupted")
  except Exception as e:
    if not args.lifeline:
      raise
    return _fail(args.lifeline, traceback.format_exc(), 1, f"{e!r}"[:500])


# Others are for who debugs JAX code of theirs: no number here depends on them.
_PROMOTION = {"rank": "allow", "dtype": "standard"}


def _run(args):
  """Runs a command; where it failed for want of a device, that is said."""
  for name, value in _PROMOTION.items():
    if f"JAX_NUMPY_{name.upper()}_PROMOTION" in os.environ:
      import jax

      jax.config.update(f"jax_numpy_{name}_promotion", value)
  try:
    return args.run(args)
  except (UserError, RunStopped):
    raise
  except Exception:
    if "jax" not in sys.modules or args.lifeline:
      raise
    import jax

    try:
      jax.devices()
    except Exception as e:
      words = str(e).partition(" (set JAX_PLATFORMS")[0].strip() or repr(e)
      given = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
      raise UserError(
        f"JAX has no device with JAX_PLATFORMS={given or ''!r}: "
        f"{words.splitlines()[0]}; install what that names, or unset it"
      ) from e
    raise


def _use_cpu():
  """Keeps JAX from looking for accelerators, for which libtpu raises alarm."""
  import jax

  jax.config.update("jax_platforms", "cpu")


def _fail(lifeline, text, code, line=None):
  """Says what went wrong, in `line` to the other processes; returns the code.

  If it went wrong because another process is lost, that is said instead.
  """
  if lifeline:
    lifeline.fail(line or text, code)
  if text:
    print(text, file=sys.stderr)
  if lifeline:
    lifeline.end(code)
  return code


def _print_unless_stray(unraisable):
  """Prints what nobody can catch, unless it is TensorStore's echo.

  Its threads call back into an event loop that the failure of a save, which is
  reported, has closed.
  """
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def _make_parser():
  parser = _Parser(
    prog="vit-jax",
    description="Vision Transformers: pre-train, fine-tune, use.",
    allow_abbrev=False,
  )
  commands = parser.add_subparsers(
    required=True, metavar="COMMAND", parser_class=_Parser
  )

  def add(name, run, help_text, to=commands):
    command = to.add_parser(name, help=help_text, allow_abbrev=False)
    command.set_defaults(run=run, parser=command)
    return command

  train = add("train", _train, "train a model, or go on with a run")
  train.add_argument(
    "--config",
    required=True,
    metavar="FILE[:ARG]",
    help="a configuration; --config.key=value changes one of its keys",
  )
  train.add_argument("--workdir", required=True, help="the run folder")
  train.add_argument(
    "--stopped_exit_code",
    type=int,
    default=0,
    metavar="CODE",
    help="of a run that was told to stop, and saved (default: 0)",
  )
  _add_distributed(train)

  _add_preflight(
    add("preflight", _preflight, "check what a run needs, on all its hosts")
  )

  _add_plan(add("plan", _plan, "say what a run would take on TPUs"))

  _add_sweep(add("sweep", _sweep, "train with every value of some keys"))

  _add_vtab(add("vtab", _vtab, "fine-tune on VTAB's tasks, 1,000 images each"))

  evaluate = add("evaluate", _evaluate, "evaluate saved weights")
  where = evaluate.add_mutually_exclusive_group(required=True)
  where.add_argument("--workdir", help="a run folder")
  where.add_argument("--checkpoint", metavar="SOURCE", help=_SOURCE)
  evaluate.add_argument("--dataset", help="default: the run's test set")
  evaluate.add_argument("--split", help="default: the run's")
  evaluate.add_argument(
    "--batch_size", type=int, help="images at once (default: the run's, or 64)"
  )
  _add_data_dir(evaluate)
  _add_json(evaluate)
  _add_distributed(evaluate)

  _add_linear(add("linear", _linear, "evaluate features: few-shot, probe"))

  predict = add("predict", _predict, "classify image files")
  _add_classifier(predict)
  predict.add_argument(
    "images", nargs="+", metavar="IMAGE", help="files, and folders of them"
  )
  predict.add_argument("--top", type=int, default=5, help="classes to show")
  _add_json(predict)

  _add_demo(add("demo", _demo, "classify pictures dropped on a page"))

  inspect = add("inspect", _inspect, "say what a file of weights holds")
  inspect.add_argument(
    "source",
    nargs="?",
    metavar="SOURCE",
    help=f"{_SOURCE}; without it the published names are listed",
  )
  _add_json(inspect)

  convert = add("convert", _convert, "write weights in another format")
  convert.add_argument("source", metavar="SOURCE", help=_SOURCE)
  convert.add_argument("out", metavar="OUT", help="the file or folder to write")
  convert.add_argument(
    "--to", required=True, help="npz, big_vision, hf, timm or orbax"
  )

  _add_export(add("export", _export, "write a model that runs without this"))

  _add_tables(add("tables", _tables, "the paper's tables, beside your runs"))

  _add_figures(add("figures", _figures, "the paper's figures, of any weights"))

  _add_report(add("report", _report, "one page of HTML on runs, to look at"))

  data = commands.add_parser("data", help="list, prepare, check, show data")
  actions = data.add_subparsers(
    required=True, metavar="ACTION", parser_class=_Parser
  )
  _add_data_commands(lambda *args: add(*args, to=actions))

  bench = commands.add_parser("bench", help="measure this machine")
  actions = bench.add_subparsers(
    required=True, metavar="ACTION", parser_class=_Parser
  )
  _add_bench_commands(lambda *args: add(*args, to=actions))

  quickstart = add(
    "quickstart", _quickstart, "pre-train, fine-tune and predict, in minutes"
  )
  quickstart.add_argument(
    "--workdir", default="runs/quickstart", help="the folder for all of it"
  )
  return parser


def _add_preflight(preflight):
  preflight.add_argument(
    "--config",
    required=True,
    metavar="FILE[:ARG]",
    help="the run's; --config.key=value as for train",
  )
  preflight.add_argument("--workdir", required=True, help="the run's")
  preflight.add_argument(
    "--hosts", type=int, help="how many processes there have to be"
  )
  preflight.add_argument(
    "--topology", metavar="CHIP:SIZE", help="plan the memory: v5e:4x4"
  )
  _add_distributed(preflight)


def _add_plan(plan):
  plan.add_argument(
    "--config",
    action="append",
    default=[],
    metavar="FILE[:ARG]",
    help="may be repeated; --config.key=value as for train",
  )
  plan.add_argument(
    "--topology", default="v5e:4x4", help="CHIP:SIZE (default: v5e:4x4)"
  )
  plan.add_argument("--num_classes", type=int, help="of unknown data")
  plan.add_argument("--num_examples", type=int, help="of unknown data")
  plan.add_argument("--price", type=float, help="dollars of a chip-hour")
  plan.add_argument("--dump-hlo", metavar="FILE", help="the compiled step")
  what = plan.add_mutually_exclusive_group()
  what.add_argument(
    "--scale", action="store_true", help="on larger slices as well"
  )
  what.add_argument(
    "--table2", action="store_true", help="the paper's core-days, estimated"
  )
  _add_json(plan)


def _add_sweep(sweep):
  sweep.add_argument(
    "--config",
    required=True,
    metavar="FILE[:ARG]",
    help="as for train; --config.key=value as well",
  )
  sweep.add_argument(
    "--final",
    metavar="FILE[:ARG]",
    help="what the best setting is then trained with; --seeds are of that",
  )
  sweep.add_argument("--workdir", required=True, help="one folder a run in it")
  sweep.add_argument(
    "--grid",
    action="append",
    default=[],
    metavar="KEY=A,B,...",
    help="a key and its values; several grids are multiplied",
  )
  sweep.add_argument(
    "--seeds", type=int, default=3, help="runs of each setting (default: 3)"
  )
  _add_jobs(sweep)
  sweep.add_argument(
    "--select", metavar="METRIC", help="what is compared (default: accuracy)"
  )
  _add_json(sweep)


def _add_vtab(vtab):
  vtab.add_argument(
    "--init_from",
    "--checkpoint",
    required=True,
    dest="source",
    metavar="SOURCE",
    help=f"{_SOURCE}; --config.key=value as for train",
  )
  vtab.add_argument("--workdir", required=True, help="one folder a task in it")
  vtab.add_argument(
    "--tasks",
    default="all",
    help="all 19, mini (no download needed), or names: caltech101,dtd",
  )
  vtab.add_argument(
    "--grid",
    action="append",
    default=[],
    metavar="KEY=A,B,...",
    help="what is tried on the 200 images (default: a rate and a schedule)",
  )
  vtab.add_argument(
    "--per_task",
    action="store_true",
    help="each task gets its best setting; default: one for all, as the paper",
  )
  vtab.add_argument(
    "--seeds", type=int, default=1, help="final runs of a task (default: 1)"
  )
  _add_jobs(vtab)
  _add_json(vtab)


def _add_jobs(command):
  command.add_argument(
    "--jobs",
    type=int,
    default=1,
    help="runs at once; they divide the GPUs or TPU chips (default: 1)",
  )


def _add_linear(linear):
  linear.add_argument(
    "--checkpoint", required=True, metavar="SOURCE", help=_SOURCE
  )
  linear.add_argument("--dataset", required=True, help="one label an image")
  linear.add_argument("--train_split", default="train")
  linear.add_argument("--test_split", default="test")
  linear.add_argument(
    "--shots",
    default="5,10",
    help="images of each class; all: every one there is (default: 5,10)",
  )
  linear.add_argument("--seeds", type=int, default=3, help="draws (default: 3)")
  linear.add_argument("--l2", type=float, default=1024, help="default: 1024")
  _add_image_size(linear, help="default: the checkpoint's")
  linear.add_argument(
    "--preprocess", metavar="OPS", help="default: the checkpoint's"
  )
  linear.add_argument(
    "--batch_size", type=int, default=64, help="images at once (default: 64)"
  )
  _add_data_dir(linear)
  _add_json(linear)
  _add_distributed(linear)


def _add_classifier(command):
  command.add_argument(
    "--checkpoint", required=True, metavar="SOURCE", help=_SOURCE
  )
  command.add_argument(
    "--class_names",
    metavar="FILE",
    help="a name a line, for weights that have none",
  )


def _add_demo(demo):
  _add_classifier(demo)
  demo.add_argument(
    "--host",
    default="127.0.0.1",
    help="default: 127.0.0.1, for this machine alone; 0.0.0.0 for all",
  )
  demo.add_argument("--port", type=int, help="default: a free one from 7860 on")
  demo.add_argument(
    "--share",
    action="store_true",
    help="a public address too, through gradio's servers; for Colab",
  )


def _add_export(export):
  export.add_argument("source", metavar="SOURCE", help=_SOURCE)
  export.add_argument("out", metavar="OUT", help="the folder to write")
  export.add_argument(
    "--to", required=True, help="stablehlo, saved_model or onnx"
  )
  _add_image_size(
    export, help="default: the checkpoint's; position embeddings are resized"
  )
  export.add_argument(
    "--preprocess",
    action="store_true",
    help="take uint8 pictures of any size; default: floats in [-1, 1]",
  )


def _add_tables(tables):
  tables.add_argument(
    "name",
    nargs="?",
    metavar="NAME",
    help="table1 to table9; without it they are listed",
  )
  tables.add_argument("--runs", metavar="DIR", help="a folder with runs")
  how = tables.add_mutually_exclusive_group()
  _add_json(how)
  how.add_argument("--markdown", action="store_true", help="for documents")
  tables.add_argument(
    "--commands",
    action="store_true",
    help="what fills the cells that are missing, and what it costs",
  )
  tables.add_argument(
    "--only",
    metavar="CELL",
    help="all commands of one missing cell, data included, such as 'ViT-B/16, "
    "ImageNet-21k, 90 epochs; CIFAR-100' or a part that is enough",
  )


def _add_figures(figures):
  figures.add_argument(
    "--checkpoint",
    action="append",
    default=[],
    metavar="SOURCE",
    help=f"{_SOURCE}; may be repeated: a panel each",
  )
  figures.add_argument(
    "images", nargs="*", metavar="IMAGE", help="for rollout and distances"
  )
  figures.add_argument(
    "--runs", metavar="DIR", help="a folder with runs, for curves and compute"
  )
  figures.add_argument(
    "--out", required=True, metavar="DIR", help="where they are written"
  )
  figures.add_argument(
    "--only",
    metavar="NAMES",
    help="rollout, filters, positions, distances, curves, compute",
  )
  _add_image_size(figures, help="default: the checkpoint's")


def _add_report(report):
  report.add_argument(
    "workdirs",
    nargs="+",
    metavar="WORKDIR",
    help="a run folder, or one with runs below it",
  )
  report.add_argument("--out", default="report.html", help="the file to write")
  _add_data_dir(report)


def _add_data_commands(add):
  _add_data_dir(add("list", _data_list, "what there is"))
  prepare = add("prepare", _data_prepare, "make, download or convert a set")
  build = add("build", _data_build, "make a set of your own labelled images")
  build.add_argument("name", metavar="NAME", help="of the new data set")
  build.add_argument(
    "--images",
    required=True,
    help="a folder, .tar or .parquet files, or tfds:DATASET:SPLIT",
  )
  build.add_argument(
    "--labels", help="CSV (image,label[,confidence]) or .jsonl"
  )
  build.add_argument("--classes", help="a file with a class a line")
  build.add_argument("--min_confidence", type=float, default=0.0)
  build.add_argument(
    "--against",
    action="append",
    metavar="DATASET:SPLIT",
    help="a test set whose images are left out; may be repeated",
  )
  build.add_argument(
    "--holdout", type=float, default=0.0, help="part that becomes `test`"
  )
  build.add_argument("--workers", type=int, help="default: one a core")
  _add_data_dir(build)
  check = add("check", _data_check, "read a set and say what is in it")
  show = add("show", _data_show, "draw augmented training images")
  for command in (prepare, check, show):
    command.add_argument(
      "name", metavar="NAME", help="of a data set, a task or folder:PATH"
    )
    _add_data_dir(command)
  check.add_argument("--split", help="default: every split")
  check.add_argument(
    "--examples", type=int, default=1000, help="of each split; 0: all of them"
  )
  show.add_argument("--split", default="train")
  show.add_argument(
    "--preprocess", default="inception_crop(size)|flip_lr", metavar="OPS"
  )
  _add_image_size(show, default=224)
  show.add_argument("--output", default="show.png", help="the file to write")
  show.add_argument("--seed", type=int, default=0, help="of the choice")


def _add_bench_commands(add):
  step = add("step", _bench_step, "the train step, on the local devices")
  step.add_argument(
    "--variant", default="ViT-L_16", help="names: ViT-B_16,ViT-L_16"
  )
  _add_image_size(step, default=224)
  step.add_argument(
    "--batch_size", type=int, default=0, help="0 (default): the largest"
  )
  step.add_argument("--num_classes", type=int, default=18291)
  step.add_argument("--steps", type=int, default=20)
  step.add_argument("--dtype", default="bfloat16", help="or float32")
  step.add_argument("--remat", default="none", help="or dots, full")
  step.add_argument("--beside", help="timm: the same model there")
  _add_json(step)

  inputs = add("input", _bench_input, "images a second that this host reads")
  inputs.add_argument("--dataset", help="default: made for the occasion")
  inputs.add_argument("--split", default="train")
  _add_data_dir(inputs)
  _add_image_size(inputs, default=224)
  inputs.add_argument("--batch_size", type=int, default=256)
  inputs.add_argument(
    "--needs",
    type=float,
    metavar="IMAGES_PER_SECOND",
    help="what a slice takes: says how many such hosts feed it",
  )
  _add_json(inputs)


def _add_image_size(command, **kwargs):
  command.add_argument(
    "--image_size", type=_parse_size, metavar="PIXELS|H,W", **kwargs
  )


def _parse_size(text):
  """Returns the integer or (height, width) of 48 and 48,96; for argparse."""
  words = text.split(",")
  sides = [int(word) if word.isdecimal() else 0 for word in words]
  if len(sides) > 2 or min(sides) < 1:
    raise argparse.ArgumentTypeError(
      f"{text!r} is neither pixels, as 224, nor height and width, as 224,448"
    )
  return tuple(sides) if len(sides) == 2 else sides[0]


def _add_data_dir(command):
  command.add_argument(
    "--data_dir",
    help="where data sets are; default: where a run says, else $TFDS_DATA_DIR "
    "or ~/tensorflow_datasets",
  )


def _add_json(command):
  command.add_argument("--json", action="store_true", help="for programs")


def _add_distributed(command):
  group = command.add_argument_group(
    "several machines",
    "Run the same command on each. On TPU pods and under Slurm --distributed "
    "is enough; elsewhere give all three of the others.",
  )
  group.add_argument(
    "--distributed", action="store_true", help="they find each other"
  )
  group.add_argument(
    "--coordinator", metavar="HOST:PORT", help="where process 0 listens"
  )
  group.add_argument("--num_processes", type=int, help="of the run, in all")
  group.add_argument("--process_id", type=int, help="of this one, from 0")
  group.add_argument(
    "--start_timeout",
    type=float,
    default=300,
    metavar="SECONDS",
    help="how long it waits for the others (default: 300)",
  )
  group.add_argument(
    "--lost_timeout",
    type=float,
    default=60,
    metavar="SECONDS",
    help="a machine that does not answer for so long is lost (default: 60)",
  )


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
  """Returns the error, with the option that may have been meant."""
  name = argument.partition("=")[0].partition(".")[0]
  options = [o for action in parser._actions for o in action.option_strings]
  return UserError(
    f"unknown argument {argument!r}; see {parser.prog} --help"
    f"{suggest(name, options)}"
  )


def _find_place(args):
  """Returns where this process stands among others, None if it is alone."""
  given = (args.coordinator, args.num_processes, args.process_id)
  if not args.distributed and given == (None, None, None):
    return None
  if not args.distributed and None in given:
    raise UserError(
      "--coordinator, --num_processes and --process_id are given together"
    )
  from vit_jax.training import hosts

  return hosts.find_place(*given, timeout=args.start_timeout)


def _connect(args, say_saved=None):
  """Joins the other processes of a run, if there are any."""
  place = _find_place(args)
  if place is None:
    return
  from vit_jax.training import hosts, lifeline

  args.lifeline = lifeline.hold(
    place, args.start_timeout, args.lost_timeout, say_saved
  )
  hosts.connect(place, args.start_timeout)
  if place.index:
    logging.getLogger("vit_jax").setLevel(logging.WARNING)


def _train(args):
  loaded = _load_checked(args.config, args.overrides)
  _connect(args, lambda: _say_saved(args.workdir))
  from vit_jax.train import train

  stopped = train(loaded, args.workdir) is None
  return args.stopped_exit_code if stopped else 0


def _load_checked(spec, overrides):
  """Returns a configuration; mistakes that take no data to see come first."""
  from vit_jax import config
  from vit_jax.training import early

  loaded = config.load(spec, overrides)
  early.check(loaded)
  return loaded


def _say_saved(workdir):
  """Says which step of a run has been saved last."""
  from vit_jax import checkpoint

  steps = checkpoint.list_steps(workdir)
  return f"saved last: step {steps[-1]}" if steps else "nothing was saved"


def _preflight(args):
  place = _find_place(args)
  from vit_jax.tools.preflight import preflight

  preflight(
    args.config,
    args.workdir,
    overrides=args.overrides,
    place=place,
    expected=args.hosts,
    topology=args.topology,
    timeout=args.start_timeout,
  )


def _plan(args):
  from vit_jax.tools import plan
  from vit_jax.tools.plan import report

  if args.table2:
    rows = plan.plan_table2()
    print(json.dumps(rows) if args.json else report.format_table2(rows))
    return
  if not args.config:
    raise UserError("plan needs --config=FILE[:ARG], or --table2")
  if args.dump_hlo and (len(args.config) > 1 or args.scale):
    raise UserError("--dump-hlo takes the program of one plan; give one config")
  options = {
    "overrides": args.overrides,
    "num_classes": args.num_classes,
    "num_examples": args.num_examples,
    "price": args.price,
  }
  found = []
  for spec in args.config:
    if args.scale:
      found += plan.plan_scale(spec, args.topology, **options)
    else:
      options["dump_hlo"] = args.dump_hlo
      found.append(plan.plan(spec, args.topology, **options))
  if args.json:
    print(json.dumps(found if len(found) > 1 else found[0]))
  elif args.scale:
    print(report.format_table(found), report.LEFT_OUT, sep="\n\n")
  else:
    print(report.format_plans(found))


def _sweep(args):
  from vit_jax.training import early

  early.check_select(args.select)
  if not args.grid:  # else these are not yet the runs
    _load_checked(args.config, args.overrides)
  from vit_jax.tools import sweep

  options = {
    "overrides": args.overrides,
    "grid": sweep.parse_grids(args.grid),
    "seeds": args.seeds,
    "jobs": args.jobs,
    "select": args.select,
  }
  if args.final:
    result = sweep.select_and_train(
      args.config, args.final, args.workdir, **options
    )
    summaries = [summary for summary in result.values() if summary]
  else:
    result = sweep.sweep(args.config, args.workdir, **options)
    summaries = [result]
  if args.json:
    print(json.dumps(result))
  else:
    print("\n\n".join(map(sweep.format_summary, summaries)))
  for summary in summaries:
    sweep.raise_if_failed(summary["runs"])


def _vtab(args):
  from vit_jax.tools import sweep, vtab

  result = vtab.vtab(
    args.source,
    args.workdir,
    tasks=args.tasks,
    overrides=args.overrides,
    grid=sweep.parse_grids(args.grid),
    per_task=args.per_task,
    seeds=args.seeds,
    jobs=args.jobs,
  )
  print(json.dumps(result) if args.json else vtab.format_report(result))


def _evaluate(args):
  _connect(args)
  import jax

  from vit_jax.evaluation.evaluate import evaluate

  results = evaluate(
    args.workdir or args.checkpoint,
    dataset=args.dataset,
    split=args.split,
    data_dir=args.data_dir,
    batch_size=args.batch_size,
  )
  if jax.process_index():
    return
  if args.json:
    print(json.dumps(results))
    return
  width = max(map(len, results)) + 2
  for name, value in results.items():
    text = f"{value:.4f}" if isinstance(value, float) else value
    print(f"{name:{width}}{text}")


def _linear(args):
  from vit_jax.evaluation import linear

  shots = linear.parse_shots(args.shots)
  _connect(args)
  import jax

  found = linear.linear(
    args.checkpoint,
    args.dataset,
    train_split=args.train_split,
    test_split=args.test_split,
    shots=shots,
    seeds=args.seeds,
    l2=args.l2,
    image_size=args.image_size,
    preprocess=args.preprocess,
    data_dir=args.data_dir,
    batch_size=args.batch_size,
  )
  if not jax.process_index():
    print(json.dumps(found) if args.json else linear.format_report(found))


def _predict(args):
  from vit_jax.evaluation.predict import predict

  results = predict(args.checkpoint, args.images, args.top, args.class_names)
  if args.json:
    print(json.dumps(results))
    return _say_errors(results)
  for result in results:
    if "classes" in result:
      print(result["image"])
      for entry in result["classes"]:
        print(f"  {entry['probability']:7.2%}  {entry['name']}")
  return _say_errors(results)


def _say_errors(results):
  """Prints what of `predict` failed; returns the exit code."""
  errors = [result["error"] for result in results if "error" in result]
  for error in errors:
    print(f"error: {error}", file=sys.stderr)
  return 2 if errors else 0


def _demo(args):
  from vit_jax.tools.demo import demo

  demo(args.checkpoint, args.class_names, args.host, args.port, args.share)


def _inspect(args):
  from vit_jax.pretrained.inspect import format_report, inspect, list_published

  if args.source is None:
    print(list_published())
    return
  found = inspect(args.source)
  print(json.dumps(found) if args.json else format_report(found))


def _convert(args):
  from vit_jax.pretrained.convert import convert

  for note in convert(args.source, args.out, args.to):
    print(f"note: {note}")
  print(f"{args.out}: {args.source} as {args.to}")


def _export(args):
  from vit_jax.tools.export import export

  about = export(
    args.source,
    args.out,
    args.to,
    image_size=args.image_size,
    preprocess=args.preprocess,
  )
  shape = ", ".join(map(str, about["input"]["shape"]))
  print(
    f"{args.out}: {about['variant']} as {args.to}, "
    f"{about['bytes'] / 1e6:.1f} MB, images {about['input']['dtype']}[{shape}]"
  )


def _tables(args):
  from vit_jax.tools.paper import tables

  if args.only and (args.name is None or args.commands or args.markdown):
    raise UserError("--only=CELL takes the NAME of a table, and --json at most")
  if args.name is None:
    found = tables.list_tables()
    lines = [f"{table['name']}  {table['title']}" for table in found]
    print(json.dumps(found) if args.json else "\n".join(lines))
    return
  rows = tables.make_table(args.name, args.runs, costs=args.commands)
  if args.only:
    lines = tables.list_commands(rows, args.only)
    print(json.dumps(lines) if args.json else "\n".join(lines))
    return
  if args.json:
    print(json.dumps(rows))
    return
  print(
    tables.format_table(
      args.name, rows, markdown=args.markdown, commands=args.commands
    )
  )


def _figures(args):
  from vit_jax.tools.figures import make_figures

  written = make_figures(
    args.out,
    checkpoints=args.checkpoint,
    images=args.images,
    runs=args.runs,
    only=args.only.split(",") if args.only else (),
    image_size=args.image_size,
  )
  print("\n".join(written))


def _report(args):
  from vit_jax.tools.report import report

  file = report(args.workdirs, args.out, args.data_dir)
  print(f"{file}: {file.stat().st_size / 1e3:,.0f} kB")


def _data_list(args):
  from vit_jax.tools import datasets

  datasets.list_datasets(args.data_dir)


def _data_prepare(args):
  from vit_jax.tools import datasets

  datasets.prepare(args.name, args.data_dir)


def _data_build(args):
  from vit_jax.tools import datasets

  datasets.build(
    args.name,
    images=args.images,
    labels=args.labels,
    classes=args.classes,
    min_confidence=args.min_confidence,
    against=args.against,
    holdout=args.holdout,
    workers=args.workers,
    data_dir=args.data_dir,
  )


def _data_check(args):
  from vit_jax.tools import datasets

  datasets.check(args.name, args.split, args.data_dir, args.examples)


def _data_show(args):
  from vit_jax.tools import datasets

  datasets.show(
    args.name,
    args.split,
    preprocess=args.preprocess,
    image_size=args.image_size,
    output=args.output,
    seed=args.seed,
    data_dir=args.data_dir,
  )


def _bench_step(args):
  from vit_jax.tools.bench import step

  rows = step.bench(
    args.variant.split(","),
    beside=args.beside,
    image_size=args.image_size,
    batch_size=args.batch_size,
    num_classes=args.num_classes,
    steps=args.steps,
    dtype=args.dtype,
    remat=args.remat,
  )
  print(json.dumps(rows) if args.json else step.format_report(rows))
  if all("error" in row for row in rows if row["code"] == "vit_jax"):
    raise RunStopped("no step was measured")


def _bench_input(args):
  from vit_jax.tools.bench import input as input_bench

  found = input_bench.bench(
    args.dataset,
    args.split,
    args.data_dir,
    image_size=args.image_size,
    batch_size=args.batch_size,
    needs=args.needs,
  )
  print(json.dumps(found) if args.json else input_bench.format_report(found))


def _quickstart(args):
  from vit_jax.tools.quickstart import quickstart

  quickstart(args.workdir)


# The commands that take --config.key=value.
_OVERRIDDEN = (_train, _sweep, _vtab, _plan, _preflight)
# Those that compute nothing on a device; what they start has its own backend.
_WITHOUT_DEVICE = (
  *(_plan, _sweep, _vtab, _inspect, _convert, _tables, _bench_input),
  *(_data_list, _data_prepare, _data_build, _data_check, _data_show),
)


if __name__ == "__main__":
  sys.exit(main())
