"""Command sets: pynetdicom as oracle for every DIMSE message, and any bytes whatever."""

from __future__ import annotations

import struct
from io import BytesIO
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pynetdicom import dimse_messages, dimse_primitives
from pynetdicom.dsutils import encode as their_encode

from dicomproxy.dimse.command import (
    NO_DATA_SET,
    RESPONSE,
    Command,
    CommandField,
    Tag,
    cancel,
    decode_command,
    request,
    response,
)
from dicomproxy.dimse.pdu import ProtocolError
from tests import sentinel

CT: Final = "1.2.840.10008.5.1.4.1.1.2"  # odd length: padded
STUDY_MOVE: Final = "1.2.840.10008.5.1.4.1.2.2.2"
EVEN_UID: Final = "1.2.3.4567"
INSTANCE: Final = "1.2.3.45.6"
DATA_SET: Final = object()
"""In a row: the message has a data set, whatever pynetdicom calls it."""

COUNTS: Final = {
    "NumberOfRemainingSuboperations": 0,
    "NumberOfCompletedSuboperations": 300,
    "NumberOfFailedSuboperations": 65535,
    "NumberOfWarningSuboperations": 1,
}
TAGS: Final = {
    "AffectedSOPClassUID": Tag.AFFECTED_SOP_CLASS_UID,
    "RequestedSOPClassUID": Tag.REQUESTED_SOP_CLASS_UID,
    "AffectedSOPInstanceUID": Tag.AFFECTED_SOP_INSTANCE_UID,
    "RequestedSOPInstanceUID": Tag.REQUESTED_SOP_INSTANCE_UID,
    "MessageID": Tag.MESSAGE_ID,
    "MessageIDBeingRespondedTo": Tag.MESSAGE_ID_BEING_RESPONDED_TO,
    "MoveDestination": Tag.MOVE_DESTINATION,
    "Priority": Tag.PRIORITY,
    "Status": Tag.STATUS,
    "OffendingElement": Tag.OFFENDING_ELEMENT,
    "ErrorComment": Tag.ERROR_COMMENT,
    "ErrorID": Tag.ERROR_ID,
    "EventTypeID": Tag.EVENT_TYPE_ID,
    "ActionTypeID": Tag.ACTION_TYPE_ID,
    "AttributeIdentifierList": Tag.ATTRIBUTE_IDENTIFIER_LIST,
    "NumberOfRemainingSuboperations": Tag.REMAINING,
    "NumberOfCompletedSuboperations": Tag.COMPLETED,
    "NumberOfFailedSuboperations": Tag.FAILED,
    "NumberOfWarningSuboperations": Tag.WARNING,
    "MoveOriginatorApplicationEntityTitle": Tag.MOVE_ORIGINATOR_AE_TITLE,
    "MoveOriginatorMessageID": Tag.MOVE_ORIGINATOR_MESSAGE_ID,
}


def rq(**more: Any) -> dict[str, Any]:
    return {"AffectedSOPClassUID": CT, "MessageID": 7, **more}


def rsp(status: int, **more: Any) -> dict[str, Any]:
    return {
        "AffectedSOPClassUID": CT,
        "MessageIDBeingRespondedTo": 65535,
        "Status": status,
        **more,
    }


def n_rq(**more: Any) -> dict[str, Any]:
    return {
        "RequestedSOPClassUID": CT,
        "RequestedSOPInstanceUID": INSTANCE,
        "MessageID": 1,
        **more,
    }


FAULT: Final = {"OffendingElement": [0x00100020, 0x0020000D], "ErrorComment": "a reason"}

# Message, Command Field (PS3.7 E.1), elements; pynetdicom's data set keyword where there is one.
MESSAGES: Final[list[tuple[str, int, dict[str, Any]]]] = [
    ("C_ECHO_RQ", 0x0030, rq()),
    ("C_ECHO_RSP", 0x8030, rsp(0)),
    (
        "C_STORE_RQ",
        0x0001,
        rq(
            Priority=1,
            AffectedSOPInstanceUID=INSTANCE,
            MoveOriginatorApplicationEntityTitle="READING1",
            MoveOriginatorMessageID=9,
            DataSet=DATA_SET,
        ),
    ),
    ("C_STORE_RSP", 0x8001, rsp(0xB007, AffectedSOPInstanceUID=INSTANCE, **FAULT)),
    ("C_FIND_RQ", 0x0020, rq(Priority=2, Identifier=DATA_SET)),
    ("C_FIND_RSP", 0x8020, rsp(0xFF00, Identifier=DATA_SET)),
    ("C_FIND_RSP", 0x8020, rsp(0xA900, **FAULT)),
    ("C_MOVE_RQ", 0x0021, rq(Priority=0, MoveDestination="READING", Identifier=DATA_SET)),
    ("C_MOVE_RSP", 0x8021, rsp(0xFF00, **COUNTS)),
    ("C_MOVE_RSP", 0x8021, rsp(0xB000, **COUNTS, **FAULT, Identifier=DATA_SET)),
    ("C_GET_RQ", 0x0010, rq(Priority=0, Identifier=DATA_SET)),
    ("C_GET_RSP", 0x8010, rsp(0xFE00, **COUNTS)),
    ("C_CANCEL_RQ", 0x0FFF, {"MessageIDBeingRespondedTo": 7}),
    (
        "N_EVENT_REPORT_RQ",
        0x0100,
        rq(AffectedSOPInstanceUID=INSTANCE, EventTypeID=2, EventInformation=DATA_SET),
    ),
    (
        "N_EVENT_REPORT_RSP",
        0x8100,
        rsp(0, AffectedSOPInstanceUID=INSTANCE, EventTypeID=2),
    ),
    ("N_GET_RQ", 0x0110, n_rq(AttributeIdentifierList=[0x00100020, 0x7FE00010])),
    ("N_GET_RSP", 0x8110, rsp(0, AffectedSOPInstanceUID=INSTANCE, AttributeList=DATA_SET)),
    ("N_SET_RQ", 0x0120, n_rq(ModificationList=DATA_SET)),
    ("N_SET_RSP", 0x8120, rsp(0x0110, AffectedSOPInstanceUID=INSTANCE, ErrorID=77)),
    ("N_ACTION_RQ", 0x0130, n_rq(ActionTypeID=1, ActionInformation=DATA_SET)),
    ("N_ACTION_RSP", 0x8130, rsp(0, AffectedSOPInstanceUID=INSTANCE, ActionTypeID=1)),
    ("N_CREATE_RQ", 0x0140, rq(AffectedSOPInstanceUID=INSTANCE, AttributeList=DATA_SET)),
    ("N_CREATE_RSP", 0x8140, rsp(0, AffectedSOPInstanceUID=INSTANCE, AttributeList=DATA_SET)),
    ("N_DELETE_RQ", 0x0150, n_rq()),
    ("N_DELETE_RSP", 0x8150, rsp(0x0112, AffectedSOPInstanceUID=INSTANCE, ErrorComment="gone")),
]


def theirs(name: str, values: dict[str, Any]) -> bytes:
    """Return the command set as pynetdicom encodes it."""
    kind = name.removesuffix("_RQ").removesuffix("_RSP")
    primitive: Any = getattr(dimse_primitives, kind)()
    for keyword, value in values.items():
        setattr(primitive, keyword, BytesIO(b"1234") if value is DATA_SET else value)
    message: Any = getattr(dimse_messages, name)()
    message.primitive_to_message(primitive)
    encoded = their_encode(message.command_set, True, True)
    assert encoded is not None
    return encoded


def expected_elements(field: int, values: dict[str, Any]) -> dict[int, Any]:
    data_set = DATA_SET in values.values()
    return {
        Tag.COMMAND_FIELD: field,
        Tag.COMMAND_DATA_SET_TYPE: 1 if data_set else NO_DATA_SET,
        **{
            TAGS[keyword]: tuple(value) if isinstance(value, list) else value
            for keyword, value in values.items()
            if value is not DATA_SET
        },
    }


def test_table_has_every_message_that_pynetdicom_knows() -> None:
    """No DIMSE message type is left out below."""
    known = {
        name
        for name in vars(dimse_messages)
        if name.startswith(("C_", "N_")) and name.endswith(("_RQ", "_RSP"))
    }
    assert {name for name, *_ in MESSAGES} == known
    fields = {field & ~RESPONSE for _, field, _ in MESSAGES}
    assert fields == {int(field) for field in CommandField}


@pytest.mark.parametrize(("name", "field", "values"), MESSAGES, ids=[row[0] for row in MESSAGES])
def test_command_set_of_pynetdicom_reads_and_writes_the_same(
    name: str, field: int, values: dict[str, Any]
) -> None:
    """We read what pynetdicom wrote, and write it back byte for byte."""
    data = theirs(name, values)
    command = decode_command(data)
    assert command == Command(expected_elements(field, values))
    assert command.encode() == data


def test_accessors_read_what_they_are_named_for() -> None:
    """The values that services use, and their defaults where an element is absent."""
    command = Command(
        {
            **expected_elements(0x8021, rsp(0xB000, **COUNTS, **FAULT, Identifier=DATA_SET)),
            Tag.MESSAGE_ID: 3,
            Tag.PRIORITY: 2,
            Tag.MOVE_DESTINATION: "READING",
            Tag.AFFECTED_SOP_INSTANCE_UID: INSTANCE,
        }
    )
    assert (command.field, command.is_response, command.has_data_set) == (0x8021, True, True)
    assert (command.message_id, command.responds_to, command.status) == (3, 65535, 0xB000)
    assert (command.priority, command.move_destination) == (2, "READING")
    assert (command.affected_sop_class_uid, command.affected_sop_instance_uid) == (CT, INSTANCE)
    assert command.error_comment == "a reason"
    assert [command.count(tag) for tag in (Tag.REMAINING, Tag.COMPLETED)] == [0, 300]
    bare = Command({Tag.COMMAND_FIELD: 0x0030})
    assert (bare.is_response, bare.has_data_set, bare.count(Tag.REMAINING)) == (False, False, None)
    assert (bare.message_id, bare.responds_to, bare.status, bare.priority) == (0, 0, 0, 0)
    assert (bare.move_destination, bare.error_comment) == ("", "")
    assert (bare.affected_sop_class_uid, bare.affected_sop_instance_uid) == ("", "")


# ------------------------------------------------------------ what we build


def test_request_is_the_oracles() -> None:
    """A C-MOVE request and a C-STORE sub-operation, as pynetdicom would send them."""
    move = request(
        CommandField.C_MOVE_RQ, CT, 7, data_set=True, priority=0, move_destination="READING"
    )
    row = next(values for name, _, values in MESSAGES if name == "C_MOVE_RQ")
    assert move.encode() == theirs("C_MOVE_RQ", row)
    store = request(
        CommandField.C_STORE_RQ,
        CT,
        7,
        data_set=True,
        priority=1,
        affected_sop_instance_uid=INSTANCE,
        move_originator_ae_title="READING1",
        move_originator_message_id=9,
    )
    row = next(values for name, _, values in MESSAGES if name == "C_STORE_RQ")
    assert store.encode() == theirs("C_STORE_RQ", row)
    assert cancel(7).encode() == theirs("C_CANCEL_RQ", {"MessageIDBeingRespondedTo": 7})


@pytest.mark.parametrize(
    ("asked", "affected"),
    [
        pytest.param(
            {Tag.AFFECTED_SOP_CLASS_UID: CT, Tag.AFFECTED_SOP_INSTANCE_UID: INSTANCE},
            {Tag.AFFECTED_SOP_CLASS_UID: CT, Tag.AFFECTED_SOP_INSTANCE_UID: INSTANCE},
            id="affected",
        ),
        pytest.param(
            {Tag.REQUESTED_SOP_CLASS_UID: CT, Tag.REQUESTED_SOP_INSTANCE_UID: INSTANCE},
            {Tag.AFFECTED_SOP_CLASS_UID: CT, Tag.AFFECTED_SOP_INSTANCE_UID: INSTANCE},
            id="requested",
        ),
        pytest.param(
            {Tag.AFFECTED_SOP_CLASS_UID: CT}, {Tag.AFFECTED_SOP_CLASS_UID: CT}, id="class only"
        ),
        pytest.param({Tag.AFFECTED_SOP_CLASS_UID: ""}, {}, id="empty"),
    ],
)
def test_response_names_what_the_request_named(
    asked: dict[int, Any], affected: dict[int, Any]
) -> None:
    """Message ID, SOP Class and Instance go back; what is ``None`` is left out."""
    to = Command({Tag.COMMAND_FIELD: 0x0130, Tag.MESSAGE_ID: 12, **asked})
    answer = response(to, 0xA700, failed=3, remaining=None)
    assert answer == Command(
        {
            Tag.COMMAND_FIELD: 0x8130,
            Tag.MESSAGE_ID_BEING_RESPONDED_TO: 12,
            Tag.COMMAND_DATA_SET_TYPE: NO_DATA_SET,
            Tag.STATUS: 0xA700,
            Tag.FAILED: 3,
            **affected,
        }
    )
    assert response(to, 0xFF00, data_set=True).has_data_set


def test_unknown_argument_is_our_mistake() -> None:
    """A misspelt element is refused, not left out."""
    with pytest.raises(KeyError):
        request(CommandField.C_MOVE_RQ, STUDY_MOVE, 1, data_set=True, move_destinaton="READING")


def test_repr_tells_no_value() -> None:
    """A printed command shows which elements it has, not what a peer put in them."""
    command = Command(
        {
            Tag.COMMAND_FIELD: 0x8021,
            Tag.ERROR_COMMENT: f"no such patient {sentinel.PATIENT_NAME}",
            0x4000: sentinel.PATIENT_ID.encode(),
        }
    )
    assert repr(command) == f"Command(field=0x8021, elements={sorted(command.elements)})"
    assert sentinel.sentinels_in(repr(command)) == []


# ------------------------------------------------------------ what peers send


def element(number: int, value: bytes, *, length: int | None = None, group: int = 0) -> bytes:
    return struct.pack("<HHL", group, number, len(value) if length is None else length) + value


FIELD: Final = element(0x0100, b"\x30\0")
NO_DATA: Final = element(0x0800, b"\1\1")
ECHO: Final = FIELD + NO_DATA


@pytest.mark.parametrize(
    ("number", "raw", "value"),
    [
        pytest.param(0x0002, b"1.2.3\0", "1.2.3", id="UI padded by NUL"),
        pytest.param(0x0002, b"1.2.3 ", "1.2.3", id="UI padded by space"),
        pytest.param(0x0002, b"1.2.3", "1.2.3", id="UI of odd length"),
        pytest.param(0x0002, b"", "", id="UI empty"),
        pytest.param(0x0600, b"READING ", "READING", id="AE padded"),
        pytest.param(0x0600, b"  READING", "READING", id="AE of odd length, led by spaces"),
        pytest.param(0x1030, b"READING\0", "READING", id="AE padded by NUL"),
        pytest.param(0x0902, b"caf\xe9 ", "café", id="LO not ASCII"),
        pytest.param(0x0901, b"\x10\0\x20\0", (0x00100020,), id="AT"),
        pytest.param(0x0901, b"", (), id="AT empty"),
        pytest.param(0x4000, b"odd", b"odd", id="unknown, odd length"),
        pytest.param(0x0001, b"\1\0\0\0", b"\1\0\0\0", id="retired"),
        pytest.param(0xFFFF, b"", b"", id="unknown, empty"),
    ],
)
def test_values_are_read_as_peers_write_them(number: int, raw: bytes, value: object) -> None:
    """Padding, its absence and odd lengths are read through."""
    command = decode_command(ECHO + element(number, raw))
    assert command.elements[number] == value
    assert decode_command(command.encode()) == command


@pytest.mark.parametrize(
    "number", [0x0110, 0x0120, 0x0700, 0x0900, 0x1020, 0x1031], ids=lambda n: f"{n:04X}"
)
def test_empty_number_is_an_absent_one(number: int) -> None:
    """Some toolkits send counts that they do not know with no value."""
    assert decode_command(ECHO + element(number, b"")) == decode_command(ECHO)


def test_group_length_is_ignored_when_reading_and_right_when_writing() -> None:
    """A wrong or missing group length does no harm, and is not passed on."""
    plain = decode_command(ECHO)
    assert decode_command(element(0, b"\xff\xff\xff\xff") + ECHO) == plain
    assert decode_command(element(0, b"") + ECHO) == plain
    assert plain.encode() == element(0, struct.pack("<L", len(ECHO))) + ECHO


def test_elements_out_of_order_are_written_in_order() -> None:
    """Order is demanded of senders; from a sloppy one we take any."""
    assert decode_command(NO_DATA + FIELD).encode().endswith(ECHO)


def test_relayed_command_keeps_what_we_do_not_know() -> None:
    """Elements outside our tables come out as they came in, byte for byte."""
    strange = FIELD + NO_DATA + element(0x0850, b"\2\0") + element(0x5010, b"\0\xff" * 9)
    assert decode_command(strange).encode() == element(0, struct.pack("<L", len(strange))) + strange


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(b"", "without Command Field", id="empty"),
        pytest.param(NO_DATA, "without Command Field", id="no field"),
        pytest.param(FIELD, "without Command Data Set Type", id="no data set type"),
        pytest.param(element(0x0100, b"") + NO_DATA, "without Command Field", id="empty field"),
        pytest.param(ECHO + b"\0\0\0\1\2\0\0", "truncated", id="seven bytes of a header"),
        pytest.param(ECHO + element(0x0110, b"\1", length=2), "longer than", id="value cut off"),
        pytest.param(ECHO + element(2, b"", length=0xFFFFFFFF), "longer than", id="undefined"),
        pytest.param(ECHO + element(0x0110, b"\1"), "US is not 2 bytes", id="US of one byte"),
        pytest.param(ECHO + element(0x0110, bytes(4)), "US is not 2 bytes", id="US of four"),
        pytest.param(ECHO + element(0x0901, bytes(6)), "multiple of 4", id="AT of six bytes"),
        pytest.param(ECHO + FIELD, "occurs twice", id="twice"),
        pytest.param(ECHO + element(0x4000, b"") * 2, "occurs twice", id="unknown twice"),
        pytest.param(ECHO + element(0x20, b"", group=0x10), "outside group", id="group 0010"),
        pytest.param(b"\0\0\2\0UI\4\0001.2\0" + ECHO, "longer than", id="Explicit VR"),
        pytest.param(b"\0\0\0\0\0\0\0\4\0\0\0\x38" + ECHO, "longer than", id="Big Endian"),
    ],
)
def test_malformed_command_is_a_protocol_error(data: bytes, words: str) -> None:
    """Each fault is named."""
    with pytest.raises(ProtocolError, match=words):
        decode_command(data)


@given(data=st.binary(max_size=300))
def test_any_bytes_are_a_command_or_a_protocol_error(data: bytes) -> None:
    """Noise raises nothing else, in front of a sound command set or behind it."""
    for whole in (data, data + ECHO, ECHO + data):
        try:
            command = decode_command(whole)
        except ProtocolError:
            continue
        assert repr(command)


elements = st.builds(
    element,
    st.one_of(st.sampled_from([int(tag) for tag in Tag]), st.integers(0, 0xFFFF)),
    st.binary(max_size=12),
    length=st.none() | st.integers(0, 2**32 - 1),
)


@given(parts=st.lists(elements, max_size=12), data=st.just(ECHO) | st.just(b""))
def test_any_elements_are_a_command_or_a_protocol_error(parts: list[bytes], data: bytes) -> None:
    """Elements of every tag with any value: read or refused, and what is read writes stably."""
    try:
        command = decode_command(data + b"".join(parts))
    except ProtocolError:
        return
    assert repr(command)
    once = decode_command(command.encode())
    assert decode_command(once.encode()) == once
    assert set(once.elements) == set(command.elements)


@given(
    message=st.sampled_from(MESSAGES),
    changes=st.lists(st.tuples(st.integers(0, 999), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 30),
)
def test_damaged_command_is_a_command_or_a_protocol_error(
    message: tuple[str, int, dict[str, Any]], changes: list[tuple[int, int]], cut: int
) -> None:
    """A sound command set with bytes changed and its end cut off."""
    data = bytearray(Command(expected_elements(*message[1:])).encode())
    for at, byte in changes:
        data[at % len(data)] = byte
    try:
        command = decode_command(bytes(data[: len(data) - cut]))
    except ProtocolError:
        return
    assert repr(command)
    assert decode_command(command.encode()).elements.keys() == command.elements.keys()


def test_equality_is_by_value_and_commands_are_not_hashable() -> None:
    """Two command sets are equal when their elements are."""
    assert decode_command(ECHO) == Command({0x0100: 0x30, 0x0800: NO_DATA_SET})
    assert decode_command(ECHO) != Command({0x0100: 0x31, 0x0800: NO_DATA_SET})
    assert decode_command(ECHO) != ECHO
    with pytest.raises(TypeError):
        hash(decode_command(ECHO))
