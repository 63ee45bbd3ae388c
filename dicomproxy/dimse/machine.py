"""The association state machine of PS3.8 section 9.2, without any I/O.

House rules: the table is the standard's Table 9-10; code holds only what a
table cannot. An event goes in, effects come out, in the order in which they
must happen; whoever owns the socket and the clock carries them out. A pair of
event and state that the table lacks cannot be caused by a peer: it is a
mistake of ours and raises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Final

from dicomproxy.dimse.framing import Fragment
from dicomproxy.dimse.pdu import (
    RELEASE_RP_BYTES,
    RELEASE_RQ_BYTES,
    Abort,
    AbortReason,
    AssociateAccept,
    AssociateReject,
    AssociateRequest,
    Pdu,
    ReleaseRequest,
    ReleaseResponse,
    encode,
)


class State(IntEnum):
    """States of PS3.8 Tables 9-1 to 9-5."""

    STA1 = 1  # idle
    STA2 = 2  # transport open, awaiting A-ASSOCIATE-RQ
    STA3 = 3  # awaiting local A-ASSOCIATE response
    STA4 = 4  # awaiting transport connection
    STA5 = 5  # awaiting A-ASSOCIATE-AC or RJ
    STA6 = 6  # association established
    STA7 = 7  # awaiting A-RELEASE-RP
    STA8 = 8  # awaiting local A-RELEASE response
    STA9 = 9  # release collision, requestor: awaiting local A-RELEASE response
    STA10 = 10  # release collision, acceptor: awaiting A-RELEASE-RP
    STA11 = 11  # release collision, requestor: awaiting A-RELEASE-RP
    STA12 = 12  # release collision, acceptor: awaiting local A-RELEASE response
    STA13 = 13  # awaiting transport close


class Event(IntEnum):
    """Events of PS3.8 Table 9-10."""

    ASSOCIATE_REQUEST = 1
    TRANSPORT_CONFIRM = 2
    ASSOCIATE_AC_PDU = 3
    ASSOCIATE_RJ_PDU = 4
    TRANSPORT_INDICATION = 5
    ASSOCIATE_RQ_PDU = 6
    ASSOCIATE_ACCEPT = 7
    ASSOCIATE_REJECT = 8
    P_DATA_REQUEST = 9
    P_DATA_PDU = 10
    RELEASE_REQUEST = 11
    RELEASE_RQ_PDU = 12
    RELEASE_RP_PDU = 13
    RELEASE_RESPONSE = 14
    ABORT_REQUEST = 15
    ABORT_PDU = 16
    TRANSPORT_CLOSED = 17
    ARTIM_EXPIRED = 18
    INVALID_PDU = 19


class Action(IntEnum):
    """Actions of PS3.8 Tables 9-6 to 9-9."""

    AE_1 = 1
    AE_2 = 2
    AE_3 = 3
    AE_4 = 4
    AE_5 = 5
    AE_6 = 6
    AE_7 = 7
    AE_8 = 8
    DT_1 = 11
    DT_2 = 12
    AR_1 = 21
    AR_2 = 22
    AR_3 = 23
    AR_4 = 24
    AR_5 = 25
    AR_6 = 26
    AR_7 = 27
    AR_8 = 28
    AR_9 = 29
    AR_10 = 30
    AA_1 = 31
    AA_2 = 32
    AA_3 = 33
    AA_4 = 34
    AA_5 = 35
    AA_6 = 36
    AA_7 = 37
    AA_8 = 38


def _row(*cells: tuple[int, Action], rest: tuple[range, Action] | None = None) -> dict[int, Action]:
    row = dict.fromkeys(rest[0], rest[1]) if rest else {}
    row.update(cells)
    return row


_MID = range(6, 13)
_A = Action
TABLE: Final = MappingProxyType(
    {
        Event.ASSOCIATE_REQUEST: _row((1, _A.AE_1)),
        Event.TRANSPORT_CONFIRM: _row((4, _A.AE_2)),
        Event.ASSOCIATE_AC_PDU: _row(
            (2, _A.AA_1), (3, _A.AA_8), (5, _A.AE_3), (13, _A.AA_6), rest=(_MID, _A.AA_8)
        ),
        Event.ASSOCIATE_RJ_PDU: _row(
            (2, _A.AA_1), (3, _A.AA_8), (5, _A.AE_4), (13, _A.AA_6), rest=(_MID, _A.AA_8)
        ),
        Event.TRANSPORT_INDICATION: _row((1, _A.AE_5)),
        Event.ASSOCIATE_RQ_PDU: _row(
            (2, _A.AE_6), (3, _A.AA_8), (5, _A.AA_8), (13, _A.AA_7), rest=(_MID, _A.AA_8)
        ),
        Event.ASSOCIATE_ACCEPT: _row((3, _A.AE_7)),
        Event.ASSOCIATE_REJECT: _row((3, _A.AE_8)),
        Event.P_DATA_REQUEST: _row((6, _A.DT_1), (8, _A.AR_7)),
        Event.P_DATA_PDU: _row(
            (2, _A.AA_1),
            (3, _A.AA_8),
            (5, _A.AA_8),
            (6, _A.DT_2),
            (7, _A.AR_6),
            (13, _A.AA_6),
            rest=(range(8, 13), _A.AA_8),
        ),
        Event.RELEASE_REQUEST: _row((6, _A.AR_1)),
        Event.RELEASE_RQ_PDU: _row(
            (2, _A.AA_1),
            (3, _A.AA_8),
            (5, _A.AA_8),
            (6, _A.AR_2),
            (7, _A.AR_8),
            (13, _A.AA_6),
            rest=(range(8, 13), _A.AA_8),
        ),
        Event.RELEASE_RP_PDU: _row(
            (2, _A.AA_1),
            (3, _A.AA_8),
            (5, _A.AA_8),
            (6, _A.AA_8),
            (7, _A.AR_3),
            (8, _A.AA_8),
            (9, _A.AA_8),
            (10, _A.AR_10),
            (11, _A.AR_3),
            (12, _A.AA_8),
            (13, _A.AA_6),
        ),
        Event.RELEASE_RESPONSE: _row((8, _A.AR_4), (9, _A.AR_9), (12, _A.AR_4)),
        Event.ABORT_REQUEST: _row((3, _A.AA_1), (4, _A.AA_2), (5, _A.AA_1), rest=(_MID, _A.AA_1)),
        Event.ABORT_PDU: _row(
            (2, _A.AA_2), (3, _A.AA_3), (5, _A.AA_3), (13, _A.AA_2), rest=(_MID, _A.AA_3)
        ),
        Event.TRANSPORT_CLOSED: _row(
            (2, _A.AA_5),
            (3, _A.AA_4),
            (4, _A.AA_4),
            (5, _A.AA_4),
            (13, _A.AR_5),
            rest=(_MID, _A.AA_4),
        ),
        Event.ARTIM_EXPIRED: _row((2, _A.AA_2), (13, _A.AA_2)),
        Event.INVALID_PDU: _row(
            (2, _A.AA_1), (3, _A.AA_8), (5, _A.AA_8), (13, _A.AA_7), rest=(_MID, _A.AA_8)
        ),
    }
)
"""PS3.8 Table 9-10: event, then state, to action."""


# ------------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class Send:
    """Write *data* to the transport."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Connect:
    """Open the transport connection."""


@dataclass(frozen=True, slots=True)
class Close:
    """Close the transport connection."""


@dataclass(frozen=True, slots=True)
class StartArtim:
    """Start, or restart, the ARTIM timer (PS3.8 9.1.5)."""


@dataclass(frozen=True, slots=True)
class StopArtim:
    """Stop the ARTIM timer."""


@dataclass(frozen=True, slots=True)
class Indicate:
    """Tell the service user what the peer did: a PDU received."""

    pdu: Pdu


@dataclass(frozen=True, slots=True)
class Deliver:
    """Tell the service user that a piece of a message came (P-DATA indication)."""

    fragment: Fragment


@dataclass(frozen=True, slots=True)
class Aborted:
    """A-ABORT or A-P-ABORT indication: by the peer, by us, or the connection was lost."""

    source: int
    reason: int
    lost: bool = False


Effect = Send | Connect | Close | StartArtim | StopArtim | Indicate | Deliver | Aborted

_PDU_EVENTS: Final[dict[type, Event]] = {
    AssociateRequest: Event.ASSOCIATE_RQ_PDU,
    AssociateAccept: Event.ASSOCIATE_AC_PDU,
    AssociateReject: Event.ASSOCIATE_RJ_PDU,
    ReleaseRequest: Event.RELEASE_RQ_PDU,
    ReleaseResponse: Event.RELEASE_RP_PDU,
    Abort: Event.ABORT_PDU,
}


class IllegalTransition(Exception):
    """A local primitive was used in a state that does not allow it."""


class AssociationMachine:
    """One association's state; requestor or acceptor by the first event it gets."""

    __slots__ = ("_requestor", "state")

    def __init__(self) -> None:
        self.state = State.STA1
        self._requestor = False

    def __repr__(self) -> str:
        role = "requestor" if self._requestor else "acceptor"
        return f"AssociationMachine({role}, {self.state.name})"

    @property
    def established(self) -> bool:
        return self.state is State.STA6

    # -- what came from the peer

    def received(self, item: Pdu | Fragment) -> list[Effect]:
        """Take a PDU, or a piece of one, that the peer sent."""
        if isinstance(item, Fragment):
            if self.state is State.STA6:  # the hot path is DT-2
                return [Deliver(item)]
            return self._fire(Event.P_DATA_PDU, item)
        return self._fire(_PDU_EVENTS[type(item)], item)

    def received_invalid(self, reason: AbortReason) -> list[Effect]:
        """Take a PDU that is not recognized or has an invalid parameter."""
        return self._fire(Event.INVALID_PDU, reason)

    def transport_connected(self) -> list[Effect]:
        """Take a transport connection that the peer opened."""
        return self._fire(Event.TRANSPORT_INDICATION, None)

    def transport_closed(self) -> list[Effect]:
        """Take the closing of the transport, by whomever."""
        if self.state is State.STA1:
            return []
        return self._fire(Event.TRANSPORT_CLOSED, None)

    def artim_expired(self) -> list[Effect]:
        if self.state not in TABLE[Event.ARTIM_EXPIRED]:
            return []  # raced with its own stopping
        return self._fire(Event.ARTIM_EXPIRED, None)

    # -- what the service user asks for

    def associate(self) -> list[Effect]:
        """Ask for the transport; the request itself follows by :meth:`send_request`."""
        self._requestor = True
        return self._fire(Event.ASSOCIATE_REQUEST, None)

    def send_request(self, pdu: AssociateRequest) -> list[Effect]:
        """The transport is open: send A-ASSOCIATE-RQ."""
        return self._fire(Event.TRANSPORT_CONFIRM, pdu)

    def accept(self, pdu: AssociateAccept) -> list[Effect]:
        return self._fire(Event.ASSOCIATE_ACCEPT, pdu)

    def reject(self, pdu: AssociateReject) -> list[Effect]:
        return self._fire(Event.ASSOCIATE_REJECT, pdu)

    def may_send_data(self) -> bool:
        """Whether P-DATA may be sent now (DT-1, AR-7)."""
        return self.state is State.STA6 or self.state is State.STA8

    def release(self) -> list[Effect]:
        return self._fire(Event.RELEASE_REQUEST, None)

    def release_response(self) -> list[Effect]:
        return self._fire(Event.RELEASE_RESPONSE, None)

    def abort(self) -> list[Effect]:
        """Abort as service user, from any state; nothing where nothing is open."""
        if self.state in (State.STA1, State.STA2, State.STA13):
            return [StopArtim(), Close()] if self.state is not State.STA1 else []
        return self._fire(Event.ABORT_REQUEST, None)

    # -- the table at work

    def _fire(self, event: Event, argument: object) -> list[Effect]:
        action = TABLE[event].get(self.state)
        if action is None:
            raise IllegalTransition(f"{event.name} in {self.state.name}")
        next_state, effects = _ACTIONS[action](self, argument)
        self.state = next_state
        return effects


_Outcome = tuple[State, list[Effect]]


def _send_encoded(machine: AssociationMachine, pdu: object) -> list[Effect]:
    return [Send(encode(pdu))]  # type: ignore[arg-type]


def _ae_2(machine: AssociationMachine, pdu: object) -> _Outcome:
    return State.STA5, _send_encoded(machine, pdu)


def _ae_7(machine: AssociationMachine, pdu: object) -> _Outcome:
    return State.STA6, _send_encoded(machine, pdu)


def _ae_8(machine: AssociationMachine, pdu: object) -> _Outcome:
    return State.STA13, [*_send_encoded(machine, pdu), StartArtim()]


def _indicate(*effects: Effect, to: State) -> Callable[[AssociationMachine, object], _Outcome]:
    def act(machine: AssociationMachine, pdu: object) -> _Outcome:
        return to, [*effects, Indicate(pdu)]  # type: ignore[arg-type]

    return act


def _only(*effects: Effect, to: State) -> Callable[[AssociationMachine, object], _Outcome]:
    def act(machine: AssociationMachine, argument: object) -> _Outcome:
        return to, list(effects)

    return act


def _ae_4(machine: AssociationMachine, pdu: object) -> _Outcome:
    return State.STA1, [Indicate(pdu), Close()]  # type: ignore[arg-type]


def _dt_2(machine: AssociationMachine, fragment: object) -> _Outcome:
    return machine.state, [Deliver(fragment)]  # type: ignore[arg-type]


def _ar_8(machine: AssociationMachine, pdu: object) -> _Outcome:
    to = State.STA9 if machine._requestor else State.STA10
    return to, [Indicate(pdu)]  # type: ignore[arg-type]


def _ar_3(machine: AssociationMachine, pdu: object) -> _Outcome:
    return State.STA1, [Indicate(pdu), Close()]  # type: ignore[arg-type]


def _abort_bytes(source: int, reason: int) -> Send:
    return Send(encode(Abort(source, reason)))


def _aa_1(machine: AssociationMachine, argument: object) -> _Outcome:
    # The service user's abort, or a first PDU that is no A-ASSOCIATE-RQ.
    return State.STA13, [_abort_bytes(0, 0), StartArtim()]


def _aa_3(machine: AssociationMachine, pdu: object) -> _Outcome:
    abort: Abort = pdu  # type: ignore[assignment]
    return State.STA1, [Aborted(abort.source, abort.reason), Close()]


def _aa_7(machine: AssociationMachine, argument: object) -> _Outcome:
    return State.STA13, [_abort_bytes(2, _reason_of(argument))]


def _aa_8(machine: AssociationMachine, argument: object) -> _Outcome:
    reason = _reason_of(argument)
    return State.STA13, [_abort_bytes(2, reason), Aborted(2, reason), StartArtim()]


def _reason_of(argument: object) -> int:
    return int(argument) if isinstance(argument, AbortReason) else int(AbortReason.UNEXPECTED_PDU)


_ACTIONS: Final[dict[Action, Callable[[AssociationMachine, object], _Outcome]]] = {
    Action.AE_1: _only(Connect(), to=State.STA4),
    Action.AE_2: _ae_2,
    Action.AE_3: _indicate(to=State.STA6),
    Action.AE_4: _ae_4,
    Action.AE_5: _only(StartArtim(), to=State.STA2),
    Action.AE_6: _indicate(StopArtim(), to=State.STA3),
    Action.AE_7: _ae_7,
    Action.AE_8: _ae_8,
    Action.DT_1: _only(to=State.STA6),  # the owner of the socket lays out the PDVs
    Action.DT_2: _dt_2,
    Action.AR_1: _only(Send(RELEASE_RQ_BYTES), to=State.STA7),
    Action.AR_2: _indicate(to=State.STA8),
    Action.AR_3: _ar_3,
    Action.AR_4: _only(Send(RELEASE_RP_BYTES), StartArtim(), to=State.STA13),
    Action.AR_5: _only(StopArtim(), to=State.STA1),
    Action.AR_6: _dt_2,
    Action.AR_7: _only(to=State.STA8),
    Action.AR_8: _ar_8,
    Action.AR_9: _only(Send(RELEASE_RP_BYTES), to=State.STA11),
    Action.AR_10: _indicate(to=State.STA12),
    Action.AA_1: _aa_1,
    Action.AA_2: _only(StopArtim(), Close(), to=State.STA1),
    Action.AA_3: _aa_3,
    Action.AA_4: _only(Aborted(2, 0, lost=True), to=State.STA1),
    Action.AA_5: _only(StopArtim(), to=State.STA1),
    Action.AA_6: _only(to=State.STA13),
    Action.AA_7: _aa_7,
    Action.AA_8: _aa_8,
}
