"""Text tables for terminals."""

from collections.abc import Sequence


def format_columns(
  rows: Sequence[Sequence[str]], aligned: str = "<>"
) -> list[str]:
  """Returns rows as lines, each column as wide as its widest text.

  Args:
    rows: texts, as many in each row; the first row is the header.
    aligned: "<" or ">" for each column; the last one also for those after it.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  signs = aligned.ljust(len(widths), aligned[-1])
  cells = zip(signs, widths, strict=False)
  line = "  ".join(f"{{:{sign}{width}}}" for sign, width in cells)
  return [line.format(*row).rstrip() for row in rows]
