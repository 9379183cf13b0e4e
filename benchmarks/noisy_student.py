"""Accuracy of teachers and students: the tables of docs/noisy_student.md.

  python benchmarks/noisy_student.py [--data=digits,tissue] [--seeds=0,1,2,3,4]

Runs configs/quickstart_noisy_student.py for each seed. Its teacher is trained
like the students, but only on the labelled images, so that the difference is
the effect of the pseudo-labels. Then the first student is trained again, from
the same teacher, with one part left out:

  no noise: no dropout, no stochastic depth, images as in the evaluation;
  no filter: min_confidence 0, so that all images are used;
  no balance: images of rare classes are not repeated.

Each stage is a run in runs/noisy_student_benchmark/DATA/seed=N/VARIANT, so that
a stopped benchmark resumes. Missing data sets are prepared. Settings were
chosen with seeds 10 and 11 and --validation, which replaces the test set by 200
training images that no network here learns from. As these are few, the labels
of the 750 unlabelled images were used as well.
"""

import argparse
import shutil
import statistics
from pathlib import Path

from vit_jax import data
from vit_jax.tools import noisy_student

FOLDER = Path("runs/noisy_student_benchmark")
DATA_DIR = Path("runs/quickstart/data")
CONFIG = "configs/quickstart_noisy_student.py"
VALIDATION = "train[50:250]"
# Name -> {key: value} of the loop or of its student.
VARIANTS = {
  "as configured": {},
  "no noise": {
    "model.dropout_rate": "0.0",
    "model.stochastic_depth_rate": "0.0",
    "train.preprocess": "resize(size)",
  },
  "no filter": {"min_confidence": "0.0"},
  "no balance": {"balance": "False"},
}
TEACHER = "teacher"


def run(name, seed, variant, changes, given) -> dict[str, float] | None:
  """Returns {stage: accuracy} of one loop, None after a stop signal."""
  folder = FOLDER / name / f"seed={seed}" / variant.replace(" ", "_")
  given = {"seed": str(seed), "data_dir": str(DATA_DIR), **given}
  spec = f"{CONFIG}:{name}"
  loop, configs = noisy_student.load(spec, given)
  if changes:
    given |= {"stages": f"('{TEACHER}', 'student1')", **changes}
    loop, changed = noisy_student.load(spec, given)
    configs = {**changed, TEACHER: configs[TEACHER]}
    if not (folder / TEACHER).exists():
      whole = FOLDER / name / f"seed={seed}" / "as_configured"
      shutil.rmtree(folder / "copy", ignore_errors=True)
      shutil.copytree(whole / TEACHER, folder / "copy")
      (folder / "copy").rename(folder / TEACHER)
  result = noisy_student.noisy_student(loop, configs, str(folder))
  if result is None:
    return None
  return {row["stage"]: row["results"]["accuracy"] for row in result["stages"]}


def make_table(found) -> str:
  """Formats {column: {seed: accuracy}} as a Markdown table."""
  seeds = sorted({seed for column in found.values() for seed in column})
  lines = [["", *found], ["---"] * (len(found) + 1)]
  for seed in seeds:
    texts = (f"{column[seed]:.1%}" for column in found.values())
    lines.append([f"seed {seed}", *texts])
  means = (statistics.fmean(column.values()) for column in found.values())
  lines.append(["mean", *(f"{x:.1%}" for x in means)])
  teacher = found[TEACHER]
  wins = (
    str(sum(column[seed] > teacher[seed] for seed in seeds))
    for column in found.values()
  )
  lines.append(["better than the first teacher", *wins])
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--data", default="digits,tissue")
  parser.add_argument("--seeds", default="0,1,2,3,4")
  parser.add_argument("--validation", action="store_true")
  args = parser.parse_args()
  given = {"eval.split": VALIDATION} if args.validation else {}
  seeds = [*map(int, args.seeds.split(","))]
  for name in args.data.split(","):
    loop, _ = noisy_student.load(f"{CONFIG}:{name}", {})
    data.prepare(loop.dataset, str(DATA_DIR))
    found = {}
    for variant, changes in VARIANTS.items():
      for seed in seeds:
        row = run(name, seed, variant, changes, given)
        if row is None:
          return
        for stage, accuracy in row.items():
          if changes and stage == TEACHER:
            continue
          column = f"{stage}, {variant}" if changes else stage
          found.setdefault(column, {})[seed] = accuracy
      print(f"\n{name}\n\n{make_table(found)}", flush=True)


if __name__ == "__main__":
  main()
