"""The chain of lines: whatever is recorded reads back, whatever is changed shows."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.audit.chain import Fault, Link, chain_line, encode_event, read_link, verify
from dicomproxy.ports import AuditEvent
from tests.sentinel import PATIENT_ID

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def event(**fields: Any) -> AuditEvent:
    given: dict[str, Any] = {
        "event": "disclosure",
        "outcome": "success",
        "caller_ae_title": "READING1",
        "peer_address": "127.0.0.1",
        "source": "north",
        "operation_id": "op1",
    }
    return AuditEvent(**{**given, **fields})


def lines(count: int) -> list[bytes]:
    made, last = [], Link()
    for number in range(count):
        line, last = chain_line(encode_event(event(instances=number), NOW), last)
        made.append(line)
    return made


def test_event_reads_back_with_what_was_given() -> None:
    """A line holds every field that was given, names the patient, and leaves out empty ones."""
    at = datetime(2026, 3, 1, 13, 30, tzinfo=timezone(timedelta(hours=1)))
    given = event(
        patient_id=PATIENT_ID, study_instance_uids=("1.2", "1.3"), status=0, at=at, extra={"x": 1}
    )
    assert json.loads(encode_event(given, NOW)) == {
        "at": "2026-03-01T12:30:00.000+00:00",
        "event": "disclosure",
        "outcome": "success",
        "caller_ae_title": "READING1",
        "peer_address": "127.0.0.1",
        "source": "north",
        "operation_id": "op1",
        "patient_id": PATIENT_ID,
        "study_instance_uids": ["1.2", "1.3"],
        "instances": 0,
        "failed": 0,
        "status": 0,
        "extra": {"x": 1},
    }


class _Unprintable:
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"x": NOW}, {"extra": {"x": "2026-03-01 12:00:00+00:00"}}),
        ({"x": float("nan")}, {"extra_unreadable": ["x"]}),
        ({"x": _Unprintable()}, {"extra_unreadable": ["x"]}),
        ({("a", "b"): 1}, {"extra_unreadable": ["('a', 'b')"]}),
    ],
)
def test_event_is_not_lost_to_its_extras(extra: dict[Any, Any], expected: dict[str, Any]) -> None:
    """What JSON cannot hold never keeps an event from being recorded."""
    found = json.loads(encode_event(event(extra=extra), NOW))
    assert expected.items() <= found.items()


@given(text=st.text())
def test_no_text_breaks_a_line(text: str) -> None:
    """Line separators, quotes and lone surrogates stay inside their line."""
    line, _ = chain_line(encode_event(event(detail=text), NOW), Link())
    assert line.count(b"\n") == 1
    assert len(line.decode("ascii").splitlines()) == 1
    assert json.loads(line).get("detail", "") == text


def test_untouched_file_has_no_fault() -> None:
    """A chain verifies from its start, and from anywhere it was cut by a rotation."""
    made = lines(6)
    assert list(verify(made)) == []
    assert list(verify(made[3:])) == []
    assert read_link([line[:-1] for line in made]).seq == 6


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda made: made[:2] + made[3:], [Fault(3, "chain")]),
        (lambda made: [*made[:2], made[2].replace(b"north", b"south"), *made[3:]], None),
        (lambda made: [made[1], made[0], *made[2:]], None),
        (lambda made: made[:3] + made[2:], [Fault(4, "chain")]),
        (lambda made: [*made[:2], b"{torn\n", *made[2:]], None),
        (lambda made: [*made[:2], b"[" * 100_000 + b"\n"], [Fault(3, "unreadable")]),
    ],
    ids=["removed", "changed", "swapped", "repeated", "inserted", "nested"],
)
def test_tampering_shows(change: Any, expected: list[Fault] | None) -> None:
    """A line that was changed, removed, moved, repeated or inserted is reported."""
    found = list(verify(change(lines(5))))
    assert found if expected is None else found == expected


@given(st.binary(max_size=200), st.integers(0, 4), st.integers(0, 400))
def test_any_changed_byte_but_in_the_last_line_shows(junk: bytes, number: int, start: int) -> None:
    """Overwriting any part of any line that has a successor is reported."""
    made = lines(6)
    changed = made[number][:-1]
    changed = changed[:start] + junk + changed[start + len(junk) :]
    if changed.replace(b"\n", b"") == made[number][:-1]:
        return
    text = b"".join([*made[:number], changed + b"\n", *made[number + 1 :]])
    assert list(verify(text.splitlines(keepends=True)))
