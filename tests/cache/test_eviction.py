"""Which studies go: whole, the least recently used, never one in use or pinned."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.cache.eviction import (
    StudyUse,
    bytes_to_free,
    least_recently_used,
    unused_since,
)
from dicomproxy.cache.vectors import skip

_USES = st.lists(
    st.builds(
        StudyUse,
        st.uuids().map(str),
        st.integers(0, 1000),
        st.floats(0, 100),
        st.booleans(),
        st.booleans(),
    ),
    max_size=20,
    unique_by=lambda study: study.study_instance_uid,
)


@given(_USES, st.integers(0, 5000))
def test_only_as_much_goes_as_must_oldest_first(studies: list[StudyUse], free: int) -> None:
    """Enough is freed if enough may go, the last one was needed, and none older stays."""
    chosen = least_recently_used(studies, free)
    by_uid = {study.study_instance_uid: study for study in studies}
    gone = [by_uid[uid] for uid in chosen]
    assert all(study.evictable and study.size_bytes for study in gone)
    left = [s for s in studies if s.evictable and s.size_bytes and s not in gone]
    freed = sum(study.size_bytes for study in gone)
    assert freed >= free or not left
    if gone:
        assert freed - gone[-1].size_bytes < free
        assert all(study.last_used >= gone[-1].last_used for study in left)


@pytest.mark.parametrize(
    ("used", "arriving", "missing", "expected"),
    [
        (0, 10, 0, 0),
        (85, 10, 0, 0),
        (86, 10, 0, 11),
        (100, 0, 0, 15),
        (10, 10, 7, 7),
        (90, 10, 3, 15),
        (90, 10, 50, 50),
        (10, 10, -5, 0),
    ],
)
def test_eviction_begins_at_the_high_watermark_and_ends_at_the_low(
    used: int, arriving: int, missing: int, expected: int
) -> None:
    """Between the watermarks nothing goes; a file system that lacks more decides."""
    freed = bytes_to_free(used, arriving, high_bytes=95, low_bytes=85, missing_free_bytes=missing)
    assert freed == expected


@given(_USES, st.floats(0, 100))
def test_age_spares_what_is_in_use_or_pinned(studies: list[StudyUse], moment: float) -> None:
    """What was used since, is in use, or is pinned stays."""
    gone = set(unused_since(studies, moment))
    for study in studies:
        stays = study.in_use or study.pinned or study.last_used >= moment
        assert (study.study_instance_uid in gone) is not stays


@given(st.lists(st.binary(max_size=5), max_size=6), st.data())
def test_skipped_buffers_lose_their_first_bytes(parts: list[bytes], data: st.DataObject) -> None:
    """What is left after a partial write is exactly what was not written."""
    text = b"".join(parts)
    count = data.draw(st.integers(0, len(text)))
    views = [memoryview(part) for part in parts]
    skip(views, count)
    assert b"".join(views) == text[count:]
