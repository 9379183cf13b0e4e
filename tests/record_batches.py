"""The command line, noting a digest of every row that is trained on.

    python tests/record_batches.py FILE train --config=... --workdir=...

FILE gets lines [step, row, digest], of the rows that this process feeds.
"""

import hashlib
import json
import sys

from vit_jax import data
from vit_jax.__main__ import main


def digests(batch) -> list[str]:
  """Returns a digest of each row of a batch."""
  return [
    hashlib.sha256(image.tobytes() + labels.tobytes()).hexdigest()
    for image, labels in zip(batch["image"], batch["labels"], strict=True)
  ]


def record(train_batches, file):
  """Wraps `data.train_batches` so that it writes down what it yields."""

  def recording(sources, *, start_step, rows, **kwargs):
    batches = train_batches(sources, start_step=start_step, rows=rows, **kwargs)
    for step, batch in enumerate(batches, start_step):
      for row, digest in zip(rows.tolist(), digests(batch), strict=True):
        print(json.dumps([step, row, digest]), file=file, flush=True)
      yield batch

  return recording


if __name__ == "__main__":
  with open(sys.argv[1], "a") as file:
    data.train_batches = record(data.train_batches, file)
    code = main(sys.argv[2:])
  sys.exit(code)
