"""The `report` command: one self-contained HTML page about runs."""

import logging
import os
from collections.abc import Sequence
from typing import Any

from vit_jax import files
from vit_jax.errors import RunStopped, UserError, check_free
from vit_jax.tools import charts
from vit_jax.tools.report.details import evaluate
from vit_jax.tools.report.page import make_page
from vit_jax.tools.runs import MAIN_METRICS, Run, find_main, find_runs, order

log = logging.getLogger(__name__)

# Misclassified images shown of one run, and in total to bound the page's size.
_MISTAKES = 12
_ALL_MISTAKES = 40


def report(
  workdirs: Sequence[str], out: str, data_dir: str | None = None
) -> Any:
  """Writes a page on runs: curves, cost, configurations, mistakes.

  Args:
    workdirs: run folders, or folders with runs below them.
    out: the file to write.
    data_dir: where the TFDS data sets are now, if they have moved.

  Returns:
    The file.

  Raises:
    UserError: no run there, or `out` exists or cannot be written.
  """
  file = files.make_path(out)
  if not files.is_remote(file):
    file = file.expanduser().absolute()
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
      raise UserError(
        f"--out={out}: {file.parent} is not a writable folder; make it, or "
        "give another --out"
      )
  check_free(file)
  runs = find_runs(workdirs)
  if len(runs) > len(charts.DASHES):
    runs.sort(key=_rank)
  chosen = runs[: len(charts.DASHES)]
  mistakes = min(_MISTAKES, _ALL_MISTAKES // len(chosen))
  found = {}
  for i, run in enumerate(chosen, 1):
    log.info("test set of run %d of %d: %s", i, len(chosen), run.name)
    found[run.name] = evaluate(run, data_dir, mistakes)
  check_free(file)  # evaluating takes minutes
  # Paths and class names may be invalid Unicode.
  page = make_page(runs, found).encode("utf-8", errors="xmlcharrefreplace")
  try:
    files.write_atomically(file, page.decode())
  except OSError as e:
    raise RunStopped(f"could not write {out}: {e.strerror}") from e
  return file


def _rank(run: Run):
  """Returns a sort key: by metric, best first, runs without a result last."""
  last = {
    name.removeprefix("eval/"): points[-1][1]
    for name, points in run.series.items()
  }
  metric = find_main(last)
  if metric is None:
    return (len(MAIN_METRICS), 0.0)
  return (MAIN_METRICS.index(metric), order(metric, last[metric]))
