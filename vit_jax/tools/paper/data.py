"""The numbers of the paper's tables, and what its names mean here.

`tables.json` has facts alone: nothing of this project's own results.
"""

import functools
import json
from pathlib import Path
from typing import Any


@functools.cache
def load() -> dict[str, Any]:
  """Returns tables.json: "table1" to "table9", and what they speak of.

  "pretraining" has the sets to pre-train on, "measures" what the columns of
  the tables measure, "vtab" the 19 tasks by the names that Table 9 prints. The
  "values" of a row are {column: number or [mean, standard deviation]}.
  """
  file = Path(__file__).with_name("tables.json")
  found = json.loads(file.read_text(encoding="utf-8"))
  for table in found.values():
    for row in table["rows"] if "columns" in table else ():
      # A row may end before the last columns.
      row["values"] = dict(zip(table["columns"], row["values"], strict=False))
  return found


def find_set(dataset: str) -> dict[str, Any]:
  """Returns what is known of a set to pre-train on, {} of another set."""
  sets = load()["pretraining"].values()
  return next((known for known in sets if known["dataset"] == dataset), {})


def variant_of(name: str) -> str:
  """Returns our name of a model: "R50x1+ViT-L/16" -> "R50+ViT-L_16"."""
  name = name.replace("ResNet", "R").replace("R50x1+", "R50+")
  return name.replace("/", "_")
