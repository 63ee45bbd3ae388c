"""The checksum of what is held is the same value, whoever computes it."""

from __future__ import annotations

import importlib.util
import sys
import zlib
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.cache import checksum


@pytest.fixture
def without_isal(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as it is where the optional package is not installed."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "isal", None)
        patch.setitem(sys.modules, "isal.isal_zlib", None)
        spec = importlib.util.find_spec(checksum.__name__)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def test_it_is_computed_without_the_optional_package(without_isal: ModuleType) -> None:
    """Nothing but speed depends on it: the standard library takes its place."""
    assert without_isal.crc32 is zlib.crc32


def test_the_optional_package_is_used_where_it_is_installed() -> None:
    """It is not passed over by an import that fails silently."""
    isal_zlib = pytest.importorskip("isal.isal_zlib")
    assert checksum.crc32 is isal_zlib.crc32


@given(pieces=st.lists(st.binary(max_size=300), max_size=6))
def test_values_are_those_of_the_standard_library(pieces: list[bytes]) -> None:
    """A cache written with one is read with the other, however the bytes were cut."""
    crc = expected = 0
    for piece in pieces:
        crc = checksum.crc32(memoryview(piece), crc)
        expected = zlib.crc32(piece, expected)
        assert crc == expected
    assert crc == zlib.crc32(b"".join(pieces))


def test_values_of_large_pieces_are_the_same() -> None:
    """Nor do the two differ where the processor takes many bytes at a time."""
    data = memoryview(bytes(range(256)) * 4099)
    for start, end in ((0, len(data)), (1, 65_537), (3, 131_072 + 15)):
        assert checksum.crc32(data[start:end], 0xDEADBEEF) == zlib.crc32(
            data[start:end], 0xDEADBEEF
        )
