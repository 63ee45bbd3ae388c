"""Ports for peers: free, and below the range the kernel hands out by itself.

A port taken from the ephemeral range can be lost to any outgoing connection
between the moment it was found and the moment the peer listens on it. Test runs
side by side are given a share each by DICOMPROXY_TEST_PORTS, such as 0/2 and 1/2.
"""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

_LOWEST = 12000
_given: set[int] = set()
_share, _shares = map(int, os.environ.get("DICOMPROXY_TEST_PORTS", "0/1").split("/"))


def _ephemeral_start() -> int:
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
    except OSError:
        return 32768
    return int(text.split()[0])


def free_port() -> int:
    """Return a TCP port that nobody listens on and that was not returned before."""
    highest = max(_ephemeral_start() - 1, _LOWEST + 1000)
    for _ in range(200 * _shares):
        port = random.randint(_LOWEST, highest)
        if port in _given or port % _shares != _share:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
    raise RuntimeError("no free port found")
