"""Text reports of plans."""

from typing import Any

from vit_jax.tools.plan import add_up_seconds
from vit_jax.tools.text import format_columns

LEFT_OUT = (
  "Estimated by the compiler, not measured. Not included: collectives (listed "
  "above), waits for input, copies that do not overlap with compute, "
  "evaluations, checkpoints and restarts."
)


def format_plans(plans: list[dict[str, Any]]) -> str:
  """Returns a block for each plan, after a table if there are several."""
  blocks = ["\n".join(_list_lines(found)) for found in plans]
  if len(plans) > 1:
    head = ("", "fits", "GiB", "ms", "images/s/chip", "MFU", "chip-hours")
    blocks.insert(0, "\n".join(format_columns([head, *map(_row, plans)])))
  return "\n\n".join([*blocks, LEFT_OUT])


def format_fastest(plans: list[dict[str, Any]]) -> str:
  """Returns a table of the plans of `find_fastest`, and the first in full."""
  best = plans[0]
  rows = [("", "GiB", "ms", "collectives, ms", "images/s/chip", "MFU")]
  for found in plans:
    # The part of the time in which the chip computes.
    busy = found["step_seconds"] / add_up_seconds(found)
    rows.append(
      (
        _flags(found["overrides"]),
        f"{found['hbm_gib']:.2f}",
        f"{1e3 * found['step_seconds']:.1f}",
        f"{1e3 * found['collective_seconds']:.1f}",
        f"{busy * found['images_per_second_per_chip']:.0f}",
        f"{busy * found['mfu']:.1%}",
      )
    )
  return "\n\n".join(
    [
      "\n".join(format_columns(rows)),
      "images/s and MFU of this table include collectives, without overlap.",
      f"The fastest: {_flags(best['overrides'])}",
      "\n".join(_list_lines(best)),
      LEFT_OUT,
    ]
  )


def _list_lines(found):
  yield f"{found['config']} on {found['topology']}, {found['chips']} chips"
  limit = f"of {found['hbm_limit_gib']:.2f} GiB a chip"
  if not found["fits"]:
    need = f"{found['hbm_gib']:.2f}" if found["hbm_gib"] else "more"
    yield f"DOES NOT FIT: needs {need} {limit}"
    for attempt in found["tried"]:
      word = "fits" if attempt["fits"] else "does not fit"
      yield f"  {_flags(attempt['overrides'])}  {word}"
    if not found["fallback"]:
      yield "none of these fits; use more or larger chips"
      return
    found = found["then"]
  parts = ", ".join(f"{name} {x:.2f}" for name, x in found["hbm"].items())
  moved = ", ".join(
    f"{x['count']} {x['kind']} {x['bytes'] / 1e6:.0f} MB"
    for x in found["collectives"]
  )
  roofline = "unknown for a program with loops"
  if found["roofline_seconds"]:
    roofline = (
      f"{1e3 * found['roofline_seconds']:.1f} ms "
      f"({found['flops'] / 1e12:.2f} TFLOP, {found['bytes'] / 1e9:.1f} GB)"
    )
  yield f"fits           {found['hbm_gib']:.2f} {limit} ({parts})"
  yield (
    f"a step         {1e3 * found['step_seconds']:.1f} ms, "
    f"{found['estimated_cycles'] / 1e6:.1f} M cycles; roofline {roofline}"
  )
  yield (
    f"collectives    {moved or 'none'}; "
    f"{1e3 * found['collective_seconds']:.1f} ms if not overlapped"
  )
  yield (
    f"speed          {found['images_per_second_per_chip']:.0f} images/s a "
    f"chip, MFU {found['mfu']:.1%}"
  )
  if "hours" in found:
    dollars = f", ${found['dollars']:,.0f}" if "dollars" in found else ""
    yield (
      f"the run        {found['total_steps']:,} steps, {found['hours']:.1f} h, "
      f"{found['chip_hours']:,.0f} chip-hours{dollars}"
    )


def _flags(overrides):
  return " ".join(f"--config.{k}={v}" for k, v in overrides.items())


def _row(found):
  best = found.get("then") or found
  name = f"{found['config']} {found['topology']}"
  if not best["fits"]:
    return (name, "no", *[""] * 5)
  return (
    name,
    "yes" if found["fits"] else _flags(found["fallback"]),
    f"{best['hbm_gib']:.2f}",
    f"{1e3 * best['step_seconds']:.1f}",
    f"{best['images_per_second_per_chip']:.0f}",
    f"{best['mfu']:.1%}",
    f"{best['chip_hours']:,.0f}" if "chip_hours" in best else "?",
  )
