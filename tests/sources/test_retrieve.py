"""Fetching from a source: by C-MOVE to ourselves, and by C-GET over one association."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.levels import (
    PATIENT_ID,
    QUERY_RETRIEVE_LEVEL,
    SERIES_INSTANCE_UID,
    SOP_INSTANCE_UID,
    STUDY_INSTANCE_UID,
    Level,
)
from dicomproxy.dataset.transfer_syntaxes import DEFAULT_ORDER
from dicomproxy.dimse.association import Association, Message
from dicomproxy.dimse.command import RESPONSE, CommandField, request, response
from dicomproxy.dimse.negotiation import UNCOMPRESSED
from dicomproxy.dimse.pdu import (
    AssociateRequest,
    ProposedContext,
    RoleSelection,
    UserInformation,
    encode,
)
from dicomproxy.ports import Failure, RetrieveOrder, SourceError
from dicomproxy.sources.archive import (
    PATIENT_ROOT_GET,
    PATIENT_ROOT_MOVE,
    STUDY_ROOT_GET,
    STUDY_ROOT_MOVE,
    ArchiveSettings,
)
from dicomproxy.sources.dimse import DimseSource, _Patience, retrieve_identifier
from dicomproxy.sources.storage_classes import COMMON_STORAGE_CLASSES
from tests.dimse_edge.harness import until
from tests.peers.archive import Archive as PynetdicomArchive
from tests.sentinel import PATIENT_ID as SENTINEL_ID
from tests.sources.support import SHORT, Arrived, archive_at, asking, first, within
from tests.support.datasets import data_set_bytes
from tests.support.datasets import study as synthetic_study
from tests.support.stand_in import (
    SECONDS,
    StandIn,
    answers,
    cancelled,
    only,
    send_final,
    send_pending,
    succeed,
)

STUDY, SERIES, IMAGE = "1.2.3", "1.2.3.4", "1.2.3.4.5"
CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"
RLE = "1.2.840.10008.1.2.5"
JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
JPEG_2000 = "1.2.840.10008.1.2.4.91"
ORDER = RetrieveOrder(Level.STUDY, (STUDY,))


def roots(*sop_classes: str) -> Any:
    return only(dict.fromkeys(sop_classes, UNCOMPRESSED))


# -------------------------------------------------------------------- request


@pytest.mark.parametrize(
    ("order", "offered", "asked", "expected"),
    [
        (
            RetrieveOrder(Level.STUDY, (STUDY, "1.9"), patient_id=SENTINEL_ID),
            (STUDY_ROOT_MOVE, PATIENT_ROOT_MOVE),
            STUDY_ROOT_MOVE,
            {STUDY_INSTANCE_UID: (STUDY, "1.9")},
        ),
        (
            RetrieveOrder(Level.SERIES, (STUDY,), (SERIES, "1.8")),
            (STUDY_ROOT_MOVE,),
            STUDY_ROOT_MOVE,
            {STUDY_INSTANCE_UID: (STUDY,), SERIES_INSTANCE_UID: (SERIES, "1.8")},
        ),
        (
            RetrieveOrder(Level.IMAGE, (STUDY,), (SERIES,), (IMAGE, "1.7"), patient_id="P"),
            (PATIENT_ROOT_MOVE,),
            PATIENT_ROOT_MOVE,
            {
                PATIENT_ID: ("P",),
                STUDY_INSTANCE_UID: (STUDY,),
                SERIES_INSTANCE_UID: (SERIES,),
                SOP_INSTANCE_UID: (IMAGE, "1.7"),
            },
        ),
        (
            RetrieveOrder(Level.PATIENT, (), patient_id=SENTINEL_ID),
            (STUDY_ROOT_MOVE, PATIENT_ROOT_MOVE),
            PATIENT_ROOT_MOVE,
            {PATIENT_ID: (SENTINEL_ID,)},
        ),
    ],
    ids=["studies", "series", "images_patient_root", "patient"],
)
async def test_move_names_level_unique_keys_and_us(
    order: RetrieveOrder,
    offered: tuple[str, ...],
    asked: str,
    expected: dict[int, tuple[str, ...]],
) -> None:
    """Level and unique keys only, in the model at hand, and our title as move destination."""
    async with asking(
        StandIn(succeed, supported=roots(*offered)), calling_ae_title="US_THERE"
    ) as at:
        (progress,) = await at.retrieve(order)
    assert (progress.final, progress.status) == (True, 0x0000)
    (message,) = at.peer.messages
    (identifier,) = at.peer.identifiers()
    assert message.command.field == CommandField.C_MOVE_RQ
    assert message.context.abstract_syntax == asked
    assert message.command.move_destination == "US_THERE"
    assert at.peer.requests[0].calling_ae_title == "US_THERE"
    assert identifier.text(QUERY_RETRIEVE_LEVEL) == order.level
    found = {element.tag: identifier.values(element.tag) for element in identifier}
    assert {tag: found[tag] for tag in found if tag != QUERY_RETRIEVE_LEVEL} == expected


@pytest.mark.parametrize(
    ("order", "offered"),
    [
        (ORDER, (PATIENT_ROOT_MOVE,)),
        (RetrieveOrder(Level.PATIENT, (), patient_id="P"), (STUDY_ROOT_MOVE,)),
        (ORDER, ()),
    ],
    ids=["patient_unknown", "no_patient_root", "no_move_at_all"],
)
async def test_order_that_no_model_can_carry(
    order: RetrieveOrder, offered: tuple[str, ...]
) -> None:
    """Nothing is sent where no accepted context fits, and the association serves on."""
    async with asking(StandIn(succeed, supported=roots(*offered)), breaker_failures=1) as at:
        with pytest.raises(SourceError) as caught:
            await at.retrieve(order)
        assert caught.value.failure is Failure.NO_CONTEXT
        assert at.archive.health().breaker == "closed"
        assert at.archive.pool.idle == (1 if offered else at.archive.pool.idle)
    assert at.peer.messages == []


def test_patient_id_beyond_ascii_is_written_in_a_named_character_set() -> None:
    """A Patient ID with other letters travels as UTF-8, and says so."""
    order = RetrieveOrder(Level.PATIENT, (), patient_id="Größe")
    for syntax in UNCOMPRESSED:
        sent = Identifier.decode(retrieve_identifier(order, True).encode(syntax), syntax)
        assert sent.specific_character_set == ("ISO_IR 192",)
        assert sent.text(PATIENT_ID) == "Größe"


# ------------------------------------------------------------------- progress


async def test_progress_is_what_the_archive_says() -> None:
    """Counts of each Pending response, and of the final one with its failed list."""
    failed = Identifier()
    failed.set_text(0x00080058, ("1.1", "1.2"))

    async def handle(association: Association, message: Message) -> None:
        for left in (2, 1):
            await send_pending(
                association, message, remaining=left, completed=3 - left, failed=0, warning=0
            )
        await send_final(association, message, 0xB000, failed, completed=1, failed=2, warning=0)

    async with asking(StandIn(handle)) as at:
        steps = await at.retrieve(ORDER)
    assert [(s.remaining, s.completed, s.failed, s.final, s.status) for s in steps] == [
        (2, 1, 0, False, 0xFF00),
        (1, 2, 0, False, 0xFF00),
        (None, 1, 2, True, 0xB000),
    ]
    assert steps[-1].failed_sop_instance_uids == ("1.1", "1.2")


async def test_failed_list_that_cannot_be_read_leaves_the_counts() -> None:
    """A broken identifier in the final response does not turn it into a failure of ours."""

    async def handle(association: Association, message: Message) -> None:
        final = response(message.command, 0xA702, data_set=True, completed=0, failed=3)
        await association.send(message.context, final, b"\x08\x00\x58\x00UI\xff\x00short")

    async with asking(StandIn(handle)) as at:
        (step,) = await at.retrieve(ORDER)
    assert (step.status, step.failed, step.failed_sop_instance_uids) == (0xA702, 3, ())


@pytest.mark.parametrize("status", [0xA701, 0xA702, 0xA801, 0xA900, 0xC000, 0xFE00])
async def test_final_failure_is_the_last_progress(status: int) -> None:
    """A retrieve that the archive refuses is answered, not broken: its status is progress."""
    async with asking(StandIn(answers(final=status)), breaker_failures=1) as at:
        (step,) = await at.retrieve(ORDER)
        assert (step.final, step.status) == (True, status)
        assert (at.archive.health().breaker, at.archive.pool.idle) == ("closed", 1)


async def test_closing_cancels_at_the_archive() -> None:
    """Whoever stops listening to a retrieve ends it there too."""
    seen = asyncio.Event()

    async def handle(association: Association, message: Message) -> None:
        await send_pending(association, message, remaining=9, completed=1)
        await cancelled(association, message)
        seen.set()

    async with asking(StandIn(handle)) as at:
        async with aclosing(at.source.retrieve(ORDER)) as steps:
            assert (await first(steps)).remaining == 9
        await within(seen.wait())
        await until(lambda: at.archive.pool.idle == 1)


@pytest.mark.parametrize("pending_before", [0, 1])
async def test_broken_off_by_the_archive(pending_before: int) -> None:
    """An abort ends the retrieve with a word for it, whatever came before."""

    async def handle(association: Association, message: Message) -> None:
        for _ in range(pending_before):
            await send_pending(association, message, remaining=9)
        association.abort()

    async with asking(StandIn(handle)) as at:
        with pytest.raises(SourceError) as caught:
            await at.retrieve(ORDER)
        assert caught.value.failure is Failure.ABORTED


# ------------------------------------------------------------------- patience


@pytest.mark.parametrize(
    ("timeouts", "already_moving"),
    [
        ({"first_instance_timeout": SHORT, "stall_timeout": 60.0}, False),
        ({"first_instance_timeout": 60.0, "stall_timeout": SHORT}, True),
    ],
    ids=["nothing_ever_came", "it_stalled"],
)
async def test_silent_retrieve_is_given_up(
    timeouts: dict[str, float], already_moving: bool
) -> None:
    """Long patience until the first instance, short after it; then C-CANCEL and TIMEOUT."""
    seen = asyncio.Event()

    async def handle(association: Association, message: Message) -> None:
        await cancelled(association, message)
        seen.set()

    order = RetrieveOrder(Level.STUDY, (STUDY,))
    async with asking(StandIn(handle), **timeouts) as at:
        if already_moving:
            order.last_activity = asyncio.get_running_loop().time()
        with pytest.raises(SourceError) as caught:
            await at.retrieve(order)
        assert caught.value.failure is Failure.TIMEOUT
        await within(seen.wait())


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def time(self) -> float:
        return self.now


async def test_patience_is_put_off_by_whatever_moves() -> None:
    """The first instance switches from one deadline to the other; bytes and counts put it off."""
    clock = Clock()
    order = RetrieveOrder(Level.STUDY, (STUDY,))
    patience = _Patience(order, first_seconds=300.0, stall_seconds=60.0)
    patience._loop, patience._started = clock, clock.now  # type: ignore[assignment]
    assert patience.left() == 300.0
    clock.now += 250.0
    assert patience.left() == 50.0
    patience.something_moved()  # a Pending count, before any byte: staging from tape
    assert patience.left() == 300.0
    order.last_activity = clock.now
    assert patience.left() == 60.0
    clock.now += 50.0
    assert patience.left() == 10.0
    patience.something_moved()
    assert patience.left() == 60.0
    clock.now += 61.0
    assert patience.left() == -1.0


async def test_patience_with_an_archive_that_is_busy_with_others_has_an_end() -> None:
    """An order that has not begun waits its turn, but not for ever under constant traffic."""
    clock = Clock()
    order = RetrieveOrder(Level.STUDY, (STUDY,))
    patience = _Patience(order, first_seconds=300.0, stall_seconds=60.0)
    patience._loop, patience._started = clock, clock.now  # type: ignore[assignment]
    began = clock.now
    while patience.left() > 0:
        order.last_possible_activity = clock.now
        clock.now += 100.0
    assert clock.now - began == 1200.0


async def test_patience_with_what_may_be_of_another_order() -> None:
    """A transfer of unknown study puts a stall off if it began in time, not if it began later."""
    clock = Clock()
    order = RetrieveOrder(Level.STUDY, (STUDY,), last_activity=clock.now)
    patience = _Patience(order, first_seconds=300.0, stall_seconds=60.0)
    patience._loop = clock  # type: ignore[assignment]
    large, small = object(), object()
    order.doubtful[large] = (clock.now + 59.0, clock.now + 100.0)
    order.doubtful[small] = (clock.now + 61.0, clock.now + 120.0)
    assert patience.left() == 160.0
    del order.doubtful[large]
    assert patience.left() == 60.0


async def test_counts_that_do_not_change_put_nothing_off() -> None:
    """An archive that repeats the same Pending for ever is as silent as one that sends none."""
    stop = asyncio.Event()

    async def handle(association: Association, message: Message) -> None:
        while not stop.is_set():
            await send_pending(association, message, remaining=7, completed=1)
            await asyncio.sleep(SHORT / 10)
        await send_final(association, message, 0xFE00)

    order = RetrieveOrder(Level.STUDY, (STUDY,))
    async with asking(StandIn(handle), stall_timeout=SHORT) as at:
        order.last_activity = asyncio.get_running_loop().time()
        with pytest.raises(SourceError) as caught:
            await at.retrieve(order)
        assert caught.value.failure is Failure.TIMEOUT
        stop.set()


async def test_retrieve_may_always_try_an_open_breaker() -> None:
    """Somebody waits for the study, so that the archive is given a chance."""
    gone = True

    async def handle(association: Association, message: Message) -> None:
        if gone:
            association.abort()
        else:
            await succeed(association, message)

    async with asking(StandIn(handle), breaker_failures=1) as at:
        with pytest.raises(SourceError):
            await at.retrieve(ORDER)
        assert at.archive.health().breaker == "open"
        gone = False
        assert (await at.retrieve(ORDER))[-1].status == 0x0000
        assert at.archive.health().breaker == "closed"


async def test_what_nobody_waits_for_tries_no_open_breaker() -> None:
    """An archive that is not well is left alone by what may as well come later."""

    async def handle(association: Association, _message: Message) -> None:
        association.abort()

    async with asking(StandIn(handle), breaker_failures=1) as at:
        with pytest.raises(SourceError):
            await at.retrieve(ORDER)
        asked = len(at.peer.requests)
        with pytest.raises(SourceError) as caught:
            await at.retrieve(replace(ORDER, wanted=lambda: False))
        assert caught.value.failure is Failure.BREAKER
        assert len(at.peer.requests) == asked


async def test_parallel_retrieves_leave_a_slot_for_queries() -> None:
    """What the core may ask for at once is the ceiling without the slot kept for queries."""
    for ceiling, expected in ((1, 1), (2, 1), (4, 3)):
        async with archive_at(1, parallel_associations=ceiling) as archive:
            assert DimseSource(archive, Arrived()).parallel_retrieves == expected


# ---------------------------------------------------------------------- C-GET


def storing(*instances: tuple[str, str, bytes]) -> Any:
    """Answer a C-GET by C-STOREs of SOP Class, UID and data, in the first context that fits."""

    async def handle(association: Association, message: Message) -> None:
        statuses = []
        for number, (sop_class, uid, data) in enumerate(instances, 1):
            context = association.context_for(sop_class)
            store = request(
                CommandField.C_STORE_RQ,
                sop_class,
                number,
                data_set=True,
                priority=0,
                affected_sop_instance_uid=uid,
            )
            await association.send(context, store, data)
            answer = await association.receive(SECONDS)
            assert answer.command.responds_to == number
            statuses.append(answer.command.status)
        failed = sum(status != 0 for status in statuses)
        await send_final(
            association,
            message,
            0xB000 if failed else 0x0000,
            completed=len(statuses) - failed,
            failed=failed,
        )

    return handle


def get_order(*sop_classes: str) -> RetrieveOrder:
    return RetrieveOrder(Level.STUDY, (STUDY,), sop_classes=sop_classes)


async def test_get_receives_over_the_same_association() -> None:
    """Each C-STORE within the C-GET reaches the arrivals, whole, and is answered."""
    big = bytes(range(256)) * 2000
    peer = StandIn(storing((CT, "1.1", b"small!"), (MR, "1.2", big)))
    async with asking(peer, retrieve="c-get") as at:
        assert at.source.wants_sop_classes
        steps = await at.retrieve(get_order(CT, MR))
        assert [(s.completed, s.failed, s.final) for s in steps] == [(2, 0, True)]
        assert [one[:3] for one in at.arrived.finished] == [
            ("north", CT, "1.1"),
            ("north", MR, "1.2"),
        ]
        assert [one[4] for one in at.arrived.finished] == [b"small!", big]
        # An association of its own: its contexts are good for nothing else.
        assert at.archive.pool.idle == 0
    assert peer.commands[0].field == CommandField.C_GET_RQ


async def test_refused_instance_is_answered_with_its_status() -> None:
    """What the arrivals say is what the archive hears, and the next instance is still taken."""
    async with asking(
        StandIn(storing((CT, "1.1", b"xx"), (CT, "1.2", b"yy"))), retrieve="c-get"
    ) as at:
        at.arrived.status = 0xA700
        steps = await at.retrieve(get_order(CT))
        assert (steps[-1].status, steps[-1].failed) == (0xB000, 2)
        assert len(at.arrived.finished) == 2


async def test_instance_cut_off_is_discarded() -> None:
    """An archive that breaks off inside an instance leaves nothing half in the arrivals."""

    class Endless:
        size = 1 << 20

        async def read_into(self, buffers: Any, offset: int) -> int:
            if offset:
                raise OSError("gone")
            return sum(map(len, buffers))

    async def handle(association: Association, message: Message) -> None:
        store = request(
            CommandField.C_STORE_RQ, CT, 1, data_set=True, affected_sop_instance_uid="1.1"
        )
        with pytest.raises(OSError, match="gone"):
            await association.send(association.context_for(CT), store, Endless())

    async with asking(StandIn(handle), retrieve="c-get") as at:
        with pytest.raises(SourceError) as caught:
            await at.retrieve(get_order(CT))
        assert caught.value.failure is Failure.ABORTED
        assert (at.arrived.finished, at.arrived.discarded) == ([], ["1.1"])


async def test_closing_a_get_cancels_it_and_what_still_comes_is_forgotten() -> None:
    """C-CANCEL is sent on the same association; the archive is not left hanging."""
    seen = asyncio.Event()

    async def handle(association: Association, message: Message) -> None:
        await send_pending(association, message, remaining=9)
        await cancelled(association, message)
        seen.set()

    async with asking(StandIn(handle), retrieve="c-get") as at:
        async with aclosing(at.source.retrieve(get_order(CT))) as steps:
            await first(steps)
        await within(seen.wait())


async def test_instance_that_crosses_the_cancellation_of_a_get_is_refused() -> None:
    """It is answered, or the archive would wait and never see the C-CANCEL; nothing is kept."""
    given_up, ended = asyncio.Event(), asyncio.Event()

    async def handle(association: Association, message: Message) -> None:
        await send_pending(association, message, remaining=2)
        await given_up.wait()
        store = request(
            CommandField.C_STORE_RQ, CT, 5, data_set=True, affected_sop_instance_uid="1.1"
        )
        await association.send(association.context_for(CT), store, b"small!")
        told = await association.receive(SECONDS)
        assert told.command.field == CommandField.C_CANCEL_RQ
        answer = await association.receive(SECONDS)
        assert (answer.command.responds_to, answer.command.status) == (5, 0xA700)
        await send_final(association, message, 0xFE00)
        ended.set()

    async with asking(StandIn(handle), retrieve="c-get") as at:
        async with aclosing(at.source.retrieve(get_order(CT))) as steps:
            await first(steps)
        given_up.set()
        await within(ended.wait())
        await until(lambda: at.archive.pool.in_use == 0)
        assert (at.arrived.finished, at.arrived.discarded) == ([], ["1.1"])


async def test_other_requests_within_a_get_are_not_understood() -> None:
    """An archive that asks something else meanwhile is told so (0211), and goes on."""

    async def handle(association: Association, message: Message) -> None:
        echo = request(CommandField.C_ECHO_RQ, STUDY_ROOT_GET, 77, data_set=False)
        await association.send(message.context, echo)
        answer = await association.receive(SECONDS)
        assert answer.command.field == CommandField.C_ECHO_RQ | RESPONSE
        assert answer.command.status == 0x0211
        await send_final(association, message)

    async with asking(StandIn(handle), retrieve="c-get") as at:
        assert (await at.retrieve(get_order(CT)))[-1].status == 0x0000


async def test_get_proposes_each_class_in_every_syntax_with_the_scp_role() -> None:
    """One context for each class and syntax, so that any instance travels as it is held."""
    async with asking(StandIn(), retrieve="c-get") as at:
        await at.retrieve(get_order(CT, MR, CT))
    (proposed,) = at.peer.requests
    for sop_class in (CT, MR):
        groups = [c.transfer_syntaxes for c in proposed.contexts if c.abstract_syntax == sop_class]
        assert Counter(s for group in groups for s in group) == Counter(DEFAULT_ORDER)
        assert all(len(group) == 1 for group in groups)
        assert RoleSelection(sop_class, scu=False, scp=True) in proposed.user.roles
    assert len(proposed.user.roles) == 2
    assert {STUDY_ROOT_GET, PATIENT_ROOT_GET} <= {c.abstract_syntax for c in proposed.contexts}


async def test_get_of_unknown_classes_proposes_the_common_ones() -> None:
    """Where the manifest is not known, the usual classes are proposed, all that fit."""
    async with asking(StandIn(), retrieve="c-get") as at:
        await at.retrieve(get_order())
    (proposed,) = at.peer.requests
    assert len(proposed.contexts) <= 128
    classes = {c.abstract_syntax for c in proposed.contexts} - {STUDY_ROOT_GET, PATIENT_ROOT_GET}
    assert classes == set(COMMON_STORAGE_CLASSES[:126])
    assert CT in classes
    for context in proposed.contexts[2:]:
        assert {JPEG_BASELINE, JPEG_2000, RLE, *UNCOMPRESSED} <= set(context.transfer_syntaxes)


@given(
    classes=st.integers(min_value=1, max_value=200),
    accept=st.none() | st.lists(st.sampled_from(DEFAULT_ORDER), min_size=1, unique=True),
)
def test_get_never_proposes_more_than_an_association_holds(
    classes: int, accept: list[str] | None
) -> None:
    """128 contexts and 64 KiB; classes that are few have all accepted syntaxes, none has others."""
    settings = ArchiveSettings(
        "north", "N", "h", 1, "US", accept=None if accept is None else tuple(accept)
    )
    source = DimseSource.__new__(DimseSource)
    source.archive = type("Settings", (), {"settings": settings})()
    order = get_order(*(f"1.2.840.10008.5.1.4.1.1.{number:03}.1" for number in range(classes)))
    proposal = source._get_proposal(order)
    assert len(proposal.contexts) <= 128
    by_class: dict[str, list[str]] = {}
    for sop_class, group in proposal.contexts[2:]:
        by_class.setdefault(sop_class, []).extend(group)
    assert list(by_class) == list(order.sop_classes[:126])
    for syntaxes in by_class.values():
        assert Counter(syntaxes) <= Counter(settings.accept_order)
        if classes <= 30:
            assert Counter(syntaxes) == Counter(settings.accept_order)
    encoded = AssociateRequest(
        "C" * 16,
        "D" * 16,
        tuple(
            ProposedContext(2 * number + 1, sop_class, group)
            for number, (sop_class, group) in enumerate(proposal.contexts)
        ),
        UserInformation(1 << 18, "2.25." + "1" * 39, "V" * 16, roles=proposal.roles),
    )
    assert len(encode(encoded)) < 64 * 1024
    assert [role.sop_class_uid for role in proposal.roles] == list(by_class)


async def test_pynetdicom_archive_sends_each_instance_as_it_holds_it() -> None:
    """Another toolkit's C-GET: uncompressed and RLE instances arrive byte for byte."""
    held = [
        *synthetic_study(1, 3, study_instance_uid=STUDY),
        *synthetic_study(1, 2, study_instance_uid=STUDY, transfer_syntax_uid=RLE),
    ]
    async with (
        PynetdicomArchive("NORTHPACS", held) as peer,
        archive_at(peer.port, retrieve="c-get") as archive,
    ):
        arrived = Arrived()
        order = get_order(CT)
        steps = []
        async with (
            asyncio.timeout(SECONDS),
            aclosing(DimseSource(archive, arrived).retrieve(order)) as progress,
        ):
            steps = [step async for step in progress]
    assert (steps[-1].status, steps[-1].completed) == (0x0000, 5)
    expected = {
        (str(one.SOPInstanceUID), str(one.file_meta.TransferSyntaxUID)): data_set_bytes(one)
        for one in held
    }
    assert {(one[2], one[3]): one[4] for one in arrived.finished} == expected
