"""What `vit-jax plan` reads from a compiled program and makes of it."""

import importlib.util
import json

import pytest

from vit_jax import config as configuration
from vit_jax.errors import UserError
from vit_jax.tools import plan
from vit_jax.tools.plan import compiling, hlo, report

# A loop of five iterations with a matmul and a copy, as TPU programs write it;
# before it an all-reduce and a kernel.
_TEXT = """HloModule jit_step, is_scheduled=true

%fused (p.0: bf16[64,128], p.1: bf16[128,32]) -> bf16[64,32] {
  %p.0 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[128,32]{1,0} parameter(1)
  ROOT %c.1 = bf16[64,32]{1,0} convolution(%p.0, %p.1), dim_labels=bf_io->bf
}

%body (b.0: (s32[], bf16[64,128], bf16[128,32])) -> (s32[], bf16[64,128]) {
  %b.0 = (s32[], bf16[64,128]{1,0}, bf16[128,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b.0), index=0
  %x = bf16[64,128]{1,0} get-tuple-element(%b.0), index=1
  %w = bf16[128,32]{1,0} get-tuple-element(%b.0), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %f = bf16[64,32]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused, \
metadata={op_name="jit(step)/encoderblock_3/dot"}, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %copy = bf16[64,128]{1,0} copy(%x), backend_config={"estimated_cycles":"7"}
  ROOT %t = (s32[], bf16[64,128]{1,0}, bf16[128,32]{1,0}) \
tuple(%next, %copy, %w)
}

%condition (c.0: (s32[], bf16[64,128], bf16[128,32])) -> pred[] {
  %c.0 = (s32[], bf16[64,128]{1,0}, bf16[128,32]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  %j = s32[] get-tuple-element(%c.0), index=0
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (x.0: bf16[64,128], w.0: bf16[128,32]) -> bf16[64,128] {
  %x.0 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %w.0 = bf16[128,32]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %first = s32[] copy(%zero)
  %sum = (f32[10]{0}, /*index=1*/f32[6]{0}) all-reduce(%x.0, %x.0), channel_id=1
  %kernel = bf16[64,128]{1,0} custom-call(%x.0), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"cycles":"5000"
}}, backend_config={"custom_call_config":{"body":"QUJD","cost_estimate":\
{"flops":"640","transcendentals":"0","bytes_accessed":"32768"}}}
  %part = bf16[64,128]{1,0} bitcast(%kernel), \
frontend_attributes={kernel_metadata={
"cycles":"5000"
}}
  %start = (bf16[64,128]{1,0}, bf16[64,128]{1,0}, u32[]) copy-start(%x.0)
  %done = bf16[64,128]{1,0} copy-done(%start)
  %init = (s32[], bf16[64,128]{1,0}, bf16[128,32]{1,0}) \
tuple(%first, %done, %w.0)
  %loop = (s32[], bf16[64,128]{1,0}, bf16[128,32]{1,0}) while(%init), \
condition=%condition, body=%body
  ROOT %out = bf16[64,128]{1,0} get-tuple-element(%loop), index=1
}
"""


_FOUR = compiling.Slice("v5e:2x2", compiling.CHIPS["v5e"], 4, (None,) * 4)


def test_cycles_count_as_often_as_they_run():
  found = hlo.read(_TEXT)["hottest"]
  assert [(row["cycles"], row["count"]) for row in found] == [
    (5000, 1),
    (500, 5),
    (35, 5),
  ]
  assert found[1]["what"] == "fusion bf16[64,32] jit(step)/encoderblock/dot"


def test_what_has_no_number_is_no_guess():
  with pytest.raises(ValueError, match="trip count of the loop of condition"):
    hlo.read(_TEXT.replace("constant(5)", "rng()"))
  with pytest.raises(ValueError, match="kernel has no cycles in its metadata"):
    hlo.read(_TEXT.replace('"cycles":"5000"', '"about":"5000"'))
  # But for mixup's, which seldom goes round twice.
  title = 'body=%body, metadata={op_name="jit(_beta)/jit(_gamma)/while"}'
  text = _TEXT.replace("constant(5)", "rng()").replace("body=%body", title)
  assert hlo.read(text)["estimated_cycles"] == 5107


def test_figures_follow_from_cycles_and_collectives():
  for chip, gigahertz in (("v3", 0.94), ("v4", 1.05), ("v5p", 1.75)):
    clock = compiling.CHIPS[chip].clock() / 1e9
    assert clock == pytest.approx(gigahertz, abs=0.005)
  cost = {"flops": 197e6, "bytes accessed": 1.0}
  found = plan.estimate(_TEXT, cost, _FOUR, 64, 64e6)
  assert found["roofline_seconds"] is None  # of a program with a loop
  assert found["estimated_cycles"] == 5535
  assert found["step_seconds"] == pytest.approx(5535 / 1.503e9, rel=1e-3)
  assert found["collectives"] == [
    {"kind": "all-reduce", "count": 1, "bytes": 64}
  ]
  # 64 bytes twice, of which 3/4 leave a chip, over 200 GB/s.
  assert found["collective_seconds"] == pytest.approx(2 * 64 * 3 / 4 / 200e9)
  text = _TEXT.replace("while(%init)", "copy(%init)")
  found = plan.estimate(text, cost, _FOUR, 64, 64e6, 10_000, price=2.0)
  seconds = found["step_seconds"]
  assert found["roofline_seconds"] == pytest.approx(1e-6)
  assert found["mfu"] == pytest.approx(16 * 1e6 / seconds / 197e12)
  # 10,000 steps on 4 chips, at 2 dollars an hour of a chip.
  assert found["hours"] == pytest.approx(10_000 * seconds / 3600)
  assert found["dollars"] == pytest.approx(8 * found["hours"])


def test_a_collective_in_pieces_is_one():
  # The TPU compiler writes it once more in each fusion that hides some of it.
  # Another kind may have the same number, as have all of `shard_map`.
  found = hlo.read(
    """%begin (p: bf16[4]) -> bf16[8] {
  %p = bf16[4]{0} parameter(0)
  ROOT %a = bf16[8]{0} all-gather(%p), channel_id=3, dimensions={0}
}

%go_on (q: bf16[4]) -> bf16[8] {
  %q = bf16[4]{0} parameter(0)
  ROOT %b = bf16[8]{0} all-gather(%q), channel_id=3, dimensions={0}
}

%all-reduce-scatter (r: bf16[8]) -> bf16[4] {
  %r = bf16[8]{0} parameter(0)
  %all = bf16[8]{0} all-reduce(%r), channel_id=6
  ROOT %mine = bf16[4]{0} dynamic-slice(%all, %offset)
}

ENTRY %main (x: bf16[4]) -> bf16[8] {
  %x = bf16[4]{0} parameter(0)
  %f = bf16[8]{0} fusion(%x), kind=kCustom, calls=%begin
  %h = bf16[4]{0} fusion(%f), kind=kCustom, calls=%all-reduce-scatter, RING
  %g = bf16[8]{0} fusion(%x), kind=kCustom, calls=%go_on
  %other = bf16[8]{0} all-gather(%x), channel_id=4, dimensions={0}
  %start = (bf16[4]{0}, bf16[8]{0}) all-gather-start(%x), channel_id=5
  %sum = bf16[8]{0} all-reduce(%other), channel_id=3
  %d = bf16[4]{0} reduce-scatter(%x), HALF, op_name="a/shard_map/r"
  %e = bf16[2]{0} reduce-scatter(%x), FOURTH, op_name="b/shard_map/r"
  ROOT %c = bf16[8]{0} add(%f, %sum)
}
""".replace("HALF", "channel_id=1, replica_groups={{0,1},{2,3}}")
    .replace("FOURTH", "channel_id=1, replica_groups=[1,4]<=[4]")
    .replace("RING", '"emitter":"SingleInputAllReduceScatterFusion"')
  )
  assert found["collectives"] == [
    {"kind": "all-gather", "count": 3, "bytes": 48},
    {"kind": "all-reduce", "count": 1, "bytes": 16},
    # A fusion of a sum and of the slice that a chip keeps is one too.
    {"kind": "reduce-scatter", "count": 3, "bytes": 48},
  ]


def test_what_cannot_be_planned_is_one_line(monkeypatch):
  for topology in ("v5:4x4", "v5e", "a100:8"):
    with pytest.raises(UserError, match="the chips are v2, v3, v4, v5e"):
      compiling.find_slice(topology)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'vit_jax\[plan\]'"):
    compiling.find_slice("v5e:4x4")


def test_sizes_of_known_data():
  config = configuration.load("configs/pretrain.py:ViT-B_16,jft")
  assert plan.find_sizes(config, None, None) == (18291, 303_000_000)
  assert plan.find_sizes(config, 10, None) == (10, 303_000_000)
  config = configuration.load(
    "configs/pretrain.py:ViT-B_16,jft", {"train.dataset": "folder:/mine"}
  )
  assert plan.find_sizes(config, 3, 50) == (3, 50)
  with pytest.raises(UserError, match="--num_classes=N"):
    plan.find_sizes(config, None, None)


def test_a_teacher_is_not_estimated(monkeypatch):
  monkeypatch.setattr(plan, "find_slice", lambda topology: _FOUR)
  with pytest.raises(UserError, match="cannot estimate the teacher runs/big;"):
    plan.plan("common", "v5e:2x2", overrides={"teacher.source": "runs/big"})


def test_the_first_fallback_that_fits_is_taken(monkeypatch):
  monkeypatch.setattr(plan, "find_slice", lambda topology: _FOUR)

  def fake(spec, overrides, *_):
    return {"fits": overrides.get("fsdp", "1") >= need, "hbm_gib": 1.0}

  monkeypatch.setattr(plan, "_try", fake)
  given = ("configs/pretrain.py:ViT-B_16,jft", "v5e:2x2")
  need = "2"
  found = plan.plan(*given, overrides={"batch_size": "16"})
  full = {"model.remat": "full"}
  assert (found["fits"], found["then"]["fits"]) == (False, True)
  assert found["fallback"] == full | {"fsdp": "2"}
  network = {"batch_size": "16", "model.variant": "EfficientNet-B0"}
  found = plan.plan(*given, overrides=network)
  assert {"model.remat": "dots"} not in [x["overrides"] for x in found["tried"]]
  need = "8"
  found = plan.plan(*given, overrides={"batch_size": "16"})
  assert found["fallback"] is None
  assert [attempt["overrides"] for attempt in found["tried"]] == [
    {"model.remat": "dots"},
    full,
    full | {"fsdp": "2"},
    full | {"fsdp": "4"},
    full | {"fsdp": "4", "micro_batches": "2"},
    full | {"fsdp": "4", "micro_batches": "4"},
  ]


def test_the_fastest_includes_collectives(monkeypatch):
  monkeypatch.setattr(plan, "find_slice", lambda topology: _FOUR)
  tried = []

  def fake(spec, overrides, *_):
    fsdp, remat = int(overrides["fsdp"]), overrides.get("model.remat", "none")
    tried.append((fsdp, remat))
    if fsdp == 4:
      raise UserError("fsdp 4 does not divide axis 0")
    step = {"step_seconds": 1.0 / fsdp, "collective_seconds": 0.9 * (fsdp - 1)}
    step |= {"images_per_second_per_chip": 10 * fsdp, "mfu": 0.3 * fsdp}
    return {"fits": fsdp > 1 or remat == "dots", "hbm_gib": 1.0, **step}

  monkeypatch.setattr(plan, "_try", fake)
  found = plan.find_fastest(
    "configs/pretrain.py:ViT-B_16,jft",
    "v5e:2x2",
    overrides={"batch_size": "16"},
  )
  assert tried == [(1, "none"), (1, "dots"), (2, "none"), (4, "none")]
  assert [x["overrides"] for x in found] == [
    {"fsdp": "1", "model.remat": "dots"},  # 1 s
    {"fsdp": "2"},  # 0.5 s and 0.9 s
  ]
  monkeypatch.setattr(report, "_list_lines", lambda found: ["details"])
  lines = report.format_fastest(found).splitlines()
  assert lines[1].split() == [
    *("--config.fsdp=1", "--config.model.remat=dots"),
    *("1.00", "1000.0", "0.0", "10", "30.0%"),
  ]
  # 20 images in 0.5 s are 20 * 0.5 / 1.4 with collectives.
  assert lines[2].split()[1:] == ["1.00", "500.0", "900.0", "7", "21.4%"]
  monkeypatch.setattr(plan, "_try", lambda *_: {"fits": False})
  with pytest.raises(UserError, match="does not fit on v5e:2x2; use more"):
    plan.find_fastest("configs/pretrain.py:ViT-B_16,jft", "v5e:2x2")


def test_the_needed_memory():
  error = "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
  assert plan.read_need(error) == 20.5
  assert plan.read_need("Used 512.0M of 1.0G hbm") == 0.5
  assert plan.read_need("something else") is None


# --- with the compiler ---

_TINY = {
  "model.variant": "ViT-w128d2m512h2_8",
  "image_size": "32",
  "batch_size": "64",
  "model.representation_size": "0",
}
_SPEC = "configs/pretrain.py:ViT-B_16,imagenet2012"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """The plan of a tiny model, and the text of its program."""
  file = tmp_path_factory.mktemp("plan") / "step.txt"
  found = plan.plan(_SPEC, "v5e:2x2", overrides=_TINY, dump_hlo=str(file))
  return found, file.read_text()


def _count_kernels(text):
  return text.count('="tpu_custom_call"')


@pytest.mark.ci
def test_a_chip_has_a_step(tiny):
  found, text = tiny
  assert found["fits"]
  assert found["chips"] == 4
  # Of each block's attention one each way, of its norms two backward.
  assert _count_kernels(text) == 2 * 4
  assert found["estimated_cycles"] == hlo.read(text)["estimated_cycles"]
  assert json.loads(json.dumps(found)) == found
  assert "images/s a chip" in report.format_plans([found])


@pytest.mark.nightly
@pytest.mark.parametrize(
  "topology", ["v3:2x2", "v4:2x2x1", "v5p:2x2x1", "v6e:2x2"]
)
def test_other_chips_have_a_step(topology, tmp_path):
  file = tmp_path / "step.txt"
  found = plan.plan(_SPEC, topology, overrides=_TINY, dump_hlo=str(file))
  assert found["fits"]
  assert found["chips"] == 4
  kernels = 2 if "v3" in topology else 4  # v3 takes only those of norms
  assert _count_kernels(file.read_text()) == 2 * kernels


@pytest.mark.ci
def test_fsdp_gathers_each_kernel_once(tiny, caplog):
  caplog.set_level("INFO")
  found = plan.plan(_SPEC, "v5e:2x2", overrides=_TINY | {"fsdp": "4"})
  assert caplog.messages[0].endswith("2 minutes for ViT-B_16 on two cores")
  whole, _ = tiny
  exchanged = {x["kind"]: x["bytes"] for x in found["collectives"]}
  # Else pieces of the class tokens at most, not tokens or loops over kernels.
  others = set(exchanged) - {"all-gather", "all-reduce", "reduce-scatter"}
  assert sum(exchanged[kind] for kind in others) < 0.02 * sum(
    exchanged.values()
  )
  # In bfloat16, half of float32, and a batch's logits, which count for more
  # here than they do with real models.
  parameters = whole["hbm"]["parameters"] * plan.GIB
  assert exchanged["all-gather"] <= 1.15 * parameters / 2
  # Loops over pieces of kernels would be several times as many.
  assert found["estimated_cycles"] < 1.3 * whole["estimated_cycles"]


@pytest.mark.nightly
def test_what_does_not_fit_has_a_fallback_that_does():
  found = plan.plan(
    "configs/pretrain.py:ViT-B_16,jft",
    "v5e:2x2",
    overrides={"batch_size": "4096", "model.scan": "true"},
  )
  assert not found["fits"]
  assert found["fallback"]
  assert found["then"]["fits"]
  assert "DOES NOT FIT" in report.format_plans([found])
