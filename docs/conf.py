"""The documents' site: `make docs` builds it into docs/_build.

Pages are Markdown in this folder. sphinx-argparse-cli writes the options of the
commands, autodoc the functions; configuration files are included as they are.
"""

import os
import sys
from pathlib import Path

# As the command line does it, so that a build says nothing but warnings.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
sys.path.insert(0, str(Path(__file__).parents[1]))

import vit_jax
from vit_jax.pretrained.names import PUBLISHED

project = "vit_jax"
version = release = vit_jax.__version__
copyright = "the authors of vit_jax"

extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx_argparse_cli",
  "sphinx_copybutton",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
smartquotes = False  # "--" is an option here, not a dash

# Docstrings put code between single backticks.
default_role = "code"
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_typehints = "none"

html_theme = "furo"
html_title = "vit_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False

_GITHUB = "https://github.com/vit-jax/vit_jax/blob/main"


def setup(app):
  app.connect("source-read", _complete)


def _complete(app, name, source):
  """Lists the published weights; links files that are not pages to GitHub."""
  rows = (f"| `{n}` | `{address}` |" for n, address in PUBLISHED.items())
  table = "\n".join(["| name | file |", "|---|---|", *rows])
  text = source[0].replace("<!-- published names -->", table)
  source[0] = text.replace("](../", f"]({_GITHUB}/")
