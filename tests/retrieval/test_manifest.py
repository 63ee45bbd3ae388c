"""What a source says exists, and how it is compared with what is held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import SERIES_INSTANCE_UID, Level
from dicomproxy.ports import Failure, SourceError, SourceQuery
from dicomproxy.retrieval.manifest import SOP_CLASS_UID, Manifest, diff, load_manifest
from dicomproxy.retrieval.selection import Selection
from tests.retrieval.fakes import CT, STUDY, Archive, study
from tests.sentinel import PATIENT_ID


async def test_manifest_lists_every_instance_by_series() -> None:
    """One STUDY row, the SERIES rows, and IMAGE rows for each series make a manifest."""
    held = study(2, 1)
    archive = Archive("north", held, study(5, uid="1.9"))
    manifest = await load_manifest(archive, STUDY)
    assert manifest.series == {s: dict.fromkeys(uids, CT) for s, uids in held.series.items()}
    assert (manifest.patient_id, manifest.verified, manifest.held) == (PATIENT_ID, True, True)
    assert [query.level for query in archive.queries] == [
        Level.STUDY,
        Level.SERIES,
        Level.IMAGE,
        Level.IMAGE,
    ]


async def test_study_that_is_not_held() -> None:
    """A source without the study says so, which is an answer like any other."""
    manifest = await load_manifest(Archive("north"), STUDY)
    assert (manifest.held, manifest.series) == (False, {})


@pytest.mark.parametrize("level", [Level.STUDY, Level.SERIES, Level.IMAGE])
@pytest.mark.parametrize("failure", [Failure.STATUS, Failure.NO_CONTEXT])
async def test_refused_level_makes_it_unverified(level: Level, failure: Failure) -> None:
    """A source that refuses a level lists nothing that could be proof."""
    archive = Archive("north", study(2, 1))
    archive.fail(level, failure, 0x0122)
    manifest = await load_manifest(archive, STUDY)
    assert (manifest.verified, manifest.listed(Selection())) == (False, {})


@pytest.mark.parametrize("level", [Level.STUDY, Level.SERIES, Level.IMAGE])
@pytest.mark.parametrize("failure", [Failure.UNREACHABLE, Failure.TIMEOUT, Failure.BREAKER])
async def test_unreachable_source_has_no_manifest(level: Level, failure: Failure) -> None:
    """A listing that was broken off is none."""
    archive = Archive("north", study(2, 1))
    archive.fail(level, failure)
    with pytest.raises(SourceError):
        await load_manifest(archive, STUDY)


async def test_source_that_lists_no_instance_of_a_study_is_not_proof() -> None:
    """An archive that answers IMAGE level with nothing at all cannot be believed."""
    assert not (await load_manifest(Archive("north", study(0, 0)), STUDY)).verified


@pytest.mark.parametrize(
    ("study_date", "recent"),
    [
        ("20261124", True),
        ("20261123", True),
        ("20261122", False),
        ("20261125", True),  # a modality whose clock is ahead
        ("", False),
        ("2026", False),
        ("not a date", False),
    ],
)
def test_recent_studies(study_date: str, recent: bool) -> None:
    """A study of today or yesterday may still grow."""
    assert Manifest("1", study_date=study_date).is_recent(date(2026, 11, 24)) is recent


UIDS = st.sets(st.integers(0, 30).map(str))


@given(st.dictionaries(st.sampled_from("abc"), UIDS), UIDS)
def test_diff(series: dict[str, set[str]], cached: set[str]) -> None:
    """Missing is what is listed and not held, gone what is held and not listed."""
    manifest = Manifest("1", series={s: dict.fromkeys(uids, "") for s, uids in series.items()})
    difference = diff(manifest, cached)
    listed = set().union(*series.values())
    assert {s: set(uids) for s, uids in difference.missing.items()} == {
        s: uids - cached for s, uids in series.items() if uids - cached
    }
    assert set(difference.gone) == cached - listed
    narrowed = diff(manifest, cached, Selection(Level.SERIES, frozenset("a")))
    assert set(narrowed.missing) <= {"a"}
    assert narrowed.gone == difference.gone


@pytest.mark.parametrize("refused", [None, Level.STUDY, Level.SERIES, Level.IMAGE])
async def test_a_far_source_gives_the_same_manifest(refused: Level | None) -> None:
    """Study and series are asked for together, and come to the same as one by one."""
    near, far = Archive("near", study(2, 3)), Archive("far", study(2, 3))
    far.round_trip_seconds = 0.03
    for archive in (near, far):
        if refused is not None:
            archive.fail(refused, Failure.STATUS, 0xA900)
    assert await load_manifest(far, STUDY) == await load_manifest(near, STUDY)
    absent = await load_manifest(far, "1.2.99")
    assert absent.held is (refused is Level.STUDY)


@pytest.mark.parametrize("turned_away", [Level.STUDY, Level.SERIES])
async def test_a_question_that_an_open_breaker_turned_away_is_asked_again(
    turned_away: Level,
) -> None:
    """Of two questions asked together one may be the probe; its answer lets the other through."""
    far = TurnsOneAway("far", study(2, 3))
    far.turned_away = turned_away
    far.round_trip_seconds = 0.03

    manifest = await load_manifest(far, STUDY)

    assert manifest == await load_manifest(Archive("near", study(2, 3)), STUDY)
    assert [query.level for query in far.queries].count(turned_away) == 2


class TurnsOneAway(Archive):
    turned_away: Level | None

    async def find(self, query: SourceQuery) -> AsyncIterator[Identifier]:
        if query.level is self.turned_away:
            self.turned_away = None
            self.queries.append(query)
            raise SourceError(self.name, Failure.BREAKER)
        async for row in super().find(query):
            yield row


SERIES_1, SERIES_2 = (f"{STUDY}.{number}" for number in (1, 2))


@pytest.mark.parametrize("likely", [[SERIES_1], [SERIES_1, SERIES_2], ["1.2.99", SERIES_2]])
@pytest.mark.parametrize("refused", [None, Level.SERIES, Level.IMAGE])
async def test_likely_series_change_no_manifest(likely: list[str], refused: Level | None) -> None:
    """Asked ahead for series that it has, or has no more, a far source lists the same."""
    near, far = Archive("near", study(2, 3)), Archive("far", study(2, 3))
    far.round_trip_seconds = 0.03
    for archive in (near, far):
        if refused is not None:
            archive.fail(refused, Failure.STATUS, 0xA900)
    manifest = await load_manifest(far, STUDY, series=likely)
    expected = await load_manifest(near, STUDY)
    assert (manifest.verified, manifest.series) == (expected.verified, expected.series)


async def test_instances_of_likely_series_are_asked_for_at_once() -> None:
    """What is known already costs no round trip: all three levels are asked together."""
    far = Archive("far", study(2))
    far.round_trip_seconds = 0.03
    far.find_gate = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        loading = group.create_task(load_manifest(far, STUDY, series=[SERIES_1]))
        async with asyncio.timeout(60):
            while len(far.queries) < 3:  # noqa: ASYNC110 (what fakes count has no event)
                await asyncio.sleep(0)
        assert {query.level for query in far.queries} == {Level.STUDY, Level.SERIES, Level.IMAGE}
        far.find_gate.set()
    assert list((await loading).series[SERIES_1]) == far.studies[STUDY].series[SERIES_1]
    assert len(far.queries) == 3


async def test_a_series_that_is_no_more_may_be_an_error_to_the_archive() -> None:
    """A failure that asking too early brought about is not held against the listing."""
    far = Strict("far", study(2, 3))
    far.round_trip_seconds = 0.03
    manifest = await load_manifest(far, STUDY, series=["1.2.99"])
    assert manifest == await load_manifest(Archive("near", study(2, 3)), STUDY)


async def test_listing_can_be_read_before_it_is_complete() -> None:
    """Each row is there by the time that it is told of."""
    seen: list[int] = []
    into: dict[str, dict[str, str]] = {}
    manifest = await load_manifest(
        Archive("north", study(3)),
        STUDY,
        into=into,
        progress=lambda: seen.append(len(into[SERIES_1])),
    )
    assert seen == [1, 2, 3]
    assert manifest.series == into


@pytest.mark.parametrize("wanted", [False, True])
async def test_sop_classes_are_asked_for_where_they_are_needed(wanted: bool) -> None:
    """Archives may have to read every file to say them."""
    archive = Archive("north", study(1))
    archive.wants_sop_classes = wanted
    await load_manifest(archive, STUDY)
    assert (SOP_CLASS_UID in archive.queries[-1].identifier) is wanted


class Strict(Archive):
    async def find(self, query: SourceQuery) -> AsyncIterator[Identifier]:
        series = query.identifier.text(SERIES_INSTANCE_UID)
        if series and series not in self.studies[STUDY].series:
            raise SourceError(self.name, Failure.STATUS, 0xC000)
        async for row in super().find(query):
            yield row
