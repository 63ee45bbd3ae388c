"""Lines of the audit file, and the chain that shows whether one was changed.

One JSON object a line. ``seq`` counts from 1, ``prev`` is the SHA-256 of the
line before, without its newline, so that a line cannot be changed, removed or
inserted without changing all that follow. Only the last line is not held by
another one. Nothing but the standard tools is needed to follow the chain:
``head -n 41 audit.jsonl | tail -n 1 | tr -d '\\n' | sha256sum`` is line 42's ``prev``.
Pure: no file is touched here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from dicomproxy.ports import AuditEvent

FIRST_PREVIOUS: Final = ""
"""``prev`` of the first line ever."""


@dataclass(frozen=True, slots=True)
class Link:
    """Where a chain ends: the number and the hash of its last line."""

    seq: int = 0
    hash: str = FIRST_PREVIOUS


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a line (counted from 1).

    ``reason`` is ``unreadable`` (a torn line, after a crash), ``chain``
    (changed, removed or inserted here or just before) or ``sequence``.
    """

    line: int
    reason: str


def encode_event(event: AuditEvent, now: datetime) -> bytes:
    """Return an event as a JSON object, without its place in the chain.

    Empty texts and lists are left out. ``at`` is UTC; an event without it
    happened *now*. What ``extra`` holds and JSON does not know becomes text,
    and if even that fails only its keys are kept: an event is never lost to them.
    """
    fields: dict[str, Any] = {
        "at": (event.at or now).astimezone(UTC).isoformat(timespec="milliseconds")
    }
    for spec in dataclasses.fields(event):
        value = getattr(event, spec.name)
        if spec.name not in ("at", "extra") and value not in ("", (), None):
            fields[spec.name] = value
    extra = dict(event.extra)
    if not extra:
        return _json(fields)
    try:
        return _json({**fields, "extra": extra})
    except Exception:  # any __str__ may have been called
        return _json({**fields, "extra_unreadable": [f"{key!s}" for key in extra]})


def chain_line(payload: bytes, last: Link) -> tuple[bytes, Link]:
    """Return *payload* as the line after *last*, newline included, and its link."""
    line = b'{"seq":%d,"prev":"%s",%s' % (last.seq + 1, last.hash.encode(), payload[1:])
    return line + b"\n", Link(last.seq + 1, line_hash(line))


def line_hash(line: bytes) -> str:
    """Return what the next line's ``prev`` says of this one, given without its newline."""
    return hashlib.sha256(line).hexdigest()


def read_link(lines: Iterable[bytes]) -> Link:
    """Return the link of the last of *lines* (without newlines), torn ones included."""
    link = Link()
    for line in lines:
        fields = _parse(line)
        link = Link(link.seq if fields is None else fields["seq"], line_hash(line))
    return link


def verify(lines: Iterable[bytes]) -> Iterator[Fault]:
    """Yield what is wrong with a file's lines, given with or without newlines.

    The first line's ``prev`` is taken as given: it may continue a file that was
    rotated away. Its number and hash are what to compare with that file's end.
    """
    last: Link | None = None
    for number, raw in enumerate(lines, start=1):
        line = raw.rstrip(b"\n")
        fields = _parse(line)
        if fields is None:
            yield Fault(number, "unreadable")
            last = Link(last.seq if last else 0, line_hash(line))
            continue
        if last is not None and fields["prev"] != last.hash:
            yield Fault(number, "chain")
        elif last is not None and last.seq and fields["seq"] != last.seq + 1:
            yield Fault(number, "sequence")
        last = Link(fields["seq"], line_hash(line))


def _parse(line: bytes) -> Mapping[str, Any] | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    if type(fields.get("seq")) is not int or not isinstance(fields.get("prev"), str):
        return None
    return fields


def _json(fields: Mapping[str, Any]) -> bytes:
    # ASCII only: no character of a name can be mistaken for the end of a line.
    return json.dumps(fields, separators=(",", ":"), allow_nan=False, default=str).encode("ascii")
