"""`vit-jax data list`: list data sets, built-in and prepared."""

from vit_jax.commands import flags, process


def add_flags(parser):
  flags.add_data_dir(parser)


def run(args):
  process.use_cpu()
  from vit_jax.data import benchmarks
  from vit_jax.tools import datasets

  found = datasets.list_datasets(args.data_dir)
  prepared = [row for row in found if row["splits"] is not None]
  print(f"prepared in {datasets.resolve(args.data_dir)}:")
  for row in prepared:
    splits = ", ".join(f"{k} {n:,}" for k, n in row["splits"].items())
    note = "" if row["format"] == "array_record" else f"  [{row['format']}]"
    print(f"  {row['name']}:{row['version']}  {splits}{note}")
  if not prepared:
    print("  nothing yet")
  for row in found[len(prepared) :]:
    how = "run `vit-jax data prepare"
    if row["name"] in benchmarks.BY_HAND:
      how = "by hand: see `vit-jax data check"
    print(f"built in: {row['name']}  ({how} {row['name']}`)")
  ready = {r["name"] for r in prepared if r["format"] == "array_record"}
  _print_tasks(ready)
  print("folders of images by class: folder:PATH")
  print("ObjectNet, as it was unpacked: objectnet:PATH/images")
  print("to download: any image data set of tensorflow.org/datasets/catalog")


def _print_tasks(ready):
  """Prints the tasks by group, with what they wait for."""
  from vit_jax import data
  from vit_jax.data import benchmarks

  for title, prefix, groups in (
    ("VTAB-1k", data.VTAB, benchmarks.GROUPS),
    ("mini-VTAB, without a download", data.MINI, benchmarks.GROUPS),
    ("other test sets of the paper", "", ("",)),
  ):
    names = list(data.list_tasks(prefix)) if prefix else benchmarks.list_plain()
    splits = ", ".join(names[0].splits)
    print(f"{title}{f' (splits {splits})' if splits else ''}:")
    for group in groups:
      for task in (t for t in names if t.group == group):
        print(f"  {group:13}{task.name:27} {_describe_state(task, ready)}")


def _describe_state(task, ready):
  from vit_jax.data import benchmarks, builders

  dataset = task.dataset.partition(":")[0]
  name = dataset.partition("/")[0]
  if dataset in ready:
    return "ready"
  if name in builders.names():
    return f"run `vit-jax data prepare {task.name}`"
  if name in benchmarks.BY_HAND:
    return f"by hand: see `vit-jax data check {task.name}`"
  return "to download"
