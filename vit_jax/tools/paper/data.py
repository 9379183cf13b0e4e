"""The numbers in the paper's tables, and our names for its models and sets.

`tables.json` has no results of this project.
"""

import functools
import json
from pathlib import Path
from typing import Any


@functools.cache
def load() -> dict[str, Any]:
  """Returns tables.json: "table1" to "table9", and the meaning of their names.

  "pretraining" has the pre-training sets, "measures" the meaning of the tables'
  columns, "vtab" the 19 tasks by their names in Table 9. The "values" of a row
  are {column: number or [mean, standard deviation]}.
  """
  file = Path(__file__).with_name("tables.json")
  found = json.loads(file.read_text(encoding="utf-8"))
  for table in found.values():
    for row in table["rows"] if "columns" in table else ():
      # Rows may lack the last columns.
      row["values"] = dict(zip(table["columns"], row["values"], strict=False))
  return found


def find_set(dataset: str) -> dict[str, Any]:
  """Returns the entry of a pre-training set, {} for another set."""
  sets = load()["pretraining"].values()
  return next((known for known in sets if known["dataset"] == dataset), {})


def variant_of(name: str) -> str:
  """Returns our name of a model: "R50x1+ViT-L/16" -> "R50+ViT-L_16"."""
  name = name.replace("ResNet", "R").replace("R50x1+", "R50+")
  return name.replace("/", "_")
