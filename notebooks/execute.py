"""Runs notebooks from their beginning and keeps what they print and draw.

  python notebooks/execute.py [NAME ...]      (make notebooks)

Each runs in a copy of the checkout, and so without what earlier runs left.
Nothing but outputs changes: no times, no names of cells, no versions.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import nbclient
import nbformat

FOLDER = pathlib.Path(__file__).resolve().parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
_SECONDS = 900  # a cell that takes longer hangs


def main():
  """Executes the notebooks that are named, or all."""
  for name in sys.argv[1:] or NAMES:
    print(name, flush=True)
    path = FOLDER / f"{name}.ipynb"
    with tempfile.TemporaryDirectory() as folder:
      checkout = copy_checkout(pathlib.Path(folder) / "vit_jax")
      env = {"PYTHONPATH": str(checkout)}
      notebook = execute(path, checkout / "notebooks", env=env)
    partial = path.with_suffix(".tmp")
    nbformat.write(notebook, partial)
    partial.replace(path)


def copy_checkout(to: pathlib.Path) -> pathlib.Path:
  """Copies what git has, or would have, of this checkout; returns `to`."""
  root = FOLDER.parent
  command = ["git", "ls-files", "-z", "-co", "--exclude-standard"]
  listed = subprocess.run(
    command, cwd=root, check=True, capture_output=True, text=True
  ).stdout
  for name in filter(None, listed.split("\0")):
    if (root / name).exists():  # it may be deleted and not yet committed
      (to / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(root / name, to / name)
  return to


def execute(
  path: pathlib.Path,
  folder: pathlib.Path,
  *,
  python: str = sys.executable,
  env: dict[str, str] | None = None,
) -> nbformat.NotebookNode:
  """Returns the notebook at `path` with the outputs of a new run.

  Args:
    path: of the notebook, which stays as it is.
    folder: where its kernel starts.
    python: the interpreter of its kernel, which has ipykernel.
    env: variables beside those of this process.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell failed.
  """
  notebook = nbformat.read(path, as_version=4)
  with tempfile.TemporaryDirectory() as kernels:
    _write_kernel(pathlib.Path(kernels) / "kernels" / "here", python)
    # Looked up in this process; the kernel has no use for it.
    os.environ["JUPYTER_PATH"] = kernels
    client = nbclient.NotebookClient(
      notebook,
      kernel_name="here",
      timeout=_SECONDS,
      record_timing=False,
      coalesce_streams=True,
      resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env={**os.environ, **(env or {})})
  return _tidy(notebook, folder.parent)


def _write_kernel(folder, python):
  folder.mkdir(parents=True)
  command = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
  spec = {"argv": command, "display_name": "here", "language": "python"}
  (folder / "kernel.json").write_text(json.dumps(spec))


def _tidy(notebook, root):
  """Takes away what differs between runs without being a result.

  Paths are shown as they are from `root`.
  """
  notebook.metadata = {
    "kernelspec": {
      "display_name": "Python 3",
      "language": "python",
      "name": "python3",
    },
    "language_info": {"name": "python"},
  }
  for i, cell in enumerate(notebook.cells):
    cell.id = f"cell-{i}"
    cell.metadata = {}
    for output in cell.get("outputs", ()):
      if "metadata" in output:
        output.metadata = {}
      if "text" in output:
        output.text = output.text.replace(f"{root}/", "")
  return notebook


if __name__ == "__main__":
  main()
