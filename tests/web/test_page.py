"""The status page: every part is there, the important ones stand out, nothing is taken as HTML."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import fields, replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.web.page import CONTENT_SECURITY_POLICY, render_page
from dicomproxy.web.status import (
    CacheStatus,
    FailureStatus,
    Hl7Status,
    OperationStatus,
    SourceStatus,
    StatusSnapshot,
)

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC).timestamp()
BARE = StatusSnapshot(
    version="0.1.0",
    started_at=NOW,
    ready=False,
    draining=False,
    ae_titles=("DICOMPROXY",),
    address="0.0.0.0:11112",
    associations=0,
    max_associations=200,
    sources=(),
    operations=(),
    cache=CacheStatus(0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
)
LOCAL = SourceStatus(
    name="local",
    ae_title="LOCALPACS",
    address="10.0.0.5:104",
    breaker="closed",
    last_success_at=NOW,
    last_failure_at=0.0,
    last_failure="",
    median_seconds=None,
    last_seconds=None,
    in_use=0,
    idle=0,
    ceiling=8,
)
NORTH = SourceStatus(
    name="north",
    ae_title="NORTHPACS",
    address="10.9.0.4:104",
    breaker="open",
    last_success_at=NOW - 7200,
    last_failure_at=NOW - 40,
    last_failure="timeout",
    median_seconds=0.042,
    last_seconds=5.0,
    in_use=1,
    idle=2,
    ceiling=4,
)
GOING = OperationStatus(
    operation_id="op-going",
    kind="query",
    caller_ae_title="READING1",
    peer_address="10.0.1.21",
    query_level="STUDY",
    destination_ae_title="",
    phase="local",
    remaining=0,
    completed=0,
    failed=0,
    warning=0,
    bytes=0,
    duration_seconds=0.2,
    quiet_seconds=0.1,
)
STUCK = replace(
    GOING,
    operation_id="op-stuck",
    kind="retrieve",
    caller_ae_title="READING2",
    destination_ae_title="READING3",
    phase="fetching",
    remaining=250,
    completed=48,
    failed=2,
    bytes=25_300_000,
    duration_seconds=95,
    quiet_seconds=42,
)
FULL = replace(
    BARE,
    started_at=NOW - 3 * 3600 - 12 * 60,
    ready=True,
    ae_titles=("DICOMPROXY", "LOCALPACS"),
    associations=3,
    sources=(LOCAL, NORTH),
    operations=(GOING, STUCK),
    cache=CacheStatus(
        bytes=150_000_000_000,
        max_size_bytes=200_000_000_000,
        studies=812,
        instances=99_000,
        pinned=4,
        in_use=2,
        spooled_bytes=1_000_000,
        hits=75,
        misses=25,
        evictions=9,
    ),
    failures=tuple(
        FailureStatus(NOW - 60 * number, "retrieve", f"reason{number}") for number in range(30)
    ),
    tasks=12,
    hl7=Hl7Status(
        address="0.0.0.0:2575",
        connections=2,
        max_connections=20,
        refused_connections=13,
        acknowledged=51,
        refused=6,
        waiting=4,
        set_aside=1,
        merges=17,
        updates=29,
        unknown_domain=3,
        last_notice_at=NOW - 90,
        last_refused_at=NOW - 25,
    ),
)


class Reader(HTMLParser):
    """Collects tags and text, and checks that tags nest."""

    VOID = frozenset({"meta"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.mark.parametrize(
    "part",
    [
        "version 0.1.0",
        "ready",
        "3 h 12 min",
        "DICOMPROXY, LOCALPACS on 0.0.0.0:11112",
        "3 of 200",
        "local PACS",
        "north",
        "10.9.0.4:104",
        "timeout 40 s ago",
        "2 h 0 min ago",
        "1 / 2 / 4",
        "42 ms",
        "5.0 s",
        "READING1",
        "48 of 300",
        "2 failed",
        "25.3 MB",
        "1 min 35 s",
        "stuck: no progress for 42 s",
        "150 GB of 200 GB",
        "75 / 25 (75 %)",
        "812",
        "99000",
        "2 / 4",
        "1.0 MB: the disk takes none",
        "READING3",
        "10.0.1.21",
        "retrieve",
        "2026-03-01 11:59:00 UTC",
        "2026-03-01 12:00:00 UTC",
        "Listening on 0.0.0.0:2575",
        "Connections 2 of 20",
        "Connections refused 13",
        "Messages acknowledged 51",
        "Messages refused 6 , the last 25 s ago",
        "Waiting 4",
        "Failed 1, until the next start",
        "Merges / updates heeded 17 / 29",
        "Of an unknown domain 3: everything was forgotten",
        "Last notice 1 min 30 s ago",
    ],
)
def test_page_shows(part: str) -> None:
    """Each part that operations needs to see is on the page, in its readable form."""
    assert part in Reader(render_page(FULL, NOW)).text


def test_bare_snapshot_says_what_there_is_not() -> None:
    """Before anything has happened the page is whole, and its tables say so."""
    text = Reader(render_page(BARE, NOW)).text
    for part in ("starting", "No sources", "Nothing is running", "None since the start"):
        assert part in text
    assert "HL7" not in text


def test_only_a_stuck_transfer_is_highlighted_and_it_comes_first() -> None:
    """A transfer without progress for over 30 s stands out; one at 30 s does not."""
    page = render_page(FULL, NOW)
    assert page.count('<tr class="stuck">') == 1
    assert page.index("op-stuck") < page.index("op-going")
    moving = replace(STUCK, quiet_seconds=30.0)
    assert '<tr class="stuck">' not in render_page(replace(FULL, operations=(moving,)), NOW)


def test_only_the_latest_failures_are_shown_latest_first() -> None:
    """Twenty of thirty failures, in the order of their age."""
    shown = re.findall(r"reason\d+", render_page(replace(FULL, failures=FULL.failures[::-1]), NOW))
    assert shown == [f"reason{number}" for number in range(20)]


def test_long_list_of_operations_is_cut_and_says_so() -> None:
    """A page stays of bounded size however much is going on."""
    many = tuple(replace(GOING, operation_id=f"op{n:04}") for n in range(130))
    page = render_page(replace(FULL, operations=many), NOW)
    assert len(re.findall(r"op\d{4}", page)) == 100
    assert "and 30 more" in page


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"last_success_at": 0.0}, None),
        ({}, True),
        ({"last_success_at": 0.0, "last_failure_at": NOW}, False),
        ({"last_failure_at": NOW + 1}, False),
        ({"last_failure_at": NOW - 1}, True),
        ({"breaker": "open"}, False),
        ({"breaker": "half_open"}, True),
    ],
)
def test_reachable_is_what_the_latest_exchange_says(
    changes: dict[str, Any], expected: bool | None
) -> None:
    """Success after failure means reachable, an open breaker never does."""
    assert replace(LOCAL, **changes).reachable is expected


@pytest.mark.parametrize(
    ("ready", "draining", "expected"),
    [
        (False, False, "starting"),
        (True, False, "ready"),
        (True, True, "draining"),
        (False, True, "draining"),
    ],
)
def test_state_is_shown_in_a_word(ready: bool, draining: bool, expected: str) -> None:
    """Draining outranks ready: nothing new is accepted."""
    page = render_page(replace(BARE, ready=ready, draining=draining), NOW)
    assert f"<title>dicomproxy: {expected}</title>" in page


def test_page_loads_nothing_and_its_policy_lets_it_use_its_own_style() -> None:
    """No script, link, image or inline style attribute; the policy names the sheet's hash."""
    page = render_page(FULL, NOW)
    tags = Reader(page).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "form", "a"}
    assert [attrs["http-equiv"] for _, attrs in tags if "http-equiv" in attrs] == ["refresh"]
    for _, attrs in tags:
        assert not attrs.keys() & {"style", "src", "href"}
        assert not any(name.startswith("on") for name in attrs)
    sheet = page.split("<style>")[1].split("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in CONTENT_SECURITY_POLICY


def _poisoned(value: Any, poison: str) -> Any:
    """Return *value* with every text in it replaced."""
    if isinstance(value, str):
        return poison
    if isinstance(value, tuple):
        return tuple(_poisoned(item, poison) for item in value)
    if hasattr(value, "__dataclass_fields__"):
        names = [spec.name for spec in fields(value)]
        return replace(value, **{name: _poisoned(getattr(value, name), poison) for name in names})
    return value


@given(
    poison=st.one_of(
        st.text(st.characters()),
        st.sampled_from(
            ["<b>", "</td><script>alert(1)</script>", '"><i x="', "'&lt;", "]]>", "<!--", "\ud800"]
        ),
    )
)
def test_no_text_becomes_markup(poison: str) -> None:
    """Whatever the texts of a snapshot are, the page has the same tags and attributes."""
    plain = Reader(render_page(_poisoned(FULL, "x"), NOW)).tags
    # Not a word with a meaning, such as a breaker's "open", which has a look of its own.
    page = render_page(_poisoned(FULL, f"x{poison}"), NOW)
    page.encode()
    assert Reader(page).tags == plain
