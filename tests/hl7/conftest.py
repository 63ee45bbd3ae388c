"""Tests of the room that use a loop run on each one that may carry the proxy."""

from __future__ import annotations

from tests.dimse_edge.conftest import pytest_asyncio_loop_factories

__all__ = ["pytest_asyncio_loop_factories"]
