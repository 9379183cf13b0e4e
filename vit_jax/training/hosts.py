"""The processes of one run: where they meet, and who is missing.

JAX waits for all of them, and when one does not come it ends the others with a
trace of C++ that names nobody. So before JAX meets, a roll is called at the
same address: process 0 listens, the others say who they are, and either all go
on or each ends with the same sentence about who was seen. The connections of
the roll may stay open: they are how lifeline.py notices who is lost later.
"""

import contextlib
import json
import logging
import platform
import selectors
import socket
import time
from importlib import metadata
from typing import Any, NamedTuple

from vit_jax import __version__
from vit_jax.errors import RunStopped, UserError

log = logging.getLogger(__name__)

START_TIMEOUT = 300  # seconds, as JAX's own
_DAY = 24 * 3600
_REPEAT = 30  # seconds between two lines of a process that waits
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")


class Place(NamedTuple):
  """Where a process stands among those of its run.

  Attributes:
    address: "host:port" of process 0.
    count: how many processes there are.
    index: which of them this is.
    devices: of this machine that are this process's; None: all.
  """

  address: str
  count: int
  index: int
  devices: list[int] | None = None


def find_place(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  timeout: float = START_TIMEOUT,
) -> Place:
  """Returns what was given, or what a TPU pod or Slurm says.

  Raises:
    UserError: neither says it, or it makes no sense.
    RunStopped: the scheduler's answer did not come.
  """
  address, count, index = coordinator, num_processes, process_id
  devices = None
  if None in (address, count, index):
    # JAX knows how each of them is asked. Named here and nowhere else: it is
    # not part of JAX's interface.
    from jax._src.clusters import ClusterEnv

    try:
      found = ClusterEnv.auto_detect_unset_distributed_params(
        address, count, index, None, None, int(timeout)
      )
    except (RuntimeError, OSError) as e:
      raise RunStopped(f"--distributed: {e}") from e
    address, count, index, devices = found
  if address is None or count is None or index is None:
    raise UserError(
      "--distributed finds no TPU pod and no Slurm step here; on other "
      "machines give --coordinator=HOST:PORT, --num_processes, --process_id"
    )
  host, _, port = address.rpartition(":")
  if not host or not port.isdigit():
    raise UserError(f"--coordinator={address}: give HOST:PORT of process 0")
  if not 0 <= index < count:
    raise UserError(
      f"--process_id={index} of --num_processes={count}; it goes from 0 to "
      f"{count - 1}"
    )
  return Place(address, count, index, list(devices) if devices else None)


def connect(place: Place, timeout: float = START_TIMEOUT) -> None:
  """Lets JAX connect the processes, once a roll has been called."""
  import jax

  jax.distributed.initialize(
    place.address,
    place.count,
    place.index,
    local_device_ids=place.devices,
    cluster_detection_method="deactivate",
    initialization_timeout=int(timeout),
    # lifeline.py is quicker, says who, and lets a stopped process be.
    heartbeat_timeout_seconds=_DAY,
    shutdown_timeout_seconds=60,
  )


def call_roll(place: Place, facts: dict, timeout: float) -> list[dict]:
  """Returns the facts of every process, once all of them are there.

  Takes and raises what `meet` does; the connections are closed.
  """
  everyone, connections = meet(place, facts, timeout)
  _close(place, connections)
  return everyone


def meet(
  place: Place, facts: dict, timeout: float
) -> tuple[list[dict], dict[int, socket.socket]]:
  """Calls the roll; returns what all said, and the connections it took.

  Args:
    place: of this process.
    facts: what the others shall know of it, of JSON's types.
    timeout: seconds that it waits.

  Returns:
    [facts], by process, each with "host" added; and {index: connection}, of
    process 0 to all others, of each of them to process 0.

  Raises:
    UserError: two processes say that they are the same one.
    RunStopped: not all came in time; says who did.
  """
  facts = {"host": socket.gethostname(), **facts}
  if place.count == 1:
    return [facts], {}
  end = time.monotonic() + timeout
  take_part = _listen if place.index == 0 else _report
  reply, connections = take_part(place, facts, end, timeout)
  if "facts" in reply:
    return reply["facts"], connections
  _close(place, connections)
  if "wrong" in reply:
    raise UserError(reply["wrong"])
  raise RunStopped(reply["missing"])


def read_versions() -> dict[str, str]:
  """Returns {package: version} of what has to be the same everywhere."""
  versions = {"python": platform.python_version(), "vit_jax": __version__}
  for name in _PACKAGES:
    try:
      versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      versions[name] = "none"
  return versions


def compare_versions(facts: list[dict]) -> str | None:
  """Says which process has other versions than process 0; None: none has."""
  first = facts[0]["versions"]
  for i, other in enumerate(facts):
    different = [
      f"{name} {version} and not {first[name]}"
      for name, version in other["versions"].items()
      if version != first[name]
    ]
    if different:
      return (
        f"process {i} on {other['host']} has {', '.join(different)} as "
        f"process 0 on {facts[0]['host']}; install the same on all of them"
      )
  return None


# --- process 0 ---


def _listen(place, facts, end, timeout):
  """Waits for the others, tells them how it went; returns that, and them."""
  roll: dict[int, dict] = {0: facts}
  connections: dict[int, socket.socket] = {}
  with _open_port(place, end) as listener, selectors.DefaultSelector() as ready:
    ready.register(listener, selectors.EVENT_READ)
    try:
      reply = _gather(place, ready, listener, roll, connections, end, timeout)
      for connection in connections.values():
        send(connection, reply)
    finally:
      for key in [*ready.get_map().values()]:
        connection: Any = key.fileobj
        if connection not in connections.values():
          connection.close()
  return reply, connections


def _gather(place, ready, listener, roll, connections, end, timeout) -> dict:
  told = time.monotonic()
  while len(roll) < place.count:
    now = time.monotonic()
    if now >= end:
      return {"missing": _say_missing(place, roll, timeout)}
    if now - told >= _REPEAT:
      told = now
      log.info("waiting: %s", _say_seen(place, roll))
    for key, _ in ready.select(min(end, told + _REPEAT) - now):
      if key.fileobj is listener:
        connection, _ = listener.accept()
        connection.setblocking(False)
        ready.register(connection, selectors.EVENT_READ, bytearray())
        continue
      wrong = _hear(place, key, ready, roll, connections)
      if wrong:
        return {"wrong": wrong}
  return {"facts": [roll[i] for i in range(place.count)]}


def _hear(place, key, ready, roll, connections) -> str | None:
  """Takes what one connection has to say; returns what is wrong with it."""
  connection, heard = key.fileobj, key.data
  try:
    new = connection.recv(2**16)
  except OSError:
    new = b""
  heard += new
  if new and not heard.endswith(b"\n") and len(heard) < 2**20:
    return None
  message = parse(heard) if new else None
  if message is None:  # it left, or is a stranger: a scanner, a health check
    for index in [i for i, c in connections.items() if c is connection]:
      del connections[index], roll[index]
    ready.unregister(connection)
    connection.close()
    return None
  heard.clear()
  index, host = message["index"], message["facts"]["host"]
  if message["count"] != place.count or not 0 < index < place.count:
    wrong = (
      f"a process on {host} was started as {index} of {message['count']}, "
      f"process 0 as 0 of {place.count}; start the same command on all"
    )
  elif index in roll:
    wrong = (
      f"two processes say that they are process {index}: on "
      f"{roll[index]['host']} and on {host}; is an older run still there?"
    )
  else:
    roll[index], connections[index] = message["facts"], connection
    return None
  send(connection, {"wrong": wrong})
  return wrong


def _say_seen(place, roll) -> str:
  missing = [i for i in range(place.count) if i not in roll]
  names = ", ".join(map(str, missing[:8])) + (", ..." if missing[8:] else "")
  present = [f"{i} on {roll[i]['host']}" for i in sorted(roll)]
  here = ", ".join(present[:4]) + (", ..." if present[4:] else "")
  return f"saw {len(roll)} of {place.count} hosts ({here}), missing {names}"


def _say_missing(place, roll, timeout) -> str:
  port = place.address.rpartition(":")[2]
  return (
    f"{_say_seen(place, roll)} after {timeout:g} s; was the command started on "
    "all of them, did it end there with an error, may they reach "
    f"{place.address} (a firewall rule for tcp:{port})?"
  )


def _open_port(place, end):
  """Opens the port of process 0; an earlier run may take a while to leave it.

  Raises:
    RunStopped: it is taken.
  """
  port = int(place.address.rpartition(":")[2])
  patience = min(end, time.monotonic() + _REPEAT)
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  while True:
    try:
      return socket.create_server(
        ("", port), family=family, dualstack_ipv6=both, backlog=1024
      )
    except OSError as e:
      if time.monotonic() >= patience:
        raise RunStopped(
          f"process 0 cannot open port {port} on {socket.gethostname()} "
          f"({e.strerror}); is an older run still there? Stop it, or give "
          "another port"
        ) from e
    time.sleep(0.5)


def _close(place, connections):
  """Closes them; the others first: the port is then free at once."""
  for connection in connections.values():
    connection.settimeout(5)
    try:
      while place.index == 0 and connection.recv(2**16):
        pass
    except OSError:
      pass
    connection.close()


# --- the others ---


def _report(place, facts, end, timeout):
  """Reports to process 0 until it answers; returns the answer, and it."""
  message = {"index": place.index, "count": place.count, "facts": facts}
  host, _, port = place.address.rpartition(":")
  why, told = "", time.monotonic()
  while (left := end - time.monotonic()) > 0:
    try:
      connection = socket.create_connection(
        (host.strip("[]"), int(port)), min(left, 10)
      )
      with contextlib.ExitStack() as stack:
        stack.enter_context(connection)
        send(connection, message)
        # Process 0 may have started later; its clock knows who is missing.
        reply = _receive(connection, end + _REPEAT)
        if reply is not None:
          stack.pop_all()  # it stays open
          return reply, {0: connection}
      why = "something else answers there, or it ended"
    except OSError as e:
      why = e.strerror or str(e)
    if time.monotonic() - told >= _REPEAT:
      told = time.monotonic()
      log.info("waiting for process 0 at %s: %s", place.address, why)
    time.sleep(0.5)
  missing = (
    f"process {place.index} on {facts['host']} did not meet all others at "
    f"process 0, {place.address}, in {timeout:g} s ({why}); was the command "
    "started there, did it end with an error, does a firewall let "
    f"tcp:{port} through?"
  )
  return {"missing": missing}, {}


def _receive(connection, end) -> dict | None:
  """Returns the reply, None if it is none of ours."""
  heard = b""
  while not heard.endswith(b"\n") and len(heard) < 2**26:
    connection.settimeout(max(0.01, end - time.monotonic()))
    try:
      # No more than the reply: what follows is the lifeline's.
      new = connection.recv(2**16, socket.MSG_PEEK)
      new = connection.recv(new.find(b"\n") + 1 or len(new) or 1)
    except TimeoutError as e:
      raise OSError(0, "process 0 is there, others are not") from e
    if not new:
      break
    heard += new
  return parse(heard)


# --- messages: a line of JSON each ---


def send(connection: socket.socket, message: dict) -> None:
  """Sends a message, if it can be sent."""
  connection.settimeout(10)
  try:
    message = {"from": "vit_jax", **message}
    connection.sendall(json.dumps(message).encode() + b"\n")
  except OSError as e:
    log.debug("not sent: %s", e)  # it is told by its own clock


def parse(text: bytes | bytearray) -> dict[str, Any] | None:
  """Returns a message of ours, None for anything else."""
  try:
    message = json.loads(text)
  except ValueError:
    return None
  if not isinstance(message, dict):
    return None
  return message if message.get("from") == "vit_jax" else None
