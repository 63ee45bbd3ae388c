"""What holds for every test: no patient value in any output, no blocking work on a loop."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Generator, Iterator
from typing import Any, TextIO, cast

import hypothesis
import pytest

from dicomproxy import logs
from tests.sentinel import sentinels_in
from tests.support.log_watch import LogWatch
from tests.support.loop_guard import GUARD

hypothesis.settings.register_profile("fast", deadline=None, max_examples=50)
hypothesis.settings.register_profile("deep", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test whose captured output names the sentinel patient."""
    report = yield
    found = sentinels_in("\n".join(text for _title, text in report.sections))
    if found and report.outcome == "passed":
        report.outcome = "failed"
        report.longrepr = f"patient values in the captured output: {found}"
    return report


@pytest.fixture(autouse=True)
def log_watch() -> Iterator[LogWatch]:
    """Log strictly, and let no line name the sentinel patient."""
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    factory, root_level = logging.getLogRecordFactory(), logging.getLogger().level
    watch = LogWatch()
    logs.configure("debug", stream=cast(TextIO, watch), strict=True, hooks=False)
    yield watch
    sys.excepthook, sys.unraisablehook, threading.excepthook = hooks
    logging.setLogRecordFactory(factory)
    logging.getLogger().setLevel(root_level)
    assert sentinels_in(watch.text) == []


@pytest.fixture(autouse=True)
def loop_guard() -> Iterator[None]:
    """Fail a test during which our code did file or database work on a loop's thread."""
    GUARD.install()
    GUARD.violations.clear()
    GUARD.enabled = True
    yield
    GUARD.enabled = False
    assert GUARD.violations == []
