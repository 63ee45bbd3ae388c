"""The guards around every test do fail a test that deserves it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dicomproxy
from tests.support.loop_guard import GUARD

ROOT = Path(dicomproxy.__file__).resolve().parent

OFFENDERS = """
import asyncio
import pytest
from dicomproxy.logs import get_logger
from tests import sentinel

def test_prints():
    print("Patient", sentinel.PATIENT_NAME)

def test_logs():
    get_logger().info("x", detail=sentinel.PATIENT_ID)

def test_logs_where_the_test_reads_stderr(capfd):
    get_logger().info("x", detail=sentinel.ACCESSION_NUMBER)
    capfd.readouterr()

def test_innocent():
    print("fine")
"""


def test_patient_value_in_output_fails_the_test(tmp_path: Path) -> None:
    """Printed, logged, or logged and read away: a sentinel value is found."""
    (tmp_path / "test_offenders.py").write_text(OFFENDERS)
    options = ["-q", "-rA", "-p", "no:cacheprovider", "-p", "tests.conftest", "-c", "/dev/null"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    failed = {
        line.split("::")[1].split(" ")[0]
        for line in done.stdout.splitlines()
        if line.startswith(("FAILED", "ERROR"))
    }
    assert failed == {"test_prints", "test_logs", "test_logs_where_the_test_reads_stderr"}


def code_in(room: str) -> object:
    """Compile a function that opens a file, as if it stood in one of our rooms."""
    scope: dict[str, object] = {}
    source = "def read():\n    open('/dev/null').close()\n"
    exec(compile(source, str(ROOT / room / "x.py"), "exec"), scope)
    return scope["read"]


async def test_file_work_on_the_loop_is_caught() -> None:
    """Our code opening a file on a loop's thread is recorded, with its place."""
    code_in("cache")()  # type: ignore[operator]
    assert GUARD.violations == ["open on the loop's thread, from cache/x.py:read:2"]
    GUARD.violations.clear()


async def test_command_line_and_tests_may_read_files() -> None:
    """The command line and the tests themselves are not caught."""
    code_in("cli")()  # type: ignore[operator]
    Path("/dev/null").read_bytes()
    assert GUARD.violations == []


def test_file_work_without_a_loop_is_fine() -> None:
    """A thread that runs no loop may wait for a disk."""
    code_in("cache")()  # type: ignore[operator]
    assert GUARD.violations == []
