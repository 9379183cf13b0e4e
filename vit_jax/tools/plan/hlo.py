"""Cycles and collectives of a compiled TPU program, read from its text.

The TPU compiler writes an estimate of cycles beside each instruction, but none
for the whole program, and XLA's own analysis counts the body of a loop once.
"""

import collections
import math
import re
from typing import Any

_COMPUTATION = re.compile(
  r"^(ENTRY )?%?([\w.-]+) \(.*\{\n((?:.*\n)*?)\}$", re.M
)
_INSTRUCTION = re.compile(r"= (\(.*?\)|\S+) ([\w-]+)\(")  # its type and opcode
# A fusion that sums an array, padded to whole tiles, and keeps a chip's part.
_SCATTERS = re.compile(r"calls=%?([\w.-]+).*AllReduceScatterFusion")
# Only the first branch of a conditional.
_CALLED = re.compile(
  r"\b(?:calls|to_apply|body|branch_computations|true_computation)"
  r"=\{?%?([\w.-]+)"
)
_COLLECTIVE = re.compile(
  r"(all-reduce|all-gather|reduce-scatter|(?:ragged-)?all-to-all"
  r"|collective-permute|collective-broadcast)(-start)?"
)


def read(text: str) -> dict[str, Any]:
  """Returns the costs of a step from a compiled executable's text.

  Returns:
    "estimated_cycles", without collectives and background copies; "hottest",
    [{"what", "cycles", "count"}], most cycles first, summed over blocks;
    "collectives", [{"kind", "count", "bytes" of the results, or of what a
    reduce-scatter sums}]; "loops", whether there are any.

  Raises:
    ValueError: a Pallas kernel without "cycles" in its metadata, or a loop
      whose counter is not compared with a constant.
  """
  cycles, runs, moved, number = (collections.Counter() for _ in range(4))
  opcodes, channels = set(), set()
  scatters = set(_SCATTERS.findall(text))
  for times, shape, opcode, line, caller in _list_instructions(text):
    opcodes.add(opcode)
    # What reads a kernel's result may repeat the kernel's metadata.
    key = "cycles" if '="tpu_custom_call"' in line else "estimated_cycles"
    if found := re.search(rf'"{key}":"([1-9]\d*)"', line):
      what = _describe(shape, opcode, line)
      cycles[what] += times * int(found[1])
      runs[what] += times
    elif key == "cycles":
      raise ValueError(f"a kernel has no cycles in its metadata: {line[:80]}")
    if not (found := _COLLECTIVE.fullmatch(opcode)):
      continue
    # A collective that is overlapped with other work occurs several times, in
    # different fusions, but on the same channel. All of `shard_map` share one.
    kind, starts = found.groups()
    manual = re.findall(r'op_name="[^"]*/shard_map/[^"]*"', line)
    channel = {(kind, x, *manual) for x in re.findall(r"channel_id=\d+", line)}
    if channels.isdisjoint(channel):
      channels |= channel
      sizes = _list_sizes(shape)
      # Asynchronous ones have (operands, results, counters).
      size = max(sizes) if starts else sum(sizes) * _count_pieces(kind, line)
      if kind == "all-reduce" and caller in scatters:
        kind = "reduce-scatter"
      moved[kind] += times * size
      number[kind] += times
  return {
    "estimated_cycles": cycles.total(),
    "hottest": [
      {"what": what, "cycles": n, "count": runs[what]}
      for what, n in cycles.most_common()
    ],
    "collectives": [
      {"kind": kind, "count": number[kind], "bytes": moved[kind]}
      for kind in sorted(moved)
    ],
    "loops": "while" in opcodes,
  }


def _count_pieces(kind, line):
  """Returns into how many pieces a reduce-scatter cuts its sum, else 1."""
  if kind != "reduce-scatter":
    return 1
  groups = re.search(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])", line)
  if not groups:
    raise ValueError(f"the groups of a reduce-scatter are unknown: {line[:80]}")
  return int(groups[2] or groups[1].count(",") + 1)


def _list_instructions(text):
  """Yields (execution count, type, opcode, line, caller) of instructions."""
  # Each computation is defined before its callers.
  blocks = _COMPUTATION.findall(text)[::-1]
  bodies = {name: body for _, name, body in blocks}
  times = collections.Counter(name for entry, name, _ in blocks if entry)
  for _, caller, body in blocks:
    for line in body.split("\n  "):
      if found := _INSTRUCTION.search(line):
        yield times[caller], *found.groups(), line, caller
        trips = _count_trips(bodies, line) if found[2] == "while" else 1
        for name in _CALLED.findall(line):
          times[name] += times[caller] * trips


def _count_trips(bodies, line):
  """Returns a loop's trip count; scans count by 1 from 0 to a constant."""
  if "/jit(_gamma)/" in line:  # mixup's rejection sampling
    return 1
  [name] = re.findall(r"condition=%?([\w.-]+)", line)
  limits = re.findall(r"= s32\[\]\S* constant\((\d+)\)", bodies[name])
  if len(limits) != 1:
    raise ValueError(f"the trip count of the loop of {name} is unknown")
  return int(limits[0])


def _describe(shape, opcode, line):
  """Returns a description that is the same for all blocks of a model."""
  shape = re.sub(r"\{[^}]*\}|/\*[^*]*\*/", "", shape)
  title = re.search(r'op_name="([^"]*)"', line)
  words = re.sub(r"block_\d+", "block", title[1] if title else "")
  return f"{opcode} {shape[:50]} {'/'.join(words.split('/')[-4:])}".strip()


def _list_sizes(shape):
  """Returns the bytes of each array of a type, without padding."""
  return [
    math.prod(int(x) for x in dims.split(",") if x) * int(bits or 8) // 8
    for bits, dims in re.findall(r"\b[a-z]+(\d*)\w*\[([\d,]*)\]", shape)
  ]
