"""Run folders as `train` leaves them, without having trained."""

import json
from pathlib import Path

from vit_jax import config as configuration

_CONFIGS = Path(__file__).parents[1] / "configs"


def load(spec, **overrides):
  """Returns the configuration configs/`spec`; a key's dots are written __."""
  given = {key.replace("__", "."): str(x) for key, x in overrides.items()}
  return configuration.to_dict(configuration.load(str(_CONFIGS / spec), given))


def write(path, config, lines, *, total_steps, unfinished="", **others):
  """Writes a run folder without checkpoints.

  Args:
    path: of the folder, which is new.
    config: its configuration, or as much as is read of it, as a dict.
    lines: of metrics.jsonl, as dicts.
    total_steps: of the whole run.
    unfinished: what metrics.jsonl has of a line that is being written.
    **others: what else is in config.json.

  Returns:
    path.
  """
  path.mkdir(parents=True)
  written = {"config": config, "total_steps": total_steps, **others}
  (path / "config.json").write_text(json.dumps(written))
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (path / "metrics.jsonl").write_text(text + unfinished)
  return path
