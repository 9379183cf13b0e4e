"""Reads the text of a compiled program: cycles, products, bytes, collectives.

XLA's own totals count the body of a loop once, however often it runs, and the
TPU compiler's estimate of cycles stands on each instruction alone. So the text
is walked, and each loop's body counts as often as the loop goes around.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
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

# Instructions that only name bytes that are there already.
_FREE = (
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "after-all",
  "while",
  "conditional",
  "call",
)
_ITEM_BITS = {"pred": 8, "token": 0}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")


class Instruction(NamedTuple):
  """One line of a computation.

  Attributes:
    name: without the percent sign.
    type: text, such as "bf16[8,128]{1,0}" or a tuple of them.
    opcode: such as "fusion".
    operands: names, or the text between the parentheses of a constant.
    attributes: the text behind the operands.
    root: whether it is its computation's result.
  """

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  root: bool

  def number(self, key: str) -> float | None:
    """Returns the first number that stands behind a key of the attributes."""
    found = re.search(rf'"{key}":"?(-?[\d.e+]+)', self.attributes)
    return float(found[1]) if found else None

  def called(self, key: str) -> str | None:
    """Returns the computation that an attribute such as "calls" names."""
    found = re.search(rf"\b{key}=%?([\w.-]+)", self.attributes)
    return found[1] if found else None


class Program(NamedTuple):
  """Computations by name, each {name: Instruction}, and which is first."""

  computations: dict[str, dict[str, Instruction]]
  entry: str


class Collective(NamedTuple):
  """Of one kind: how many a step has, and the bytes of their results."""

  kind: str
  count: int
  bytes: int


def parse(text: str) -> Program:
  """Returns the program of a compiled executable's text."""
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = "", {}
  # What a kernel says of itself stands on lines of its own.
  text = re.sub(r'\{\n("[^\n]*)\n\}', r"{\1}", text)
  for line in text.splitlines():
    head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
    if head:
      current = computations[head[2]] = {}
      entry = head[2] if head[1] else entry
    elif " = " in line:
      instruction = _parse_line(line)
      if instruction:
        current[instruction.name] = instruction
  assert entry, "this text has no ENTRY computation"
  return Program(computations, entry)


def _parse_line(line):
  found = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
  if not found:
    return None
  start = found.end()
  end = _close(line, start) if line[start] == "(" else line.index(" ", start)
  opening = line.index("(", end)
  closing = _close(line, opening)
  opcode = line[end:opening].strip()
  inside = line[opening + 1 : closing - 1]
  operands = tuple(re.findall(r"%([\w.-]+)", inside)) or (inside.strip(),)
  return Instruction(
    found[2],
    line[start:end],
    opcode,
    operands,
    line[closing:],
    bool(found[1]),
  )


def _close(line, start):
  """Returns the index behind the parenthesis that closes that at `start`."""
  depth = 0
  for i in range(start, len(line)):
    depth += {"(": 1, ")": -1}.get(line[i], 0)
    if not depth:
      return i + 1
  raise ValueError(f"a parenthesis is not closed: {line[:80]}")


def walk(
  program: Program, into_fusions: bool = False
) -> Iterator[tuple[Instruction, int, dict[str, Instruction]]]:
  """Yields (instruction, how often it runs, its computation).

  Of a conditional the first branch counts. What fusions and asynchronous
  instructions are made of is left out unless it is asked for.
  """
  yield from _walk(program, program.entry, 1, into_fusions)


def _walk(program, name, times, into_fusions):
  instructions = program.computations[name]
  for instruction in instructions.values():
    yield instruction, times, instructions
    inner, more = None, 1
    if instruction.opcode == "while":
      inner = instruction.called("body")
      more = count_trips(program, instruction, instructions)
    elif instruction.opcode == "call":
      inner = instruction.called("to_apply")
    elif instruction.opcode == "conditional":
      branches = re.search(
        r"(?:branch_computations=\{|true_computation=)%?([\w.-]+)",
        instruction.attributes,
      )
      inner = branches[1] if branches else None
    elif into_fusions and instruction.opcode in ("fusion", "async-start"):
      inner = instruction.called("calls")
    if inner:
      yield from _walk(program, inner, times * more, into_fusions)


def count_trips(program: Program, loop: Instruction, around: dict) -> int:
  """Returns how often a while loop runs.

  As annotated, or from its condition (counter < limit), the counter's first
  value and what the body adds to it.

  Raises:
    ValueError: the loop does not count so.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if known:
    return int(known[1])
  condition = program.computations[loop.called("condition") or ""]
  body = program.computations[loop.called("body") or ""]
  # The constant may stand in the condition or be carried by the loop.
  limit, index = None, None
  carried = around.get(loop.operands[0])
  for operand in _follow_to_comparison(program, condition):
    source = condition.get(operand)
    if source is not None and source.opcode == "constant":
      limit = int(source.operands[0])
    elif source is not None and source.opcode == "get-tuple-element":
      at = _index(source)
      if index is None:
        index = at
      else:
        limit = _constant(around, carried.operands[at]) if carried else None
  if limit is None or index is None:
    raise ValueError(f"nobody knows how often {loop.name} runs")
  first = (_constant(around, carried.operands[index]) if carried else 0) or 0
  return max(0, -(-(limit - first) // _find_stride(body, index)))


def _follow_to_comparison(program, condition):
  """Returns the names of what a condition compares, in its own computation."""
  root = next(i for i in condition.values() if i.root)
  while root.opcode in ("copy", "bitcast"):
    root = condition[root.operands[0]]
  return root.operands


def _find_stride(body, index):
  """Returns what a loop's body adds to its counter, 1 if that is not plain."""
  root = next(i for i in body.values() if i.root)
  if root.opcode == "tuple":
    step = body.get(root.operands[index])
    if step is not None and step.opcode == "add":
      constants = [_constant(body, operand) for operand in step.operands]
      return next((c for c in constants if c), 1)
  return 1


def _index(instruction):
  found = re.search(r"index=(\d+)", instruction.attributes)
  assert found, f"{instruction.name} has no index"
  return int(found[1])


def _constant(instructions, name):
  """Returns the integer that an instruction is, None if it is no constant."""
  found = instructions.get(name)
  while found is not None and found.opcode in ("copy", "bitcast"):
    found = instructions.get(found.operands[0])
  if found is None or found.opcode != "constant":
    return None
  return int(found.operands[0])


# --- what a program costs ---


def count_cycles(
  program: Program, cost_kernel: Callable[[dict[str, Any]], float]
) -> float:
  """Returns the compiler's estimate of a step's cycles.

  Instructions without an estimate (collectives, copies in the background) cost
  nothing here, but for custom kernels.

  Args:
    program: from `parse`.
    cost_kernel: a custom kernel's own count {"flops", "transcendentals",
      "bytes_accessed"} -> cycles. If it says "cycles" as well, the larger
      of the two counts.
  """
  return sum(row[0] for row in list_cycles(program, cost_kernel))


def list_cycles(program, cost_kernel) -> list[tuple[float, int, Instruction]]:
  """Returns [(cycles, times, instruction)], most cycles first."""
  rows = []
  for instruction, times, _ in walk(program):
    cycles = instruction.number("estimated_cycles") or 0
    if cycles <= 0 and is_kernel(instruction):
      counted = cost_kernel(read_kernel_cost(instruction))
      cycles = max(instruction.number("cycles") or 0, counted)
    if cycles > 0:
      rows.append((cycles * times, times, instruction))
  return sorted(rows, key=lambda row: -row[0])


def is_kernel(instruction: Instruction) -> bool:
  """Returns whether it is a kernel that somebody wrote, as with Pallas."""
  return (
    instruction.opcode == "custom-call"
    and 'custom_call_target="tpu_custom_call"' in instruction.attributes
  )


def read_kernel_cost(instruction: Instruction) -> dict[str, float]:
  """Returns what a kernel's author says that it costs.

  Raises:
    ValueError: nothing is said, or nothing but zeros.
  """
  cost = {
    key: instruction.number(key) or 0.0
    for key in ("flops", "transcendentals", "bytes_accessed")
  }
  if not any(cost.values()):
    raise ValueError(
      f"the kernel {instruction.name} has neither cycles nor a cost_estimate"
    )
  return cost


def count_flops(program: Program) -> float:
  """Returns the operations of all products: two for each multiply-add.

  Products with padding are left out, as XLA does. A kernel's are its own count.
  """
  total = 0.0
  for instruction, times, around in walk(program, into_fusions=True):
    if instruction.opcode == "convolution":
      total += times * _convolution_flops(instruction, around)
    elif instruction.opcode == "dot":
      total += times * _dot_flops(instruction, around)
    elif is_kernel(instruction):
      total += times * read_kernel_cost(instruction)["flops"]
  return total


def count_loop_bytes(program: Program) -> float:
  """Returns the bytes that loops access after their first time around.

  XLA's own count has the first. Each instruction reads its operands and writes
  its result; of an array that a fusion only slices, or updates a slice of, the
  slice alone is counted.
  """
  total = 0.0
  for instruction, times, around in walk(program):
    if times > 1 and instruction.opcode not in _FREE:
      total += (times - 1) * _instruction_bytes(program, instruction, around)
  return total


def list_collectives(program: Program) -> list[Collective]:
  """Returns what devices exchange in a step, by kind.

  One that other work hides is written several times, in the fusions that begin
  it, go on with it and end it; all of them are on the same channel.
  """
  found: dict[str, list[int]] = {}
  channels = set()
  for instruction, times, _ in walk(program, into_fusions=True):
    kind = instruction.opcode.removesuffix("-start")
    channel = instruction.called("channel_id")
    if kind not in COLLECTIVES or (channel and channel in channels):
      continue
    channels.add(channel)
    size = _result_bytes(instruction)
    count = found.setdefault(kind, [0, 0])
    count[0] += times
    count[1] += times * size
  return [Collective(kind, *found[kind]) for kind in sorted(found)]


def _result_bytes(instruction):
  """Returns the bytes of a collective's result."""
  sizes = [_size_of(*shape) for shape in _SHAPE.findall(instruction.type)]
  if instruction.opcode.endswith("-start") and len(sizes) > 1:
    # (operands, results, counters): the larger half is what is moved.
    return max(sizes)
  return sum(sizes)


def count_bytes(type_text: str) -> int:
  """Returns the bytes of an array or a tuple, padding left out."""
  return sum(_size_of(*shape) for shape in _SHAPE.findall(type_text))


@functools.cache
def _size_of(dtype, dims):
  if dtype not in _ITEM_BITS:
    bits = re.search(r"\d+", dtype)
    _ITEM_BITS[dtype] = int(bits[0]) if bits else 0
  return math.prod(_dims(dims)) * _ITEM_BITS[dtype] // 8


def _dims(text):
  return tuple(int(x) for x in text.split(",") if x)


def _shape(instruction):
  """Returns the shape of an array."""
  found = _SHAPE.search(instruction.type)
  assert found, f"{instruction.name} is no array"
  return _dims(found[2])


def _instruction_bytes(program, instruction, around):
  inner = program.computations.get(instruction.called("calls") or "", {})
  total = 0
  for i, operand in enumerate(instruction.operands):
    source = around.get(operand)
    if source is not None:
      full = count_bytes(source.type)
      total += min(full, _sliced_bytes(inner, i, full))
  root = next((i for i in inner.values() if i.root), None)
  if root is not None and root.opcode == "dynamic-update-slice":
    return total + count_bytes(inner[root.operands[1]].type)
  return total + count_bytes(instruction.type)


def _sliced_bytes(inner, position, full):
  """Returns what a fusion reads of its operand at `position`."""
  parameter = next(
    (
      i.name
      for i in inner.values()
      if i.opcode == "parameter" and i.operands == (str(position),)
    ),
    None,
  )
  users = [i for i in inner.values() if parameter in i.operands]
  read = 0
  for user in users:
    if user.opcode == "dynamic-slice":
      read += count_bytes(user.type)
    elif user.opcode != "dynamic-update-slice" or (
      user.operands[0] != parameter
    ):
      return full
  return read if users else full


def _dot_flops(instruction, around):
  contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)", instruction[4])
  left = _shape(around[instruction.operands[0]])
  axes = _dims(contracted[1]) if contracted else ()
  summed = math.prod(left[axis] for axis in axes)
  return 2 * summed * math.prod(_shape(instruction))


def _convolution_flops(instruction, around):
  """TPU programs write every product as a convolution.

  The batch axes of a product are its spatial ones, where dilation and padding
  see to it that few taps fall on the other operand.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
  assert labels, f"{instruction.name} has no dim_labels"
  image, kernel = (_shape(around[name]) for name in instruction.operands[:2])
  out = _shape(instruction)
  total = 2 * kernel[labels[2].index("i")]
  total *= out[labels[3].index("b")] * out[labels[3].index("f")]
  window = _read_window(instruction.attributes)
  for i, axis in enumerate(sorted(set(labels[3]) - {"b", "f"})):
    total *= _count_taps(
      image[labels[1].index(axis)],
      kernel[labels[2].index(axis)],
      out[labels[3].index(axis)],
      *(window[name][i] for name in ("stride", "pad", "lhs", "rhs")),
    )
  # The kernel's "i" is already an input feature of one group.
  groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
  return total / (int(groups[1]) if groups else 1)


def _read_window(attributes):
  """Returns {"stride", "pad" (low), "lhs", "rhs"} of a convolution's window."""
  found = re.search(r"window=\{([^}]*)\}", attributes)
  text = found[1] if found else ""
  fields = dict(field.split("=") for field in text.split())
  axes = len(fields.get("size", "").split("x"))

  def read(name, default):
    values = fields.get(name)
    if values is None:
      return [default] * axes
    return [int(value.split("_")[0]) for value in values.split("x")]

  return {
    "stride": read("stride", 1),
    "pad": read("pad", 0),
    "lhs": read("lhs_dilate", 1),
    "rhs": read("rhs_dilate", 1),
  }


@functools.cache
def _count_taps(size, kernel, out, stride, low, dilation, kernel_dilation):
  """Returns how often a kernel's taps fall on an element along one axis."""
  count = 0
  for tap in range(kernel):
    for position in range(out):
      place = position * stride - low + tap * kernel_dilation
      count += place % dilation == 0 and 0 <= place < size * dilation
  return count


def summarize(rows) -> list[dict[str, Any]]:
  """Returns the rows of `list_cycles` for people, the blocks' like ones added.

  Each is {"what", "cycles", "count"}.
  """
  groups: dict[str, list[float]] = {}
  for cycles, times, instruction in rows:
    group = groups.setdefault(_describe(instruction), [0, 0])
    group[0] += cycles
    group[1] += times
  ordered = sorted(groups.items(), key=lambda item: -item[1][0])
  return [
    {"what": what, "cycles": cycles, "count": count}
    for what, (cycles, count) in ordered
  ]


def _describe(instruction):
  """Returns what an instruction makes, and the end of where it comes from."""
  shape = re.sub(r"\{[^}]*\}|/\*[^*]*\*/", "", instruction.type)
  title = re.search(r'op_name="([^"]*)"', instruction.attributes)
  words = title[1] if title else ""
  words = "/".join(re.sub(r"block_\d+", "block", words).split("/")[-4:])
  return f"{instruction.opcode} {shape[:50]} {words}".strip()
