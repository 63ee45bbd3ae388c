"""Transfer syntaxes: which of those proposed is taken, and how those wanted are proposed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import UID, AllTransferSyntaxes

from dicomproxy.dataset.transfer_syntaxes import (
    DEFAULT_ORDER,
    LOSSLESS,
    LOSSY,
    UNCOMPRESSED,
    chooser,
    context_groups,
    within_bytes,
)

EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
JPEG, JPEG_LOSSLESS = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.70"
RLE = "1.2.840.10008.1.2.5"
PRIVATE = "1.3.6.1.4.1.5962.300.1"

orders = st.lists(st.sampled_from(DEFAULT_ORDER), min_size=1, unique=True)


@pytest.mark.parametrize(
    ("accept", "proposed", "chosen"),
    [
        (None, [EXPLICIT, IMPLICIT], EXPLICIT),
        (None, [IMPLICIT, EXPLICIT], EXPLICIT),
        (None, [EXPLICIT, RLE], RLE),
        (None, [RLE, JPEG_LOSSLESS], JPEG_LOSSLESS),
        (None, [JPEG, IMPLICIT], IMPLICIT),
        (None, [JPEG], JPEG),
        (None, [PRIVATE], PRIVATE),
        (None, [PRIVATE, JPEG], JPEG),
        (None, [], None),
        ([IMPLICIT, RLE], [RLE, IMPLICIT], IMPLICIT),
        ([RLE], [IMPLICIT], None),
        ([RLE], [PRIVATE], None),
        ([PRIVATE], [RLE, PRIVATE], PRIVATE),
        ([], [EXPLICIT], None),
    ],
)
def test_choice(accept: list[str] | None, proposed: list[str], chosen: str | None) -> None:
    """Lossless, uncompressed, lossy only alone; or as configured, and then nothing else."""
    assert chooser(accept)(proposed) == chosen


def test_every_syntax_of_the_registry_is_somewhere() -> None:
    """What an archive may hold is accepted in a known order, each syntax once."""
    assert len(set(DEFAULT_ORDER)) == len(DEFAULT_ORDER) == len({*LOSSLESS, *UNCOMPRESSED, *LOSSY})
    registered = {
        str(uid)
        for uid in AllTransferSyntaxes
        if "SMPTE" not in uid.name and "Retired" not in uid.name and "JPIP" not in uid.name
    }
    assert registered <= set(DEFAULT_ORDER)
    assert all(UID(uid).is_transfer_syntax for uid in registered)


@pytest.mark.parametrize(
    ("contexts", "expected"),
    [
        (1, [(EXPLICIT, IMPLICIT, RLE)]),
        (2, [(EXPLICIT,), (IMPLICIT, RLE)]),
        (3, [(EXPLICIT,), (IMPLICIT,), (RLE,)]),
        (9, [(EXPLICIT,), (IMPLICIT,), (RLE,)]),
    ],
)
def test_spreading_over_contexts(contexts: int, expected: list[tuple[str, ...]]) -> None:
    """As many alone as fit, the rest in the last one."""
    assert context_groups([EXPLICIT, IMPLICIT, RLE], contexts) == expected


@given(accept=orders, contexts=st.integers(1, 130))
def test_spreading_loses_nothing(accept: list[str], contexts: int) -> None:
    """Never more contexts than allowed; every syntax once, in order."""
    groups = context_groups(accept, contexts)
    assert 1 <= len(groups) <= contexts
    assert [syntax for group in groups for syntax in group] == accept


@given(accept=orders, most_bytes=st.integers(0, 3000))
def test_cutting_keeps_order_and_size(accept: list[str], most_bytes: int) -> None:
    """A subset in the same order, within its bytes unless it is a single one."""
    kept = within_bytes(accept, most_bytes)
    assert kept
    assert list(kept) == [syntax for syntax in accept if syntax in kept]
    size = sum(4 + len(syntax) for syntax in kept)
    assert size <= most_bytes or len(kept) == 1
    if sum(4 + len(syntax) for syntax in accept) <= most_bytes:
        assert list(kept) == accept


def test_cutting_leaves_what_archives_hold_most() -> None:
    """Where a dozen fit, the usual compressions are among them."""
    kept = within_bytes(DEFAULT_ORDER, 12 * 26)
    assert {EXPLICIT, IMPLICIT, JPEG_LOSSLESS, JPEG, RLE, "1.2.840.10008.1.2.4.90"} <= set(kept)
