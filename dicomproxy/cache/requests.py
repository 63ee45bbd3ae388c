"""How the command line asks a running process to evict a study.

A request is a file in ``requests/``, written under another name and renamed;
the process that owns the cache looks there now and then, and puts an answer
beside it. Files only: whoever may write there may also delete the cache.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from dicomproxy.cache.layout import delete

_REQUEST: Final = ".request"
_ANSWER: Final = ".answer"
_LONGEST_BYTES: Final = 4096
_MOST_AT_ONCE: Final = 100
_KEPT_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.1


def answer_requests(directory: Path, evict: Callable[[str], str]) -> None:
    """Do what is asked for in *directory*, and delete answers nobody fetched.

    Raises:
        OSError: the directory cannot be used.
    """
    with os.scandir(directory) as entries:
        names = [entry.name for entry in entries][:_MOST_AT_ONCE]
    for name in names:
        path = directory / name
        if not name.endswith(_REQUEST):
            _forget_old(path)
            continue
        study_instance_uid = _study_asked_for(path)
        outcome = "bad_request" if study_instance_uid is None else evict(study_instance_uid)
        _write(path.with_suffix(_ANSWER), {"outcome": outcome})
        delete(path)


def ask_to_evict(directory: Path, study_instance_uid: str, timeout_seconds: float) -> str:
    """Ask the process that owns the cache to evict a study, and return its answer.

    ``no_answer`` if none came in time; the request is then withdrawn.

    Raises:
        OSError: the directory cannot be used.
    """
    request = directory / f"{secrets.token_hex(8)}{_REQUEST}"
    answer = request.with_suffix(_ANSWER)
    _write(request, {"evict": study_instance_uid})
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        fields = _read(answer)
        if fields is not None:
            delete(answer)
            return str(fields.get("outcome", "bad_answer"))
        time.sleep(_POLL_SECONDS)
    delete(request)
    return "no_answer"


def _study_asked_for(path: Path) -> str | None:
    fields = _read(path)
    asked = None if fields is None else fields.get("evict")
    return asked if isinstance(asked, str) and asked else None


def _read(path: Path) -> dict[str, object] | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with open(fd, "rb") as file:
        try:
            fields = json.loads(file.read(_LONGEST_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
    return fields if isinstance(fields, dict) else None


def _write(path: Path, fields: dict[str, str]) -> None:
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(json.dumps(fields), encoding="ascii")
    partial.chmod(0o600)
    partial.rename(path)


def _forget_old(path: Path) -> None:
    try:
        if time.time() - path.lstat().st_mtime > _KEPT_SECONDS:
            delete(path)
    except OSError:
        return  # fetched meanwhile
