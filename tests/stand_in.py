"""What stands in for `train` where only the order of runs is tested.

A run resumes from its folder, takes its steps, saves on SIGTERM. Its accuracy
is base_lr + seed / 10 + the length of the task's name / 1000. The files "fail"
and "stop" in its folder end it with an error, and after one step.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

# In place of sweep.TRAIN; a step takes 20 ms.
COMMAND = [sys.executable, __file__, "train"]


def use(monkeypatch, jobs, sweep) -> list[list[str]]:
  """Has sweeps run it in this process; returns the commands, as they come."""
  commands = []

  def start(_, workdir, command, slot):
    commands.append(command)
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "log.txt", "a") as log:
      train(command[len(sweep.TRAIN) :], slot, log)
    return SimpleNamespace(done=lambda: True)

  monkeypatch.setattr(jobs.Executor, "start", start)
  monkeypatch.setattr(sweep, "_POLL_SECONDS", 0)
  # The stand-in's config.json is not one to compare with.
  monkeypatch.setattr(sweep.run_folder, "check", lambda *_: False)
  return commands


def train(arguments, environment, log, take_step=lambda: True):
  """Does what the command line says; returns the exit code."""
  keys = dict(a[2:].partition("=")[::2] for a in arguments)
  folder = Path(keys["workdir"])
  total = int(keys.get("config.total_steps", 6))
  splits = {
    name: {"split": keys.get(f"config.{name}.split", "s")}
    for name in ("train", "eval")
  }
  print("begins", environment.get("CUDA_VISIBLE_DEVICES"), file=log, flush=True)
  if (folder / "fail").exists():
    print("error: it is told to", file=log)
    return 1
  written = {"config": splits, "total_steps": total}
  (folder / "config.json").write_text(json.dumps(written))
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


if __name__ == "__main__":
  stopped = []
  signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))

  def take_slow_step():
    time.sleep(0.02)
    return not stopped

  sys.exit(train(sys.argv[2:], os.environ, sys.stdout, take_slow_step))
