"""The seconds of each test file, from pytest's report.

  make test PYTEST_ADDOPTS=--junitxml=default.xml
  make test-ci PYTEST_ADDOPTS=--junitxml=ci.xml
  python benchmarks/test_times.py default.xml ci.xml

They are wall-clock seconds in a test or its fixtures, added up over the
workers, so they include waiting.
"""

import collections
import sys
import xml.etree.ElementTree as ET


def main(files: list[str]) -> None:
  columns = [read_seconds(file) for file in files]
  names = sorted(
    set().union(*columns), key=lambda name: -sum(c[name] for c in columns)
  )
  print("| test file |", " | ".join(files), "|")
  print("|---|" + "---|" * len(files))
  for name in (*names, "all"):
    cells = [c[name] if name != "all" else sum(c.values()) for c in columns]
    print(f"| {name} |", " | ".join(f"{x:,.0f}" for x in cells), "|")


def read_seconds(file: str) -> collections.Counter:
  """Returns {test file: seconds} of a JUnit report."""
  seconds = collections.Counter()
  for case in ET.parse(file).iter("testcase"):
    name = case.get("classname", "").rpartition(".")[2]
    seconds[name] += float(case.get("time", 0))
  return seconds


if __name__ == "__main__":
  main(sys.argv[1:])
