"""The documents' site: `make docs` builds it into docs/_build.

Pages are Markdown in this folder. What the code knows by itself (commands,
configuration keys, configuration files, published names) is written into them
by reference.py while the site is built.
"""

import os
import sys
from pathlib import Path

# As the command line does it, so that a build says nothing but warnings.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import vit_jax

project = "vit_jax"
version = release = vit_jax.__version__
copyright = "the authors of vit_jax"

extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "reference",
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
