"""The `tables` command: each table of the paper, beside what runs here give.

The paper's numbers are `paper/tables.json`; ours are read from run folders, or,
where they follow from the models, computed from these.
"""

import itertools
import logging
import re
import statistics
from typing import Any

from vit_jax.errors import UserError, check_choice, suggest
from vit_jax.models import variants
from vit_jax.tools.paper import cells, data, flops, protocol
from vit_jax.tools.paper.cells import Cell
from vit_jax.tools.paper.pretraining import Pretraining, is_pretraining
from vit_jax.tools.runs import Run, find_runs
from vit_jax.tools.text import format_columns

NAMES = tuple(f"table{i}" for i in range(1, 10))
_STAND_IN = "ImageNet-21k"  # for what only JFT-300M can give
log = logging.getLogger(__name__)

_RUNS = "runs"  # where commands put what there is not


def list_tables() -> list[dict[str, str]]:
  """Returns [{"name", "title"}] of every table."""
  return [{"name": n, "title": data.load()[n]["title"]} for n in NAMES]


def make_table(
  name: str, runs: str | None = None, costs: bool = False
) -> list[dict[str, Any]]:
  """Returns the rows of a table of the paper, beside ours.

  Args:
    name: "table1" to "table9".
    runs: a folder with runs at any depth; None for none.
    costs: whether to say what missing cells cost in exaFLOPs. Counting takes
      some seconds for each model.

  Returns:
    [{"name", ...}]. Of results (tables 2 and 5 to 9): "pretraining", "epochs",
    "variant", "private", "note", "stand_in" (a row, where the pre-training set
    is private) and "cells": {column: {"paper", "paper_spread", "ours",
    "spread", "difference", "values", "runs", "differs", "recipes",
    "commands", "images", "exaflops", "datasets"}}, in percent. Table 6 also
    has "exaflops" and "paper_exaflops", table 1 "parameters", tables 3 and 4
    hyper-parameters and "runs".

  Raises:
    UserError: an unknown name, or a folder without runs.
  """
  check_choice("the table's name", name, NAMES)
  found = find_runs([runs]) if runs else []
  folder = (runs or _RUNS).rstrip("/")
  table = data.load()[name]
  if name == "table1":
    return [_make_sizes(row) for row in table["rows"]]
  if name == "table3":
    return [
      row for r in table["rows"] for row in _list_pretrainings(r, found, folder)
    ]
  if name == "table4":
    return [_make_transfer(row, found) for row in table["rows"]]
  rows = [_make_row(name, row, found, folder, costs) for row in table["rows"]]
  if name == "table6":
    rows = [_add_exaflops(*both) for both in zip(rows, table["rows"])]  # noqa: B905
  shown = [*rows, *(row["stand_in"] for row in rows if row.get("stand_in"))]
  if found and not any(c.get("runs") for row in shown for c in _all(row)):
    log.info("%s has %d runs, none of a cell of this table", runs, len(found))
  return rows


# --- tables of facts ---


def _make_sizes(row):
  """Table 1: the sizes as the paper has them, and the parameters we count."""
  encoder = variants.parse(row["variant"]).encoder
  assert encoder
  size = row["name"].removeprefix("ViT-")[0]
  counts = {
    f"ViT-{size}_{patch}": flops.count_parameters(
      f"ViT-{size}_{patch}", 224, 1000
    )
    for patch in row["patches"]
  }
  count = flops.count_parameters(row["variant"], 224, row["num_classes"])
  return {
    "name": row["name"],
    "layers": encoder.num_layers,
    "hidden_size": encoder.hidden_size,
    "mlp_dim": encoder.mlp_dim,
    "num_heads": encoder.num_heads,
    "params_M": round(count / 1e6),
    "paper": {k: row[k] for k in _SIZES},
    "parameters_with_1000_classes": counts,
    "note": row["note"],
  }


_SIZES = ("layers", "hidden_size", "mlp_dim", "num_heads", "params_M")


def _list_pretrainings(row, runs, folder):
  """Table 3: a row for each model and number of epochs."""
  known = data.load()["pretraining"][row["pretraining"]]
  for model in row["models"]:
    for epochs in row["epochs"]:
      wanted = Pretraining(data.variant_of(model), known["dataset"], epochs)
      plan = cells.plan_pretraining(wanted, folder, costs=False)
      found = [run for run in runs if is_pretraining(run, wanted)]
      differs = (protocol.compare_pretraining(run, wanted) for run in found)
      yield {
        "name": model,
        "pretraining": row["pretraining"],
        "private": known["private"],
        "epochs": epochs,
        **{k: row[k] for k in _HYPERPARAMETERS},
        **data.load()["table3"]["common"],
        "runs": [str(run.path) for run in found],
        "differs": sorted({*itertools.chain.from_iterable(differs)}),
        "commands": list(plan.commands),
        "datasets": list(plan.datasets),
        "images": plan.images,
      }


_HYPERPARAMETERS = (
  "base_lr",
  "decay",
  "weight_decay",
  "dropout_rate",
  "clip_norm",
)


def _make_transfer(row, runs):
  """Table 4: the hyper-parameters, and which runs have been fine-tuned."""
  measure = data.load()["measures"][row["name"]]
  is_vtab = measure["kind"] == "vtab_mean"
  spec = "vtab.py:VARIANT,TASK"
  if not is_vtab:
    spec = f"finetune.py:VARIANT,{measure['dataset']}"
  return {
    **row,
    **data.load()["table4"]["common"],
    "config": f"configs/{spec}",
    "runs": [
      str(run.path)
      for run in runs
      if run.config["init_from"]
      and (
        run.config["train.dataset"].startswith("vtab:")
        if is_vtab
        else run.config["train.dataset"] == measure["dataset"]
      )
    ],
  }


# --- tables of results ---


def _make_row(name, row, runs, folder, costs):
  """Returns a row of a results table."""
  if row.get("reference"):
    values = {
      column: _show_paper(paper) for column, paper in row["values"].items()
    }
    return {"name": row["name"], "note": row["note"], "cells": values}
  variant = row.get("variant") or data.variant_of(row["name"])
  known = data.load()["pretraining"][row["pretraining"]]
  made = {
    "name": row["name"],
    "variant": variant,
    "pretraining": row["pretraining"],
    "epochs": row["epochs"],
    "private": known["private"],
    "cells": _make_cells(name, row, known, runs, folder, costs),
  }
  if known["private"]:
    made["stand_in"] = _make_stand_in(name, row, variant, runs, folder, costs)
  optional = ("note", "tpuv3_core_days")
  return made | {key: row[key] for key in optional if key in row}


def _make_stand_in(name, row, variant, runs, folder, costs):
  """Returns the same row from the public set, beside Table 5's values."""
  known = data.load()["pretraining"][_STAND_IN]
  epochs = 90
  values = dict.fromkeys(row["values"])
  if name in ("table2", "table5", "table6", "table9"):
    values |= {k: x for k, x in _find_public(name, row).items() if k in values}
  public = row | {"pretraining": _STAND_IN, "epochs": epochs, "values": values}
  return {
    "name": row["name"],
    "variant": variant,
    "pretraining": _STAND_IN,
    "epochs": epochs,
    "private": False,
    "cells": _make_cells(name, public, known, runs, folder, costs),
  }


def _find_public(name, row):
  """Returns the paper's values of a model from ImageNet-21k, {} for none."""
  for table in (name, "table5"):
    for other in data.load()[table]["rows"]:
      same = other["name"] == row["name"]
      if same and other.get("pretraining") == _STAND_IN:
        return other["values"]
  return {}


def _make_cells(name, row, known, runs, folder, costs):
  """Returns {column: cell} of a row."""
  made = {}
  for column, paper in row["values"].items():
    if column != "Average":
      cell = _find_cell(name, row, column, known)
      made[column] = _fill(cell, paper, runs, folder, costs)
  if "Average" in row["values"]:
    made["Average"] = _average(made, row["values"]["Average"])
  return made


def _find_cell(name, row, column, known):
  """Returns what a cell of a results table measures."""
  overrides = dict(row.get("overrides", {}))
  table = data.load()[name]
  overrides |= table.get("columns", {}).get(column, {})
  pretraining = Pretraining(
    row.get("variant") or data.variant_of(row["name"]),
    known["dataset"],
    row["epochs"],
    tuple(overrides.items()),
  )
  seeds = table.get("seeds", 1)
  size = _whole_patches(pretraining.variant)
  if name == "table8":
    return Cell("linear", pretraining, "imagenet2012", image_size=224)
  if name == "table9" and column in data.load()["vtab"]["tasks"]:
    task = data.load()["vtab"]["tasks"][column]
    return Cell("vtab", pretraining, f"vtab:{task}", size, seeds=seeds)
  measure = data.load()["measures"][column]
  dataset = measure.get("dataset", "")
  cell = Cell(measure["kind"], pretraining, dataset, size, seeds=seeds)
  if "imagenet_size" in row and column.startswith("ImageNet"):
    cell = cell._replace(image_size=row["imagenet_size"], averaged=True)
  return cell


def _whole_patches(variant):
  """Returns Table 4's image size, without the pixels that fill no patch."""
  size = data.load()["table4"]["common"]["image_size"]
  sizes = variants.parse(variant)
  return size // sizes.stride * sizes.stride if sizes.encoder else size


def _show_paper(paper):
  mean, spread = paper if isinstance(paper, list) else (paper, None)
  return {"paper": mean, "paper_spread": spread}


def _fill(cell: Cell, paper, runs: list[Run], folder: str, costs: bool):
  """Returns a cell as JSON has it."""
  made = _show_paper(paper)
  found = cells.measure(cell, runs)
  made |= _summarize(found.values, made["paper"])
  made |= {
    "values": list(found.values),
    "runs": list(found.paths),
    "differs": list(found.differs),
    "recipes": list(found.recipes),
    "other_runs": found.others,
  }
  if len(found.values) < cell.seeds:
    plan = cells.plan(cell, runs, folder, costs)
    made |= plan._asdict() | {"commands": list(plan.commands)}
  return made


def _summarize(values, paper):
  ours = statistics.fmean(values) if values else None
  difference = None
  if ours is not None and paper is not None:
    difference = ours - paper
  return {
    "ours": ours,
    "spread": statistics.stdev(values) if len(values) > 1 else None,
    "difference": difference,
  }


def _average(made, paper):
  """Returns the mean of a row's cells, where all of them are there."""
  ours = [cell["ours"] for cell in made.values()]
  values = [] if None in ours else [statistics.fmean(ours)]
  differs = sorted({x for cell in made.values() for x in cell["differs"]})
  average = _show_paper(paper) | _summarize(values, paper)
  return average | {"differs": differs if values else []}


def _add_exaflops(made, row):
  """Adds to a row of Table 6 what its pre-training costs, computed here."""
  known = data.load()["pretraining"][row["pretraining"]]
  wanted = Pretraining(made["variant"], known["dataset"], row["epochs"])
  exaflops = cells.pretraining_exaflops(wanted)
  return made | {
    "exaflops": round(exaflops, 2),
    "paper_exaflops": row["exaflops"],
    "exaflops_difference": round(exaflops / row["exaflops"] - 1, 4),
  }


# --- for people ---


def format_table(
  name: str,
  rows: list[dict[str, Any]],
  *,
  markdown: bool = False,
  commands: bool = False,
) -> str:
  """Returns a table as text; `commands` adds what fills the missing cells."""
  grid = {"table1": _grid_sizes, "table3": _grid_facts, "table4": _grid_facts}
  lines = _draw(grid.get(name, _grid_results)(rows), markdown)
  notes = [f"{_title(row)}: {row['note']}" for row in rows if row.get("note")]
  note = data.load()[name].get("note")
  lines += ["", *([note] if note else []), *notes] if note or notes else []
  lines += _list_differences(rows)
  if any(row.get("private") for row in rows):
    lines += ["", "* needs JFT-300M, which is private."]
  if commands:
    lines.append("")
    for title, cell in _list_cells(rows):
      lines += _show_plan(title, cell, markdown)
  number = name.removeprefix("table")
  return "\n".join(
    [f"Table {number}: {data.load()[name]['title']}", "", *lines]
  )


def _title(row):
  parts = [row.get("pretraining"), row.get("epochs")]
  if parts[0] is None:
    return row["name"]
  star = "*" if row.get("private") else ""
  epochs = f", {parts[1]} epochs" if parts[1] else ""
  return f"{row['name']}, {parts[0]}{star}{epochs}"


def _grid_sizes(rows):
  header = ["model", "layers", "hidden", "MLP", "heads", "params", "the paper"]
  lines = [
    [
      row["name"],
      *(str(row[key]) for key in _SIZES[:4]),
      *(f"{x['params_M']} M" for x in (row, row["paper"])),
    ]
    for row in rows
  ]
  return [header, *lines]


def _grid_facts(rows):
  """Tables 3 and 4: hyper-parameters, and how many runs there are."""
  skip = {"name", "private", "commands", "images", "runs", "pretraining"}
  skip |= {"datasets", "epochs", "b1", "b2", "momentum", "config", "differs"}
  keys = [key for key in rows[0] if key not in skip]
  lines = [
    [
      _title(row),
      *(_show(row[key]) for key in keys),
      str(len(row["runs"])) + ("!" if row.get("differs") else ""),
    ]
    for row in rows
  ]
  return [["", *keys, "runs"], *lines]


def _show(value):
  if isinstance(value, list):
    return " ".join(map(_show, value))
  return f"{value:g}" if isinstance(value, float) else str(value or 0)


def _grid_results(rows):
  """Each cell has the paper's value, then ours where there is one."""
  lines = []
  for row in rows:
    lines.append(row)
    stand_in = row.get("stand_in")
    if stand_in and any(c["ours"] is not None for c in _all(stand_in)):
      lines.append(stand_in)
  columns = list(dict.fromkeys(c for row in rows for c in row["cells"]))
  header = ["", *columns]
  grid = [
    [_title(row), *(_show_cell(row["cells"].get(c)) for c in columns)]
    for row in lines
  ]
  if "exaflops" in rows[0]:
    header.append("exaFLOPs")
    for row, line in zip(lines, grid):  # noqa: B905
      cost = row.get("exaflops")
      text = f"{row['paper_exaflops']} | {cost:.1f}" if cost else ""
      line.append(text)
  grid = [header, *grid]
  if len(columns) > len(lines):
    grid = [list(column) for column in zip(*grid)]  # noqa: B905
  return grid


def _all(row):
  return row["cells"].values()


def _show_cell(cell):
  """Returns "88.55 ±0.04 | 88.31 ±0.05 (-0.24)"."""
  if cell is None:
    return ""
  text = _show_value(cell["paper"], cell["paper_spread"])
  if cell.get("ours") is None:
    return text
  text += f" | {_show_value(cell['ours'], cell['spread'])}"
  if cell["difference"] is not None:
    text += f" ({cell['difference']:+.2f})"
  return text + ("!" if cell.get("differs") else "")


def _show_value(value, spread):
  if value is None:
    return "-"
  return f"{value:.2f}" + (f" ±{spread:.2f}" if spread is not None else "")


def _draw(grid, markdown):
  """Returns the lines of a grid of texts, its first one the header."""
  if markdown:
    escaped = [[text.replace("|", "/") for text in row] for row in grid]
    rule = ["---"] * len(grid[0])
    return [
      f"| {' | '.join(row)} |" for row in (escaped[0], rule, *escaped[1:])
    ]
  return format_columns(grid, "<")


def _list_differences(rows):
  """Returns what is behind each exclamation mark."""
  lines = [
    f"! {title}: {'; '.join(found['differs'])}"
    for title, found in _list_cells(rows)
    if found.get("differs")
  ]
  return ["", *lines] if lines else []


def list_commands(rows: list[dict[str, Any]], only: str) -> list[str]:
  """Returns all that fills one cell, the preparation of its data included.

  Args:
    rows: from `make_table`.
    only: the cell's title as `format_table` has it above a cell's commands,
      "ViT-B/16, ImageNet-21k, 90 epochs; CIFAR-100", or as many of its parts
      as no other cell has.

  Raises:
    UserError: no cell or several, or one that no command fills.
  """
  found = {}  # a stand-in may have a row of its own, which is the same
  for title, cell in _list_cells(rows):
    title = title.partition(" (stands in")[0].replace("*", "")
    found.setdefault(title, cell)
  wanted = _split_title(only)
  fits = [only] if only in found else []
  fits = fits or [title for title in found if _split_title(title) >= wanted]
  if len(fits) != 1:
    which = " | ".join(fits[:3]) + (" | ..." if len(fits) > 3 else "")
    raise UserError(
      f"--only={only} fits {len(fits)} cells"
      + (f": {which}; say which" if fits else suggest(only, found))
    )
  cell = found[fits[0]]
  if "commands" not in cell:
    raise UserError(
      f"--only={only}: no command fills this cell"
      + (", your runs do" if cell.get("values") else "")
    )
  return [*cells.prepare(cell["datasets"]), *cell["commands"]]


def _split_title(title):
  return {part.strip() for part in re.split("[,;]", title.replace("*", ""))}


def _list_cells(rows):
  """Returns [(title, cell)], stand-ins last; of tables 1, 3 and 4 the rows."""
  found = []
  for row in rows:
    if "cells" not in row:
      found.append((_title(row), row))
      continue
    for made in (row, row.get("stand_in")):
      for column, cell in made["cells"].items() if made else ():
        title = f"{_title(made)}; {column}"
        if made is not row:
          title += f" (stands in for {row['pretraining']})"
        found.append((title, cell))
  return found


def _show_plan(title, plan, markdown):
  if not plan.get("commands"):
    return []
  cost = f"{plan['images']:,} images"
  if plan.get("exaflops") is not None:
    cost += f", {plan['exaflops']:,.4g} exaFLOPs"
  commands = [f"  {command}" for command in plan["commands"]]
  if markdown:
    return [f"{title}: {cost}", "", "```sh", *plan["commands"], "```", ""]
  return [f"{title}: {cost}", *commands]
