"""A copy of the project, as a new clone with what is not committed yet."""

import shutil
import subprocess
from pathlib import Path

REPO = Path(__file__).parents[1]


def copy(folder: Path) -> Path:
  """Copies all files that git does not ignore; returns the folder."""
  listed = subprocess.run(
    ["git", "ls-files", "-z", "-co", "--exclude-standard"],
    cwd=REPO,
    capture_output=True,
    text=True,
    check=True,
  )
  for name in filter(None, listed.stdout.split("\0")):
    if (REPO / name).is_file():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(REPO / name, folder / name)
  return folder
