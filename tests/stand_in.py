"""What stands in for `train` where only the order of runs is tested.

A run resumes from its folder, takes its steps, saves on SIGTERM. Its accuracy
is base_lr + seed / 10 + the length of the task's name / 1000.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

# In place of jobs._CHILD; a step takes 20 ms.
CHILD = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import stand_in
stand_in.main(*sys.argv[1:])
"""


class Ended:
  """Stands in for the process of a run that has ended."""

  def __init__(self, code):
    self.returncode = code

  def poll(self):
    return self.returncode

  def terminate(self):
    pass

  kill = terminate


def use(monkeypatch, jobs, sweep) -> None:
  """Has sweeps run the stand-in, in this process."""

  def start(run, environment, _):
    run.workdir.mkdir(parents=True, exist_ok=True)
    with open(run.workdir / "log.txt", "a") as log:
      code = train(run.arguments(), environment, log)
    return jobs._Job(run, Ended(code), environment, time.monotonic())

  monkeypatch.setattr(jobs, "_start", start)
  monkeypatch.setattr(jobs, "_POLL_SECONDS", 0)
  # The stand-in's config.json is not one to compare with.
  monkeypatch.setattr(sweep.run_folder, "check", lambda *_: False)


def main(parent, *arguments):
  """Is a process of a sweep."""
  if os.getppid() != int(parent):
    sys.exit("orphan")
  stopped = []
  signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))

  def take_step():
    time.sleep(0.02)
    return not stopped and os.getppid() != 1

  sys.exit(train(arguments, os.environ, sys.stdout, take_step))


def train(arguments, environment, log, take_step=lambda: True):
  """Does what the command line says; returns the exit code."""
  keys = dict(a[2:].partition("=")[::2] for a in arguments[1:])
  folder = Path(keys["workdir"])
  total = int(keys.get("config.total_steps", 6))
  parts = {
    name: {
      "dataset": "d",
      "split": keys.get(f"config.{name}.split", "s"),
      "preprocess": "p",
    }
    for name in ("train", "eval")
  }
  config = {**parts, "image_size": 8}
  run = json.dumps({"config": config, "total_steps": total})
  print("begins", environment.get("CUDA_VISIBLE_DEVICES"), file=log, flush=True)
  if (folder / "fail").exists():
    print("error: it is told to", file=log)
    return 1
  (folder / "config.json").write_text(run)
  (folder / "checkpoints").mkdir(exist_ok=True)
  steps = [int(f.name) for f in (folder / "checkpoints").iterdir()]
  step = max(steps, default=0)
  print("from", step, file=log, flush=True)
  with open(folder / "metrics.jsonl", "a") as f:
    while step < total and take_step() and not (folder / "stop").exists():
      step += 1
      line = {"step": step}
      if step == total:
        rate = float(keys["config.schedule.base_lr"])
        task = keys["config"].partition(",")[2]
        accuracy = rate + 0.1 * int(keys["config.seed"]) + len(task) / 1000
        line |= {"eval/examples": 10, "eval/accuracy": accuracy}
      f.write(json.dumps(line) + "\n")
      f.flush()
  (folder / "checkpoints" / str(step)).mkdir(exist_ok=True)
  return 0
