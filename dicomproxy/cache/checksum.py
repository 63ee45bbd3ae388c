"""CRC-32 of what is held (the polynomial of PNG and ZIP), as fast as it is to be had here.

Every byte that is received passes through it, so it counts: with the processor's
carry-less multiplication it takes a fraction of the time. Values are the same
either way, and a cache written with one is read with the other.
"""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32
except ImportError:  # not installed, or not for this processor
    from zlib import crc32

__all__ = ["crc32"]
