"""`vit-jax tables`: print the paper's tables beside your runs."""

import json

from vit_jax.commands import flags, process
from vit_jax.errors import UserError


def add_flags(parser):
  parser.add_argument(
    "name",
    nargs="?",
    metavar="NAME",
    help="table1 to table9; omit it to list them",
  )
  parser.add_argument("--runs", metavar="DIR", help="a folder with runs")
  how = parser.add_mutually_exclusive_group()
  flags.add_json(how)
  how.add_argument("--markdown", action="store_true", help="print Markdown")
  parser.add_argument(
    "--commands",
    action="store_true",
    help="print the commands that fill missing cells",
  )
  parser.add_argument(
    "--only",
    metavar="CELL",
    help="print all commands for one missing cell, including its data, such as "
    "'ViT-B/16, ImageNet-21k, 90 epochs; CIFAR-100' or an unambiguous part",
  )


def run(args):
  process.use_cpu()
  from vit_jax.tools.paper import tables

  if args.only and args.name is None:
    raise UserError("--only=CELL needs a table's NAME, such as table5")
  if args.only and (args.commands or args.markdown):
    raise UserError(
      "--only=CELL already prints commands; omit --commands and --markdown"
    )
  if args.name is None:
    found = tables.list_tables()
    lines = [f"{table['name']}  {table['title']}" for table in found]
    print(json.dumps(found) if args.json else "\n".join(lines))
    return
  rows = tables.make_table(args.name, args.runs)
  if args.only:
    lines = tables.list_commands(rows, args.only)
    print(json.dumps(lines) if args.json else "\n".join(lines))
    return
  if args.json:
    print(json.dumps(rows))
    return
  options = {"markdown": args.markdown, "commands": args.commands}
  print(tables.format_table(args.name, rows, **options))
