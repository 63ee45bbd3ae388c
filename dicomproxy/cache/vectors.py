"""Lists of buffers, as readv and writev take them. Pure."""

from __future__ import annotations

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
