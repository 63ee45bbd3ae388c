"""Who a local patient is: learnt or asked for, once at a time, and forgotten when it must be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.identity.safety import Demographics
from dicomproxy.ports import Failure, SourceError, SourceQuery
from tests.identity.providers import local
from tests.query.builders import identifier
from tests.query.identities import Site, patient_row
from tests.sentinel import PATIENT_BIRTH_DATE, PATIENT_ID, PATIENT_NAME
from tests.support.log_watch import LogWatch

ME = local(PATIENT_ID)
HERE = patient_row(PATIENT_ID, PATIENT_NAME, PATIENT_BIRTH_DATE)
KNOWN = Demographics(PATIENT_NAME, PATIENT_BIRTH_DATE, "F")


@asynccontextmanager
async def site(*here: Identifier, kind: type[Site] = Site) -> AsyncIterator[Site]:
    made = kind(here=here)
    try:
        async with asyncio.timeout(60):
            yield made
    finally:
        await made.service.close()


class Slow(Site):
    """Its local PACS has read its answer, and does not send it before it may."""

    def __init__(self, **given: object) -> None:
        super().__init__(**given)  # type: ignore[arg-type]
        self.reached, self.gate = asyncio.Event(), asyncio.Event()

    async def ask(self, query: SourceQuery) -> AsyncIterator[Identifier]:
        self.asked.append(query)
        rows = list(self.here)
        self.reached.set()
        await self.gate.wait()
        for row in rows:
            yield row


async def test_the_local_pacs_is_asked_once_and_remembered() -> None:
    """By the ID, for what is compared."""
    async with site(HERE) as it:
        assert await it.service.demographics(ME) == KNOWN
        assert await it.service.demographics(ME) == KNOWN
    (question,) = it.asked
    assert question.identifier.text(0x00100020) == PATIENT_ID


async def test_an_id_beyond_ascii_is_asked_for_in_a_character_set_that_has_it() -> None:
    """As the way back from a source can lead to one without a question that named it."""
    async with site(HERE) as it:
        assert await it.service.demographics(local("Ärztin-Ž")) is None
    (question,) = it.asked
    assert question.identifier.text(0x00100020) == "Ärztin-Ž"


async def test_those_who_ask_at_the_same_time_share_one_question() -> None:
    """One of them giving up takes nothing from the others."""
    async with site(HERE, kind=Slow) as it, asyncio.TaskGroup() as group:
        assert isinstance(it, Slow)
        first, *others = [group.create_task(it.service.demographics(ME)) for _ in range(5)]
        await it.reached.wait()
        first.cancel()
        it.gate.set()
        assert await asyncio.gather(*others) == [KNOWN] * 4
        assert len(it.asked) == 1


@pytest.mark.parametrize(
    "row",
    [
        patient_row("SOMEBODY", PATIENT_NAME, PATIENT_BIRTH_DATE),
        identifier(
            PatientID=PATIENT_ID, IssuerOfPatientID="ELSEWHERE", PatientName="", PatientSex="M"
        ),
    ],
    ids=["another ID", "another issuer"],
)
async def test_what_the_local_pacs_says_of_others_is_not_taken(row: Identifier) -> None:
    """An archive that ignores the key answers with whomever it has."""
    async with site(row) as it:
        assert await it.service.demographics(ME) is None
        it.service.learn(row)
        assert it.service.known.of(ME) is None


async def test_a_row_that_does_not_say_all_teaches_nothing() -> None:
    """Half of what is known would empty the other half in what is shown."""
    async with site() as it:
        it.service.learn(identifier(PatientID=PATIENT_ID, PatientName=PATIENT_NAME))
        assert it.service.known.of(ME) is None
        it.service.learn(HERE)
        assert it.service.known.of(ME) == KNOWN


@pytest.mark.parametrize(
    ("name", "birth_date", "sex"),
    [("", "", ""), (PATIENT_NAME, "", ""), (PATIENT_NAME, "1980", "O")],
    ids=["nothing", "a name", "nothing valid"],
)
async def test_a_row_with_nothing_to_compare_does_not_keep_the_local_pacs_from_being_asked(
    name: str, birth_date: str, sex: str
) -> None:
    """Many an archive returns these keys empty below PATIENT level."""
    async with site(HERE) as it:
        it.service.learn(patient_row(PATIENT_ID, name, birth_date, sex))
        assert await it.service.demographics(ME) == KNOWN


@pytest.mark.parametrize("order", [1, -1])
async def test_rows_that_contradict_one_another_have_the_local_pacs_asked(
    order: int, log_watch: LogWatch
) -> None:
    """Whichever study came last is not who the patient is; a merge begins anew."""
    older = patient_row(PATIENT_ID, PATIENT_NAME, "19010101")
    async with site(HERE) as it:
        for row in (HERE, older)[::order]:
            it.service.learn(row)
        for row in (older, HERE, older):
            assert await it.service.demographics(ME) == KNOWN
            it.service.learn(row)
        assert len(it.asked) == 2  # again after what contradicted it
        assert len(log_watch.named("local_patient_contradicts_itself")) == 1
        it.identities.forget(ME)
        it.service.learn(older)
        assert it.service.known.of(ME) == Demographics(PATIENT_NAME, "19010101", "F")


@pytest.mark.parametrize("order", [1, -1])
async def test_rows_with_another_name_have_the_local_pacs_asked_once(
    order: int, log_watch: LogWatch
) -> None:
    """A study made before a marriage does not rename anybody, whenever it is seen."""
    maiden = patient_row(PATIENT_ID, "Maiden^Name", PATIENT_BIRTH_DATE)
    padded = patient_row(PATIENT_ID, PATIENT_NAME + "^^ ", PATIENT_BIRTH_DATE)
    async with site(HERE) as it:
        it.service.learn(padded)
        it.service.learn(HERE)
        assert it.service.known.of(ME) == KNOWN
        for row in (maiden, HERE, maiden)[::order]:
            it.service.learn(row)
            assert await it.service.demographics(ME) == KNOWN
        assert len(it.asked) == 1
        assert log_watch.named("local_patient_contradicts_itself") == []


async def test_a_patient_without_birth_date_and_sex_is_asked_for_once() -> None:
    """What the local PACS says when it is asked is all that it knows."""
    async with site(patient_row(PATIENT_ID, PATIENT_NAME, "", "")) as it:
        for _ in range(2):
            assert await it.service.demographics(ME) == Demographics(PATIENT_NAME)
    assert len(it.asked) == 1


@pytest.mark.parametrize("failure", [SourceError("local", Failure.TIMEOUT), RuntimeError()])
async def test_a_local_pacs_that_fails_is_nothing_known(failure: Exception) -> None:
    """And is asked again the next time."""
    async with site(HERE) as it:
        it.local_failure = failure
        assert await it.service.demographics(ME) is None
        it.local_failure = None
        assert await it.service.demographics(ME) == KNOWN


@pytest.mark.parametrize("everything", [False, True])
async def test_what_was_on_its_way_when_it_was_forgotten_is_asked_for_again(
    everything: bool,
) -> None:
    """The record may have been another one by then: who waits for it gets the new one."""
    async with site(HERE, kind=Slow) as it, asyncio.TaskGroup() as group:
        assert isinstance(it, Slow)
        asking = group.create_task(it.service.demographics(ME))
        await it.reached.wait()
        it.here = [patient_row(PATIENT_ID, "Merged", PATIENT_BIRTH_DATE, "M")]
        if everything:
            it.identities.forget_all()
        else:
            it.identities.forget(ME)
        it.gate.set()
        merged = Demographics("Merged", PATIENT_BIRTH_DATE, "M")
        assert await asking == merged
        assert it.service.known.of(ME) == merged


async def test_a_record_that_changes_all_the_time_is_nothing_known() -> None:
    """What is out of date each time it comes is not taken."""

    class Changing(Site):
        async def ask(self, query: SourceQuery) -> AsyncIterator[Identifier]:
            self.asked.append(query)
            self.identities.forget(ME)
            for row in self.here:
                yield row

    async with site(HERE, kind=Changing) as it:
        assert await it.service.demographics(ME) is None
        assert it.service.known.of(ME) is None
        assert 1 < len(it.asked) < 10
