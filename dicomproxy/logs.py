"""Structured logs that cannot carry a patient.

One JSON object a line on stderr: ``timestamp``, ``level``, ``event`` and
allow-listed keys. The rule kept here: what is not known to be harmless is not
written. A key outside :data:`ALLOWED_KEYS` is dropped and only its name is
shown, exceptions are reduced to their type and to our own frames, and the
records and warnings of libraries, which like to print the value they stumbled
over, keep nothing but their logger, level and error type.

The log level is ``level``; a Query/Retrieve Level is ``query_level``.
"""

from __future__ import annotations

import asyncio
import errno
import faulthandler
import json
import logging
import math
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any, Final, Literal, TextIO, cast

import structlog
from prometheus_client import Counter
from structlog.typing import FilteringBoundLogger

__all__ = [
    "ALLOWED_KEYS",
    "ForbiddenLogEntry",
    "bound_context",
    "claim_output",
    "configure",
    "error_fields",
    "get_logger",
    "loop_exception_handler",
]

_KEYS: Final = """
    ae_title calling_ae_title called_ae_title destination_ae_title caller_ae_title
    retrieve_ae_title move_originator_ae_title peer_ae_title
    peer_address peer_port host port address interface
    source sources holder holders destination destinations workstation
    study_instance_uid series_instance_uid sop_instance_uid sop_class_uid
    transfer_syntax_uid study_instance_uids series_instance_uids sop_instance_uids
    sop_class_uids transfer_syntax_uids abstract_syntax_uid implementation_class_uid
    implementation_version
    query_level root service command operation direction method role
    matches local_matches remote_matches withheld dropped duplicates conflicts
    completed failed warning warnings remaining arrived delivered expected found missing
    instances series studies associations contexts batches events rows lines files keys
    count attempt attempts limit maximum minimum hits misses evicted adopted pruned rebuilt
    queued pending flights deliveries queries operations waiting active idle
    bytes seconds used free size ratio
    status status_text http_status failure reason result reject_source source_code
    fault outcome error_type errno stack detail phase state previous_state mode
    association_id operation_id flight_id message_id context_id pdu_type tag keyword
    complete cached interactive verified pinned partial degraded ready
    path file line directory version python platform pid signal schema_version
    logger foreign_level task thread dropped_keys key setting format
"""

ALLOWED_KEYS: Final = frozenset(_KEYS.split())
"""Every key that may be written; a measure (``*_seconds``, ``*_bytes``, ``*_count``) may too."""

_MEASURE: Final = re.compile(r"[a-z][a-z0-9_]*_(?:seconds|bytes|count)")
_EVENT: Final = re.compile(r"[a-z][a-z0-9_]*")
_UID: Final = re.compile(r"[0-9.]{0,64}")
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LONGEST_TEXT: Final = 256
_LONGEST_LIST: Final = 100
_DIMSE_STATUS_KEYS: Final = ("status",)
_OWN_CODE: Final = Path(__file__).resolve().parent
_QUIET_LOGGERS: Final = ("pydicom", "pynetdicom", "asyncio", "aiohttp", "concurrent.futures")

_LINES_LOST = Counter(
    "dicomproxy_log_lines_lost_total", "Log lines that the log stream did not take."
)

EventDict = MutableMapping[str, Any]


class ForbiddenLogEntry(AssertionError):
    """Strict mode only: a key, value or event name that production would drop."""


def get_logger(**initial: Any) -> FilteringBoundLogger:
    """Return a logger with *initial* keys bound; usable before :func:`configure`."""
    return cast(FilteringBoundLogger, structlog.get_logger(**initial))


def bound_context(**keys: Any) -> AbstractContextManager[Any]:
    """Add *keys* to every line logged inside the block, in tasks started there too."""
    return structlog.contextvars.bound_contextvars(**keys)


def configure(
    level: str = "info",
    format: Literal["json", "console"] = "json",
    stream: TextIO | None = None,
    *,
    strict: bool = False,
    hooks: bool = True,
) -> None:
    """Set up our own lines and silence everybody else's.

    Args:
        level: lowest level written: debug, info, warning, error.
        format: ``json`` for machines, ``console`` for a terminal.
        stream: where lines go; by default stderr as it is when a line is written.
        strict: raise :class:`ForbiddenLogEntry` where a key would be dropped.
        hooks: take over the interpreter's hooks for unhandled exceptions.
    """
    _configure_own(level, format, stream, strict)
    _silence_libraries()
    if hooks:
        sys.excepthook = _excepthook
        sys.unraisablehook = _unraisablehook
        threading.excepthook = _threading_excepthook
        # Not logging.captureWarnings: it hands on the formatted text only.
        warnings.showwarning = _showwarning


def claim_output() -> None:
    """Keep the process's stderr for our lines alone; for a service, at its start.

    Decoders written in C print to the descriptors themselves, where no handler
    can reduce what they say. After this what they print is lost; a crash of the
    interpreter still shows, as frames of code.
    """
    sys.stderr.flush()
    sys.stdout.flush()
    stream = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(null)
    sys.stderr = stream
    faulthandler.enable(stream)


def error_fields(error: BaseException) -> dict[str, Any]:
    """Return what may be logged of *error*: its type, our frames, an errno's name."""
    fields: dict[str, Any] = {"error_type": _type_name(error)}
    if isinstance(error, OSError) and error.errno is not None:
        fields["errno"] = errno.errorcode.get(error.errno, str(error.errno))
    stack = list(_own_frames(error.__traceback__))
    if stack:
        fields["stack"] = stack
    return fields


def own_frame(code: CodeType, line: int) -> str:
    """Return ``file:function:line`` of a frame of ours, nothing of another's."""
    path = Path(code.co_filename)
    if not path.is_relative_to(_OWN_CODE):
        return ""
    return f"{path.relative_to(_OWN_CODE)}:{code.co_name}:{line}"


def loop_exception_handler(loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    """Log what an event loop could not deliver to anybody, by type (for set_exception_handler).

    The context's message is left out: for callbacks it prints their arguments.
    """
    task = context.get("task") or context.get("future")
    fields: dict[str, Any] = {}
    if isinstance(task, asyncio.Task):
        fields["task"] = task.get_name()
    error = context.get("exception")
    if isinstance(error, BaseException):
        fields.update(error_fields(error))
    elif task is not None:
        fields["reason"] = "destroyed_while_pending"
    get_logger().error("unhandled_error", **fields)


# ------------------------------------------------------------------- our lines


class _LineWriter:
    """Writes finished lines; a log stream that fails never stops traffic."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def msg(self, line: str) -> None:
        stream = self._stream if self._stream is not None else sys.stderr
        try:
            with self._lock:
                stream.write(line + "\n")
                stream.flush()
        except (OSError, ValueError):  # gone, full or closed: there is nowhere to say so
            _LINES_LOST.inc()

    debug = info = warning = error = critical = fatal = msg


def _configure_own(level: str, format: str, stream: TextIO | None, strict: bool) -> None:
    writer = _LineWriter(stream)
    render: Callable[[Any, str, EventDict], str] = _render_json
    if format == "console":
        shown_on = stream if stream is not None else sys.stderr
        render = structlog.dev.ConsoleRenderer(colors=shown_on.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _reduce_exception,
            _AllowList(strict),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: writer,
        # Loggers are made at import, before the configuration is known.
        cache_logger_on_first_use=False,
    )


def _reduce_exception(_logger: Any, _method: str, entry: EventDict) -> EventDict:
    """Replace ``exc_info`` with :func:`error_fields`."""
    given = entry.pop("exc_info", None)
    error = given[1] if isinstance(given, tuple) else given
    if given is True:
        error = sys.exc_info()[1]
    if isinstance(error, BaseException):
        for key, value in error_fields(error).items():
            entry.setdefault(key, value)
    return entry


class _AllowList:
    """Lets through known keys with plain values, and shows the names of the rest."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict

    def __call__(self, _logger: Any, _method: str, entry: EventDict) -> EventDict:
        event = entry.pop("event", None)
        if not isinstance(event, str) or not _EVENT.fullmatch(event):
            # An event name is a constant; what does not look like one was built from values.
            self._refuse("an event name is snake_case and constant")
            event = "unnamed_event"
        kept: EventDict = {"event": event}
        dropped: list[str] = []
        for key, value in entry.items():
            if not _allowed(key, value):
                self._refuse(f"log key {key!r} is not allow-listed")
                dropped.append(_text(key))
                continue
            try:
                kept[key] = _plain(key, value)
            except TypeError:
                self._refuse(f"log key {key!r} holds a {type(value).__name__}")
                dropped.append(_text(key))
        if dropped:
            kept["dropped_keys"] = dropped
        return kept

    def _refuse(self, why: str) -> None:
        if self._strict:
            raise ForbiddenLogEntry(why)


def _allowed(key: str, value: Any) -> bool:
    if key in ALLOWED_KEYS:
        return True
    return isinstance(value, (int, float)) and _MEASURE.fullmatch(key) is not None


def _plain(key: str, value: Any) -> Any:
    """Return *value* as plain JSON: a scalar, or a list of scalars.

    Raises:
        TypeError: it is something else, and its text could say anything.
    """
    if not isinstance(value, (list, tuple, set, frozenset)):
        return _scalar(key, value)
    items = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    shown = [_scalar(key, item) for item in items[:_LONGEST_LIST]]
    if len(items) > _LONGEST_LIST:
        shown.append(f"+{len(items) - _LONGEST_LIST} more")
    return shown


def _scalar(key: str, value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        # A DIMSE status is known by its hexadecimal digits (PS3.7 Annex C).
        return f"0x{value:04X}" if key in _DIMSE_STATUS_KEYS else int(value)
    if isinstance(value, float):
        return round(float(value), 6) if math.isfinite(value) else None
    if isinstance(value, str):
        if key.endswith(("_uid", "_uids")) and not _UID.fullmatch(value):
            return "(not a UID)"  # a peer may have put anything there
        return _text(value)
    raise TypeError


def _text(value: str) -> str:
    """Return *value* on one line and of bounded length, as a real ``str``."""
    text = str.__str__(value)
    if len(text) > _LONGEST_TEXT:
        text = text[:_LONGEST_TEXT] + "..."
    return _UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], text)


def _render_json(_logger: Any, _method: str, entry: EventDict) -> str:
    head = {key: entry.pop(key) for key in ("timestamp", "level", "event")}
    return json.dumps({**head, **entry}, separators=(",", ":"))


# ------------------------------------------------------------------ exceptions


def _type_name(error: BaseException) -> str:
    name = type(error).__name__
    if isinstance(error, BaseExceptionGroup):
        inner = sorted({_type_name(child) for child in error.exceptions})
        return f"{name}({', '.join(inner)})"
    return name


def _own_frames(traceback: TracebackType | None) -> Iterator[str]:
    """Yield ``file:function:line`` of our frames, outermost first."""
    while traceback is not None:
        if frame := own_frame(traceback.tb_frame.f_code, traceback.tb_lineno):
            yield frame
        traceback = traceback.tb_next


def _excepthook(
    _kind: type[BaseException], error: BaseException, _traceback: TracebackType | None
) -> None:
    get_logger().critical("unhandled_error", **error_fields(error))


def _threading_excepthook(given: threading.ExceptHookArgs) -> None:
    fields = {} if given.exc_value is None else error_fields(given.exc_value)
    name = given.thread.name if given.thread is not None else None
    get_logger().critical("unhandled_error", thread=name, **fields)


def _unraisablehook(given: sys.UnraisableHookArgs) -> None:
    fields = {} if given.exc_value is None else error_fields(given.exc_value)
    get_logger().error("unhandled_error", **fields)


# ------------------------------------------------------------- other libraries


def _silence_libraries() -> None:
    """Reduce every record of the standard library's logging before a handler sees it."""
    logging.setLogRecordFactory(_reduced_record)
    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler) in (logging.StreamHandler, _ForeignHandler):
            root.removeHandler(handler)
    root.addHandler(_ForeignHandler())
    # Without its text, a library's informational record says nothing.
    root.setLevel(logging.WARNING)
    for name in _QUIET_LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.WARNING)


def _reduced_record(
    name: str,
    level: int,
    path: str,
    line: int,
    _message: object,
    _args: Any,
    exc_info: Any,
    func: str | None = None,
    _sinfo: str | None = None,
    **_extra: Any,
) -> logging.LogRecord:
    """Build a record without message, arguments, exception or stack: only facts of code."""
    record = logging.LogRecord(name, level, path, line, "foreign_log", (), None, func, None)
    error = exc_info[1] if isinstance(exc_info, tuple) and len(exc_info) == 3 else None
    record.error_type = None if error is None else _type_name(error)
    return record


class _ForeignHandler(logging.Handler):
    """Turns a reduced record into a line of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        get_logger().log(
            record.levelno if record.levelno in _LEVELS else logging.WARNING,
            "foreign_log",
            logger=record.name,
            foreign_level=record.levelname.lower(),
            file=Path(record.pathname).name,
            line=record.lineno,
            error_type=getattr(record, "error_type", None),
        )


_LEVELS: Final = (logging.WARNING, logging.ERROR, logging.CRITICAL)


def _showwarning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    get_logger().warning(
        "foreign_warning", error_type=category.__name__, file=Path(filename).name, line=lineno
    )


# Loggers are used before the configuration is read; even then nothing unlisted is written.
_configure_own("info", "json", None, strict=False)
