"""The `tables` command: the tables of the paper, beside our results.

The paper's numbers are in `paper/tables.json`. Ours are read from run folders;
sizes and FLOPs are computed from the models.
"""

import itertools
import logging
import re
import statistics
from typing import Any

from vit_jax.errors import UserError, check_choice
from vit_jax.models import variants
from vit_jax.tools.paper import cells, data, flops, loops, protocol
from vit_jax.tools.paper.cells import Cell
from vit_jax.tools.paper.protocol import Pretraining
from vit_jax.tools.runs import find_runs
from vit_jax.tools.text import format_columns

NAMES = tuple(f"table{i}" for i in range(1, 10))
# Columns of the tables without results.
_SIZES = ("layers", "hidden_size", "mlp_dim", "num_heads", "params_M")
_RATES = ("base_lr", "decay", "weight_decay", "dropout_rate", "clip_norm")
_FACTS = {
  "table1": (*_SIZES, "paper_params_M"),
  "table3": (*_RATES, "optimizer", "batch_size", "warmup_steps", "image_size"),
  "table4": (
    *("steps", "base_lrs", "held_out_percent", "optimizer", "batch_size"),
    *("weight_decay", "clip_norm", "decay", "image_size", "loss"),
  ),
}
_STAND_IN = "ImageNet-21k"  # for JFT-300M, which is private
_RUNS = "runs"  # default folder of new runs
log = logging.getLogger(__name__)


def list_tables() -> list[dict[str, str]]:
  """Returns [{"name", "title"}] of every table."""
  return [{"name": n, "title": data.load()[n]["title"]} for n in NAMES]


def make_table(name: str, runs: str | None = None) -> list[dict[str, Any]]:
  """Returns the rows of a table of the paper, with our results.

  Args:
    name: "table1" to "table9".
    runs: a folder with runs at any depth; None for none.

  Returns:
    [{"name", ...}]. Results (tables 2 and 5 to 9) have "pretraining", "epochs",
    "variant", "private", "note", "stand_in" (a row, if the pre-training set is
    private) and "cells": {column: {"paper", "paper_spread", "ours", "spread",
    "difference", "values", "runs", "differs", "commands", "images",
    "datasets"}}, in percent. Table 6 also has "exaflops" and "paper_exaflops".
    The others have hyper-parameters and, except for table 1, "runs".

  Raises:
    UserError: an unknown name, or a folder without runs.
  """
  check_choice("the table's name", name, NAMES)
  try:
    found = find_runs([runs]) if runs else []
  except UserError as e:
    raise UserError(
      f"{e}; without --runs the table has the paper's values only"
    ) from e
  folder = (runs or _RUNS).rstrip("/")
  rows = data.load()[name]["rows"]
  if name == "table1":
    return [_make_sizes(row) for row in rows]
  if name == "table3":
    return [r for row in rows for r in _list_pretrainings(row, found, folder)]
  if name == "table4":
    return [_make_transfer(row, found) for row in rows]
  made = [_make_row(name, row, found, folder) for row in rows]
  if found and not any(c.get("runs") for _, c in _list_cells(made)):
    log.info("%s has %d runs, but none for this table", runs, len(found))
  return made


# --- tables of facts ---


def _make_sizes(row):
  """Returns a row of Table 1: sizes and parameters, ours and the paper's."""
  encoder = variants.parse(row["variant"]).encoder
  assert encoder
  count = flops.count_parameters(row["variant"], row["num_classes"])
  return {
    "name": row["name"],
    "layers": encoder.num_layers,
    "hidden_size": encoder.hidden_size,
    "mlp_dim": encoder.mlp_dim,
    "num_heads": encoder.num_heads,
    "params_M": round(count / 1e6),
    **{f"paper_{key}": row[key] for key in _SIZES},
    "note": row["note"],
  }


def _list_pretrainings(row, runs, folder):
  """Yields rows of Table 3, one for each model and number of epochs."""
  for model, epochs in itertools.product(row["models"], row["epochs"]):
    wanted = _find_pretraining(row | {"name": model, "epochs": epochs})
    found = [run for run in runs if protocol.is_pretraining(run, wanted)]
    differs = (protocol.compare_pretraining(run, wanted) for run in found)
    yield {
      "name": model,
      "pretraining": row["pretraining"],
      "private": _find_set(row)["private"],
      "epochs": epochs,
      **{key: row[key] for key in _RATES},
      **data.load()["table3"]["common"],
      "runs": [str(run.path) for run in found],
      "differs": sorted({*itertools.chain.from_iterable(differs)}),
      **cells.plan_pretraining(wanted, folder)._asdict(),
    }


def _make_transfer(row, runs):
  """Returns a row of Table 4: hyper-parameters, and the fine-tuning runs."""
  dataset = data.load()["measures"][row["name"]].get("dataset")
  found = []
  for run in runs:
    name = run.config["train.dataset"]
    same = name == dataset if dataset else name.startswith("vtab:")
    if same and run.config["init_from"]:
      found.append(str(run.path))
  return {**row, **data.load()["table4"]["common"], "runs": found}


# --- tables of results ---


def _make_row(name, row, runs, folder):
  """Returns a row of a results table."""
  if row.get("loop"):
    return _make_loop(row, runs, folder)
  if row.get("reference"):
    values = {key: _show_paper(value) for key, value in row["values"].items()}
    return {"name": row["name"], "note": row["note"], "cells": values}
  made = _fill_row(name, row, runs, folder)
  if made["private"]:
    # The same model from the public set, beside the paper's values for it.
    known = _find_public(name, row)
    values = {column: known.get(column) for column in row["values"]}
    public = {"pretraining": _STAND_IN, "epochs": 90, "values": values}
    made["stand_in"] = _fill_row(name, row | public, runs, folder)
    made["stand_in"].pop("note", None)
  if name == "table6":
    made["exaflops"] = round(cells.count_exaflops(_find_pretraining(row)), 2)
    made["paper_exaflops"] = row["exaflops"]
  return made


def _make_loop(row, runs, folder):
  """Returns the row of a model that `vit-jax noisy-student` trains."""
  made = {}
  for column, paper in row["values"].items():
    dataset = data.load()["measures"][column]["dataset"]
    found = loops.measure(row["loop"], dataset, runs)
    made[column] = found._asdict() | _compare(found.values, paper)
    if not found.values:
      plan = loops.plan(row["loop"], dataset, runs, folder)
      made[column] |= plan._asdict()
  kept = {key: row[key] for key in ("name", "note", "tpuv3_core_days")}
  return {**kept, "private": True, "cells": made}


def _fill_row(name, row, runs, folder):
  """Returns a row with the results of its cells' runs."""
  made = {}
  for column, paper in row["values"].items():
    if column == "Average":  # the last one
      ours = [cell["ours"] for cell in made.values()]
      values = [] if None in ours else [statistics.fmean(ours)]
      differs = {x for cell in made.values() for x in cell["differs"]}
      made[column] = _compare(values, paper)
      made[column]["differs"] = sorted(differs) if values else []
      continue
    cell = _find_cell(name, row, column)
    found = cells.measure(cell, runs)
    made[column] = found._asdict() | _compare(found.values, paper)
    if len(found.values) < cell.seeds:
      made[column] |= cells.plan(cell, runs, folder)._asdict()
  optional = ("note", "tpuv3_core_days")
  return {
    "name": row["name"],
    "variant": _find_pretraining(row).variant,
    "pretraining": row["pretraining"],
    "epochs": row["epochs"],
    "private": _find_set(row)["private"],
    "cells": made,
    **{key: row[key] for key in optional if key in row},
  }


def _find_public(name, row):
  """Returns the paper's values of a model from ImageNet-21k, {} for none."""
  for table in (name, "table5"):
    for other in data.load()[table]["rows"]:
      same = other["name"] == row["name"]
      if same and other.get("pretraining") == _STAND_IN:
        return other["values"]
  return {}


def _find_set(row):
  return data.load()["pretraining"][row["pretraining"]]


def _find_pretraining(row, **overrides):
  return Pretraining(
    row.get("variant") or data.variant_of(row["name"]),
    _find_set(row)["dataset"],
    row["epochs"],
    tuple({**row.get("overrides", {}), **overrides}.items()),
  )


def _find_cell(name, row, column):
  """Returns the `Cell` of a row and a column of a results table."""
  table = data.load()[name]
  overrides = table.get("column_overrides", {}).get(column, {})
  pretraining = _find_pretraining(row, **overrides)
  if name == "table8":
    return Cell("linear", pretraining, "imagenet2012", image_size=224)
  tasks = data.load()["vtab"]["tasks"]
  if name == "table9" and column in tasks:
    kind, dataset = "vtab", f"vtab:{tasks[column]}"
  else:
    measure = data.load()["measures"][column]
    kind, dataset = measure["kind"], measure.get("dataset", "")
  # Table 4's image size, rounded down to whole patches.
  size = data.load()["table4"]["common"]["image_size"]
  sizes = variants.parse(pretraining.variant)
  size -= size % sizes.stride if sizes.encoder else 0
  averaged = "imagenet_size" in row and column.startswith("ImageNet")
  size = row["imagenet_size"] if averaged else size
  return Cell(kind, pretraining, dataset, size, averaged, table.get("seeds", 1))


def _show_paper(paper):
  mean, spread = paper if isinstance(paper, list) else (paper, None)
  return {"paper": mean, "paper_spread": spread}


def _compare(values, paper):
  """Returns our values beside the paper's mean or [mean, spread]."""
  ours = statistics.fmean(values) if values else None
  shown = _show_paper(paper)
  known = None not in (ours, shown["paper"])
  return {
    **shown,
    "ours": ours,
    "values": values,
    "spread": statistics.stdev(values) if len(values) > 1 else None,
    "difference": ours - shown["paper"] if known else None,
  }


# --- as text ---


def format_table(
  name: str,
  rows: list[dict[str, Any]],
  *,
  markdown: bool = False,
  commands: bool = False,
) -> str:
  """Returns a table as text; `commands` adds those that fill missing cells."""
  table = data.load()[name]
  made = _list_cells(rows)
  grid = _grid_facts(rows, _FACTS[name]) if name in _FACTS else _grid(rows)
  notes = [table["note"]] if "note" in table else []
  notes += [f"{_title(row)}: {row['note']}" for row in rows if "note" in row]
  differences = [
    f"! {title}: {'; '.join(found['differs'])}"
    for title, found in made
    if found.get("differs")
  ]
  private = any(row.get("private") for row in rows)
  star = ["* needs JFT-300M, which is private."] if private else []
  lines = [f"Table {name.removeprefix('table')}: {table['title']}"]
  for part in (_draw(grid, markdown), notes, differences, star):
    lines += ["", *part] if part else []
  if commands:
    lines.append("")
    for title, cell in made:
      if "commands" in cell:
        lines.append(f"{title}: {cell['images']:,} images")
        shown = [f"  {command}" for command in cell["commands"]]
        block = ["", "```sh", *cell["commands"], "```", ""]
        lines += block if markdown else shown
  return "\n".join(lines)


def _title(row):
  if row.get("pretraining") is None:
    return row["name"]
  star = "*" if row["private"] else ""
  return f"{row['name']}, {row['pretraining']}{star}, {row['epochs']} epochs"


def _grid_facts(rows, keys):
  """Returns a grid of hyper-parameters and numbers of runs."""
  lines = [["", *keys]]
  lines += [[_title(row), *(_show(row[key]) for key in keys)] for row in rows]
  if "runs" in rows[0]:
    lines[0].append("runs")
    for row, line in zip(rows, lines[1:], strict=True):
      line.append(f"{len(row['runs'])}{'!' if row.get('differs') else ''}")
  return lines


def _show(value):
  if isinstance(value, list):
    return " ".join(map(_show, value))
  return f"{value:g}" if isinstance(value, float) else str(value or 0)


def _grid(rows):
  """Returns a grid of the paper's values and ours, if there are any."""
  shown = []
  for row in rows:
    shown.append(row)
    stand_in = row.get("stand_in", {"cells": {}})
    if any(cell["ours"] is not None for cell in stand_in["cells"].values()):
      shown.append(stand_in)
  columns = list(dict.fromkeys(c for row in rows for c in row["cells"]))
  grid = [["", *columns]]
  grid += [
    [_title(row), *(_show_cell(row["cells"].get(c)) for c in columns)]
    for row in shown
  ]
  if "exaflops" in rows[0]:
    grid[0].append("exaFLOPs")
    for row, line in zip(shown, grid[1:], strict=True):
      cost = row.get("exaflops")
      line.append(f"{row['paper_exaflops']} | {cost:.1f}" if cost else "")
  return [*zip(*grid, strict=True)] if len(columns) > len(shown) else grid


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
  return text + ("!" if cell["differs"] else "")


def _show_value(value, spread):
  if value is None:
    return "-"
  return f"{value:.2f}" + (f" ±{spread:.2f}" if spread is not None else "")


def _draw(grid, markdown):
  """Returns a grid of texts as lines; its first row is the header."""
  if not markdown:
    return format_columns(grid, "<")
  escaped = [[text.replace("|", "/") for text in row] for row in grid]
  escaped.insert(1, ["---"] * len(grid[0]))
  return [f"| {' | '.join(row)} |" for row in escaped]


def _list_cells(rows):
  """Returns [(title, cell)]; of tables 1, 3 and 4, the rows are the cells."""
  found = []
  for row in rows:
    if "cells" not in row:
      found.append((_title(row), row))
      continue
    found += [(f"{_title(row)}; {c}", x) for c, x in row["cells"].items()]
    if other := row.get("stand_in"):
      end = f" (stands in for {row['pretraining']})"
      made = other["cells"].items()
      found += [(f"{_title(other)}; {column}{end}", x) for column, x in made]
  return found


def list_commands(rows: list[dict[str, Any]], only: str) -> list[str]:
  """Returns the commands that prepare the data of a cell and fill it.

  The first line is a comment with the number of training images.

  Args:
    rows: from `make_table`.
    only: the cell's title as in `format_table`, above the cell's commands,
      "ViT-B/16, ImageNet-21k, 90 epochs; CIFAR-100", or enough of its parts to
      be unique.

  Raises:
    UserError: no cell or several cells match, or no command fills the cell.
  """
  found = {}  # a stand-in may also have a row of its own
  for title, cell in _list_cells(rows):
    title = title.partition(" (stands in")[0].replace("*", "")
    found.setdefault(title, cell)
  wanted = _split_title(only)
  parts = {title: _split_title(title) for title in found}
  known = sorted({*itertools.chain.from_iterable(parts.values())})
  for part in sorted(wanted.difference(known)):
    check_choice("a part of --only", part, known)
  fits = [only] if only in found else []
  fits = fits or [title for title in found if parts[title] >= wanted]
  if len(fits) != 1:
    which = " | ".join(fits[:3]) + (" | ..." if len(fits) > 3 else "")
    raise UserError(
      f"--only={only} fits {len(fits)} cells"
      + (f": {which}; choose one" if fits else ", none has all these parts")
    )
  cell = found[fits[0]]
  if "commands" not in cell:
    raise UserError(f"--only={only}: no command fills this cell")
  count = f"# {cell['images']:,} training images"
  return [count, *cells.prepare(cell["datasets"]), *cell["commands"]]


def _split_title(title):
  return {part.strip() for part in re.split("[,;]", title.replace("*", ""))}
