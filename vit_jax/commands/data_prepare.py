"""`vit-jax data prepare`: make, download or convert a data set."""

from vit_jax.commands import flags, process


def add_flags(parser):
  flags.add_dataset_name(parser)
  flags.add_data_dir(parser)


def run(args):
  process.use_cpu()
  from vit_jax import data

  folder = data.prepare(args.name, args.data_dir)
  print(f"{args.name} is ready in {folder}")
