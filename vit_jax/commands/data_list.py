"""`vit-jax data list`: list data sets, built-in and prepared."""

from vit_jax.commands import flags, process


def add_flags(parser):
  flags.add_data_dir(parser)


def run(args):
  process.use_cpu()
  from vit_jax.data import builders
  from vit_jax.data.preparation import find_data_dir
  from vit_jax.tools import datasets

  prepared = datasets.list_datasets(args.data_dir)
  print(f"prepared in {find_data_dir(args.data_dir)}:")
  for row in prepared:
    splits = ", ".join(f"{k} {n:,}" for k, n in row["splits"].items())
    note = "" if row["format"] == "array_record" else f"  [{row['format']}]"
    print(f"  {row['name']}:{row['version']}  {splits}{note}")
  if not prepared:
    print("  nothing yet")
  there = {row["name"].partition("/")[0] for row in prepared}
  for name in builders.names():
    if name not in there:
      print(f"built in: {name}  ({_describe_state(name, name, set())})")
  _print_tasks({r["name"] for r in prepared if r["format"] == "array_record"})
  print("folders of images by class: folder:PATH; without classes: images:PATH")
  print("images that a model has labelled: pseudo:PATH")
  print("ObjectNet, unpacked: objectnet:PATH/images")
  print("to download: any image data set of tensorflow.org/datasets/catalog")


def _print_tasks(ready):
  """Prints the tasks by group, with the state of their data."""
  from vit_jax import data
  from vit_jax.data import benchmarks

  for title, tasks in (
    ("VTAB-1k", data.list_tasks(data.VTAB)),
    ("mini-VTAB, without a download", data.list_tasks(data.MINI)),
    (
      "other test sets of the paper",
      [task for task in benchmarks.TASKS.values() if not task.group],
    ),
  ):
    splits = ", ".join(tasks[0].splits)
    print(f"{title}{f' (splits {splits})' if splits else ''}:")
    for task in tasks:
      state = _describe_state(task.name, task.dataset, ready)
      print(f"  {task.group:13}{task.name:27} {state}")


def _describe_state(name, dataset, ready):
  from vit_jax.data import benchmarks, builders

  dataset = dataset.partition(":")[0]
  builder = dataset.partition("/")[0]
  if dataset in ready:
    return "ready"
  if builder in benchmarks.BY_HAND:
    return f"by hand: see `vit-jax data check {name}`"
  if builder in builders.names():
    return f"run `vit-jax data prepare {name}`"
  return "to download"
