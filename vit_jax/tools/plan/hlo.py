"""Cycles and collectives of a compiled TPU program, read from its text.

The TPU compiler writes an estimate of cycles beside each instruction, but none
for the whole program. So the text is walked, and the body of a loop counts as
often as the loop runs.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_LINE = re.compile(
  r"\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)(.*)"
)
_KERNEL = 'custom_call_target="tpu_custom_call"'  # of Pallas


class Instruction(NamedTuple):
  """One line of a computation; `type` such as "bf16[8,128]{1,0}" or a tuple."""

  root: bool
  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]  # names, or the value of a constant
  attributes: str

  def number(self, key: str) -> float | None:
    """Returns the first number behind a key of the attributes."""
    found = re.search(rf'"{key}":"?(-?[\d.e+]+)', self.attributes)
    return float(found[1]) if found else None

  def attribute(self, key: str) -> str:
    """Returns a word, such as the computation that "calls" names, or ""."""
    found = re.search(rf"\b{key}=\{{?%?([\w.-]+)", self.attributes)
    return found[1] if found else ""


class Program(NamedTuple):
  """Computations by name, each {name: Instruction}, and which is first."""

  computations: dict[str, dict[str, Instruction]]
  entry: str


def parse(text: str) -> Program:
  """Returns the program of a compiled executable's text."""
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = "", {}
  # The metadata of a kernel stands on lines of its own.
  text = re.sub(r'\{\n("[^\n]*)\n\}', r"{\1}", text)
  for line in text.splitlines():
    if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
      current = computations[head[2]] = {}
      entry = head[2] if head[1] else entry
    elif found := _LINE.match(line):
      root, name, type_, opcode, inside, attributes = found.groups()
      operands = re.findall(r"%([\w.-]+)", inside) or [inside.strip()]
      current[name] = Instruction(
        bool(root), name, type_, opcode, tuple(operands), attributes
      )
  assert entry, "this text has no ENTRY computation"
  return Program(computations, entry)


def walk(
  program: Program, into_fusions: bool = False
) -> Iterator[tuple[int, Instruction]]:
  """Yields (how often it runs, instruction); of a conditional one branch."""

  def visit(name, times):
    for x in program.computations[name].values():
      yield times, x
      inner, more = "", 1
      if x.opcode == "while":
        inner = x.attribute("body")
        more = _count_trips(program, x, program.computations[name])
      elif x.opcode == "call":
        inner = x.attribute("to_apply")
      elif x.opcode == "conditional":
        inner = x.attribute("branch_computations")
        inner = inner or x.attribute("true_computation")
      elif into_fusions and x.opcode in ("fusion", "async-start"):
        inner = x.attribute("calls")
      if inner:
        yield from visit(inner, times * more)

  return visit(program.entry, 1)


def _count_trips(program, loop, around):
  """Returns how often a while loop runs: from its counter, limit and stride."""
  condition = program.computations[loop.attribute("condition")]
  body = program.computations[loop.attribute("body")]
  carried = around[loop.operands[0]].operands
  # The limit is a constant in the condition, or carried by the loop.
  limit, index = None, None
  comparison = _follow(condition, _find_root(condition).name)
  for name in comparison.operands if comparison else ():
    source = condition[name]
    at = source.attribute("index")
    if source.opcode == "constant":
      limit = int(source.operands[0])
    elif at and index is None:
      index = int(at)
    elif at:
      limit = _constant(around, carried[int(at)])
  if limit is None or index is None:
    raise ValueError(f"it is unknown how often {loop.name} runs")
  step = body.get(_find_root(body).operands[index])
  strides = [_constant(body, x) for x in step.operands] if step else []
  stride = next((x for x in strides if x), 1)
  first = _constant(around, carried[index]) or 0
  return max(0, -(-(limit - first) // stride))


def _find_root(computation):
  return next(x for x in computation.values() if x.root)


def _follow(computation, name):
  """Returns the instruction of a name, through copies."""
  found = computation.get(name)
  while found is not None and found.opcode in ("copy", "bitcast"):
    found = computation.get(found.operands[0])
  return found


def _constant(computation, name):
  """Returns the integer of a constant, else None."""
  found = _follow(computation, name)
  if found is None or found.opcode != "constant":
    return None
  return int(found.operands[0])


def list_cycles(program: Program) -> list[tuple[float, int, Instruction]]:
  """Returns [(cycles, times, instruction)], most cycles first.

  Collectives and background copies have no estimate and count as 0. A Pallas
  kernel has to state its "cycles" in its metadata.
  """
  rows = []
  for times, x in walk(program):
    cycles = x.number("estimated_cycles") or 0
    if cycles <= 0 and _KERNEL in x.attributes:
      cycles = x.number("cycles")
      if not cycles:
        raise ValueError(f"the kernel {x.name} does not state its cycles")
    if cycles > 0:
      rows.append((cycles * times, times, x))
  return sorted(rows, key=lambda row: -row[0])


def summarize(rows) -> list[dict[str, Any]]:
  """Adds up the rows of `list_cycles` that differ only by block.

  Returns:
    [{"what", "cycles", "count"}], most cycles first.
  """
  groups: dict[str, dict[str, Any]] = {}
  for cycles, times, x in rows:
    shape = re.sub(r"\{[^}]*\}|/\*[^*]*\*/", "", x.type)
    title = re.search(r'op_name="([^"]*)"', x.attributes)
    words = re.sub(r"block_\d+", "block", title[1] if title else "")
    words = "/".join(words.split("/")[-4:])
    what = f"{x.opcode} {shape[:50]} {words}".strip()
    group = groups.setdefault(what, {"what": what, "cycles": 0, "count": 0})
    group["cycles"] += cycles
    group["count"] += times
  return sorted(groups.values(), key=lambda group: -group["cycles"])


def list_collectives(program: Program) -> list[dict[str, Any]]:
  """Returns [{"kind", "count", "bytes" of the results}] of a step.

  The compiler writes a collective that it overlaps with other work several
  times, in different fusions, but on the same channel.
  """
  found: dict[str, dict[str, Any]] = {}
  channels = set()
  for times, x in walk(program, into_fusions=True):
    kind, channel = x.opcode.removesuffix("-start"), x.attribute("channel_id")
    if kind not in COLLECTIVES or (channel and channel in channels):
      continue
    channels.add(channel)
    sizes = _list_sizes(x.type)
    # Asynchronous ones have (operands, results, counters).
    size = max(sizes) if x.opcode.endswith("-start") else sum(sizes)
    row = found.setdefault(kind, {"kind": kind, "count": 0, "bytes": 0})
    row["count"] += times
    row["bytes"] += times * size
  return [found[kind] for kind in sorted(found)]


def _list_sizes(type_text):
  """Returns the bytes of each array of a type, without padding."""
  sizes = []
  for dtype, dims in re.findall(r"([a-z]\w*)\[([\d,]*)\]", type_text):
    bits = re.search(r"\d+", dtype)
    count = math.prod(int(x) for x in dims.split(",") if x)
    sizes.append(count * (int(bits[0]) if bits else 8) // 8)
  return sizes
