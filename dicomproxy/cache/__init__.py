"""The bounded cache of instances, grouped by study.

One study is a directory of instance files and an append-only journal; one row
of a diskcache index remembers its size and last use. The journal is the truth,
the row is what can be rebuilt from it. See :mod:`dicomproxy.cache.store`.
"""

from __future__ import annotations

from dicomproxy.cache.layout import CacheLocked
from dicomproxy.cache.settings import CacheSettings, CacheStats
from dicomproxy.cache.store import DiskInstanceStore

__all__ = ["CacheLocked", "CacheSettings", "CacheStats", "DiskInstanceStore"]
