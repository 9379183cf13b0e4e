"""The numbers of the paper's tables, and what its names mean here.

`tables.json` has facts alone: nothing of this project's own results.
"""

import functools
import importlib.resources
import json
from typing import Any


@functools.cache
def load() -> dict[str, Any]:
  """Returns tables.json: "table1" to "table9", and what they speak of.

  "pretraining" has the sets to pre-train on, "measures" what the columns of
  the tables measure, "vtab" the 19 tasks by the names that Table 9 prints. The
  "values" of a row are {column: number or [mean, standard deviation]}.
  """
  file = importlib.resources.files("vit_jax.tools.paper") / "tables.json"
  found = json.loads(file.read_text(encoding="utf-8"))
  for name in ("table2", "table5", "table6", "table7", "table8", "table9"):
    columns = found[name]["columns"]
    for row in found[name]["rows"]:
      # A row may end before the last columns.
      row["values"] = dict(zip(columns, row["values"], strict=False))
  return found


def variant_of(name: str) -> str:
  """Returns our name of a model: "R50x1+ViT-L/16" -> "R50+ViT-L_16"."""
  name = name.replace("ResNet", "R").replace("R50x1+", "R50+")
  return name.replace("/", "_")
