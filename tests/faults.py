"""What disks and networks do to files."""

import pathlib


def flip_a_bit(path: pathlib.Path) -> None:
  """Turns the lowest bit of the byte in the middle of a file."""
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def largest(folder: pathlib.Path) -> pathlib.Path:
  """The largest file below a folder."""
  files = [f for f in folder.rglob('*') if f.is_file()]
  return max(files, key=lambda f: f.stat().st_size)
