"""Minted accession numbers: short, the same each time, and different for different origins."""

from __future__ import annotations

import re
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.dataset.accession import LONGEST, Origin, candidates, mint
from dicomproxy.dataset.patient import Domain
from tests.sentinel import ACCESSION_NUMBER

ORIGIN = st.builds(Origin, source=st.sampled_from(["north", "south", "n"]), number=st.text())
FORM = re.compile(r"X[0-9A-HJKMNP-TV-Z]{13}")


def test_number_stays_the_same_from_version_to_version() -> None:
    """What stands in a report of last year leads to its study after every update."""
    assert mint(Origin("north", "1001")) == "XA8GSKKQ3Z2P3T"
    assert mint(Origin("north", "1001"), 1) == "XZK5PF1KQJJSZ5"
    assert mint(Origin("north", "Ä1")) == "X67E0ZAV8B8140"


@given(ORIGIN, st.integers(0, 1000))
def test_number_is_a_short_string_that_can_be_read_aloud(origin: Origin, attempt: int) -> None:
    """14 characters of an SH without I, L, O and U."""
    assert FORM.fullmatch(mint(origin, attempt))


@given(ORIGIN, ORIGIN, st.integers(0, 3), st.integers(0, 3))
def test_different_origins_have_different_numbers(
    one: Origin, other: Origin, attempt: int, another: int
) -> None:
    """Source, number and attempt all count, and where one ends and the next begins."""
    same = one.is_same(other) and attempt == another
    assert (mint(one, attempt) == mint(other, another)) == same


def test_issuer_does_not_count() -> None:
    """An answer that names the issuer and an object that does not have one number."""
    assert mint(Origin("north", "1", Domain("RIS"))) == mint(Origin("north", "1"))
    assert Origin("north", "1", Domain("RIS")).is_same(Origin("north", "1"))


@pytest.mark.parametrize(
    ("number", "prefix", "first"),
    [
        ("1001", "N-", "N-1001"),
        ("12345678901234", "N-", "N-12345678901234"),  # 16 characters
        ("123456789012345", "N-", None),  # 17
        ("1001", "", None),
    ],
)
def test_prefix_is_tried_first_where_it_fits(number: str, prefix: str, first: str | None) -> None:
    """A prefixed number that fits comes before minted ones, of which there is no end."""
    origin = Origin("north", number)
    found = list(islice(candidates(origin, prefix), 4))
    minted = [mint(origin, attempt) for attempt in range(4)]

    assert found == ([first, *minted][:4] if first else minted)
    assert all(len(one) <= LONGEST for one in found)


def test_representation_holds_no_number() -> None:
    """What may end in a log names the source only."""
    assert repr(Origin("north", ACCESSION_NUMBER)) == "<Origin at north>"
