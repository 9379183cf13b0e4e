"""What the code knows by itself, as Markdown; a Sphinx extension.

A page asks for it with a line of its own, `<!-- generated: NAME -->`; NAME
is one of `GENERATED`. The text is made anew whenever the site is built, so
that it says what the code says.
"""

import argparse
import ast
import io
import os
import re
import textwrap
import tokenize
from pathlib import Path

from vit_jax import __main__ as cli
from vit_jax import config
from vit_jax.pretrained.names import PUBLISHED

REPO = Path(__file__).parents[1]
PUBLIC = "https://github.com/vit-jax/vit_jax/blob/main"
COMMON = REPO / "configs" / "common.py"
_MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
_WIDTH = "80"  # columns of a usage line


def setup(app):
  app.connect("source-read", _fill_page)
  # Before napoleon, which turns sections into markup.
  app.connect("autodoc-process-docstring", _protect, priority=100)
  # A page that has not changed may still say something else than before.
  app.connect("env-get-outdated", _list_filled)
  return {"parallel_read_safe": True}


def _fill_page(app, name, source):
  source[0] = point_out(fill(source[0]))


def _list_filled(app, env, *_):
  return [
    name
    for name in env.found_docs
    if _MARK.search(Path(env.doc2path(name)).read_text(encoding="utf-8"))
  ]


def _protect(app, what, name, thing, options, lines):
  """Has a docstring's text shown as it is: it was not written as markup."""
  out = []
  for line in lines:
    begins = line.startswith("  ") and out and not out[-1].strip()
    before = next((x for x in reversed(out) if x.strip()), "")
    if begins and not before.startswith(" ") and not before.endswith(":"):
      out += ["::", ""]  # what is indented by itself is code
    out.append(line)
  code = False
  for i, line in enumerate(out):
    code = line == "::" or (code and (not line or line.startswith(" ")))
    if not code:
      out[i] = _outside_code(r"([*|])", line)
  lines[:] = out


def fill(text: str) -> str:
  """Returns a page with its generated parts in their places."""
  return _MARK.sub(lambda match: GENERATED[match[1]](), text)


def point_out(text: str) -> str:
  """Lets what is not of the site lead to the repository.

  That is links to its files, and the names of tests, which read as sentences.
  """
  text = re.sub(r"\]\(\.\./", f"]({PUBLIC}/", text)
  return re.sub(r"`(tests/[\w/]+\.py)(?:::test_(\w+))?`", _link_test, text)


def _link_test(found):
  file, test = found.groups()
  name = test.replace("_", " ") if test else f"`{file}`"
  return f"[{name}]({PUBLIC}/{file})"


# --- the commands ---


def make_commands() -> str:
  """Returns a section for each command, from the command line's own parser."""
  os.environ["COLUMNS"] = _WIDTH
  return "\n".join(
    _format_command(parser) for parser in list_parsers(cli.make_parser())
  )


def list_parsers(parser) -> list[argparse.ArgumentParser]:
  """Returns the parsers of the commands, those of `data` one by one."""
  children = [
    child
    for action in parser._actions
    if isinstance(action, argparse._SubParsersAction)
    for child in action.choices.values()
  ]
  if not children:
    return [parser]
  return [leaf for child in children for leaf in list_parsers(child)]


def _format_command(parser) -> str:
  usage = parser.format_usage().removeprefix("usage: ").strip()
  _, text = cli.COMMANDS[parser.prog.removeprefix("vit-jax ")]
  lines = [f"## {parser.prog}", "", f"{_upper(text)}.", ""]
  lines += ["```text", _align(usage), "```", ""]
  rows = [
    (_name_option(action), _explain(action))
    for action in parser._actions
    if not isinstance(action, argparse._HelpAction)
  ]
  if parser.get_default("overrides") is not None:
    rows.append(("`--config.KEY=VALUE`", "sets [a key](config.md)"))
  lines += _format_table(("argument", "meaning"), rows)
  lines += [
    f"*{_upper(group.title or '')}.* {group.description}\n"
    for group in parser._action_groups
    if group.description
  ]
  return "\n".join(lines)


def _align(usage):
  first, *rest = [line.strip() for line in usage.splitlines()]
  return "\n".join([first, *(f"    {line}" for line in rest)])


def _name_option(action) -> str:
  if not action.option_strings:
    return f"`{action.metavar or action.dest}`"
  value = ""
  if action.nargs != 0:
    value = f"={action.metavar or action.dest.upper()}"
  return ", ".join(f"`{option}{value}`" for option in action.option_strings)


def _explain(action) -> str:
  text = action.help or ""
  if action.required and action.option_strings:
    text = f"{text}; required".removeprefix("; ")
  return _escape(text)


# --- the configuration keys ---


def make_keys() -> str:
  """Returns a table of keys for each part of configs/common.py.

  A key's description is the comment on its line, and the comment above the
  first line of its group.
  """
  defaults = config.load(str(COMMON))
  kinds = config.flatten(defaults)
  parts, rows = [], []
  for title, key, description in read_keys(COMMON.read_text(encoding="utf-8")):
    if title is not None:
      parts += [*_format_keys(rows), f"## {_upper(title)}", ""]
      rows = []
      continue
    if key not in kinds:  # a group, not a value
      continue
    *parents, name = key.split(".")
    node = defaults
    for parent in parents:
      node = node[parent]
    kind = node.get_type(name).__name__
    kind = {"object": "int or (int, int)"}.get(kind, kind)
    default = "unset" if kinds[key] is None else _show(kinds[key])
    rows.append((f"`{key}`", kind, default, _escape(description)))
  return "\n".join([*parts, *_format_keys(rows)])


def _show(value):
  text = f"{value:g}" if isinstance(value, float) else repr(value)
  return _keep_pipes(f"`{text}`")


def _format_keys(rows):
  return _format_table(("key", "type", "default", "meaning"), rows)


def read_keys(source: str) -> list[tuple]:
  """Returns what get_config sets, in its order.

  Args:
    source: of configs/common.py.

  Returns:
    [(title, None, None)] for a line like `# --- data ---`, and (None, key,
    description) for an assignment to `config.KEY`.
  """
  comments = {
    token.start[0]: token.string.lstrip("# ").strip()
    for token in tokenize.generate_tokens(io.StringIO(source).readline)
    if token.type == tokenize.COMMENT
  }
  assigned = _find_assignments(source)
  found, above, last = [], [], 0
  for line in sorted(comments.keys() | assigned.keys()):
    text = comments.get(line, "")
    if line in assigned:
      words = [*above, text] if above else [text]
      found.append((None, assigned[line], _join(words)))
      above = []
    elif title := re.fullmatch(r"-+ (.+) -+", text):
      found.append((title[1], None, None))
      above = []
    else:
      above = [*above, text] if line == last + 1 and above else [text]
    last = line
  return found


def _find_assignments(source):
  """Returns {line: key} of the assignments to `config.KEY`."""
  found = {}
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Assign):
      target = ast.unparse(node.targets[0])
      if target.startswith("config."):
        found[node.lineno] = target.removeprefix("config.")
  return found


def _join(words):
  """Joins lines; what stands beside a key ends what stands above it."""
  text = " ".join(filter(None, words))
  return text[:1].upper() + text[1:]


# --- the configuration files ---


def make_config_files() -> str:
  """Returns a table of configs/, and each file's docstring below it."""
  texts = {
    path.name: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    for path in sorted((REPO / "configs").glob("*.py"))
  }
  rows = [
    (f"[{name}](#{_anchor(name)})", _escape(_first_sentence(text)))
    for name, text in texts.items()
  ]
  lines = _format_table(("file", "what it is"), rows)
  for name, text in texts.items():
    lines += [f"## {name}", "", _as_markdown(text), ""]
  return "\n".join(lines)


def _first_sentence(text):
  return " ".join(text.split("\n\n")[0].split())


def _anchor(title):
  """Returns the anchor that GitHub and MyST give a title."""
  kept = re.sub(r"[^\w\- ]", "", title.lower())
  return kept.replace(" ", "-")


def _as_markdown(text):
  """Turns what is indented into blocks: of commands, if it has one."""
  parts = []
  for part in text.split("\n\n"):
    if part.startswith("  "):
      language = "sh" if "  vit-jax " in part else "text"
      parts.append(f"```{language}\n{textwrap.dedent(part)}\n```")
    else:
      parts.append(part)
  return "\n\n".join(parts)


# --- the published names ---

# Heading -> which addresses; the first that fits counts.
_FAMILIES = (
  ("The paper, ImageNet-21k", "vit_models/imagenet21k/"),
  (
    "The paper, fine-tuned on ImageNet",
    "vit_models/imagenet21k+imagenet2012/",
  ),
  ("AugReg, fine-tuned on ImageNet", "--imagenet2012"),
  ("AugReg, ImageNet-21k", "vit_models/augreg/"),
  ("Sharpness-aware minimisation, ImageNet", "vit_models/sam/"),
  ("Surrogate-gap minimisation, ImageNet", "vit_models/gsam/"),
  ("big_vision", "big_vision/"),
  ("BiT, fine-tuned on ImageNet", "-ILSVRC2012"),
  ("BiT-M, ImageNet-21k", "BiT-M"),
  ("BiT-S, ImageNet", "BiT-S"),
)


def make_published() -> str:
  """Returns a table of names and addresses for each family of files."""
  families = {title: [] for title, _ in _FAMILIES}
  for name, published in PUBLISHED.items():
    families[find_family(published.address)].append(
      (f"`{name}`", f"`{published.address}`")
    )
  lines = []
  for title, rows in families.items():
    lines += [f"### {title}", "", *_format_table(("name", "file"), rows)]
  return "\n".join(lines)


def find_family(address: str) -> str:
  """Returns the heading that an address stands under."""
  return next(title for title, part in _FAMILIES if part in address)


# --- Markdown ---


def _format_table(head, rows) -> list[str]:
  if not rows:
    return []
  lines = [head, tuple("---" for _ in head), *rows]
  return [f"| {' | '.join(line)} |" for line in lines] + [""]


def _escape(text):
  """Keeps the text of a table's cell as it is; `code` is code."""
  return _outside_code(r"([<>*_\[\]])", _keep_pipes(text))


def _outside_code(characters, text):
  """Escapes characters that do not stand between backticks."""
  return "".join(
    part if part.startswith("`") else re.sub(characters, r"\\\1", part)
    for part in re.split("(`[^`]*`)", text)
  )


def _keep_pipes(text):
  """Lets `|` stand in a table's cell, code or not."""
  return text.replace("|", r"\|")


def _upper(text):
  return text[:1].upper() + text[1:]


GENERATED = {
  "commands": make_commands,
  "keys": make_keys,
  "config_files": make_config_files,
  "published": make_published,
}
