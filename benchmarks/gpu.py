"""Speed on one GPU: beside timm's, and with cuDNN's and XLA's attention.

  python benchmarks/gpu.py                 # 8 minutes at most
  python benchmarks/gpu.py --toy           # tiny models, on the CPU

Needs jax for the GPU, flax, optax and numpy, and timm, torch and Pillow for the
comparison. Each case runs in its own process, the most important ones first;
those for which no time is left are listed. After each case OUT.md has the table
so far, and OUT.json all figures.

Goals: training L/16 takes at least 55 % of the measured matmul ceiling and is
at least 1.25 times as fast as timm; B/16 trains far above the 1,459 images/s
that NVIDIA published for JAX on an H100.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # nothing to install
from vit_jax.tools.bench import process, step

_COMMON = {"num_classes": 1000, "steps": 20, "dtype": "bfloat16"}
_COMMON |= {"remat": "none", "image_size": 224}
_DINOV3 = {"image_size": 512, "registers": 4, "rope": "dinov3"}
_DINOV3 |= {"pos_embedding": "none", "qkv_bias": "qv", "layer_scale_init": 1e-5}
_DINOV3 |= {"activation": "gelu_erf", "layer_norm_epsilon": 1e-5}
MODELS = {
  "B/16": {"variant": "ViT-B_16", "batch_size": 256},
  "L/16": {"variant": "ViT-L_16", "batch_size": 128},
  "H/14": {"variant": "ViT-H_14", "batch_size": 64},
  "DINOv3-L": {"variant": "ViT-L_16", "batch_size": 32, **_DINOV3},
}
_TOY = {"variant": "ViT-w32d1m64h2_8", "image_size": 16, "batch_size": 8}
_TOY |= {"num_classes": 5, "steps": 3}
# "fused" is cuDNN's attention, "plain" XLA's.
_ORDER = (
  *("L/16 train: fused timm", "B/16 train: fused timm"),
  *("L/16 inference: fused timm", "L/16 train: plain"),
  *("DINOv3-L train: fused timm", "H/14 train: fused timm"),
  *("B/16 inference: fused timm", "DINOv3-L inference: fused timm"),
  *("H/14 inference: fused timm", "DINOv3-L train: plain"),
  *("B/16 train: plain", "H/14 train: plain"),
  *("L/16 inference: plain", "DINOv3-L inference: plain"),
  *("B/16 inference: plain", "H/14 inference: plain"),
)
_LIMIT = 150  # seconds of a case
_LEAST = 20  # with fewer seconds left none begins


def list_cases(only: str = "") -> list[tuple[str, str]]:
  """Returns (model and mode, code) of the cases with `only` in the former."""
  lines = [line.split(": ") for line in _ORDER]
  return [(x, y) for x, codes in lines if only in x for y in codes.split()]


def run(what: str, code: str, rows: dict, timeout: float, toy: bool) -> dict:
  """Returns the figures of a case, or "error", one line, in place of them.

  `rows`, {case: figures}, has what ran before: timm is compared with the fused
  case of the same model, and the matmul ceiling is measured once.
  """
  if code == "timm":
    where = {"device": "cpu", "compiled": False} if toy else {}
    return step.run_timm(rows[what, "fused"], timeout, **where)
  model, mode = what.split()
  spec = {**_COMMON, **MODELS[model], **(_TOY if toy else {})}
  spec |= {"inference": mode == "inference", "attention": code}
  if done := [x for x in rows.values() if "mfu" in x]:
    spec["ceiling_tflops"] = done[0]["ceiling_tflops"] / done[0]["devices"]
  found = process.call(step.measure, spec, timeout)
  return {"code": "vit_jax", **spec, **found}


def format_row(row: dict) -> str:
  """Returns a case's figures in one line."""
  if "error" in row:
    return row["error"]
  mfu = f"{row['mfu']:.1%} of the ceiling, " if "mfu" in row else ""
  return (
    f"{row['images_per_second']:,.1f} images/s, {mfu}"
    f"{row['memory_gib']:.1f} GiB, compiled in {row['compile_seconds']:.0f} s; "
    f"{row['how']}"
  )


def format_table(rows: dict) -> str:
  """Returns the Markdown table of all cases, and notes below it."""
  lines = [["", "pixels", "batch", "images/s", "of the matmul ceiling"]]
  lines[0] += ["timm, images/s", "times timm"]
  lines[0] += ["XLA's attention, images/s", "times XLA's"]
  lines.append(["---"] * len(lines[0]))
  for what in dict.fromkeys(what for what, _ in rows):
    ours, *others = (
      rows.get((what, code), {}) for code in ("fused", "timm", "plain")
    )
    rate = ours.get("images_per_second")
    cells = [str(ours.get(key, "-")) for key in ("image_size", "batch_size")]
    cells.append(f"{rate:,.0f}" if rate else "-")
    cells.append(f"{ours['mfu']:.1%}" if rate else "-")
    for other in others:
      theirs = other.get("images_per_second")
      cells.append(f"{theirs:,.0f}" if theirs else "-")
      cells.append(f"{rate / theirs:.2f}" if rate and theirs else "-")
    lines.append([what, *cells])
  table = [f"| {' | '.join(line)} |" for line in lines]
  notes = step.list_notes(list(rows.values()))
  for case, row in rows.items():
    notes += [f"{' '.join(case)}: {row['error']}"] if "error" in row else []
  return "\n".join([*table, "", *(f"* {note}" for note in notes)]) + "\n"


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--seconds", type=float, default=480)
  parser.add_argument("--only", default="", help="B/16, inference, ...")
  parser.add_argument("--toy", action="store_true")
  parser.add_argument("--out", help="without .md; runs/gpu, runs/gpu_toy")
  args = parser.parse_args(argv)
  out = args.out or ("runs/gpu_toy" if args.toy else "runs/gpu")
  end = time.monotonic() + args.seconds
  if args.toy:
    os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # timm uses only one
  cases = list_cases(args.only)
  wanted = ("timm", "torch", "torchvision")
  if missing := [x for x in wanted if not importlib.util.find_spec(x)]:
    print(f"timm is left out: {', '.join(missing)} not installed", flush=True)
    cases = [case for case in cases if case[1] != "timm"]
  Path(out).parent.mkdir(parents=True, exist_ok=True)
  rows = {}
  for case in cases:
    left = end - time.monotonic()
    if left < _LEAST:
      rows[case] = {"error": "not run, no time was left"}
    else:
      rows[case] = run(*case, rows, min(left, _LIMIT), args.toy)
    print(f"{' '.join(case)}: {format_row(rows[case])}", flush=True)
    named = [{"case": " ".join(case), **row} for case, row in rows.items()]
    Path(f"{out}.json").write_text(json.dumps(named, indent=1))
    Path(f"{out}.md").write_text(format_table(rows))
  print(f"\n{format_table(rows)}")


if __name__ == "__main__":
  main()
