"""Installs this checkout into a notebook's runtime, as on Colab.

  python notebooks/install.py [EXTRA ...]

What is there and new enough stays as it is. JAX finds a GPU or a TPU through a
plug-in of its own version, so the two are asked for together; and where there
is TensorFlow, tensorflow-cpu would write over its files. What is missing comes
in the versions of constraints.txt.
"""

import importlib
import pathlib
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_ROOT = pathlib.Path(__file__).resolve().parents[1]
# What JAX finds an accelerator with, and the extra that asks for it.
_PLUGINS = {
  "jax-cuda13-plugin": "cuda13",
  "jax-cuda12-plugin": "cuda12",
  "libtpu": "tpu",
}


def main():
  """Installs the package, then what it needs and the runtime has not."""
  installed = {str(canonicalize_name(d.name)) for d in metadata.distributions()}
  _pip("--no-deps", "--editable", str(_ROOT))
  importlib.invalidate_caches()
  extras = ["train", "figures", *sys.argv[1:]]
  wanted = list_requirements(
    metadata.requires("vit_jax") or [], extras, installed
  )
  constraints = choose_constraints(
    (_ROOT / "constraints.txt").read_text(), installed
  )
  with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
    file.write(constraints)
    file.flush()
    try:
      _pip("--constraint", file.name, *wanted)
    except SystemExit:
      # Else a new kernel would find the package and not install the rest.
      uninstall = [sys.executable, "-m", "pip", "uninstall", "-qy", "vit_jax"]
      subprocess.run(uninstall)
      raise


def _pip(*arguments):
  quiet = ("--quiet", "--disable-pip-version-check")
  command = [sys.executable, "-m", "pip", "install", *quiet, *arguments]
  if code := subprocess.run(command).returncode:
    sys.exit(code)


def list_requirements(
  given: list[str], extras: list[str], installed: set[str]
) -> list[str]:
  """Returns what pip is asked for.

  Args:
    given: the package's requirements, as its metadata has them.
    extras: of the package.
    installed: normalised names of what the runtime has.
  """
  wanted = []
  for requirement in map(Requirement, given):
    marker, requirement.marker = requirement.marker, None
    if marker and not any(marker.evaluate({"extra": e}) for e in ("", *extras)):
      continue
    if requirement.name == "vit_jax":  # an extra that consists of others
      continue
    if requirement.name == "tensorflow-cpu" and "tensorflow" in installed:
      requirement.name = "tensorflow"
    if requirement.name == "jax":
      requirement.extras = _find_plugin(installed)
    wanted.append(str(requirement))
  return wanted


def _find_plugin(installed):
  """Returns the extras of jax for this runtime, at most one."""
  for name, extra in _PLUGINS.items():
    if name in installed:
      return {extra}
  return {"cuda12"} if shutil.which("nvidia-smi") else set()


def choose_constraints(text: str, installed: set[str]) -> str:
  """Returns the lines of constraints.txt for packages that are missing."""
  return "".join(
    f"{line}\n"
    for line in text.splitlines()
    if "==" in line
    and canonicalize_name(line.partition("==")[0]) not in installed
  )


if __name__ == "__main__":
  main()
