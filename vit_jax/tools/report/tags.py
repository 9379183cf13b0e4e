"""Pieces of HTML. Whatever comes from outside is escaped here."""

import base64
import html
from collections.abc import Iterable, Sequence

from vit_jax.tools.report.details import Picture


class Raw(str):
  """Text that is HTML already."""


def escape(x) -> Raw:
  """Returns text as HTML; what is HTML already stays."""
  return x if isinstance(x, Raw) else Raw(html.escape(str(x)))


def join(parts: Iterable[str], between: str = "\n") -> Raw:
  """Returns pieces of HTML or text, one after the other."""
  return Raw(between.join(map(escape, parts)))


def tag(name: str, *content, **attributes) -> Raw:
  """Returns an element; `class_` and `aria_label` are class and aria-label."""
  given = "".join(
    f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
    for key, value in attributes.items()
    if value is not None
  )
  return Raw(f"<{name}{given}>{join(content, '')}</{name}>")


def table(
  caption: str,
  head: Sequence,
  rows: Iterable[Sequence],
  class_: str | None = None,
) -> Raw:
  """Returns a table that scrolls by itself where it is too wide.

  Args:
    caption: what it shows.
    head: of each column.
    rows: text, HTML, or whole cells (`cell`); the first names the row.
    class_: for the style sheet.
  """
  top = [tag("th", x, scope="col") for x in head]
  body = [
    tag(
      "tr",
      tag("th", row[0], scope="row"),
      *(
        x if x.startswith("<td") else tag("td", x) for x in map(escape, row[1:])
      ),
    )
    for row in rows
  ]
  return tag(
    "div",
    tag(
      "table",
      tag("caption", tag("span", caption)),
      tag("thead", tag("tr", *top)),
      tag("tbody", join(body)),
      class_=class_,
    ),
    class_="scroll",
    role="group",
    aria_label=caption,
    tabindex=0,  # so that arrow keys can move it
  )


def transpose(head: Sequence, rows: Sequence[Sequence]):
  """Returns (head, rows) of a table with its columns as rows."""
  turned = list(zip(head, *rows, strict=True))
  return turned[0], turned[1:]


def bar(share: float, text: str) -> Raw:
  """Returns a cell with a share as text and as the length of a bar."""
  drawn = tag("span", class_="bar", style=f"--share:{share:.4f}")
  return tag("td", drawn, text, class_="bars")


def fold(summary: str, *content) -> Raw:
  """Returns what is shown on demand."""
  return tag("details", tag("summary", summary), *content)


def image(picture: Picture, alt: str) -> Raw:
  """Returns a picture that is part of the page."""
  height, width = picture.size
  content = base64.b64encode(picture.content).decode()
  return Raw(
    f'<img src="data:{picture.kind};base64,{content}" width="{width}" '
    f'height="{height}" alt="{html.escape(alt)}">'
  )


def percent(x: float) -> str:
  """Returns a share as percent with two decimals, as the tables have it."""
  return f"{x:.2%}".replace("%", "\u00a0%")
