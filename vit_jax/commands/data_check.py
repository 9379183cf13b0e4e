"""`vit-jax data check`: validate and describe a data set."""

from vit_jax.commands import flags, process
from vit_jax.errors import UserError


def add_flags(parser):
  flags.add_dataset_name(parser)
  flags.add_data_dir(parser)
  parser.add_argument("--split", help="default: every split")
  parser.add_argument(
    "--examples", type=int, default=1000, help="checked per split; 0: all"
  )


def run(args):
  process.use_cpu()
  from vit_jax import data
  from vit_jax.tools import datasets

  name = args.name
  if not name.startswith(data.BY_PATH):
    _print_needs(data.find_needs(name, args.data_dir))
  faults = []
  checked = datasets.check(name, args.split, args.data_dir, args.examples)
  for i, (source, summary) in enumerate(checked):
    if not i:
      _print_source(name, source)
    _print_summary(summary, source)
    faults += summary["faults"]
  for fault in faults:
    print(f"at fault: {fault}")
  if faults:
    raise UserError(f"{name}: {len(faults):,} examples are at fault, see above")


def _print_needs(needs):
  if needs.state == "ready":
    print(f"prepared in {needs.folder}")
    return
  print(f"not ready ({needs.state}): {needs.folder}")
  if needs.state == "to convert":
    return
  if needs.manual_folder is None:
    print("  `vit-jax data prepare` downloads or makes all of it")
    return
  print(f"  fetched by hand, into {needs.manual_folder}:")
  for file, there in needs.manual_files.items():
    print(f"    {file}  {'there' if there else 'missing'}")
  print(f"  instructions of TFDS: {needs.instructions}")


def _print_source(name, source):
  labels = f"up to {source.max_labels} labels" if source.multilabel else "1"
  names = source.class_names
  if not names:
    print(f"{name}: images without labels")
    return
  more = ", ..." if len(names) > 5 else ""
  print(
    f"{name}: {source.num_classes:,} classes ({', '.join(names[:5])}{more}), "
    f"labels per image: {labels}"
  )
  if getattr(source, "left_out", None):  # a folder's skipped files, by suffix
    print(f"  {source.describe_left_out()}")


def _print_summary(summary, source):
  print(
    f"  {summary['split']}: {summary['examples']:,} examples, "
    f"{summary['checked']:,} checked and valid\n"
    f"    height {_range(summary['height'])}, width "
    f"{_range(summary['width'])} pixels"
  )
  if names := source.class_names:
    counts = summary["label_counts"]
    rarest, commonest = int(counts.argmin()), int(counts.argmax())
    line = (
      f"{counts[rarest]:,} show {names[rarest]!r} (the fewest) and "
      f"{counts[commonest]:,} {names[commonest]!r} (the most)"
    )
    if counts[rarest] == counts[commonest]:
      line = f"{counts[rarest]:,} show each class"
    print(f"    of these, {line}")
  for trait, count in summary["traits"].most_common():
    print(f"    {count:,} {trait}")


def _range(pair):
  low, high = pair
  return str(low) if low == high else f"{low} to {high}"
