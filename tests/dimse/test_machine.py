"""The association state machine against PS3.8 Table 9-10, written out here a second time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pynetdicom.fsm import TRANSITION_TABLE

from dicomproxy.dimse import pdu
from dicomproxy.dimse.framing import Fragment
from dicomproxy.dimse.machine import (
    Aborted,
    AssociationMachine,
    Close,
    Connect,
    Deliver,
    Effect,
    Event,
    IllegalTransition,
    Indicate,
    Send,
    StartArtim,
    State,
    StopArtim,
)

REQUEST = pdu.AssociateRequest(
    "CALLED", "CALLING", (pdu.ProposedContext(1, "1.2.840.10008.1.1", ("1.2.840.10008.1.2",)),)
)
ACCEPT = pdu.AssociateAccept("CALLED", "CALLING", (pdu.ContextAnswer(1, 0, "1.2.840.10008.1.2"),))
REJECT = pdu.REJECT_LIMIT
FRAGMENT = Fragment(1, True, True, memoryview(b"x"))
ABORT = pdu.Abort(2, 6)

# One column per state, Sta1 to Sta13; "." is a cell that the standard leaves empty.
EXPECTED = """
ASSOCIATE_REQUEST    AE-1 .    .    .    .    .    .    .    .    .     .    .    .
TRANSPORT_CONFIRM    .    .    .    AE-2 .    .    .    .    .    .     .    .    .
ASSOCIATE_AC_PDU     .    AA-1 AA-8 .    AE-3 AA-8 AA-8 AA-8 AA-8 AA-8  AA-8 AA-8 AA-6
ASSOCIATE_RJ_PDU     .    AA-1 AA-8 .    AE-4 AA-8 AA-8 AA-8 AA-8 AA-8  AA-8 AA-8 AA-6
TRANSPORT_INDICATION AE-5 .    .    .    .    .    .    .    .    .     .    .    .
ASSOCIATE_RQ_PDU     .    AE-6 AA-8 .    AA-8 AA-8 AA-8 AA-8 AA-8 AA-8  AA-8 AA-8 AA-7
ASSOCIATE_ACCEPT     .    .    AE-7 .    .    .    .    .    .    .     .    .    .
ASSOCIATE_REJECT     .    .    AE-8 .    .    .    .    .    .    .     .    .    .
P_DATA_REQUEST       .    .    .    .    .    DT-1 .    AR-7 .    .     .    .    .
P_DATA_PDU           .    AA-1 AA-8 .    AA-8 DT-2 AR-6 AA-8 AA-8 AA-8  AA-8 AA-8 AA-6
RELEASE_REQUEST      .    .    .    .    .    AR-1 .    .    .    .     .    .    .
RELEASE_RQ_PDU       .    AA-1 AA-8 .    AA-8 AR-2 AR-8 AA-8 AA-8 AA-8  AA-8 AA-8 AA-6
RELEASE_RP_PDU       .    AA-1 AA-8 .    AA-8 AA-8 AR-3 AA-8 AA-8 AR-10 AR-3 AA-8 AA-6
RELEASE_RESPONSE     .    .    .    .    .    .    .    AR-4 AR-9 .     .    AR-4 .
ABORT_REQUEST        .    .    AA-1 AA-2 AA-1 AA-1 AA-1 AA-1 AA-1 AA-1  AA-1 AA-1 .
ABORT_PDU            .    AA-2 AA-3 .    AA-3 AA-3 AA-3 AA-3 AA-3 AA-3  AA-3 AA-3 AA-2
TRANSPORT_CLOSED     .    AA-5 AA-4 AA-4 AA-4 AA-4 AA-4 AA-4 AA-4 AA-4  AA-4 AA-4 AR-5
ARTIM_EXPIRED        .    AA-2 .    .    .    .    .    .    .    .     .    .    AA-2
INVALID_PDU          .    AA-1 AA-8 .    AA-8 AA-8 AA-8 AA-8 AA-8 AA-8  AA-8 AA-8 AA-7
"""

CELLS = [
    (Event[row.split()[0]], State(number), cell)
    for row in EXPECTED.strip().splitlines()
    for number, cell in enumerate(row.split()[1:], start=1)
]

FIRE: dict[Event, Callable[[AssociationMachine], list[Effect]]] = {
    Event.ASSOCIATE_REQUEST: lambda machine: machine.associate(),
    Event.TRANSPORT_CONFIRM: lambda machine: machine.send_request(REQUEST),
    Event.ASSOCIATE_AC_PDU: lambda machine: machine.received(ACCEPT),
    Event.ASSOCIATE_RJ_PDU: lambda machine: machine.received(REJECT),
    Event.TRANSPORT_INDICATION: lambda machine: machine.transport_connected(),
    Event.ASSOCIATE_RQ_PDU: lambda machine: machine.received(REQUEST),
    Event.ASSOCIATE_ACCEPT: lambda machine: machine.accept(ACCEPT),
    Event.ASSOCIATE_REJECT: lambda machine: machine.reject(REJECT),
    Event.P_DATA_PDU: lambda machine: machine.received(FRAGMENT),
    Event.RELEASE_REQUEST: lambda machine: machine.release(),
    Event.RELEASE_RQ_PDU: lambda machine: machine.received(pdu.ReleaseRequest()),
    Event.RELEASE_RP_PDU: lambda machine: machine.received(pdu.ReleaseResponse()),
    Event.RELEASE_RESPONSE: lambda machine: machine.release_response(),
    Event.ABORT_REQUEST: lambda machine: machine.abort(),
    Event.ABORT_PDU: lambda machine: machine.received(ABORT),
    Event.TRANSPORT_CLOSED: lambda machine: machine.transport_closed(),
    Event.ARTIM_EXPIRED: lambda machine: machine.artim_expired(),
    Event.INVALID_PDU: lambda machine: machine.received_invalid(pdu.AbortReason.INVALID_PARAMETER),
}
"""How each event reaches the machine; P_DATA_REQUEST is asked about, not fired."""

USER_ABORT = Send(b"\x07\0\0\0\0\x04\0\0\0\0")


def provider_abort(reason: int) -> Send:
    return Send(b"\x07\0\0\0\0\x04\0\0\x02" + bytes([reason]))


def reached(state: State, *, requestor: bool = True) -> AssociationMachine:
    """Return a machine in *state*; the role matters for release collisions only."""
    machine = AssociationMachine()
    if requestor:
        machine.associate()
    machine.state = state
    return machine


def outcome(
    action: str, event: Event, state: State, *, requestor: bool
) -> tuple[State, list[Effect]]:
    """Return what PS3.8 Tables 9-6 to 9-9 say *action* does."""
    received: dict[Event, Any] = {
        Event.ASSOCIATE_AC_PDU: ACCEPT,
        Event.ASSOCIATE_RJ_PDU: REJECT,
        Event.ASSOCIATE_RQ_PDU: REQUEST,
        Event.RELEASE_RQ_PDU: pdu.ReleaseRequest(),
        Event.RELEASE_RP_PDU: pdu.ReleaseResponse(),
    }
    indicate: list[Effect] = [Indicate(received[event])] if event in received else []
    # Of the two reasons there are, a known PDU in the wrong state is "unexpected".
    reason = 6 if event is Event.INVALID_PDU else 2
    return {
        "AE-1": (State.STA4, [Connect()]),
        "AE-2": (State.STA5, [Send(pdu.encode(REQUEST))]),
        "AE-3": (State.STA6, indicate),
        "AE-4": (State.STA1, [*indicate, Close()]),
        "AE-5": (State.STA2, [StartArtim()]),
        "AE-6": (State.STA3, [StopArtim(), *indicate]),
        "AE-7": (State.STA6, [Send(pdu.encode(ACCEPT))]),
        "AE-8": (State.STA13, [Send(pdu.encode(REJECT)), StartArtim()]),
        "DT-2": (State.STA6, [Deliver(FRAGMENT)]),
        "AR-1": (State.STA7, [Send(b"\x05\0\0\0\0\x04\0\0\0\0")]),
        "AR-2": (State.STA8, indicate),
        "AR-3": (State.STA1, [*indicate, Close()]),
        "AR-4": (State.STA13, [Send(b"\x06\0\0\0\0\x04\0\0\0\0"), StartArtim()]),
        "AR-5": (State.STA1, [StopArtim()]),
        "AR-6": (State.STA7, [Deliver(FRAGMENT)]),
        "AR-8": (State.STA9 if requestor else State.STA10, indicate),
        "AR-9": (State.STA11, [Send(b"\x06\0\0\0\0\x04\0\0\0\0")]),
        "AR-10": (State.STA12, indicate),
        "AA-1": (State.STA13, [USER_ABORT, StartArtim()]),
        "AA-2": (State.STA1, [StopArtim(), Close()]),
        "AA-3": (State.STA1, [Aborted(2, 6), Close()]),
        "AA-4": (State.STA1, [Aborted(2, 0, lost=True)]),
        "AA-5": (State.STA1, [StopArtim()]),
        "AA-6": (State.STA13, []),
        "AA-7": (State.STA13, [provider_abort(reason)]),
        "AA-8": (State.STA13, [provider_abort(reason), Aborted(2, reason), StartArtim()]),
    }[action]


# Where the standard has an empty cell and something may come all the same: a closing that
# follows our own, a timer that fired while it was being stopped, a user who aborts twice.
QUIET: dict[tuple[Event, State], list[Effect]] = {
    (Event.TRANSPORT_CLOSED, State.STA1): [],
    (Event.ABORT_REQUEST, State.STA1): [],
    (Event.ABORT_REQUEST, State.STA2): [StopArtim(), Close()],
    (Event.ABORT_REQUEST, State.STA13): [StopArtim(), Close()],
    **{
        (Event.ARTIM_EXPIRED, state): []
        for state in State
        if state not in (State.STA2, State.STA13)
    },
}


def test_expected_table_is_whole_and_agrees_with_pynetdicom() -> None:
    """The table above names every event and state once, and is what pynetdicom's is."""
    assert {(event, state) for event, state, _ in CELLS} == set(itertools.product(Event, State))
    assert {
        (f"Evt{event.value}", f"Sta{state.value}"): cell
        for event, state, cell in CELLS
        if cell != "."
    } == TRANSITION_TABLE


@pytest.mark.parametrize("requestor", [True, False], ids=["requestor", "acceptor"])
@pytest.mark.parametrize(
    ("event", "state", "cell"),
    [row for row in CELLS if row[0] is not Event.P_DATA_REQUEST],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_event_in_every_state(event: Event, state: State, cell: str, requestor: bool) -> None:
    """Each pair moves to the state, and has the effects, of its action; empty cells raise."""
    machine = reached(state, requestor=requestor)
    if cell != ".":
        expected_state, expected_effects = outcome(cell, event, state, requestor=requestor)
        assert FIRE[event](machine) == expected_effects
        assert machine.state is expected_state
    elif (event, state) in QUIET:
        assert FIRE[event](machine) == QUIET[event, state]
        assert machine.state is state
    else:
        with pytest.raises(IllegalTransition, match=f"^{event.name} in {state.name}$"):
            FIRE[event](machine)
        assert machine.state is state


@pytest.mark.parametrize("state", list(State), ids=lambda state: state.name)
def test_data_may_be_sent_only_where_the_table_allows(state: State) -> None:
    """P-DATA goes out while established, and while the peer awaits our release response."""
    cells = {row[1]: row[2] for row in CELLS if row[0] is Event.P_DATA_REQUEST}
    assert reached(state).may_send_data() is (cells[state] != ".")


def test_requestor_of_a_release_collision_answers_first() -> None:
    """The association's requestor responds at once, then awaits the peer's response."""
    machine = AssociationMachine()
    assert machine.associate() == [Connect()]
    machine.send_request(REQUEST)
    assert machine.received(ACCEPT) == [Indicate(ACCEPT)]
    assert machine.established
    assert machine.release() == [Send(pdu.RELEASE_RQ_BYTES)]
    assert machine.received(pdu.ReleaseRequest()) == [Indicate(pdu.ReleaseRequest())]
    assert machine.release_response() == [Send(pdu.RELEASE_RP_BYTES)]
    assert machine.received(pdu.ReleaseResponse()) == [Indicate(pdu.ReleaseResponse()), Close()]
    assert machine.state is State.STA1
    assert machine.transport_closed() == []


def test_acceptor_of_a_release_collision_waits_first() -> None:
    """The association's acceptor awaits the response, then sends its own and awaits closing."""
    machine = AssociationMachine()
    assert machine.transport_connected() == [StartArtim()]
    assert machine.received(REQUEST) == [StopArtim(), Indicate(REQUEST)]
    machine.accept(ACCEPT)
    machine.release()
    assert machine.received(pdu.ReleaseRequest()) == [Indicate(pdu.ReleaseRequest())]
    with pytest.raises(IllegalTransition):
        machine.release_response()  # not our turn
    assert machine.received(pdu.ReleaseResponse()) == [Indicate(pdu.ReleaseResponse())]
    assert machine.release_response() == [Send(pdu.RELEASE_RP_BYTES), StartArtim()]
    assert machine.transport_closed() == [StopArtim()]
    assert machine.state is State.STA1


def test_both_ends_of_a_release_collision_finish() -> None:
    """Two machines that release at the same moment both end idle, each told so once."""
    ours, theirs = AssociationMachine(), AssociationMachine()
    ours.associate()
    ours.send_request(REQUEST)
    theirs.transport_connected()
    theirs.received(REQUEST)
    theirs.accept(ACCEPT)
    ours.received(ACCEPT)
    ours.release()
    theirs.release()
    ours.received(pdu.ReleaseRequest())
    theirs.received(pdu.ReleaseRequest())
    ours.release_response()
    theirs.received(pdu.ReleaseResponse())
    theirs.release_response()
    ours.received(pdu.ReleaseResponse())
    theirs.transport_closed()
    assert (ours.state, theirs.state) == (State.STA1, State.STA1)


@pytest.mark.parametrize(
    "reason", list(pdu.AbortReason), ids=[reason.name for reason in pdu.AbortReason]
)
def test_protocol_error_is_answered_with_its_reason(reason: pdu.AbortReason) -> None:
    """What the parser found wrong is what the peer is told (PS3.8 9.3.8)."""
    machine = reached(State.STA6)
    assert machine.received_invalid(reason)[:2] == [
        provider_abort(int(reason)),
        Aborted(2, int(reason)),
    ]


def test_first_pdu_that_is_no_request_is_aborted_without_telling_anyone() -> None:
    """Before a request there is no service user to tell: A-ABORT, and ARTIM runs on."""
    machine = AssociationMachine()
    machine.transport_connected()
    assert machine.received(FRAGMENT) == [USER_ABORT, StartArtim()]
    assert machine.artim_expired() == [StopArtim(), Close()]
    assert machine.state is State.STA1


def test_repr_names_role_and_state() -> None:
    """A machine in a log or a failed test says what it is."""
    assert repr(reached(State.STA6)) == "AssociationMachine(requestor, STA6)"
    assert repr(reached(State.STA2, requestor=False)) == "AssociationMachine(acceptor, STA2)"


PEER_EVENTS = [
    Event.ASSOCIATE_AC_PDU,
    Event.ASSOCIATE_RJ_PDU,
    Event.ASSOCIATE_RQ_PDU,
    Event.P_DATA_PDU,
    Event.RELEASE_RQ_PDU,
    Event.RELEASE_RP_PDU,
    Event.ABORT_PDU,
    Event.INVALID_PDU,
    Event.ARTIM_EXPIRED,
    Event.TRANSPORT_CLOSED,
]


@given(requestor=st.booleans(), events=st.lists(st.sampled_from(PEER_EVENTS), max_size=12))
def test_peer_can_never_cause_an_illegal_transition(requestor: bool, events: list[Event]) -> None:
    """Until the connection is closed, whatever a peer sends has a cell in the table."""
    machine = AssociationMachine()
    if requestor:
        machine.associate()
        machine.send_request(REQUEST)
    else:
        machine.transport_connected()
    for event in events:
        effects = FIRE[event](machine)
        if machine.state is State.STA1:
            # Closing is said exactly once: by us, or by the event that was itself a closing.
            assert (Close() in effects) is (event is not Event.TRANSPORT_CLOSED)
            return
        if machine.state is State.STA3:
            machine.accept(ACCEPT)
