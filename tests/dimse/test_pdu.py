"""PDUs as bytes and as values: pynetdicom as oracle, and what no peer's bytes may do to us."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any, Final

import pynetdicom.pdu as theirs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pynetdicom import pdu_primitives as primitives
from pynetdicom.presentation import PresentationContext

from dicomproxy.dimse import pdu
from dicomproxy.dimse.pdu import (
    AbortReason,
    AssociateAccept,
    AssociateReject,
    AssociateRequest,
    ContextAnswer,
    ProposedContext,
    ProtocolError,
    RoleSelection,
    UserIdentity,
    UserInformation,
    decode,
    encode,
)
from tests import sentinel

VERIFICATION: Final = "1.2.840.10008.1.1"
CT: Final = "1.2.840.10008.5.1.4.1.1.2"
STUDY_FIND: Final = "1.2.840.10008.5.1.4.1.2.2.1"
STORAGE: Final = "1.2.840.10008.4.2"
GENERAL_SR: Final = "1.2.840.10008.5.1.4.1.1.88.22"
IMPLICIT: Final = "1.2.840.10008.1.2"
EXPLICIT: Final = "1.2.840.10008.1.2.1"

USER: Final = UserInformation(
    max_length=262144,
    implementation_class_uid="1.2.3.4",
    implementation_version_name="TEST_01",
    async_window=(3, 5),
    roles=(RoleSelection(CT, True, True), RoleSelection(STUDY_FIND, False, True)),
    extended=((STUDY_FIND, b"\1\0\1"), (CT, b"\2\0\3\0\1\0")),
    common_extended=((GENERAL_SR, STORAGE, ("1.2.3", "1.2.3.55")), (CT, STORAGE, ())),
)
REQUEST: Final = AssociateRequest(
    "CALLED",
    "CALLING",
    (
        ProposedContext(1, VERIFICATION, (IMPLICIT,)),
        ProposedContext(3, CT, (EXPLICIT, IMPLICIT)),
        ProposedContext(255, STUDY_FIND, (IMPLICIT,)),
    ),
    replace(USER, user_identity=UserIdentity(2, True, b"reader", b"passcode")),
)
ACCEPT: Final = AssociateAccept(
    "CALLED",
    "CALLING",
    (
        ContextAnswer(1, 0, IMPLICIT),
        ContextAnswer(3, 4, EXPLICIT),
        ContextAnswer(255, 3, IMPLICIT),
    ),
    replace(USER, common_extended=(), user_identity_response=b"ticket"),
)

SMALL: Final[list[tuple[Any, bytes]]] = [
    (AssociateReject(2, 3, 2), b"\x03\0\0\0\0\x04\0\x02\x03\x02"),
    (pdu.ReleaseRequest(), b"\x05\0\0\0\0\x04\0\0\0\0"),
    (pdu.ReleaseResponse(), b"\x06\0\0\0\0\x04\0\0\0\0"),
    (pdu.Abort(2, 6), b"\x07\0\0\0\0\x04\0\0\x02\x06"),
]


def decoded(data: bytes) -> pdu.Pdu:
    """Decode one whole PDU, header included."""
    assert int.from_bytes(data[2:6], "big") == len(data) - 6
    return decode(data[0], data[6:])


def item(item_type: int, body: bytes) -> bytes:
    return bytes((item_type, 0)) + len(body).to_bytes(2, "big") + body


# ------------------------------------------------------------ pynetdicom as oracle


def their_user_items(user: UserInformation) -> list[Any]:
    length = primitives.MaximumLengthNotification()
    length.maximum_length_received = user.max_length
    class_uid = primitives.ImplementationClassUIDNotification()
    class_uid.implementation_class_uid = user.implementation_class_uid
    version = primitives.ImplementationVersionNameNotification()
    version.implementation_version_name = user.implementation_version_name
    items: list[Any] = [length, class_uid, version]
    if user.async_window:
        window = primitives.AsynchronousOperationsWindowNegotiation()
        window.maximum_number_operations_invoked = user.async_window[0]
        window.maximum_number_operations_performed = user.async_window[1]
        items.append(window)
    for role in user.roles:
        selection = primitives.SCP_SCU_RoleSelectionNegotiation()
        selection.sop_class_uid = role.sop_class_uid
        selection.scu_role, selection.scp_role = role.scu, role.scp
        items.append(selection)
    for uid, information in user.extended:
        extended = primitives.SOPClassExtendedNegotiation()
        extended.sop_class_uid = uid
        extended.service_class_application_information = information
        items.append(extended)
    for uid, service, related in user.common_extended:
        common = primitives.SOPClassCommonExtendedNegotiation()
        common.sop_class_uid, common.service_class_uid = uid, service
        common.related_general_sop_class_identification = list(related)
        items.append(common)
    if user.user_identity:
        identity = primitives.UserIdentityNegotiation()
        identity.user_identity_type = user.user_identity.identity_type
        identity.positive_response_requested = user.user_identity.response_requested
        identity.primary_field = user.user_identity.primary
        identity.secondary_field = user.user_identity.secondary
        items.append(identity)
    if user.user_identity_response is not None:
        answer = primitives.UserIdentityNegotiation()
        answer.server_response = user.user_identity_response
        items.append(answer)
    return items


def their_associate(ours: AssociateRequest | AssociateAccept) -> bytes:
    """Return what pynetdicom encodes for the same association PDU."""
    primitive = primitives.A_ASSOCIATE()
    primitive.application_context_name = ours.application_context
    primitive.called_ae_title = ours.called_ae_title
    primitive.calling_ae_title = ours.calling_ae_title
    primitive.user_information = their_user_items(ours.user)
    contexts = []
    for one in ours.contexts:
        context = PresentationContext()
        context.context_id = one.context_id
        if isinstance(one, ProposedContext):
            context.abstract_syntax = one.abstract_syntax
            context.transfer_syntax = list(one.transfer_syntaxes)
        else:
            context.result = one.result
            context.transfer_syntax = [one.transfer_syntax]
        contexts.append(context)
    if isinstance(ours, AssociateRequest):
        primitive.presentation_context_definition_list = contexts
        request = theirs.A_ASSOCIATE_RQ()
        request.from_primitive(primitive)
        return bytes(request.encode())
    primitive.presentation_context_definition_results_list = contexts
    primitive.result = 0
    accept = theirs.A_ASSOCIATE_AC()
    accept.from_primitive(primitive)
    return bytes(accept.encode())


IDENTITIES: Final = [
    pytest.param(UserIdentity(1, False, b"reader"), id="user name"),
    pytest.param(UserIdentity(2, True, b"reader", b"passcode"), id="name and passcode"),
    pytest.param(UserIdentity(3, True, b"\0kerberos\xff"), id="kerberos"),
    pytest.param(UserIdentity(4, False, b"<saml/>" * 100), id="saml"),
    pytest.param(None, id="none"),
]


@pytest.mark.parametrize("identity", IDENTITIES)
def test_request_encoded_by_pynetdicom_reads_the_same(identity: UserIdentity | None) -> None:
    """Every user item of a request means to us what it means to pynetdicom."""
    request = replace(REQUEST, user=replace(USER, user_identity=identity))
    assert decoded(their_associate(request)) == request


def test_acceptance_encoded_by_pynetdicom_reads_the_same() -> None:
    """Every user item of an acceptance means to us what it means to pynetdicom."""
    assert decoded(their_associate(ACCEPT)) == ACCEPT


@pytest.mark.parametrize("identity", IDENTITIES)
def test_request_of_ours_is_read_by_pynetdicom(identity: UserIdentity | None) -> None:
    """pynetdicom reads our request and, encoding what it read, writes the same bytes."""
    data = encode(replace(REQUEST, user=replace(USER, user_identity=identity)))
    read = theirs.A_ASSOCIATE_RQ()
    read.decode(data)
    assert read.encode() == data
    assert (read.called_ae_title, read.calling_ae_title) == ("CALLED", "CALLING")
    primitive = read.to_primitive()
    assert [
        ProposedContext(one.context_id, str(one.abstract_syntax), tuple(one.transfer_syntax))
        for one in primitive.presentation_context_definition_list
    ] == list(REQUEST.contexts)
    assert primitive.maximum_length_received == USER.max_length


def test_acceptance_of_ours_is_read_by_pynetdicom() -> None:
    """pynetdicom reads our acceptance and, encoding what it read, writes the same bytes."""
    data = encode(ACCEPT)
    read = theirs.A_ASSOCIATE_AC()
    read.decode(data)
    assert read.encode() == data
    assert [
        ContextAnswer(one.context_id, one.result, str(one.transfer_syntax[0]))
        for one in read.to_primitive().presentation_context_definition_results_list
    ] == list(ACCEPT.contexts)


@pytest.mark.parametrize(
    ("value", "data", "their_type"),
    [
        (*row, their_type)
        for row, their_type in zip(
            SMALL,
            (theirs.A_ASSOCIATE_RJ, theirs.A_RELEASE_RQ, theirs.A_RELEASE_RP, theirs.A_ABORT_RQ),
            strict=True,
        )
    ],
    ids=[type(row[0]).__name__ for row in SMALL],
)
def test_small_pdus_are_the_standards_bytes(value: pdu.Pdu, data: bytes, their_type: Any) -> None:
    """The ten-byte PDUs are as PS3.8 draws them, both ways, and to pynetdicom too."""
    assert encode(value) == data
    assert decoded(data) == value
    read = their_type()
    read.decode(data)
    assert read.encode() == data


# ------------------------------------------------------------ round trips

titles = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=16)
uids = st.from_regex(r"[0-9]{1,5}(\.[0-9]{1,8}){1,6}", fullmatch=True)
blobs = st.binary(max_size=60)
user_informations = st.builds(
    UserInformation,
    max_length=st.one_of(st.just(0), st.integers(7, 2**32 - 1)),
    implementation_class_uid=st.one_of(st.just(""), uids),
    implementation_version_name=st.one_of(st.just(""), titles),
    async_window=st.none() | st.tuples(st.integers(0, 65535), st.integers(0, 65535)),
    roles=st.lists(st.builds(RoleSelection, uids, st.booleans(), st.booleans())).map(tuple),
    extended=st.lists(st.tuples(uids, blobs), max_size=4).map(tuple),
    common_extended=st.lists(
        st.tuples(uids, uids, st.lists(uids, max_size=3).map(tuple)), max_size=3
    ).map(tuple),
    user_identity=st.none()
    | st.builds(UserIdentity, st.integers(0, 255), st.booleans(), blobs, blobs),
    user_identity_response=st.none() | blobs,
)
context_ids = st.lists(st.integers(0, 127).map(lambda n: 2 * n + 1), min_size=1, unique=True)
requests = context_ids.flatmap(
    lambda ids: st.builds(
        AssociateRequest,
        titles,
        titles,
        st.tuples(
            *(
                st.builds(
                    ProposedContext,
                    st.just(context_id),
                    uids,
                    st.lists(uids, min_size=1, max_size=4).map(tuple),
                )
                for context_id in ids
            )
        ),
        user_informations,
        uids,
        st.integers(0, 65535),
    )
)
accepts = st.builds(
    AssociateAccept,
    titles,
    titles,
    st.lists(
        st.builds(ContextAnswer, st.integers(0, 255), st.integers(0, 255), uids), max_size=9
    ).map(tuple),
    user_informations,
    uids,
)
smalls = st.one_of(
    st.builds(AssociateReject, *(st.integers(0, 255),) * 3),
    st.builds(pdu.Abort, *(st.integers(0, 255),) * 2),
    st.sampled_from([pdu.ReleaseRequest(), pdu.ReleaseResponse()]),
)
pdus = st.one_of(requests, accepts, smalls)


@given(value=pdus)
def test_what_is_encoded_is_what_is_decoded(value: pdu.Pdu) -> None:
    """Any PDU that we can express survives its own bytes."""
    assert decoded(encode(value)) == value


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(replace(REQUEST, called_ae_title=""), id="no called AE title"),
        pytest.param(replace(REQUEST, calling_ae_title="A" * 17), id="17 characters"),
        pytest.param(
            replace(REQUEST, user=UserInformation(extended=((CT, bytes(65536)),))), id="long item"
        ),
    ],
)
def test_what_does_not_fit_its_field_is_our_mistake(value: pdu.Pdu) -> None:
    """A value that its field cannot hold is refused, never truncated."""
    with pytest.raises(ValueError):
        encode(value)


# ------------------------------------------------------------ malformed PDUs

HEAD: Final = b"\0\1\0\0" + b"CALLED".ljust(16) + b"CALLING".ljust(16) + bytes(32)
APPLICATION: Final = item(0x10, b"1.2.840.10008.3.1.1.1")
PROPOSED: Final = item(0x20, b"\1\0\0\0" + item(0x30, b"1.2") + item(0x40, b"1.2.840.10008.1.2"))
RQ, AC = 0x01, 0x02
INVALID, UNRECOGNIZED = AbortReason.INVALID_PARAMETER, AbortReason.UNRECOGNIZED_PDU


def with_user(user: bytes) -> bytes:
    return HEAD + APPLICATION + PROPOSED + item(0x50, user)


MALFORMED: Final = [
    ("no such type", 0x08, bytes(4), "unknown PDU type 0x08", UNRECOGNIZED),
    ("type zero", 0x00, bytes(4), "unknown PDU type 0x00", UNRECOGNIZED),
    ("reject of three bytes", 0x03, bytes(3), "shorter than its fixed part", INVALID),
    ("release request, empty", 0x05, b"", "shorter than its fixed part", INVALID),
    ("release response, empty", 0x06, b"", "shorter than its fixed part", INVALID),
    ("abort of one byte", 0x07, b"\0", "shorter than its fixed part", INVALID),
    ("request, empty", RQ, b"", "shorter than its fixed part", INVALID),
    ("request of 67 bytes", RQ, HEAD[:67], "shorter than its fixed part", INVALID),
    ("acceptance of 67 bytes", AC, HEAD[:67], "shorter than its fixed part", INVALID),
    ("request of the fixed part", RQ, HEAD, "no presentation context", INVALID),
    ("half an item header", RQ, HEAD + b"\x10\0\0", "truncated item header", INVALID),
    ("item beyond the PDU", RQ, HEAD + b"\x10\0\0\x05abcd", "longer than its PDU", INVALID),
    ("unknown item beyond it", RQ, HEAD + b"\x99\0\xff\xff", "longer than its PDU", INVALID),
    ("no context", RQ, HEAD + APPLICATION + item(0x50, b""), "no presentation context", INVALID),
    ("context of three bytes", RQ, HEAD + item(0x20, b"\1\0\0"), "too short", INVALID),
    ("answer of three bytes", AC, HEAD + item(0x21, b"\1\0\0"), "too short", INVALID),
    ("even context ID", RQ, HEAD + PROPOSED.replace(b"\1\0\0\0", b"\2\0\0\0"), "even", INVALID),
    ("context ID zero", RQ, HEAD + PROPOSED.replace(b"\1\0\0\0", bytes(4)), "even", INVALID),
    ("context ID twice", RQ, HEAD + PROPOSED * 2, "used twice", INVALID),
    (
        "no abstract syntax",
        RQ,
        HEAD + item(0x20, b"\1\0\0\0" + item(0x40, b"1.2")),
        "without abstract",
        INVALID,
    ),
    (
        "no transfer syntax",
        RQ,
        HEAD + item(0x20, b"\1\0\0\0" + item(0x30, b"1.2")),
        "without abstract or transfer",
        INVALID,
    ),
    (
        "sub-item beyond the context",
        RQ,
        HEAD + item(0x20, b"\1\0\0\0" + b"\x30\0\0\x09" + b"1.2"),
        "longer than its PDU",
        INVALID,
    ),
    ("UID not ASCII", RQ, HEAD + item(0x10, b"1.2.\xc3"), "UID is not ASCII", INVALID),
    ("maximum length of 3 bytes", RQ, with_user(item(0x51, bytes(3))), "not 4 bytes", INVALID),
    (
        "maximum length of 6",
        RQ,
        with_user(item(0x51, b"\0\0\0\6")),
        "no room for a PDV",
        INVALID,
    ),
    ("window of 2 bytes", RQ, with_user(item(0x53, b"\0\1")), "window item is not 4", INVALID),
    ("role, empty", RQ, with_user(item(0x54, b"")), "truncated length", INVALID),
    ("role without roles", RQ, with_user(item(0x54, b"\0\x031.2")), "truncated role", INVALID),
    ("role with one role", RQ, with_user(item(0x54, b"\0\x031.2\1")), "truncated role", INVALID),
    ("role UID too long", RQ, with_user(item(0x54, b"\0\x091.2\1\1")), "longer than", INVALID),
    ("extended UID one over", RQ, with_user(item(0x56, b"\0\x041.2")), "longer than", INVALID),
    ("extended UID too long", RQ, with_user(item(0x56, b"\xff\xff1.2")), "longer than", INVALID),
    ("common, no service", RQ, with_user(item(0x57, b"\0\x031.2")), "truncated length", INVALID),
    (
        "common, related beyond its list",
        RQ,
        with_user(item(0x57, b"\0\x011\0\x012\0\x03\0\x091")),
        "longer than its item",
        INVALID,
    ),
    ("identity, empty", RQ, with_user(item(0x58, b"")), "truncated user identity", INVALID),
    ("identity, no primary", RQ, with_user(item(0x58, b"\2\1")), "truncated length", INVALID),
    ("identity, long secondary", RQ, with_user(item(0x58, b"\2\1\0\0\0\5a")), "longer", INVALID),
    ("identity answer too long", AC, with_user(item(0x59, b"\0\5a")), "longer than", INVALID),
]


@pytest.mark.parametrize(
    ("pdu_type", "body", "words", "reason"),
    [row[1:] for row in MALFORMED],
    ids=[row[0] for row in MALFORMED],
)
def test_malformed_pdu_is_a_protocol_error(
    pdu_type: int, body: bytes, words: str, reason: AbortReason
) -> None:
    """Each fault is named, and carries the reason that A-ABORT will give."""
    with pytest.raises(ProtocolError, match=words) as raised:
        decode(pdu_type, body)
    assert raised.value.reason is reason


def contexts(count: int) -> bytes:
    """Return *count* proposals with what context IDs there are; beyond 128 they repeat."""
    return b"".join(
        item(0x20, bytes(((2 * n + 1) % 256, 0, 0, 0)) + item(0x30, b"1.2") + item(0x40, b"1"))
        for n in range(count)
    )


def test_128_contexts_are_accepted_and_one_more_is_refused() -> None:
    """The standard has 128 context IDs; a request cannot make us hold more."""
    request = decode(RQ, HEAD + contexts(128))
    assert isinstance(request, AssociateRequest)
    assert len(request.contexts) == pdu.MAX_CONTEXTS == 128
    with pytest.raises(ProtocolError, match="more than 128"):
        decode(RQ, HEAD + contexts(129))
    with pytest.raises(ProtocolError, match="more than 128"):
        decode(AC, HEAD + item(0x21, b"\1\0\0\0" + item(0x40, b"1")) * 129)


def test_unknown_items_are_skipped_at_every_depth() -> None:
    """Items that a later standard may add change nothing (PS3.8 9.3.1)."""
    new = item(0x7E, b"whatever this is")
    plain = HEAD + APPLICATION + PROPOSED + item(0x50, item(0x51, b"\0\0\x40\0"))
    strange = (
        HEAD
        + new
        + APPLICATION
        + item(0x20, PROPOSED[4:] + new)
        + new
        + item(0x50, new + item(0x51, b"\0\0\x40\0") + new)
        + item(0x00, b"")
    )
    assert decode(RQ, strange) == decode(RQ, plain)


def test_padding_that_peers_add_is_not_part_of_a_value() -> None:
    """NUL or space behind a UID or a title, and bytes in reserved fields, mean nothing."""
    padded = bytearray(
        HEAD.replace(b"CALLED    ", b"CALLED\0\0\0\0")
        + item(0x10, b"1.2.840.10008.3.1.1.1\0")
        + item(0x20, b"\1\xff\xff\xff" + item(0x30, b"1.2\0") + item(0x40, b"1.2.840.10008.1.2 "))
    )
    padded[2:4] = b"\xff\xff"
    padded[36:68] = bytes(range(32))
    assert decode(RQ, bytes(padded)) == decode(RQ, HEAD + APPLICATION + PROPOSED)


def test_missing_optional_parts_have_the_standards_defaults() -> None:
    """Without user information: unlimited length, no window, default roles."""
    request = decode(RQ, HEAD + APPLICATION + PROPOSED)
    assert isinstance(request, AssociateRequest)
    assert request.user == UserInformation()
    assert decode(AC, HEAD) == AssociateAccept("CALLED", "CALLING", (), UserInformation(), "")


def test_repr_and_errors_hide_credentials() -> None:
    """Neither a printed request nor an error text gives a passcode or a ticket away."""
    identity = UserIdentity(2, True, sentinel.PATIENT_NAME.encode(), b"open sesame")
    user = UserInformation(user_identity=identity, user_identity_response=b"open sesame")
    shown = repr(replace(REQUEST, user=user)) + repr(replace(ACCEPT, user=user))
    assert "UserIdentity(identity_type=2" in shown
    assert "sesame" not in shown
    assert sentinel.sentinels_in(shown) == []
    broken = item(0x58, b"\2\1\0\x0bopen sesame\0\xffopen sesame")
    with pytest.raises(ProtocolError) as raised:
        decode(RQ, with_user(broken))
    assert "sesame" not in str(raised.value)


@pytest.mark.parametrize(
    ("reject", "transient", "words"),
    [
        (pdu.REJECT_CALLING, False, "permanent: calling AE title not recognized"),
        (pdu.REJECT_CALLED, False, "permanent: called AE title not recognized"),
        (pdu.REJECT_NO_REASON, False, "permanent: no reason given"),
        (
            pdu.REJECT_APPLICATION_CONTEXT,
            False,
            "permanent: application context name not supported",
        ),
        (pdu.REJECT_PROTOCOL_VERSION, False, "permanent: protocol version not supported"),
        (pdu.REJECT_CONGESTION, True, "transient: temporary congestion"),
        (pdu.REJECT_LIMIT, True, "transient: local limit exceeded"),
        (AssociateReject(2, 9, 9), True, "transient: reason not known to the standard"),
    ],
)
def test_rejection_says_its_reason_in_words(
    reject: AssociateReject, transient: bool, words: str
) -> None:
    """Result, source and reason read as PS3.8 Table 9-21 has them."""
    assert (reject.transient, reject.in_words()) == (transient, words)


# ------------------------------------------------------------ any bytes whatever


def read(pdu_type: int, body: bytes) -> pdu.Pdu | None:
    try:
        return decode(pdu_type, body)
    except ProtocolError:
        return None


@given(pdu_type=st.integers(0, 255), body=st.binary(max_size=400))
@example(pdu_type=RQ, body=HEAD)
def test_any_bytes_are_a_pdu_or_a_protocol_error(pdu_type: int, body: bytes) -> None:
    """Noise never raises anything else."""
    read(pdu_type, body)


@given(pdu_type=st.sampled_from([RQ, AC]), items=st.binary(max_size=400))
def test_any_items_are_a_pdu_or_a_protocol_error(pdu_type: int, items: bytes) -> None:
    """Neither do noisy items behind a sound head."""
    read(pdu_type, HEAD + items)


@given(
    value=pdus,
    mutations=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 5000),
)
def test_mutated_pdu_is_a_pdu_or_a_protocol_error(
    value: pdu.Pdu, mutations: list[tuple[int, int]], cut: int
) -> None:
    """Bytes changed and the end cut off; and what is still read can be printed and compared."""
    data = bytearray(encode(value))
    for at, byte in mutations:
        data[6 + at % (len(data) - 6)] = byte
    result = read(data[0], bytes(data[6 : len(data) - cut % len(data)]))
    assert repr(result)


@pytest.mark.parametrize(
    "filler",
    [
        pytest.param(b"\x10\0\0\0", id="empty items"),
        pytest.param(item(0x50, item(0x54, b"\0\x011\1\1")), id="user items"),
        pytest.param(item(0x20, b"\1\0\0\0" + item(0x40, b"") * 8000), id="empty syntaxes"),
    ],
)
def test_largest_request_takes_bounded_memory(filler: bytes) -> None:
    """64 KiB of the smallest things there are cost some hundred bytes for each, no more."""
    body = HEAD + filler * ((pdu.MAX_ASSOCIATE_BYTES - len(HEAD)) // len(filler))
    tracemalloc.start()
    try:
        read(RQ, body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 1024 * 1024


def test_many_small_user_items_are_held_once() -> None:
    """One user information item full of roles: the worst there is, and still small."""
    roles = item(0x54, b"\0\x011\1\1") * 7000
    tracemalloc.start()
    try:
        request = read(RQ, with_user(roles[: 60_000 // 9 * 9]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(request, AssociateRequest)
    assert len(request.user.roles) == 60_000 // 9
    assert peak < 4 * 1024 * 1024
