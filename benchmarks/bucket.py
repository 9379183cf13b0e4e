"""Training speed from a bucket, compared with the local disk.

  make quickstart
  python benchmarks/bucket.py

Pre-trains as the quickstart does, for fewer steps, alternately from its folder
and from a fake of Cloud Storage on this machine (tests/fake_gcs.py) that waits
before each answer. Prints images/s, and the fake's requests and bytes sent.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import fake_gcs

SHUFFLES = {
  "all": ["--config.train.shuffle=all"],
  "blocks": [
    "--config.train.shuffle=blocks",
    "--config.train.buffer_gib=0.06",  # less than the set
  ],
}


def train(data_dir, steps, flags, environment=None):
  """Returns the median images/s of the second half of a run."""
  with tempfile.TemporaryDirectory() as workdir:
    command = [
      *(sys.executable, "-m", "vit_jax", "train"),
      *("--config=configs/quickstart_pretrain.py", f"--workdir={workdir}/run"),
      f"--config.data_dir={data_dir}",
      *(f"--config.total_steps={steps}", "--config.log_every=50"),
      *("--config.eval.split=", "--config.checkpoint_every=0", *flags),
    ]
    environment = os.environ | (environment or {})
    subprocess.run(command, env=environment, check=True, capture_output=True)
    lines = Path(workdir, "run", "metrics.jsonl").read_text().splitlines()
  speeds = [json.loads(x).get("speed/images_per_second") for x in lines]
  speeds = [x for x in speeds if x]
  return statistics.median(speeds[len(speeds) // 2 :])


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--folder", type=Path, default="runs/quickstart")
  parser.add_argument("--steps", type=int, default=1000)
  args = parser.parse_args()
  [shards] = (args.folder / "data" / "jft_like").glob("*")
  size = sum(f.stat().st_size for f in shards.glob("*-train.array_record*"))
  with fake_gcs.serve(args.folder) as server:
    for name, flags in SHUFFLES.items():
      local = train(args.folder / "data", args.steps, flags)
      for latency in (0.03, 0.1):
        server.latency = latency
        server.reset()
        speed = train("gs://data", args.steps, flags, server.environment())
        again = train(args.folder / "data", args.steps, flags)
        local, mean = again, (local + again) / 2
        print(
          f"{name:7} {latency * 1000:4.0f} ms  {speed:6.0f} images/s, "
          f"{speed / mean:.2f} of the disk's {mean:.0f}; "
          f"{len(server.requests)} requests, {server.sent / 1e6:.1f} MB "
          f"of a set of {size / 1e6:.1f} MB",
          flush=True,
        )


if __name__ == "__main__":
  main()
