"""The bench commands: figures that follow from each other, and their limits."""

import json
import os
import signal
import time

import gpu
import jax
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tiny_runs import Runs

from vit_jax import data, models
from vit_jax.__main__ import main
from vit_jax.data import pipeline
from vit_jax.models import attention
from vit_jax.tools.bench import input as input_bench
from vit_jax.tools.bench import run, step

TINY = "ViT-w16d1m32h2_8"
OPTIONS = {
  "image_size": 16,
  "num_classes": 5,
  "batch_size": 8,
  "steps": 2,
  "dtype": "float32",
  "remat": "none",
}
FOUND = {
  "batch_size": 8,
  "step_seconds": 0.5,
  "images_per_second": 16.0,
  "tflops": 2.0,
  "ceiling_tflops": 4.0,
  "mfu": 0.5,
  "memory_gib": 1.0,
  "compile_seconds": 3.0,
  "devices": 1,
  "device": "card",
  "how": "compiled",
  "versions": {"jax": "1"},
}


# --- the step ---


@pytest.mark.ci
@pytest.mark.parametrize("inference", [False, True])
def test_figures_follow_from_the_time_of_a_step(monkeypatch, inference):
  monkeypatch.setattr(step, "_CPU_SIDES", (64,))
  one = jax.devices()[:1]  # which takes half the time to compile for
  monkeypatch.setattr(jax, "local_devices", lambda: one)
  found = step.measure(variant=TINY, inference=inference, **OPTIONS)
  tokens, width, mlp = 5, 16, 32
  products = 4 * (8 * 8 * 3) * width  # the patches
  products += tokens * 4 * width**2 + 2 * tokens**2 * width  # attention
  products += tokens * 2 * width * mlp + width * 5  # the MLP and the head
  flops = (1 if inference else 3) * 2 * products * 8
  seconds = found["step_seconds"]
  assert found["tflops"] == pytest.approx(flops / seconds / 1e12)
  assert found["images_per_second"] == pytest.approx(8 / seconds)
  ceiling = found["ceiling_tflops"]
  assert found["mfu"] == pytest.approx(found["tflops"] / ceiling)
  assert found["memory_gib"] > 0
  # Before anything is learnt all of 5 classes are alike, but for the noise.
  assert inference or 0 < found["loss"] < 10


def test_attention_without_a_kernel():
  assert attention.find_fused(200, 768, 12)
  with step._choose_attention("plain"):
    assert attention.find_fused(200, 768, 12) is None


def test_beside_timm(monkeypatch):
  def call(run, spec, timeout=None):
    if "model" in spec:
      assert spec["model"]["embed_dim"] == 16
      assert spec["model"]["mlp_ratio"] == 2
      return FOUND | {"step_seconds": 1.0, "versions": {"torch": "2"}}
    return FOUND

  monkeypatch.setattr(step, "call", call)
  # It would start JAX in this process, which would take a GPU's memory.
  monkeypatch.setattr(step, "count_multiply_adds", None)
  ours, theirs = step.bench([TINY], beside="timm", **OPTIONS)
  assert theirs["times_ours"] == 2
  assert theirs["images_per_second"] == 8
  assert (theirs["tflops"], theirs["mfu"]) == (1, 0.25)
  assert "vit_jax is 2.00 x as fast" in step.format_report([ours, theirs])
  monkeypatch.setattr(step, "call", lambda *_: {"error": "no such thing"})
  assert "no such thing" in step.format_report(step.bench([TINY], **OPTIONS))


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["step", "--variant=ViT-Q_16"], "ViT-Q_16"),
    (["step", "--variant=ViT-B_16", "--image_size=225"], "nearest valid: 224"),
    (["step", "--variant=ViT-B_16", "--batch_size=0"], "must be at least 1"),
    (["step", "--variant=ViT-B_16", "--beside=other"], "only timm is known"),
    (["step", "--variant=ViT-B_16", "--dtype=int8"], "int8"),
    (["step", "--variant=ViT-B_16", "--attention=cudnn"], "fused, plain"),
    (["input", "--needs=0"], "--needs=0.0; it must be more than 0"),
    (["input", "--dataset=no_such_set"], "unknown data set 'no_such_set'"),
  ],
)
def test_mistakes_take_one_line(arguments, words, capsys):
  assert main(["bench", *arguments]) == 2
  error = capsys.readouterr().err
  assert words in error
  assert error.count("\n") == 1


@pytest.mark.ci
def test_processes_end_to_end(capsys):
  options = "--image_size=16 --batch_size=8 --num_classes=5 --steps=2"
  command = ["bench", "step", f"--variant={TINY}", *options.split()]
  assert main(command) == 0
  table = capsys.readouterr().out
  assert table.count(f"{TINY} vit_jax") == 1
  assert "matmuls reach" in table


@pytest.mark.ci
def test_a_process_that_dies_is_an_error():
  assert step.call(os._exit, {"status": 3}) == {"error": "the process died"}


@pytest.mark.ci
def test_a_process_that_takes_too_long_is_killed():
  assert step.call(signal.pause, {}, 0.5) == {"error": "killed after 0 s"}


_DINOV3 = {"model_name": "vit_small_patch16_dinov3_qkvb"}


@pytest.mark.ci
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("options", [{}, _DINOV3], ids=["vit", "dinov3"])
def test_a_step_of_timm(options, inference):
  import torch_libraries  # noqa: F401, torchvision is not there

  from vit_jax.tools.bench import torch_step

  model = {"img_size": 16, "num_classes": 5, "patch_size": 8}
  model |= {"embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2}
  found = torch_step.measure(
    model=model | options,
    inference=inference,
    batch_size=8,
    steps=2,
    dtype="float32",
    device="cpu",
    compiled=False,
  )
  assert found["step_seconds"] > 0
  assert inference or 0 < found["loss"] < 10


# --- benchmarks/gpu.py ---


def test_table_of_the_gpu():
  ours = {"code": "vit_jax", "image_size": 224, **FOUND}
  theirs = {"code": "timm", **FOUND, "images_per_second": 10.0}
  rows = {
    ("L/16 train", "fused"): ours,
    ("L/16 train", "timm"): theirs,
    ("L/16 train", "plain"): {"error": "out of memory"},
    ("B/16 train", "fused"): {"error": "its process has died"},
  }
  _, _, large, base, _, *notes = gpu.format_table(rows).splitlines()
  cells = "L/16 train", "224", "8", "16", "50.0%", "10", "1.60", "-", "-"
  assert large == f"| {' | '.join(cells)} |"
  assert base == f"| B/16 train{' | -' * 8} |"
  assert "* L/16 train plain: out of memory" in notes
  assert "* vit_jax: 1 x card, jax 1; compiled" in notes


def test_gpu_cases_are_complete():
  cases = gpu.list_cases()
  assert cases[:2] == [("L/16 train", "fused"), ("L/16 train", "timm")]
  wanted = {
    (f"{model} {mode}", code)
    for model in gpu.MODELS
    for mode in ("train", "inference")
    for code in ("fused", "timm", "plain")
  }
  assert set(cases) == wanted
  assert len(cases) == len(wanted)


@pytest.mark.ci
@pytest.mark.parametrize("name", gpu.MODELS)
def test_models_of_the_gpu_are_as_large_in_timm(monkeypatch, name):
  from torch_libraries import timm, torch

  def call(run, spec, timeout):
    made = spec["model"]
    named = "model_name" in made
    make = timm.create_model if named else timm.models.VisionTransformer
    with torch.device("meta"):
      return {"size": sum(x.numel() for x in make(**made).parameters())}

  monkeypatch.setattr(step, "call", call)
  spec = {**gpu._COMMON, **gpu.MODELS[name]}
  size = step.run_timm(spec)["size"]
  options = {x: y for x, y in spec.items() if x not in ("batch_size", "steps")}
  params = jax.eval_shape(models.create(**options).init, jax.random.key(0))
  assert size == sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.ci
def test_gpu_cases_in_small(tmp_path, capsys):
  out = tmp_path / "found"
  gpu.main(["--toy", "--only=DINOv3-L inference", f"--out={out}"])
  printed = capsys.readouterr().out
  assert out.with_suffix(".md").read_text() in printed
  rows = json.loads(out.with_suffix(".json").read_text())
  fused, *_, plain = rows  # and timm's between them, where it is installed
  assert fused["images_per_second"] > 0
  assert (fused["attention"], plain["attention"]) == ("fused", "plain")
  assert fused["ceiling_tflops"] == plain["ceiling_tflops"]
  gpu.main(["--toy", "--seconds=1", f"--out={out}"])
  assert (
    "L/16 train fused: not run, no time was left"
    in out.with_suffix(".md").read_text()
  )


# --- the input ---


def test_seeds_of_a_batch_are_those_of_its_images():
  fold_in = tf.random.experimental.stateless_fold_in
  seed = tf.constant([2**40 + 3, 0], tf.int64)
  for number in (0, 7, 2**33):
    rows = tf.constant([0, 5, 2**34], tf.int64)
    of_step = fold_in(seed, tf.constant(number, tf.int64))
    each = [fold_in(of_step, row).numpy().tolist() for row in rows]
    seeds = pipeline._fold(2**40 + 3, tf.constant(number, tf.int64), rows)
    assert seeds.numpy().tolist() == each


def test_the_median_of_the_rounds_ratios_counts():
  # Seconds, and those of CPU.
  times = {"pipeline": [(1, 1), (2, 1), (4, 1)]}
  times["plain"] = [(3, 5), (4, 4), (4, 6)]
  assert input_bench._compare(times) == {"plain": [2.0, 5.0]}


@pytest.mark.ci
def test_input_of_a_folder(tmp_path):
  for name in ("cat", "dog"):
    (tmp_path / name).mkdir()
    for i in range(10):
      noise = Image.effect_noise((60, 40), 64).convert("RGB")
      noise.save(tmp_path / name / f"{i}.jpg")
  options = {"image_size": 32, "batch_size": 8, "rounds": 1}
  found = input_bench.bench(f"folder:{tmp_path}", needs=1e9, **options)
  rates = found["images_per_second"]
  assert list(rates) == ["pipeline", "plain", "resizing", "decoding"]
  assert found["per_core"] == pytest.approx(rates["pipeline"] / found["cores"])
  assert found["hosts"] == np.ceil(1e9 / rates["pipeline"])
  assert found["ratio"].keys() == {"plain", "resizing", "decoding"}


@pytest.mark.ci
def test_input_of_what_is_made(capsys, monkeypatch):
  monkeypatch.setattr(input_bench, "_TURN", 128)
  monkeypatch.setattr(input_bench, "_PHOTOS", 32)
  small = ["--image_size=32", "--batch_size=64"]
  assert main(["bench", "input", "--needs=20000", *small]) == 0
  said = capsys.readouterr().out
  assert "images/s a core" in said
  assert "20,000 images/s take" in said


@pytest.mark.ci
def test_input_needs_jpegs(tmp_path, capsys):
  for name in ("cat", "dog"):
    (tmp_path / name).mkdir()
    for i in range(4):
      Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
  assert main(["bench", "input", f"--dataset=folder:{tmp_path}"]) == 2
  assert "is not a JPEG" in capsys.readouterr().err


# --- the run ---


def test_rows_add_up():
  parts = {"start-up: imports": [3.0, 0.0, 0], "start-up": [1.0, 0.5, 0]}
  parts |= {"steps: dispatch": [5.0, 0.0, 7], "the rest": [1.0, 0.0, 0]}
  found = {"wall": 10.0, "parts": parts, "background": 0.25}
  lines = run.format_report({"cold": found}).splitlines()
  assert [line.split() for line in lines[1:]] == [
    ["start-up", "4.00", "40.0%", "0.50"],
    ["imports", "3.00", "30.0%"],
    ["the", "rest", "1.00", "10.0%", "0.50"],
    ["steps", "7", "5.00", "50.0%"],
    ["the", "rest", "1.00", "10.0%"],
    ["wall", "time", "10.00", "100.0%", "0.50"],
    ["saves", "in", "the", "background:", "0.2", "s"],
  ]


@pytest.mark.ci
def test_parts_of_a_run_add_up(tmp_path):
  runs = Runs(tmp_path)
  data.prepare("digits", str(runs.data_dir))
  overrides = {"data_dir": str(runs.data_dir), "total_steps": "4"}
  overrides |= {"eval_every": "2", "checkpoint_every": "2"}
  found = run.measure(
    spec=str(runs.config),
    overrides=overrides,
    cache=jax.config.jax_compilation_cache_dir,
    begin=time.time(),
  )
  parts = found["parts"]
  total = sum(seconds for seconds, *_ in parts.values())
  assert total == pytest.approx(found["wall"], abs=0.01)
  assert all(0 <= xla <= seconds for seconds, xla, _ in parts.values())
  counts = {name: count for name, (*_, count) in parts.items()}
  assert counts["start-up: first step"] == 1
  assert counts["steps: dispatch"] == 3
  assert counts["save"] == counts["save: fingerprint"] == 2
  assert counts["evaluation"] == 2
  assert found["background"] > 0
