"""Logs: nothing that could name a patient leaves, whoever tries to write it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import subprocess
import sys
import textwrap
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy import logs
from tests import sentinel
from tests.support.log_watch import LogWatch


@pytest.fixture
def lax() -> io.StringIO:
    """Production's behaviour: what is not allowed is dropped, nothing is raised."""
    stream = io.StringIO()
    logs.configure("debug", stream=stream, hooks=False)
    return stream


def only_entry(stream: io.StringIO) -> dict[str, Any]:
    (line,) = stream.getvalue().splitlines()
    entry: dict[str, Any] = json.loads(line)
    return entry


def test_line_opens_with_time_level_and_event(lax: io.StringIO) -> None:
    """A line is one JSON object: when, how bad, what, then facts."""
    logs.get_logger(source="north").info("source_query_done", matches=3, duration_seconds=0.25)

    entry = only_entry(lax)
    assert list(entry)[:3] == ["timestamp", "level", "event"]
    assert entry["timestamp"].endswith("Z")
    assert entry["level"] == "info"
    assert entry["event"] == "source_query_done"
    assert entry["source"] == "north"
    assert entry["matches"] == 3
    assert entry["duration_seconds"] == 0.25


def test_unlisted_key_is_dropped_and_named(lax: io.StringIO) -> None:
    """Of a key that nobody allowed only the name is written."""
    logs.get_logger().info("x", patient_id=sentinel.PATIENT_ID, matches=1)

    entry = only_entry(lax)
    assert entry["dropped_keys"] == ["patient_id"]
    assert entry["matches"] == 1


def test_query_level_does_not_hide_log_level(lax: io.StringIO) -> None:
    """``level`` is the log level; a Query/Retrieve Level given under that name is dropped."""
    logs.get_logger().warning("x", level="STUDY", query_level="STUDY")

    entry = only_entry(lax)
    assert entry["level"] == "warning"
    assert entry["dropped_keys"] == ["level"]
    assert entry["query_level"] == "STUDY"


@pytest.mark.parametrize("event", ["Patient SENTINEL^PATIENT", "", "with space", "Études"])
def test_event_built_from_values_is_replaced(lax: io.StringIO, event: str) -> None:
    """An event name is a constant in snake case; anything else is not written."""
    logs.get_logger().info(event)
    assert only_entry(lax)["event"] == "unnamed_event"


@pytest.mark.parametrize(
    "fields",
    [
        {"patient_name": sentinel.PATIENT_NAME},
        {"source": object()},
        {"detail": b"bytes"},
        {"sources": [["nested"]]},
        {"detail": {"PatientID": sentinel.PATIENT_ID}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_strict_mode_raises_where_production_drops(fields: dict[str, Any]) -> None:
    """In tests a key or value that would be dropped is an error."""
    with pytest.raises(logs.ForbiddenLogEntry):
        logs.get_logger().info("x", **fields)


def test_measures_need_no_listing_but_must_be_numbers(lax: io.StringIO) -> None:
    """Any ``*_seconds``, ``*_bytes`` or ``*_count`` is allowed, as a number only."""
    logs.get_logger().info("x", breaker_open_seconds=1.5, spool_bytes=7, patient_count="Jane")

    entry = only_entry(lax)
    assert entry["breaker_open_seconds"] == 1.5
    assert entry["spool_bytes"] == 7
    assert entry["dropped_keys"] == ["patient_count"]


class Colour(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("key", "given_value", "written"),
    [
        ("status", 0xB000, "0xB000"),
        ("reason", "two\nlines\x1b[0m", "two\\nlines\\x1b[0m"),
        ("reason", "\ud800\u2028", "\\ud800\\u2028"),
        ("reason", "x" * 300, "x" * 256 + "..."),
        ("reason", Colour.RED, "red"),
        ("ratio", float("nan"), None),
        ("sources", {"b", "a"}, ["a", "b"]),
        ("sources", (), []),
        ("count", [0] * 101, [0] * 100 + ["+1 more"]),
        ("study_instance_uid", "1.2.3", "1.2.3"),
        ("study_instance_uid", sentinel.PATIENT_NAME, "(not a UID)"),
        ("sop_instance_uids", ["1.2", "1." * 40], ["1.2", "(not a UID)"]),
        ("complete", True, True),
    ],
)
def test_values_are_written_plainly(
    lax: io.StringIO, key: str, given_value: object, written: object
) -> None:
    """Values are scalars or lists of them: one line, bounded, a UID only if it is one."""
    logs.get_logger().info("x", **{key: given_value})
    assert only_entry(lax)[key] == written


@given(st.text())
def test_any_text_stays_one_line(text: str) -> None:
    """Whatever a peer calls itself, one event is one line that reads back."""
    stream = io.StringIO()
    logs.configure(stream=stream, hooks=False)
    logs.get_logger().info("x", called_ae_title=text)
    assert only_entry(stream)["event"] == "x"


def test_exception_is_reduced_to_type_and_own_frames(lax: io.StringIO) -> None:
    """An exception leaves its type and our frames, never its message."""
    try:
        logs.configure(level=sentinel.PATIENT_NAME)
    except Exception:
        logs.get_logger().exception("x")

    entry = only_entry(lax)
    assert entry["error_type"] == "KeyError"
    assert entry["stack"][0].startswith("logs.py:configure:")
    assert sentinel.PATIENT_NAME.upper() not in lax.getvalue().upper()


def test_operating_system_error_keeps_its_errno() -> None:
    """What a full disk and a missing file differ in is logged; the path is not."""
    assert logs.error_fields(FileNotFoundError(2, "no", "/secret")) == {
        "error_type": "FileNotFoundError",
        "errno": "ENOENT",
    }


def test_exception_group_names_what_is_inside() -> None:
    """Of a group, the types of its members are logged."""
    group = ExceptionGroup("secret", [ValueError("a"), OSError(), ValueError("b")])
    assert logs.error_fields(group)["error_type"] == "ExceptionGroup(OSError, ValueError)"


def test_context_reaches_lines_of_tasks_started_inside(lax: io.StringIO) -> None:
    """What is bound once per association is on every line of its tasks."""

    async def speak() -> None:
        logs.get_logger().info("x")

    async def run() -> None:
        with logs.bound_context(association_id=7):
            await asyncio.create_task(speak())

    asyncio.run(run())
    assert only_entry(lax)["association_id"] == 7


@pytest.mark.parametrize("name", ["pydicom", "pynetdicom.acse", "asyncio", "something.else"])
def test_library_record_keeps_no_message(lax: io.StringIO, name: str) -> None:
    """Of a library's record only logger, level, place and error type are left."""
    try:
        raise ValueError(sentinel.PATIENT_NAME)
    except ValueError:
        logging.getLogger(name).exception("bad value %s", sentinel.PATIENT_ID)

    entry = only_entry(lax)
    assert entry["event"] == "foreign_log"
    assert entry["level"] == "error"
    assert entry["logger"] == name
    assert entry["error_type"] == "ValueError"


def test_library_record_is_reduced_for_any_handler(
    lax: io.StringIO, caplog: pytest.LogCaptureFixture
) -> None:
    """Even a handler that somebody else installs sees no message."""
    logging.getLogger("pydicom").warning("Invalid value: %s", sentinel.PATIENT_BIRTH_DATE)
    assert caplog.messages == ["foreign_log"]


@pytest.mark.parametrize("name", ["pydicom", "pynetdicom", "aiohttp.access"])
def test_library_chatter_is_silent(lax: io.StringIO, name: str) -> None:
    """Below warning nothing of a library is written: without text it says nothing."""
    logging.getLogger(name).info("hello")
    assert lax.getvalue() == ""


def test_level_filters(lax: io.StringIO) -> None:
    """Lines below the configured level are not written."""
    logs.configure("warning", stream=lax, hooks=False)
    logs.get_logger().info("quiet")
    logs.get_logger().warning("loud")
    assert only_entry(lax)["event"] == "loud"


def test_console_format_is_for_reading(lax: io.StringIO) -> None:
    """On a terminal the same allow-listed facts are shown without JSON."""
    logs.configure(format="console", stream=lax, hooks=False)
    logs.get_logger().info("listening", port=11112, patient_name="x")
    assert "listening" in lax.getvalue()
    assert "port=11112" in lax.getvalue()
    assert "dropped_keys=['patient_name']" in lax.getvalue()


def test_closed_log_stream_stops_nobody(lax: io.StringIO) -> None:
    """A log stream that went away costs lines, not traffic."""
    lax.close()
    logs.get_logger().info("x")


async def test_loop_handler_logs_type_and_task(lax: io.StringIO) -> None:
    """What a loop could deliver to nobody is logged by type and task name."""

    async def fail() -> None:
        raise ValueError(sentinel.PATIENT_NAME)

    task = asyncio.create_task(fail(), name="leg")
    await asyncio.wait([task])
    error = task.exception()
    context = {"message": sentinel.PATIENT_ID, "exception": error, "task": task}
    logs.loop_exception_handler(asyncio.get_running_loop(), context)

    entry = only_entry(lax)
    assert (entry["event"], entry["error_type"]) == ("unhandled_error", "ValueError")
    assert entry["task"] == "leg"


UNHANDLED = {
    "main": "raise ValueError('SENTINEL^PATIENT')",
    "thread": "t = threading.Thread(target=lambda: 1 / 0, name='writer'); t.start(); t.join()",
    "unraisable": "class Bad:\n    def __del__(self): 1 / 0\nb = Bad(); del b",
    "warning": "warnings.warn('SENTINELID4711', UserWarning)",
}


@pytest.mark.parametrize(
    ("way", "event", "error_type"),
    [
        ("main", "unhandled_error", "ValueError"),
        ("thread", "unhandled_error", "ZeroDivisionError"),
        ("unraisable", "unhandled_error", "ZeroDivisionError"),
        ("warning", "foreign_warning", "UserWarning"),
    ],
)
def test_interpreter_prints_nothing_itself(way: str, event: str, error_type: str) -> None:
    """Unhandled exceptions and warnings leave the process as one reduced line each."""
    program = "import threading, warnings\nfrom dicomproxy import logs\nlogs.configure()\n"
    done = subprocess.run(
        [sys.executable, "-c", program + textwrap.dedent(UNHANDLED[way])],
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = done.stderr.splitlines()
    entry = json.loads(line)
    assert (entry["event"], entry["error_type"]) == (event, error_type)
    assert done.stdout == ""


def test_watch_reads_back_what_was_logged(log_watch: LogWatch) -> None:
    """Tests can ask what was logged, decoded and by event."""
    logs.get_logger().info("x", count=1)
    assert log_watch.named("x")[0]["count"] == 1
