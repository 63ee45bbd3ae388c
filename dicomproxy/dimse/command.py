"""DIMSE command sets (PS3.7 sections 6.3, 9.3, 10.3 and Annex E).

A command set is group 0000 in Implicit VR Little Endian, whatever the
presentation context says. Elements that the standard does not know are kept
as bytes and written back. Pure: no socket, no clock.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, Final

from dicomproxy.dimse.pdu import ProtocolError

MAX_COMMAND_BYTES: Final = 64 * 1024
NO_DATA_SET: Final = 0x0101


class CommandField(IntEnum):
    """Command Field (0000,0100) values (PS3.7 E.1); responses have bit 15 set."""

    C_STORE_RQ = 0x0001
    C_GET_RQ = 0x0010
    C_FIND_RQ = 0x0020
    C_MOVE_RQ = 0x0021
    C_ECHO_RQ = 0x0030
    N_EVENT_REPORT_RQ = 0x0100
    N_GET_RQ = 0x0110
    N_SET_RQ = 0x0120
    N_ACTION_RQ = 0x0130
    N_CREATE_RQ = 0x0140
    N_DELETE_RQ = 0x0150
    C_CANCEL_RQ = 0x0FFF


RESPONSE: Final = 0x8000


class Tag(IntEnum):
    """Command elements (PS3.7 E.1) by their element number in group 0000."""

    GROUP_LENGTH = 0x0000
    AFFECTED_SOP_CLASS_UID = 0x0002
    REQUESTED_SOP_CLASS_UID = 0x0003
    COMMAND_FIELD = 0x0100
    MESSAGE_ID = 0x0110
    MESSAGE_ID_BEING_RESPONDED_TO = 0x0120
    MOVE_DESTINATION = 0x0600
    PRIORITY = 0x0700
    COMMAND_DATA_SET_TYPE = 0x0800
    STATUS = 0x0900
    OFFENDING_ELEMENT = 0x0901
    ERROR_COMMENT = 0x0902
    ERROR_ID = 0x0903
    AFFECTED_SOP_INSTANCE_UID = 0x1000
    REQUESTED_SOP_INSTANCE_UID = 0x1001
    EVENT_TYPE_ID = 0x1002
    ATTRIBUTE_IDENTIFIER_LIST = 0x1005
    ACTION_TYPE_ID = 0x1008
    REMAINING = 0x1020
    COMPLETED = 0x1021
    FAILED = 0x1022
    WARNING = 0x1023
    MOVE_ORIGINATOR_AE_TITLE = 0x1030
    MOVE_ORIGINATOR_MESSAGE_ID = 0x1031


_US: Final = frozenset(
    {
        Tag.COMMAND_FIELD,
        Tag.MESSAGE_ID,
        Tag.MESSAGE_ID_BEING_RESPONDED_TO,
        Tag.PRIORITY,
        Tag.COMMAND_DATA_SET_TYPE,
        Tag.STATUS,
        Tag.ERROR_ID,
        Tag.EVENT_TYPE_ID,
        Tag.ACTION_TYPE_ID,
        Tag.REMAINING,
        Tag.COMPLETED,
        Tag.FAILED,
        Tag.WARNING,
        Tag.MOVE_ORIGINATOR_MESSAGE_ID,
    }
)
_UI: Final = frozenset(
    {
        Tag.AFFECTED_SOP_CLASS_UID,
        Tag.REQUESTED_SOP_CLASS_UID,
        Tag.AFFECTED_SOP_INSTANCE_UID,
        Tag.REQUESTED_SOP_INSTANCE_UID,
    }
)
_TEXT: Final = frozenset({Tag.MOVE_DESTINATION, Tag.ERROR_COMMENT, Tag.MOVE_ORIGINATOR_AE_TITLE})
_AT: Final = frozenset({Tag.OFFENDING_ELEMENT, Tag.ATTRIBUTE_IDENTIFIER_LIST})

_HEADER = struct.Struct("<HHL")
_US_ELEMENT = struct.Struct("<HHLH")


class Command:
    """One command set: values by element number of group 0000.

    US values are ``int``, UI, AE and LO values ``str``, AT values tuples of
    ``0xGGGGEEEE``, anything else ``bytes``. Group length is not a value: it is
    computed when encoding.
    """

    __slots__ = ("elements",)

    def __init__(self, elements: Mapping[int, Any]) -> None:
        self.elements: dict[int, Any] = dict(elements)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Command) and self.elements == other.elements

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        # Never Error Comment or instance values beyond what may be logged.
        return f"Command(field=0x{self.field:04X}, elements={sorted(self.elements)})"

    @property
    def field(self) -> int:
        return int(self.elements.get(Tag.COMMAND_FIELD, 0))

    @property
    def is_response(self) -> bool:
        return bool(self.field & RESPONSE)

    @property
    def message_id(self) -> int:
        return int(self.elements.get(Tag.MESSAGE_ID, 0))

    @property
    def responds_to(self) -> int:
        return int(self.elements.get(Tag.MESSAGE_ID_BEING_RESPONDED_TO, 0))

    @property
    def has_data_set(self) -> bool:
        return bool(self.elements.get(Tag.COMMAND_DATA_SET_TYPE, NO_DATA_SET) != NO_DATA_SET)

    @property
    def status(self) -> int:
        return int(self.elements.get(Tag.STATUS, 0))

    @property
    def priority(self) -> int:
        return int(self.elements.get(Tag.PRIORITY, 0))

    @property
    def affected_sop_class_uid(self) -> str:
        return str(self.elements.get(Tag.AFFECTED_SOP_CLASS_UID, ""))

    @property
    def affected_sop_instance_uid(self) -> str:
        return str(self.elements.get(Tag.AFFECTED_SOP_INSTANCE_UID, ""))

    @property
    def move_destination(self) -> str:
        return str(self.elements.get(Tag.MOVE_DESTINATION, ""))

    @property
    def error_comment(self) -> str:
        """The peer's free text; to be relayed, never logged."""
        return str(self.elements.get(Tag.ERROR_COMMENT, ""))

    def count(self, tag: Tag) -> int | None:
        """Return a number of sub-operations, ``None`` where it is absent."""
        value = self.elements.get(tag)
        return int(value) if value is not None else None

    def encode(self) -> bytes:
        """Return the command set as bytes, group length first (PS3.7 6.3.1)."""
        parts: list[bytes] = []
        for element in sorted(self.elements):
            value = self.elements[element]
            if isinstance(value, int):
                parts.append(_US_ELEMENT.pack(0, element, 2, value))
                continue
            if isinstance(value, str):
                encoded = value.encode("latin-1", "replace")
                if len(encoded) % 2:
                    encoded += b"\0" if element in _UI else b" "
            elif isinstance(value, tuple):
                encoded = b"".join(struct.pack("<HH", tag >> 16, tag & 0xFFFF) for tag in value)
            else:
                encoded = bytes(value)
            parts.append(_HEADER.pack(0, element, len(encoded)) + encoded)
        body = b"".join(parts)
        return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


def decode_command(data: bytes) -> Command:
    """Decode a command set (PS3.7 6.3.1).

    Raises:
        ProtocolError: it is not group 0000 in Implicit VR Little Endian, a
            value has the wrong length, or Command Field is missing.
    """
    elements: dict[int, Any] = {}
    at = 0
    end = len(data)
    while at < end:
        if at + 8 > end:
            raise ProtocolError("truncated command element")
        group, element, length = _HEADER.unpack_from(data, at)
        at += 8
        if group != 0:
            raise ProtocolError("element outside group 0000 in a command set")
        if at + length > end:
            raise ProtocolError("command element longer than its command set")
        value = data[at : at + length]
        at += length
        if element == Tag.GROUP_LENGTH:
            # What follows the group is not part of it. An archive in wide use
            # repeats the identifier of its last C-GET response there.
            if length == 4 and at == 12:
                end = min(end, at + int.from_bytes(value, "little"))
            continue
        if element in elements:
            raise ProtocolError("command element occurs twice")
        if element in _US:
            if length == 0:
                continue
            if length != 2:
                raise ProtocolError("command element of VR US is not 2 bytes")
            elements[element] = value[0] | value[1] << 8
        elif element in _UI:
            elements[element] = value.rstrip(b"\0 ").decode("ascii", "replace")
        elif element in _TEXT:
            elements[element] = value.decode("latin-1").strip(" \0")
        elif element in _AT:
            if length % 4:
                raise ProtocolError("command element of VR AT is not a multiple of 4 bytes")
            pairs = struct.iter_unpack("<HH", value)
            elements[element] = tuple(high << 16 | low for high, low in pairs)
        else:
            elements[element] = value
    if Tag.COMMAND_FIELD not in elements:
        raise ProtocolError("command set without Command Field")
    if Tag.COMMAND_DATA_SET_TYPE not in elements:
        raise ProtocolError("command set without Command Data Set Type")
    return Command(elements)


def request(
    field: CommandField, sop_class_uid: str, message_id: int, *, data_set: bool, **more: Any
) -> Command:
    """Build a DIMSE-C request; *more* names :class:`Tag` members in lower case."""
    elements: dict[int, Any] = {
        Tag.AFFECTED_SOP_CLASS_UID: sop_class_uid,
        Tag.COMMAND_FIELD: int(field),
        Tag.MESSAGE_ID: message_id,
        Tag.COMMAND_DATA_SET_TYPE: 0x0001 if data_set else NO_DATA_SET,
    }
    for name, value in more.items():
        elements[Tag[name.upper()]] = value
    return Command(elements)


def cancel(message_id: int) -> Command:
    """Build a C-CANCEL-RQ for the operation with *message_id* (PS3.7 9.3.2.3)."""
    return Command(
        {
            Tag.COMMAND_FIELD: int(CommandField.C_CANCEL_RQ),
            Tag.MESSAGE_ID_BEING_RESPONDED_TO: message_id,
            Tag.COMMAND_DATA_SET_TYPE: NO_DATA_SET,
        }
    )


def response(to: Command, status: int, *, data_set: bool = False, **more: Any) -> Command:
    """Build the response to request *to* (PS3.7 9.3, 10.3).

    SOP Class and Instance are those of the request where it named them, as
    affected ones, which is how a response names them in every service.
    """
    elements: dict[int, Any] = {
        Tag.COMMAND_FIELD: to.field | RESPONSE,
        Tag.MESSAGE_ID_BEING_RESPONDED_TO: to.message_id,
        Tag.COMMAND_DATA_SET_TYPE: 0x0001 if data_set else NO_DATA_SET,
        Tag.STATUS: status,
    }
    named = to.elements
    for affected, requested in (
        (Tag.AFFECTED_SOP_CLASS_UID, Tag.REQUESTED_SOP_CLASS_UID),
        (Tag.AFFECTED_SOP_INSTANCE_UID, Tag.REQUESTED_SOP_INSTANCE_UID),
    ):
        value = named.get(affected) or named.get(requested)
        if value:
            elements[affected] = value
    for name, value in more.items():
        if value is not None:
            elements[Tag[name.upper()]] = value
    return Command(elements)
