"""What devices send each other in a step, read from compiled HLO text.

A loop's body stands in the text once and runs many times: the bodies of
`while` are multiplied by their trips, which the loop's condition compares with.
Of a conditional the branch that sends most is counted: one of them runs. TPUs
overlap a collective with the computations around it: the text then holds it in
several fusions, which one chain joins, and it is counted in the first of them.
"""

import dataclasses
import math
import re

KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
_BYTES = {
  'pred': 1,
  's4': 1,
  'u4': 1,
  's8': 1,
  'u8': 1,
  's16': 2,
  'u16': 2,
  'f16': 2,
  'bf16': 2,
  's32': 4,
  'u32': 4,
  'f32': 4,
  's64': 8,
  'u64': 8,
  'f64': 8,
}
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.* -> .*\{\s*$')
_OPERATION = re.compile(
  rf'^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({"|".join(KINDS)})(-start)?\('
)
_ARRAY = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\]')
_LOOP = re.compile(r' while\(.*?condition=%?([\w.\-]+), body=%?([\w.\-]+)')
_TRIPS = re.compile(r'known_trip_count[^\d]*(\d+)')
_CALLED = re.compile(
  r'(?:calls|to_apply|called_computations|branch_computations|'
  r'true_computation|false_computation)='
  r'(?:\{([^}]*)\}|%?([\w.\-]+))'
)
_CONSTANT = re.compile(r' [su](?:32|64)\[\][^=]* constant\((\d+)\)')
_CHAIN = re.compile(r'channel_id=(\d+).*\bchain_id="')
_GROUPS = re.compile(r'replica_groups=\{\{([\d,]*)\}')
_GROUPS_IOTA = re.compile(r'replica_groups=\[(\d+),(\d+)\]')
_GROUPS_MESH = re.compile(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}')


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Collectives of one kind in a step, on one device.

  Attributes:
    kind: such as 'all-reduce'.
    count: operations that run.
    bytes: of their results (of their inputs for reduce-scatter): what is
      reduced or gathered, not what crosses the links.
  """

  kind: str
  count: int
  bytes: int


def parse(text: str) -> list[Traffic]:
  """Collectives by kind, most bytes first.

  Args:
    text: `compiled.as_text()` of one step.
  """
  entry = re.search(r'^ENTRY %?([\w.\-]+)', text, re.MULTILINE)
  if entry is None:
    return []
  found = _sent(entry.group(1), _computations(text), {})
  return sorted(found.values(), key=lambda t: -t.bytes)


def _computations(text: str) -> dict[str, list[str]]:
  """Name -> lines of every computation; a chain's later links are left out."""
  found, current = {}, None
  chains = set()
  for line in text.splitlines():
    chain = _CHAIN.search(line)
    if chain is not None:
      if chain.group(1) in chains:
        continue
      chains.add(chain.group(1))
    match = _COMPUTATION.match(line)
    if match is not None:
      current = found.setdefault(match.group(1), [])
    elif line.rstrip() == '}':
      current = None
    elif current is not None:  # a kernel inside may take lines of its own
      current.append(line)
  return found


def _sent(
  name: str,
  bodies: dict[str, list[str]],
  known: dict[str, dict[str, Traffic]],
) -> dict[str, Traffic]:
  """Kind -> collectives of one run of a computation and of all that it calls.

  Args:
    name: of the computation.
    bodies: of all computations.
    known: what was found so far, by name; added to.
  """
  if name in known:
    return known[name]
  total: dict[str, Traffic] = {}

  def add(found: dict[str, Traffic], times: int = 1) -> None:
    for kind, one in found.items():
      before = total.get(kind, Traffic(kind, 0, 0))
      total[kind] = Traffic(
        kind,
        before.count + times * one.count,
        before.bytes + times * one.bytes,
      )

  for line in bodies.get(name, ()):
    match = _OPERATION.match(line)
    if match is not None:
      result, kind, start = match.groups()
      size = _payload(result, kind, bool(start), line)
      add({kind: Traffic(kind, 1, size)})
    loop = _LOOP.search(line)
    if loop is not None:
      trips = _trips(line, loop.group(1), bodies)
      add(_sent(loop.group(2), bodies, known), trips)
    called = [
      _sent(one, bodies, known)
      for several, single in _CALLED.findall(line)
      for one in re.findall(r'[\w.\-]+', several or single)
    ]
    if ' conditional(' in line and called:
      called = [max(called, key=lambda f: sum(t.bytes for t in f.values()))]
    for found in called:
      add(found)
  known[name] = total
  return total


def _trips(line: str, condition: str, bodies: dict[str, list[str]]) -> int:
  """Trips of a loop: as the compiler knows them, or what ends it; else 1."""
  known = _TRIPS.search(line)
  if known is not None:
    return int(known.group(1))
  found = [int(n) for n in _CONSTANT.findall('\n'.join(bodies[condition]))]
  return max(found, default=1)


def _payload(result: str, kind: str, starts: bool, line: str) -> int:
  """Bytes of an operation's result; of its input for reduce-scatter."""
  result = re.sub(r'\{[^}]*\}', '', result)
  if starts and kind != 'all-reduce':
    # (inputs, results, ...), tuples both where several operations were joined:
    # what is gathered or passed on is the largest.
    parts = re.findall(r'\(([^()]*)\)', result[1:]) or result.split(', ')
    return max(_size(part) for part in parts)
  total = _size(result)
  return total * _group_size(line) if kind == 'reduce-scatter' else total


def _size(arrays: str) -> int:
  """Bytes of all arrays of a type, as it is written."""
  return sum(
    _BYTES.get(dtype, 0) * math.prod(int(d) for d in dims.split(',') if d)
    for dtype, dims in _ARRAY.findall(arrays)
  )


def _group_size(line: str) -> int:
  """Devices that take part in one operation; 1 where that is not said."""
  listed, iota = _GROUPS.search(line), _GROUPS_IOTA.search(line)
  if listed is not None:
    return max(1, len(listed.group(1).split(',')))
  if iota is not None:
    return int(iota.group(2))
  mesh = _GROUPS_MESH.search(line)
  if mesh is None:
    return 1
  sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
  axes = re.findall(r"'(\w+)'", mesh.group(2))
  return math.prod(int(sizes.get(axis, 1)) for axis in axes)
