"""What a source says exists, and how it is compared with what is held."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import Level
from dicomproxy.ports import Failure, SourceError, SourceQuery
from dicomproxy.retrieval.manifest import Manifest, diff, load_manifest
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
