"""Protocol data units of the DICOM upper layer, as values and as bytes (PS3.8 9.3).

Pure: no socket, no clock. One exception type, :class:`ProtocolError`, for
anything a peer can send. Unknown items are skipped, lengths are checked before
they are used, and an A-ASSOCIATE PDU is at most 64 KiB with at most 128
presentation contexts, so that decoding is bounded whatever arrives.
P-DATA-TF is not here: it is streamed by :mod:`dicomproxy.dimse.framing`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

APPLICATION_CONTEXT: Final = "1.2.840.10008.3.1.1.1"
MAX_ASSOCIATE_BYTES: Final = 64 * 1024
MAX_CONTEXTS: Final = 128


class PduType(IntEnum):
    """PDU types (PS3.8 9.3.1)."""

    ASSOCIATE_RQ = 0x01
    ASSOCIATE_AC = 0x02
    ASSOCIATE_RJ = 0x03
    P_DATA_TF = 0x04
    RELEASE_RQ = 0x05
    RELEASE_RP = 0x06
    ABORT = 0x07


class AbortReason(IntEnum):
    """Reasons of a provider-initiated A-ABORT (PS3.8 9.3.8)."""

    NOT_SPECIFIED = 0
    UNRECOGNIZED_PDU = 1
    UNEXPECTED_PDU = 2
    UNRECOGNIZED_PARAMETER = 4
    UNEXPECTED_PARAMETER = 5
    INVALID_PARAMETER = 6


class ProtocolError(Exception):
    """The peer broke the protocol; answered by A-ABORT with *reason* (PS3.8 9.3.8)."""

    def __init__(self, message: str, reason: AbortReason = AbortReason.INVALID_PARAMETER) -> None:
        self.reason = reason
        super().__init__(message)


class ContextResult(IntEnum):
    """Result of one presentation context (PS3.8 9.3.3.2)."""

    ACCEPTED = 0
    USER_REJECTION = 1
    NO_REASON = 2
    ABSTRACT_SYNTAX_NOT_SUPPORTED = 3
    TRANSFER_SYNTAXES_NOT_SUPPORTED = 4


@dataclass(frozen=True, slots=True)
class ProposedContext:
    """A presentation context as the requestor proposes it (PS3.8 9.3.2.2)."""

    context_id: int
    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ContextAnswer:
    """The acceptor's answer to one presentation context (PS3.8 9.3.3.2)."""

    context_id: int
    result: int
    transfer_syntax: str


@dataclass(frozen=True, slots=True)
class RoleSelection:
    """SCP/SCU Role Selection of one SOP Class (PS3.7 D.3.3.4)."""

    sop_class_uid: str
    scu: bool
    scp: bool


@dataclass(frozen=True, slots=True)
class UserIdentity:
    """User Identity Negotiation (PS3.7 D.3.3.7); repr hides the credentials."""

    identity_type: int
    response_requested: bool
    primary: bytes = field(repr=False)
    secondary: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class UserInformation:
    """The user information item, common to request and acceptance (PS3.7 D.3.3).

    ``max_length`` is what the sender of this item can receive; 0 is unlimited.
    ``extended`` maps a SOP Class to its service-class application information,
    carried as bytes. ``common_extended`` maps a SOP Class to its service class
    and related general SOP Classes.
    """

    max_length: int = 0
    implementation_class_uid: str = ""
    implementation_version_name: str = ""
    async_window: tuple[int, int] | None = None
    roles: tuple[RoleSelection, ...] = ()
    extended: tuple[tuple[str, bytes], ...] = ()
    common_extended: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    user_identity: UserIdentity | None = None
    user_identity_response: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class AssociateRequest:
    """A-ASSOCIATE-RQ (PS3.8 9.3.2)."""

    called_ae_title: str
    calling_ae_title: str
    contexts: tuple[ProposedContext, ...]
    user: UserInformation = UserInformation()
    application_context: str = APPLICATION_CONTEXT
    protocol_version: int = 1


@dataclass(frozen=True, slots=True)
class AssociateAccept:
    """A-ASSOCIATE-AC (PS3.8 9.3.3); the titles only echo the request's."""

    called_ae_title: str
    calling_ae_title: str
    contexts: tuple[ContextAnswer, ...]
    user: UserInformation = UserInformation()
    application_context: str = APPLICATION_CONTEXT


@dataclass(frozen=True, slots=True)
class AssociateReject:
    """A-ASSOCIATE-RJ (PS3.8 9.3.4)."""

    result: int
    source: int
    reason: int

    @property
    def transient(self) -> bool:
        return self.result == 2

    def in_words(self) -> str:
        """Say the reason as PS3.8 Table 9-21 does."""
        words = _REJECT_WORDS.get((self.source, self.reason), "reason not known to the standard")
        return f"{'transient' if self.transient else 'permanent'}: {words}"


_REJECT_WORDS: Final = {
    (1, 1): "no reason given",
    (1, 2): "application context name not supported",
    (1, 3): "calling AE title not recognized",
    (1, 7): "called AE title not recognized",
    (2, 1): "no reason given (ACSE)",
    (2, 2): "protocol version not supported",
    (3, 1): "temporary congestion",
    (3, 2): "local limit exceeded",
}

REJECT_CALLING: Final = AssociateReject(1, 1, 3)
REJECT_CALLED: Final = AssociateReject(1, 1, 7)
REJECT_NO_REASON: Final = AssociateReject(1, 1, 1)
REJECT_APPLICATION_CONTEXT: Final = AssociateReject(1, 1, 2)
REJECT_PROTOCOL_VERSION: Final = AssociateReject(1, 2, 2)
REJECT_CONGESTION: Final = AssociateReject(2, 3, 1)
REJECT_LIMIT: Final = AssociateReject(2, 3, 2)


@dataclass(frozen=True, slots=True)
class ReleaseRequest:
    """A-RELEASE-RQ (PS3.8 9.3.6)."""


@dataclass(frozen=True, slots=True)
class ReleaseResponse:
    """A-RELEASE-RP (PS3.8 9.3.7)."""


@dataclass(frozen=True, slots=True)
class Abort:
    """A-ABORT (PS3.8 9.3.8); source 0 is the service user, 2 the provider."""

    source: int
    reason: int


Pdu = (
    AssociateRequest | AssociateAccept | AssociateReject | ReleaseRequest | ReleaseResponse | Abort
)

RELEASE_RQ_BYTES: Final = struct.pack(">BxL4x", PduType.RELEASE_RQ, 4)
RELEASE_RP_BYTES: Final = struct.pack(">BxL4x", PduType.RELEASE_RP, 4)

# ------------------------------------------------------------------- encoding


def _item(item_type: int, body: bytes) -> bytes:
    if len(body) > 0xFFFF:
        raise ValueError(f"item 0x{item_type:02X} is longer than 65535 bytes")
    return struct.pack(">BxH", item_type, len(body)) + body


def _counted(value: bytes) -> bytes:
    return struct.pack(">H", len(value)) + value


def _ae(title: str) -> bytes:
    encoded = title.encode("ascii", "replace")
    if not 1 <= len(encoded) <= 16:
        raise ValueError("an AE title has 1 to 16 characters")
    return encoded.ljust(16)


def _user_items(user: UserInformation) -> Iterator[bytes]:
    yield _item(0x51, struct.pack(">L", user.max_length))
    if user.implementation_class_uid:
        yield _item(0x52, user.implementation_class_uid.encode("ascii"))
    if user.async_window is not None:
        yield _item(0x53, struct.pack(">HH", *user.async_window))
    for role in user.roles:
        uid = role.sop_class_uid.encode("ascii")
        yield _item(0x54, _counted(uid) + bytes((role.scu, role.scp)))
    if user.implementation_version_name:
        yield _item(0x55, user.implementation_version_name.encode("ascii"))
    for sop_class, information in user.extended:
        yield _item(0x56, _counted(sop_class.encode("ascii")) + information)
    for sop_class, service_class, related in user.common_extended:
        general = b"".join(_counted(uid.encode("ascii")) for uid in related)
        yield _item(
            0x57,
            _counted(sop_class.encode("ascii"))
            + _counted(service_class.encode("ascii"))
            + _counted(general),
        )
    if user.user_identity is not None:
        identity = user.user_identity
        yield _item(
            0x58,
            bytes((identity.identity_type, identity.response_requested))
            + _counted(identity.primary)
            + _counted(identity.secondary),
        )
    if user.user_identity_response is not None:
        yield _item(0x59, _counted(user.user_identity_response))


def encode(pdu: Pdu) -> bytes:
    """Return *pdu* as bytes (PS3.8 9.3).

    Raises:
        ValueError: a value does not fit its field; ours to avoid.
    """
    match pdu:
        case AssociateRequest():
            contexts = b"".join(
                _item(
                    0x20,
                    bytes((context.context_id, 0, 0, 0))
                    + _item(0x30, context.abstract_syntax.encode("ascii"))
                    + b"".join(
                        _item(0x40, syntax.encode("ascii")) for syntax in context.transfer_syntaxes
                    ),
                )
                for context in pdu.contexts
            )
            return _associate(PduType.ASSOCIATE_RQ, pdu, contexts, pdu.protocol_version)
        case AssociateAccept():
            contexts = b"".join(
                _item(
                    0x21,
                    bytes((answer.context_id, 0, answer.result, 0))
                    + _item(0x40, answer.transfer_syntax.encode("ascii")),
                )
                for answer in pdu.contexts
            )
            return _associate(PduType.ASSOCIATE_AC, pdu, contexts, 1)
        case AssociateReject():
            return struct.pack(
                ">BxLxBBB", PduType.ASSOCIATE_RJ, 4, pdu.result, pdu.source, pdu.reason
            )
        case ReleaseRequest():
            return RELEASE_RQ_BYTES
        case ReleaseResponse():
            return RELEASE_RP_BYTES
        case Abort():
            return struct.pack(">BxLxxBB", PduType.ABORT, 4, pdu.source, pdu.reason)


def _associate(
    pdu_type: PduType, pdu: AssociateRequest | AssociateAccept, contexts: bytes, version: int
) -> bytes:
    body = b"".join(
        (
            struct.pack(">Hxx", version),
            _ae(pdu.called_ae_title),
            _ae(pdu.calling_ae_title),
            bytes(32),
            _item(0x10, pdu.application_context.encode("ascii")),
            contexts,
            _item(0x50, b"".join(_user_items(pdu.user))),
        )
    )
    return struct.pack(">BxL", pdu_type, len(body)) + body


# ------------------------------------------------------------------- decoding


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        if at + 4 > len(data):
            raise ProtocolError("truncated item header")
        item_type = data[at]
        (length,) = struct.unpack_from(">H", data, at + 2)
        at += 4
        if at + length > len(data):
            raise ProtocolError("item longer than its PDU")
        yield item_type, data[at : at + length]
        at += length


def _take_counted(data: bytes, at: int) -> tuple[bytes, int]:
    if at + 2 > len(data):
        raise ProtocolError("truncated length")
    (length,) = struct.unpack_from(">H", data, at)
    end = at + 2 + length
    if end > len(data):
        raise ProtocolError("value longer than its item")
    return data[at + 2 : end], end


def _uid(data: bytes) -> str:
    # Padding is not allowed here (PS3.8 9.3.1) and common all the same.
    try:
        return data.rstrip(b"\0 ").decode("ascii")
    except UnicodeDecodeError:
        raise ProtocolError("UID is not ASCII") from None


def _text(data: bytes) -> str:
    return data.decode("ascii", "replace").strip(" \0")


def decode(pdu_type: int, body: bytes) -> Pdu:
    """Decode the variable part of any PDU but P-DATA-TF (PS3.8 9.3).

    Raises:
        ProtocolError: *body* is malformed or *pdu_type* unknown.
    """
    if pdu_type == PduType.ASSOCIATE_RQ:
        return _decode_request(body)
    if pdu_type == PduType.ASSOCIATE_AC:
        return _decode_accept(body)
    if pdu_type in (
        PduType.ASSOCIATE_RJ,
        PduType.RELEASE_RQ,
        PduType.RELEASE_RP,
        PduType.ABORT,
    ):
        if len(body) < 4:
            raise ProtocolError("PDU shorter than its fixed part")
        if pdu_type == PduType.ASSOCIATE_RJ:
            return AssociateReject(body[1], body[2], body[3])
        if pdu_type == PduType.ABORT:
            return Abort(body[2], body[3])
        return ReleaseRequest() if pdu_type == PduType.RELEASE_RQ else ReleaseResponse()
    raise ProtocolError(f"unknown PDU type 0x{pdu_type:02X}", AbortReason.UNRECOGNIZED_PDU)


def _head(body: bytes) -> tuple[int, str, str]:
    if len(body) < 68:
        raise ProtocolError("A-ASSOCIATE PDU shorter than its fixed part")
    (version,) = struct.unpack_from(">H", body)
    return version, _text(body[4:20]), _text(body[20:36])


def _decode_request(body: bytes) -> AssociateRequest:
    version, called, calling = _head(body)
    application_context = ""
    user: UserInformation | None = None
    contexts: list[ProposedContext] = []
    for item_type, value in _items(body[68:]):
        if item_type == 0x10:
            application_context = _uid(value)
        elif item_type == 0x20:
            contexts.append(_proposed(value))
            if len(contexts) > MAX_CONTEXTS:
                raise ProtocolError("more than 128 presentation contexts")
        elif item_type == 0x50:
            user = _user(value)
    ids = [context.context_id for context in contexts]
    if len(set(ids)) != len(ids):
        raise ProtocolError("presentation context ID used twice")
    if not contexts:
        raise ProtocolError("no presentation context proposed")
    return AssociateRequest(
        called, calling, tuple(contexts), user or UserInformation(), application_context, version
    )


def _proposed(value: bytes) -> ProposedContext:
    if len(value) < 4:
        raise ProtocolError("presentation context item too short")
    context_id = value[0]
    if context_id % 2 == 0:
        raise ProtocolError("presentation context ID is even")
    abstract = ""
    syntaxes: list[str] = []
    for item_type, part in _items(value[4:]):
        if item_type == 0x30:
            abstract = _uid(part)
        elif item_type == 0x40:
            syntaxes.append(_uid(part))
    if not abstract or not syntaxes:
        raise ProtocolError("presentation context without abstract or transfer syntax")
    return ProposedContext(context_id, abstract, tuple(syntaxes))


def _decode_accept(body: bytes) -> AssociateAccept:
    _, called, calling = _head(body)
    application_context = ""
    user: UserInformation | None = None
    answers: list[ContextAnswer] = []
    for item_type, value in _items(body[68:]):
        if item_type == 0x10:
            application_context = _uid(value)
        elif item_type == 0x21:
            if len(value) < 4:
                raise ProtocolError("presentation context item too short")
            syntax = ""
            for sub_type, part in _items(value[4:]):
                if sub_type == 0x40:
                    syntax = _uid(part)
            answers.append(ContextAnswer(value[0], value[2], syntax))
            if len(answers) > MAX_CONTEXTS:
                raise ProtocolError("more than 128 presentation contexts")
        elif item_type == 0x50:
            user = _user(value)
    return AssociateAccept(
        called, calling, tuple(answers), user or UserInformation(), application_context
    )


def _user(value: bytes) -> UserInformation:
    max_length = 0
    class_uid = version_name = ""
    window: tuple[int, int] | None = None
    roles: list[RoleSelection] = []
    extended: list[tuple[str, bytes]] = []
    common: list[tuple[str, str, tuple[str, ...]]] = []
    identity: UserIdentity | None = None
    identity_response: bytes | None = None
    for item_type, part in _items(value):
        match item_type:
            case 0x51:
                if len(part) != 4:
                    raise ProtocolError("maximum length item is not 4 bytes")
                (max_length,) = struct.unpack(">L", part)
                if 0 < max_length < 7:
                    # A PDV needs six bytes of header before its first byte.
                    raise ProtocolError("maximum length leaves no room for a PDV")
            case 0x52:
                class_uid = _uid(part)
            case 0x53:
                if len(part) != 4:
                    raise ProtocolError("asynchronous operations window item is not 4 bytes")
                invoked, performed = struct.unpack(">HH", part)
                window = (invoked, performed)
            case 0x54:
                uid, at = _take_counted(part, 0)
                if at + 2 > len(part):
                    raise ProtocolError("truncated role selection")
                roles.append(RoleSelection(_uid(uid), bool(part[at]), bool(part[at + 1])))
            case 0x55:
                version_name = _text(part)
            case 0x56:
                uid, at = _take_counted(part, 0)
                extended.append((_uid(uid), part[at:]))
            case 0x57:
                common.append(_common_extended(part))
            case 0x58:
                if len(part) < 2:
                    raise ProtocolError("truncated user identity")
                primary, at = _take_counted(part, 2)
                secondary = _take_counted(part, at)[0] if at < len(part) else b""
                identity = UserIdentity(part[0], bool(part[1]), primary, secondary)
            case 0x59:
                identity_response = _take_counted(part, 0)[0]
            case _:
                pass  # PS3.8 9.3.1: unrecognized items are ignored
    return UserInformation(
        max_length,
        class_uid,
        version_name,
        window,
        tuple(roles),
        tuple(extended),
        tuple(common),
        identity,
        identity_response,
    )


def _common_extended(part: bytes) -> tuple[str, str, tuple[str, ...]]:
    sop_class, at = _take_counted(part, 0)
    service_class, at = _take_counted(part, at)
    related: list[str] = []
    if at < len(part):
        general, _ = _take_counted(part, at)
        inner = 0
        while inner < len(general):
            uid, inner = _take_counted(general, inner)
            related.append(_uid(uid))
    return _uid(sop_class), _uid(service_class), tuple(related)
