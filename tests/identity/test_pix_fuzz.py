"""Answers of cross-references, cut, turned and mixed: an error, or what was really said."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.identity import pix, pixm
from dicomproxy.ports import CrossReferenceError
from tests.peers.pix_manager import Question, Reply
from tests.peers.pixm_manager import UNKNOWN_ID, parameters

NORTH = Domain("NORTH", "1.2.2", "ISO")
QUESTION = Question("QPD|IHE PIX Query|C1|A^^^HERE|^^^NORTH&1.2.2&ISO\r", "C1", "C1", [], [])
FOUND = Reply(identifiers=["N-1^^^NORTH&1.2.2&ISO"]).written(QUESTION)
NONE = Reply(status="NF").written(QUESTION)
UNKNOWN = Reply("AE", "AE", errors=["ERR||QPD^1^3^1^1|204|E"]).written(QUESTION)
DOWN = Reply("AE", "AE", errors=["ERR|||207|E"]).written(QUESTION)


def read(content: bytes) -> tuple[PatientId, ...] | None:
    """Return what PIX makes of an answer; None for an error."""
    try:
        return pix.read_answer(content, "C1", NORTH)
    except CrossReferenceError:
        return None


def test_whole_answers_are_read() -> None:
    """Each of those below is what it is meant to be."""
    assert read(FOUND) == (PatientId("N-1", NORTH),)
    assert read(NONE) == ()
    assert read(UNKNOWN) == ()
    assert read(DOWN) is None


def test_an_answer_cut_anywhere_gives_no_id_that_was_not_given() -> None:
    """Neither half an ID nor "nobody", as long as the answer said somebody."""
    for length in range(len(FOUND)):
        found = read(FOUND[:length])
        assert found in (None, (PatientId("N-1", NORTH),)), length


def test_an_outage_cut_anywhere_is_never_nobody() -> None:
    """An error stays one."""
    assert {read(DOWN[:length]) for length in range(len(DOWN))} == {None}


@given(
    st.sampled_from([FOUND, NONE, UNKNOWN, DOWN]),
    st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=4)), max_size=4),
)
def test_no_change_of_an_answer_raises_anything_else(
    answer: bytes, changes: list[tuple[int, bytes]]
) -> None:
    """Whatever is overwritten, it is read or refused, and IDs are of the domain asked for."""
    data = bytearray(answer)
    for offset, piece in changes:
        data[offset : offset + len(piece)] = piece
    assert all(one.domain == NORTH for one in read(bytes(data)) or ())


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    """Nothing that does not carry our control ID is an answer."""
    assert read(data) is None
    assert read(b"MSH|^~\\&|A\r" + data) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.just("urn:oid:1.2.2"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("resourceType", "parameter", "name", "valueIdentifier", "system"),
                    *("value", "issue", "code", "diagnostics", "details", "text"),
                ]
            ),
            inner
            | st.sampled_from(["Parameters", "OperationOutcome", "targetIdentifier", "not-found"]),
        )
    ),
    max_leaves=12,
)


def read_json(status: int, body: bytes) -> tuple[str, ...] | None:
    try:
        return pixm.read_answer(status, body, "urn:oid:1.2.2")
    except CrossReferenceError:
        return None


@given(st.sampled_from([200, 400, 403, 404, 500]), JSON)
def test_any_json_is_read_or_refused(status: int, value: Any) -> None:
    """Every shape is foreseen; only a 200 gives IDs, and those are texts."""
    found = read_json(status, json.dumps(value).encode())
    assert found is None or all(isinstance(one, str) and one for one in found)
    assert status == 200 or not found


def test_json_cut_anywhere_is_refused() -> None:
    """Half an answer says neither somebody nor nobody."""
    for status, whole in ((200, parameters(("urn:oid:1.2.2", "N-1"))), (404, UNKNOWN_ID)):
        body = json.dumps(whole).encode()
        assert read_json(status, body) is not None
        assert {read_json(status, body[:length]) for length in range(len(body))} == {None}
