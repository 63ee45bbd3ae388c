"""Lists of buffers, as readv and writev take them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

MOST_BUFFERS: Final = 256
"""How many go into one system call; well below what any system allows (IOV_MAX)."""


def skip(buffers: list[memoryview], count: int) -> None:
    """Drop the first *count* bytes of *buffers*, in place."""
    whole = 0
    while whole < len(buffers) and count >= buffers[whole].nbytes:
        count -= buffers[whole].nbytes
        whole += 1
    del buffers[:whole]
    if count:
        buffers[0] = buffers[0][count:]


def fill(buffers: Iterable[memoryview], data: bytes | memoryview, offset: int) -> int:
    """Copy *data* from *offset* on into *buffers*, in order; the bytes copied."""
    done = 0
    for buffer in buffers:
        part = data[offset + done : offset + done + buffer.nbytes]
        buffer[: len(part)] = part
        done += len(part)
    return done
