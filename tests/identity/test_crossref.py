"""The cross-references of a source as one: the first that knows answers, and an outage is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest
from prometheus_client import REGISTRY

from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.identity.crossref import Identities, IdentityUnresolved, Provider
from dicomproxy.identity.domains import Domains
from dicomproxy.identity.reports import recently_withheld
from dicomproxy.identity.same import SameDomain
from dicomproxy.ports import CrossReference, CrossReferenceError, Failure
from tests.identity.providers import HOSPITAL, NORTH, SOUTH, Scripted, local, north
from tests.sentinel import PATIENT_ID
from tests.support.log_watch import LogWatch

OUTAGE = CrossReferenceError(Failure.UNREACHABLE, "down")
ME, OTHER = local(PATIENT_ID), local("OTHER")
DOMAINS = Domains(HOSPITAL, {"north": NORTH, "south": SOUTH, "sister": Domain()})


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


Make = Callable[..., Identities]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made = []

    def make(*chain: CrossReference, **options: object) -> Identities:
        providers = [Provider(f"p{number}", one) for number, one in enumerate(chain)]
        identities = Identities(
            DOMAINS,
            {"north": providers, "south": providers, "sister": [Provider("same", SameDomain())]},
            **options,  # type: ignore[arg-type]
        )
        made.append(identities)
        return identities

    yield make
    for identities in made:
        await identities.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0)


# ------------------------------------------------------------------ composition


async def test_source_of_the_local_domain_has_the_same_ids(make: Make) -> None:
    """Under same an ID is itself, both ways; one of another domain leads nowhere."""
    identities = make()

    assert await identities.elsewhere(ME, "sister") == (ME,)
    assert await identities.here(ME, "sister") == ME
    with pytest.raises(IdentityUnresolved, match="no_local_id"):
        await identities.here(PatientId("X", Domain("ELSEWHERE")), "sister")
    assert await SameDomain().lookup(ME, NORTH) == ()


async def test_first_cross_reference_that_knows_an_id_answers(make: Make) -> None:
    """One that knows none passes the question on; one after the answer is not asked."""
    knows_not, knows, later = Scripted(), Scripted({ME, north("N1")}), Scripted({ME, north("N2")})
    identities = make(knows_not, knows, later)

    assert await identities.elsewhere(ME, "north") == (north("N1"),)
    assert (len(knows_not.asked), len(knows.asked), len(later.asked)) == (1, 1, 0)


async def test_patient_has_no_id_only_if_every_cross_reference_says_so(make: Make) -> None:
    """None of all of them is none; an outage of one among them is an error."""
    first, second = Scripted(), Scripted()
    identities = make(first, second)

    assert await identities.elsewhere(ME, "north") == ()
    first.failure = OUTAGE
    with pytest.raises(CrossReferenceError, match="unreachable down"):
        await identities.elsewhere(OTHER, "north")


async def test_answer_in_spite_of_an_outage_counts(make: Make, log_watch: LogWatch) -> None:
    """Where the first fails, the next is asked and its ID holds, and the failure is told."""
    first, second = Scripted(), Scripted({ME, north("N1")})
    first.failure = OUTAGE
    identities = make(first, second)

    assert await identities.elsewhere(ME, "north") == (north("N1"),)
    assert recently_withheld()[-1][1:] == (
        "north",
        "cross_reference_failed",
        "p0: unreachable down",
    )
    (told,) = log_watch.named("cross_reference_failed")
    assert (told["service"], told["source"], told["failure"], told["reason"]) == (
        "p0",
        "north",
        "unreachable",
        "down",
    )


async def test_outage_that_goes_on_is_one_thing_to_tell(make: Make) -> None:
    """On the status page it leaves room for the rest."""
    down = Scripted()
    down.failure = CrossReferenceError(Failure.UNREACHABLE, "still")
    identities = make(down)
    for number in range(3):
        with pytest.raises(CrossReferenceError):
            await identities.elsewhere(local(f"L{number}"), "north")

    told = [one for one in recently_withheld() if one.reason == "p0: unreachable still"]
    assert len(told) == 1


SEVERAL = CrossReferenceError(Failure.STATUS, "several_ids")
NOT_THIS_DOMAIN = CrossReferenceError(Failure.STATUS, "unknown_domain")


async def test_several_ids_that_are_to_be_none_are_not_chosen_from_by_another(make: Make) -> None:
    """Who knows them has answered; the next might name the wrong one of them."""
    first, second = Scripted(), Scripted({ME, north("N1")})
    first.failure = SEVERAL
    identities = make(first, second)

    with pytest.raises(CrossReferenceError, match="several_ids"):
        await identities.elsewhere(ME, "north")
    with pytest.raises(IdentityUnresolved, match="several_local_ids"):
        await identities.here(north("N1"), "north")
    assert second.asked == []


@pytest.mark.parametrize("failures", [(NOT_THIS_DOMAIN, OUTAGE), (OUTAGE, NOT_THIS_DOMAIN)])
async def test_unknown_domain_hides_no_outage(
    make: Make, failures: tuple[CrossReferenceError, CrossReferenceError]
) -> None:
    """An ID of nobody's domain is unresolved only if nobody was out of reach."""
    chain = Scripted(), Scripted()
    for one, failure in zip(chain, failures, strict=True):
        one.failure = failure

    with pytest.raises(CrossReferenceError, match="unreachable"):
        await make(*chain).here(PatientId("X1", Domain("ELSEWHERE")), "north")


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (None, "none"),
        (SEVERAL, "several_ids"),
        (NOT_THIS_DOMAIN, "unknown_domain"),
        (OUTAGE, "unreachable"),
        (CrossReferenceError(Failure.TIMEOUT), "timeout"),
        (CrossReferenceError(Failure.STATUS, "rejected"), "status"),
    ],
)
async def test_each_outcome_is_counted_by_itself(
    make: Make, failure: CrossReferenceError | None, outcome: str
) -> None:
    """Who watches can tell an outage from a table that lacks a domain, and both from nobody."""

    def counted() -> float:
        return (
            REGISTRY.get_sample_value(
                "dicomproxy_cross_reference_lookups_total", {"service": "p0", "outcome": outcome}
            )
            or 0.0
        )

    provider, before = Scripted(), counted()
    provider.failure = failure
    with suppress(CrossReferenceError):
        await make(provider).elsewhere(ME, "north")
    assert counted() == before + 1


async def test_source_without_cross_references_knows_nobody(make: Make) -> None:
    """A source for which nothing is configured is not asked about anybody."""
    assert await make(Scripted({ME, north("N1")})).elsewhere(ME, "nowhere") == ()


async def test_silent_cross_reference_is_an_outage_after_its_deadline(make: Make) -> None:
    """One that does not answer in time fails, and is cancelled; the next is asked."""
    silent, second = Scripted(), Scripted({ME, north("N1")})
    silent.gate = asyncio.Event()

    assert await make(silent, second, deadline_seconds=0.01).elsewhere(ME, "north") == (
        north("N1"),
    )
    with pytest.raises(CrossReferenceError, match="timeout deadline"):
        await make(silent, deadline_seconds=0.01).elsewhere(ME, "north")
    assert silent.cancelled == 2


async def test_crash_is_an_outage_without_values(make: Make, log_watch: LogWatch) -> None:
    """A fault of the program is an error like an outage; what it says is not told."""
    crashing = Scripted()
    crashing.failure = RuntimeError(PATIENT_ID)

    with pytest.raises(CrossReferenceError, match=r"^protocol_error crashed$"):
        await make(crashing).elsewhere(ME, "north")
    assert log_watch.named("cross_reference_crashed")[0]["error_type"] == "RuntimeError"


@pytest.mark.parametrize("value", ["N*", "N?1", "N1\\N2", "", "N\n1"])
async def test_id_that_would_match_other_patients_is_no_answer(make: Make, value: str) -> None:
    """What cannot be sent as a key for one patient is an error, never a key."""
    with pytest.raises(CrossReferenceError, match="id_of_no_use"):
        await make(Scripted({ME, north(value)})).elsewhere(ME, "north")


async def test_id_of_another_domain_is_no_answer(make: Make) -> None:
    """An ID that a cross-reference gives for a domain that was not asked for is not used."""

    class Wrong(Scripted):
        async def lookup(self, patient: PatientId, domain: Domain) -> tuple[PatientId, ...]:
            return (PatientId("S1", SOUTH),)

    with pytest.raises(CrossReferenceError, match="id_of_another_domain"):
        await make(Wrong()).elsewhere(ME, "north")


async def test_several_ids_come_together(make: Make) -> None:
    """Where a cross-reference gives several IDs of a person, all of them are asked for."""
    provider = Scripted({ME, north("N1"), north("N2")})

    assert await make(provider).elsewhere(ME, "north") == (north("N1"), north("N2"))


# ------------------------------------------------------------------- way back


async def test_foreign_id_leads_to_one_local_id(make: Make) -> None:
    """An answer is mapped back by the same cross-references."""
    assert await make(Scripted({ME, north("N1")})).here(north("N1"), "north") == ME


async def test_local_id_at_a_source_is_itself(make: Make) -> None:
    """A row that names the local issuer needs no cross-reference."""
    provider = Scripted()

    assert await make(provider).here(PatientId(PATIENT_ID, Domain("HOSPITAL")), "north") == ME
    assert provider.asked == []


@pytest.mark.parametrize(
    ("persons", "reason"),
    [
        ([], "no_local_id"),
        ([{north("N1")}], "no_local_id"),
        ([{north("N1"), ME, OTHER}], "several_local_ids"),
    ],
)
async def test_foreign_id_of_none_or_several_local_patients_is_unresolved(
    make: Make, persons: list[set[PatientId]], reason: str
) -> None:
    """Without exactly one local ID there is nobody to show the answer under."""
    with pytest.raises(IdentityUnresolved, match=reason):
        await make(Scripted(*persons)).here(north("N1"), "north")


async def test_cross_reference_that_refuses_to_choose_leaves_unresolved(make: Make) -> None:
    """One that knows several local IDs and gives none is as good as one that gives them."""
    provider = Scripted()
    provider.failure = CrossReferenceError(Failure.STATUS, "several_ids")

    with pytest.raises(IdentityUnresolved, match="several_local_ids"):
        await make(provider).here(north("N1"), "north")


async def test_outage_on_the_way_back_is_an_error(make: Make) -> None:
    """Not knowing is told apart from knowing that there is nobody."""
    provider = Scripted()
    provider.failure = OUTAGE

    with pytest.raises(CrossReferenceError, match="down"):
        await make(provider).here(north("N1"), "north")


# --------------------------------------------------------------------- memory


async def test_answers_are_remembered_for_a_while(make: Make) -> None:
    """An ID is remembered for minutes, its absence for a shorter time."""
    clock, provider = Clock(), Scripted({ME, north("N1")})
    identities = make(provider, remember_seconds=100, remember_none_seconds=10, clock=clock)

    for now, asked in ((0, 2), (9, 2), (10, 3), (99, 4), (100, 5)):
        clock.now = now
        assert await identities.elsewhere(ME, "north") == (north("N1"),)
        assert await identities.elsewhere(OTHER, "north") == ()
        assert len(provider.asked) == asked, now


async def test_errors_are_not_remembered(make: Make) -> None:
    """The first lookup after an outage has an answer."""
    provider = Scripted({ME, north("N1")})
    provider.failure = OUTAGE
    identities = make(provider)
    with pytest.raises(CrossReferenceError):
        await identities.elsewhere(ME, "north")
    provider.failure = None

    assert await identities.elsewhere(ME, "north") == (north("N1"),)


async def test_answer_in_spite_of_an_outage_is_remembered_for_the_shorter_time(make: Make) -> None:
    """Once the first cross-reference is back, its word is heard before long."""
    clock, first, second = Clock(), Scripted({ME, north("N1")}), Scripted({ME, north("N2")})
    first.failure = OUTAGE
    identities = make(first, second, remember_seconds=100, remember_none_seconds=10, clock=clock)
    assert await identities.elsewhere(ME, "north") == (north("N2"),)
    first.failure, clock.now = None, 10

    assert await identities.elsewhere(ME, "north") == (north("N1"),)


async def test_memory_is_bounded(make: Make) -> None:
    """Beyond its bound the answer not used longest goes, with all that points to it."""
    provider = Scripted({ME, north("N1")})
    identities = make(provider, most=2)
    for patient in (ME, OTHER, ME, local("THIRD")):
        await identities.elsewhere(patient, "north")
    asked = len(provider.asked)

    await identities.elsewhere(ME, "north")
    assert len(provider.asked) == asked
    await identities.elsewhere(OTHER, "north")
    assert len(provider.asked) == asked + 1
    assert len(identities._touching) <= 3


async def test_one_person_under_two_spellings_of_a_domain_is_asked_for_once(make: Make) -> None:
    """An ID whose domain is named by namespace or by OID alone is the same ID."""
    provider = Scripted({ME, north("N1")})
    identities = make(provider)

    for domain in (HOSPITAL, Domain("HOSPITAL"), Domain("", "1.2.1")):
        assert await identities.elsewhere(PatientId(PATIENT_ID, domain), "north")
    assert provider.asked == [(ME, NORTH)]


# -------------------------------------------------------------------- sharing


async def test_lookups_of_the_same_patient_are_one(make: Make) -> None:
    """Who asks while somebody else waits for the same gets that answer."""
    provider = Scripted({ME, north("N1")})
    provider.gate = asyncio.Event()
    identities = make(provider)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        waiting = [group.create_task(identities.elsewhere(ME, "north")) for _ in range(20)]
        await until(lambda: provider.asked)
        provider.gate.set()

    assert {task.result() for task in waiting} == {(north("N1"),)}
    assert len(provider.asked) == 1


async def test_sources_that_share_a_domain_and_who_knows_it_share_the_question() -> None:
    """A region of many archives is asked about once; one with another manager is not in it."""
    regional, other = Scripted({ME, north("N1")}), Scripted({ME, north("N2")})
    domains = Domains(HOSPITAL, dict.fromkeys(("a", "b", "c"), NORTH))
    chain, alone = [Provider("mpi", regional)], [Provider("other", other)]
    identities = Identities(domains, {"a": chain, "b": list(chain), "c": alone})

    found = await asyncio.gather(*(identities.elsewhere(ME, source) for source in "abc"))
    assert found == [(north("N1"),), (north("N1"),), (north("N2"),)]
    assert await identities.here(north("N1"), "b") == ME
    assert await identities.here(north("N1"), "a") == ME
    assert len(regional.asked) == 2
    assert len(other.asked) == 1
    await identities.close()


async def test_failure_is_shared_too(make: Make) -> None:
    """Everybody who waits for a lookup that fails gets an error of their own."""
    provider = Scripted()
    provider.failure, provider.gate = OUTAGE, asyncio.Event()
    identities = make(provider)
    waiting = [asyncio.create_task(identities.elsewhere(ME, "north")) for _ in range(3)]
    await until(lambda: provider.asked)
    provider.gate.set()
    async with asyncio.timeout(10):
        failures = await asyncio.gather(*waiting, return_exceptions=True)

    assert [str(failure) for failure in failures] == ["unreachable down"] * 3
    assert len({id(failure) for failure in failures}) == 3
    assert len(provider.asked) == 1


async def test_cancelling_one_who_waits_leaves_the_others(make: Make) -> None:
    """A query that is cancelled does not take the answer from another one."""
    provider = Scripted({ME, north("N1")})
    provider.gate = asyncio.Event()
    identities = make(provider)
    given_up = asyncio.create_task(identities.elsewhere(ME, "north"))
    stays = asyncio.create_task(identities.elsewhere(ME, "north"))
    await until(lambda: provider.asked)
    given_up.cancel()
    await until(given_up.done)
    provider.gate.set()

    async with asyncio.timeout(10):
        assert await stays == (north("N1"),)
    assert provider.cancelled == 0


async def test_lookup_that_nobody_waits_for_any_more_is_cancelled(make: Make) -> None:
    """The last one to go ends the lookup; the next one begins anew."""
    provider = Scripted({ME, north("N1")})
    provider.gate = asyncio.Event()
    identities = make(provider)
    waiting = [asyncio.create_task(identities.elsewhere(ME, "north")) for _ in range(2)]
    await until(lambda: provider.asked)
    for task in waiting:
        task.cancel()
    await until(lambda: provider.cancelled)
    provider.gate = None

    assert await identities.elsewhere(ME, "north") == (north("N1"),)
    assert len(provider.asked) == 2
    await until(lambda: repr(identities) == "<Identities 1 remembered, 0 under way>")


async def test_lookups_under_way_are_bounded(make: Make) -> None:
    """Beyond the bound a lookup is refused at once, as an outage, and room comes back."""
    provider = Scripted()
    provider.gate = asyncio.Event()
    identities = make(provider)
    waiting = [
        asyncio.create_task(identities.elsewhere(local(f"P{number}"), "north"))
        for number in range(256)
    ]
    await until(lambda: len(provider.asked) == 256)
    with pytest.raises(CrossReferenceError, match="too_many_lookups"):
        await identities.elsewhere(ME, "north")
    provider.gate.set()
    async with asyncio.timeout(10):
        assert await asyncio.gather(*waiting) == [()] * 256
    assert await identities.elsewhere(ME, "north") == ()


async def test_closing_ends_what_waits(make: Make) -> None:
    """Who waits when the program ends gets an error, not a cancellation of their own."""
    provider = Scripted()
    provider.gate = asyncio.Event()
    identities = make(provider)
    waiting = asyncio.create_task(identities.elsewhere(ME, "north"))
    await until(lambda: provider.asked)
    await identities.close()

    with pytest.raises(CrossReferenceError, match="closing"):
        await waiting
    with pytest.raises(CrossReferenceError, match="closing"):
        await identities.elsewhere(ME, "north")


# ------------------------------------------------------------------ forgetting


async def test_merge_drops_everything_that_hangs_together(make: Make) -> None:
    """A notice that names one ID of a person drops all of theirs, and nobody else's."""
    stranger = {OTHER, north("N9")}
    provider = Scripted({ME, north("N1"), PatientId("S1", SOUTH)}, stranger)
    identities = make(provider)
    told: list[frozenset[PatientId] | None] = []
    identities.on_forget(told.append)
    await identities.elsewhere(ME, "north")
    await identities.elsewhere(ME, "south")
    await identities.elsewhere(OTHER, "north")

    gone = identities.forget(PatientId("N1", Domain("NORTH")))

    assert gone == {ME, north("N1"), PatientId("S1", SOUTH)}
    assert told == [gone]
    assert set(provider.forgotten) == gone
    asked = len(provider.asked)
    await identities.elsewhere(OTHER, "north")
    assert len(provider.asked) == asked
    provider.persons = [{ME, north("N2")}, stranger]
    assert await identities.elsewhere(ME, "north") == (north("N2"),)


async def test_absence_is_forgotten_too(make: Make) -> None:
    """A patient who had no ID elsewhere is asked for again once they are said to have one."""
    provider = Scripted()
    identities = make(provider)
    assert await identities.elsewhere(ME, "north") == ()
    provider.persons = [{ME, north("N1")}]

    identities.forget(ME)
    assert await identities.elsewhere(ME, "north") == (north("N1"),)


async def test_answer_on_its_way_during_a_merge_is_asked_for_again(make: Make) -> None:
    """What was read before the merge is neither used nor remembered."""
    provider = Scripted({ME, north("N1")})
    gate = provider.gate = asyncio.Event()
    identities = make(provider)
    waiting = asyncio.create_task(identities.elsewhere(ME, "north"))
    await until(lambda: provider.asked)
    provider.persons, provider.gate = [{ME, north("N2")}], None
    identities.forget(north("N1"), north("N2"))
    gate.set()

    async with asyncio.timeout(10):
        assert await waiting == (north("N2"),)
    assert len(provider.asked) == 2
    assert await identities.elsewhere(ME, "north") == (north("N2"),)


async def test_who_asks_after_a_merge_does_not_wait_for_the_answer_before_it(make: Make) -> None:
    """A lookup begun before a notice about that very patient serves nobody who comes later."""
    provider = Scripted({ME, north("N1")})
    gate = provider.gate = asyncio.Event()
    identities = make(provider)
    before = asyncio.create_task(identities.elsewhere(ME, "north"))
    await until(lambda: provider.asked)
    provider.persons, provider.gate = [{ME, north("N2")}], None
    identities.forget(ME)

    async with asyncio.timeout(10):
        assert await identities.elsewhere(ME, "north") == (north("N2"),)
        gate.set()
        assert await before == (north("N2"),)


async def test_merge_just_before_an_answer_is_taken_is_heeded(make: Make) -> None:
    """Between the end of a lookup and whoever waits for it a notice is not lost."""
    identities: Identities

    class Merged(Scripted):
        async def lookup(self, patient: PatientId, domain: Domain) -> tuple[PatientId, ...]:
            answer = await super().lookup(patient, domain)
            if len(self.asked) == 1:
                self.persons = [{ME, north("N2")}]
                soon = asyncio.get_running_loop().call_soon
                # The second turn of the loop: the lookup is over, nobody was woken yet.
                soon(soon, identities.forget, ME)
            return answer

    provider = Merged({ME, north("N1")})
    identities = make(provider)
    assert await identities.elsewhere(ME, "north") == (north("N2"),)
    assert len(provider.asked) == 2


async def test_merge_of_somebody_else_leaves_answers_on_their_way(make: Make) -> None:
    """Notices about others do not make a lookup begin again."""
    provider = Scripted({ME, north("N1")})
    provider.gate = asyncio.Event()
    identities = make(provider)
    waiting = asyncio.create_task(identities.elsewhere(ME, "north"))
    await until(lambda: provider.asked)
    identities.forget(OTHER, north("N9"))
    provider.gate.set()

    async with asyncio.timeout(10):
        assert await waiting == (north("N1"),)
    assert len(provider.asked) == 1


async def test_record_that_changes_all_the_time_is_an_error(make: Make) -> None:
    """A lookup is repeated a few times, not for ever."""
    identities: Identities

    class Restless(Scripted):
        async def lookup(self, patient: PatientId, domain: Domain) -> tuple[PatientId, ...]:
            identities.forget(patient)
            return await super().lookup(patient, domain)

    provider = Restless({ME, north("N1")})
    identities = make(provider)
    with pytest.raises(CrossReferenceError, match="changes_all_the_time"):
        await identities.elsewhere(ME, "north")
    assert len(provider.asked) == 3


async def test_flood_of_notices_makes_a_lookup_begin_again(make: Make) -> None:
    """More notices than are kept in mind during a lookup count as being about it."""
    provider = Scripted({ME, north("N1")})
    gate = provider.gate = asyncio.Event()
    identities = make(provider)
    waiting = asyncio.create_task(identities.elsewhere(ME, "north"))
    await until(lambda: provider.asked)
    provider.gate = None
    identities.forget(*(local(f"P{number}") for number in range(1001)))
    gate.set()

    async with asyncio.timeout(10):
        assert await waiting == (north("N1"),)
    assert len(provider.asked) == 2


async def test_whole_cross_reference_that_changed_is_forgotten_whole(make: Make) -> None:
    """After forget_all nothing is remembered, answers on their way included, and all are told."""
    provider = Scripted({ME, north("N1")})
    identities = make(provider)
    told: list[frozenset[PatientId] | None] = []
    identities.on_forget(told.append)
    await identities.elsewhere(ME, "north")
    gate = provider.gate = asyncio.Event()
    waiting = asyncio.create_task(identities.elsewhere(OTHER, "north"))
    await until(lambda: len(provider.asked) == 2)
    provider.persons, provider.gate = [{ME, north("N2")}, {OTHER, north("N3")}], None
    identities.forget_all()
    gate.set()

    async with asyncio.timeout(10):
        assert await waiting == (north("N3"),)
    assert await identities.elsewhere(ME, "north") == (north("N2"),)
    assert told == [None]


async def test_forgetting_nobody_is_nothing(make: Make) -> None:
    """A notice without IDs drops nothing and tells nobody."""
    identities = make(Scripted())
    told: list[frozenset[PatientId] | None] = []
    identities.on_forget(told.append)

    assert identities.forget() == frozenset()
    assert told == []


async def test_nothing_is_remembered_before_the_cross_reference_has_heard_of_a_merge(
    make: Make,
) -> None:
    """It may answer for a while as before: that serves whoever asks, and nobody after them."""
    clock = Clock()
    provider = Scripted({ME, north("N1")}, {OTHER, north("N9")})
    identities = make(provider, clock=clock, settle_seconds=30)
    identities.forget(ME)
    assert not identities.settled(north("N5"), ME)
    assert await identities.elsewhere(ME, "north") == (north("N1"),)
    provider.persons[0] = {ME, north("N2")}

    assert await identities.elsewhere(ME, "north") == (north("N2"),)
    assert repr(identities) == "<Identities 0 remembered, 0 under way>"
    clock.now = 30
    assert identities.settled(ME)
    for _ in range(2):
        assert await identities.elsewhere(ME, "north") == (north("N2"),)
    assert len(provider.asked) == 3


async def test_others_are_remembered_after_a_merge(make: Make) -> None:
    """Whom a notice does not concern are looked up no more often for it."""
    provider = Scripted({ME, north("N1")}, {OTHER, north("N9")})
    identities = make(provider)
    identities.forget(ME)

    for _ in range(2):
        assert await identities.elsewhere(OTHER, "north") == (north("N9"),)
    assert len(provider.asked) == 1


async def test_found_id_that_a_merge_named_is_not_remembered(make: Make) -> None:
    """A notice that names the ID there counts as one that names the ID here."""
    provider = Scripted({ME, north("N1")})
    identities = make(provider)
    identities.forget(north("N1"))

    for _ in range(2):
        assert await identities.elsewhere(ME, "north") == (north("N1"),)
    assert len(provider.asked) == 2


@pytest.mark.parametrize("settle", [True, False])
async def test_whole_cross_reference_may_have_to_settle_too(make: Make, settle: bool) -> None:
    """Where somebody else told that anything may have changed; not where it said so itself."""
    clock = Clock()
    provider = Scripted({ME, north("N1")})
    identities = make(provider, clock=clock, settle_seconds=30)
    identities.forget_all(settle=settle)

    for _ in range(2):
        assert await identities.elsewhere(ME, "north") == (north("N1"),)
    assert len(provider.asked) == (2 if settle else 1)
    clock.now = 30
    for _ in range(2):
        await identities.elsewhere(ME, "north")
    assert len(provider.asked) == (3 if settle else 1)


async def test_merges_kept_in_mind_are_bounded(make: Make) -> None:
    """Of a flood of notices the latest count."""
    identities = make(Scripted())
    for number in range(25):
        identities.forget(*(local(f"P{number}-{one}") for one in range(1000)))

    assert identities.settled(local("P0-0"))
    assert not identities.settled(local("P24-0"))
