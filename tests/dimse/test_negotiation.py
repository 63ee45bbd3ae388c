"""Negotiation: every table row, and pynetdicom's own negotiation as oracle for roles."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pynetdicom.presentation import (
    PresentationContext,
    negotiate_as_acceptor,
    negotiate_as_requestor,
)

from dicomproxy.dimse.negotiation import (
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    IMPLICIT_VR_LITTLE_ENDIAN,
    UNCOMPRESSED,
    Context,
    Supported,
    acceptance,
    accepted_contexts,
    first_of,
    negotiate,
    requestors_order,
)
from dicomproxy.dimse.pdu import (
    AssociateAccept,
    AssociateRequest,
    ContextAnswer,
    ProposedContext,
    RoleSelection,
    UserInformation,
    decode,
    encode,
)

VERIFICATION: Final = "1.2.840.10008.1.1"
CT: Final = "1.2.840.10008.5.1.4.1.1.2"
MR: Final = "1.2.840.10008.5.1.4.1.1.4"
PRIVATE: Final = "1.3.12.2.1107.5.9.1"
SYNTAXES: Final = (
    IMPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_VR_BIG_ENDIAN,
    DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN,
)
IMPLICIT, EXPLICIT, BIG, DEFLATED = SYNTAXES
BOTH: Final = Supported(first_of((EXPLICIT, IMPLICIT)), accept_scp_role=True)
ROLES: Final = [None, *itertools.product((True, False), repeat=2)]
"""Every role proposal or answer: none, or (SCU, SCP)."""


def proposal(
    *contexts: ProposedContext, roles: Sequence[RoleSelection] = (), **user: object
) -> AssociateRequest:
    information = UserInformation(roles=tuple(roles), **user)  # type: ignore[arg-type]
    return AssociateRequest("CALLED", "CALLING", contexts, information)


# ------------------------------------------------------------ acceptor


@pytest.mark.parametrize(
    ("abstract", "syntaxes", "result", "chosen"),
    [
        pytest.param(CT, (IMPLICIT,), 0, IMPLICIT, id="the only one"),
        pytest.param(CT, (IMPLICIT, EXPLICIT), 0, EXPLICIT, id="our order, not theirs"),
        pytest.param(CT, (DEFLATED, BIG, IMPLICIT), 0, IMPLICIT, id="the one we have"),
        pytest.param(CT, (BIG, DEFLATED), 4, BIG, id="no syntax of ours"),
        pytest.param(MR, (IMPLICIT, EXPLICIT), 3, IMPLICIT, id="no service of ours"),
        pytest.param(MR, (BIG,), 3, BIG, id="neither"),
    ],
)
def test_each_context_has_its_result(
    abstract: str, syntaxes: tuple[str, ...], result: int, chosen: str
) -> None:
    """Accepted with one syntax, or refused with the reason of PS3.8 9.3.3.2."""
    done = negotiate(proposal(ProposedContext(5, abstract, syntaxes)), {CT: BOTH}.get)
    assert done.answers == (ContextAnswer(5, result, chosen),)
    expected = {5: Context(5, CT, chosen, as_scu=False, as_scp=True)} if result == 0 else {}
    assert done.contexts == expected
    assert done.roles == ()


def test_answers_come_in_the_order_proposed() -> None:
    """One answer for each proposal, whatever its ID or its result."""
    ids = (7, 1, 255, 3)
    request = proposal(*(ProposedContext(i, CT if i > 3 else PRIVATE, (IMPLICIT,)) for i in ids))
    done = negotiate(request, {CT: BOTH}.get)
    assert [(answer.context_id, answer.result) for answer in done.answers] == [
        (7, 0),
        (1, 3),
        (255, 0),
        (3, 3),
    ]
    assert set(done.contexts) == {7, 255}


def test_one_class_may_have_a_context_for_each_syntax() -> None:
    """As storage requestors propose them, to learn which syntaxes are taken."""
    request = proposal(
        ProposedContext(1, CT, (IMPLICIT,)),
        ProposedContext(3, CT, (DEFLATED,)),
        ProposedContext(5, CT, (EXPLICIT,)),
        roles=[RoleSelection(CT, False, True)],
    )
    done = negotiate(request, {CT: BOTH}.get)
    assert [answer.result for answer in done.answers] == [0, 4, 0]
    assert {i: c.transfer_syntax for i, c in done.contexts.items()} == {1: IMPLICIT, 5: EXPLICIT}
    assert done.roles == (RoleSelection(CT, False, True),)  # once, not per context


def test_role_of_a_class_that_was_not_accepted_is_not_answered() -> None:
    """Nor is one of a class that was not proposed at all."""
    request = proposal(
        ProposedContext(1, MR, (IMPLICIT,)),
        ProposedContext(3, CT, (BIG,)),
        roles=[RoleSelection(uid, True, True) for uid in (MR, CT, PRIVATE)],
    )
    assert negotiate(request, {CT: BOTH}.get).roles == ()


def theirs(
    context_id: int, abstract: str, syntaxes: Sequence[str], roles: tuple[bool, bool] | None = None
) -> PresentationContext:
    context = PresentationContext()
    context.context_id = context_id
    context.abstract_syntax = abstract
    context.transfer_syntax = list(syntaxes)
    if roles is not None:
        context.scu_role, context.scp_role = roles
    return context


@pytest.mark.parametrize("ours", ROLES[1:], ids=lambda roles: f"allowed={roles}")
@pytest.mark.parametrize("asked", ROLES, ids=lambda roles: f"asked={roles}")
def test_acceptor_roles_are_those_of_pynetdicom(
    asked: tuple[bool, bool] | None, ours: tuple[bool, bool]
) -> None:
    """Result, our roles and the role answered, for every proposal and every permission."""
    roles = [] if asked is None else [RoleSelection(CT, *asked)]
    supported = Supported(
        first_of((EXPLICIT, IMPLICIT)), accept_scu_role=ours[0], accept_scp_role=ours[1]
    )
    done = negotiate(
        proposal(ProposedContext(1, CT, (IMPLICIT,)), roles=roles), {CT: supported}.get
    )

    (expected,), their_roles = negotiate_as_acceptor(
        [theirs(1, CT, [IMPLICIT])],
        [theirs(0x01, CT, [EXPLICIT, IMPLICIT], roles=ours)],
        None if asked is None else {CT: asked},  # type: ignore[dict-item]
    )
    assert [answer.result for answer in done.answers] == [expected.result]
    if expected.result == 0:
        assert done.contexts == {
            1: Context(1, CT, IMPLICIT, as_scu=expected.as_scu, as_scp=expected.as_scp)
        }
        assert done.roles == tuple(
            RoleSelection(str(role.sop_class_uid), bool(role.scu_role), bool(role.scp_role))
            for role in their_roles
        )
    else:
        assert done.contexts == {}


abstract_syntaxes = st.sampled_from([CT, MR, PRIVATE, VERIFICATION])
syntax_lists = st.lists(st.sampled_from(SYNTAXES), min_size=1, unique=True)
proposals = st.lists(st.tuples(abstract_syntaxes, syntax_lists), min_size=1, max_size=8)


@given(
    proposed=proposals,
    supported=st.dictionaries(abstract_syntaxes, syntax_lists, min_size=1),
)
def test_acceptor_agrees_with_pynetdicom(
    proposed: list[tuple[str, list[str]]], supported: dict[str, list[str]]
) -> None:
    """Any proposals, anything supported: the same results and the same syntaxes."""
    numbered = [(2 * n + 1, *row) for n, row in enumerate(proposed)]
    request = proposal(
        *(ProposedContext(i, abstract, tuple(syntaxes)) for i, abstract, syntaxes in numbered)
    )
    services = {uid: Supported(first_of(syntaxes)) for uid, syntaxes in supported.items()}
    done = negotiate(request, services.get)
    expected, _ = negotiate_as_acceptor(
        [theirs(*row) for row in numbered],
        [theirs(1, uid, syntaxes) for uid, syntaxes in supported.items()],
    )
    assert [(a.context_id, a.result, a.transfer_syntax) for a in done.answers] == [
        (c.context_id, c.result, c.transfer_syntax[0]) for c in expected
    ]


# ------------------------------------------------------------ choosers


@pytest.mark.parametrize(
    ("offered", "ours", "theirs_first"),
    [
        ((IMPLICIT, EXPLICIT), EXPLICIT, IMPLICIT),
        ((EXPLICIT, IMPLICIT), EXPLICIT, EXPLICIT),
        ((BIG, IMPLICIT), IMPLICIT, IMPLICIT),
        ((BIG, DEFLATED), None, None),
        ((), None, None),
    ],
)
def test_choosers_follow_our_order_or_the_requestors(
    offered: tuple[str, ...], ours: str | None, theirs_first: str | None
) -> None:
    """*first_of* puts our preference first, *requestors_order* the requestor's."""
    assert first_of(UNCOMPRESSED)(offered) == ours
    assert requestors_order(UNCOMPRESSED)(offered) == theirs_first


def test_chooser_may_be_made_from_an_iterator() -> None:
    """What is supported is read once, and known at every later choice."""
    choose = requestors_order(iter(UNCOMPRESSED))
    assert [choose((IMPLICIT,)), choose((IMPLICIT,))] == [IMPLICIT, IMPLICIT]


# ------------------------------------------------------------ acceptance


@pytest.mark.parametrize(
    ("offered", "answered"), [(None, None), ((0, 0), (1, 1)), ((1, 1), (1, 1)), ((8, 2), (1, 1))]
)
def test_window_is_answered_one_to_one_and_only_if_offered(
    offered: tuple[int, int] | None, answered: tuple[int, int] | None
) -> None:
    """We do one operation at a time; an item that was not offered is not answered."""
    request = proposal(ProposedContext(1, CT, (IMPLICIT,)), async_window=offered)
    accept = acceptance(request, negotiate(request, {CT: BOTH}.get), max_length=1000)
    assert accept.user.async_window == answered


def test_acceptance_says_who_we_are_and_what_was_agreed() -> None:
    """Titles echoed, our implementation, our maximum, roles and extended negotiation."""
    extended = ((CT, b"\1\0"),)
    request = proposal(
        ProposedContext(1, CT, (IMPLICIT,)),
        roles=[RoleSelection(CT, True, True)],
        max_length=5000,
        extended=((MR, b"\1"),),
    )
    done = negotiate(request, {CT: BOTH}.get)
    accept = acceptance(request, done, max_length=131072, extended=extended)
    assert accept == AssociateAccept(
        "CALLED",
        "CALLING",
        (ContextAnswer(1, 0, IMPLICIT),),
        UserInformation(
            max_length=131072,
            implementation_class_uid=IMPLEMENTATION_CLASS_UID,
            implementation_version_name=IMPLEMENTATION_VERSION_NAME,
            roles=(RoleSelection(CT, True, True),),
            extended=extended,
        ),
    )
    assert len(IMPLEMENTATION_CLASS_UID) <= 64
    assert len(IMPLEMENTATION_VERSION_NAME) <= 16


def test_acceptance_of_a_request_without_titles_can_be_sent() -> None:
    """A peer that left its title blank is answered, not met with an error of ours."""
    request = AssociateRequest("", "", (ProposedContext(1, CT, (IMPLICIT,)),))
    accept = acceptance(request, negotiate(request, {CT: BOTH}.get), max_length=0)
    data = encode(accept)
    assert decode(data[0], data[6:]).contexts == accept.contexts  # type: ignore[union-attr]


# ------------------------------------------------------------ requestor


def accepted(*answers: ContextAnswer, roles: Sequence[RoleSelection] = ()) -> AssociateAccept:
    return AssociateAccept("CALLED", "CALLING", answers, UserInformation(roles=tuple(roles)))


@pytest.mark.parametrize(
    ("answer", "usable"),
    [
        pytest.param(ContextAnswer(1, 0, EXPLICIT), True, id="accepted"),
        pytest.param(ContextAnswer(1, 1, EXPLICIT), False, id="user rejection"),
        pytest.param(ContextAnswer(1, 2, EXPLICIT), False, id="no reason"),
        pytest.param(ContextAnswer(1, 3, EXPLICIT), False, id="abstract syntax"),
        pytest.param(ContextAnswer(1, 4, EXPLICIT), False, id="transfer syntaxes"),
        pytest.param(ContextAnswer(1, 9, EXPLICIT), False, id="a result that does not exist"),
        pytest.param(ContextAnswer(3, 0, EXPLICIT), False, id="a context that was not proposed"),
        pytest.param(ContextAnswer(1, 0, BIG), False, id="a syntax that was not proposed"),
        pytest.param(ContextAnswer(1, 0, ""), False, id="no syntax"),
    ],
)
def test_only_what_was_proposed_and_accepted_is_used(answer: ContextAnswer, usable: bool) -> None:
    """An acceptor cannot make us send what we did not offer."""
    request = proposal(ProposedContext(1, CT, (IMPLICIT, EXPLICIT)))
    expected = {1: Context(1, CT, EXPLICIT, as_scu=True, as_scp=False)} if usable else {}
    assert accepted_contexts(request, accepted(answer)) == expected


def test_context_left_unanswered_is_not_accepted() -> None:
    """Silence is no consent."""
    request = proposal(*(ProposedContext(i, CT, (IMPLICIT,)) for i in (1, 3)))
    assert set(accepted_contexts(request, accepted(ContextAnswer(3, 0, IMPLICIT)))) == {3}


@pytest.mark.parametrize("answered", ROLES, ids=lambda roles: f"answered={roles}")
@pytest.mark.parametrize("asked", ROLES, ids=lambda roles: f"asked={roles}")
def test_requestor_roles_are_those_of_pynetdicom(
    asked: tuple[bool, bool] | None, answered: tuple[bool, bool] | None
) -> None:
    """Our roles for every proposal and every answer, refused roles and silence included."""
    request = proposal(
        ProposedContext(1, CT, (IMPLICIT,)),
        roles=[] if asked is None else [RoleSelection(CT, *asked)],
    )
    accept = accepted(
        ContextAnswer(1, 0, IMPLICIT),
        roles=[] if answered is None else [RoleSelection(CT, *answered)],
    )
    result = PresentationContext()
    result.context_id, result.result = 1, 0
    result.transfer_syntax = [IMPLICIT]
    (expected,) = negotiate_as_requestor(
        [theirs(1, CT, [IMPLICIT], roles=asked)],
        [result],
        None if answered is None else {CT: answered},  # type: ignore[dict-item]
    )
    contexts = accepted_contexts(request, accept)
    if expected.as_scu or expected.as_scp:
        assert contexts == {
            1: Context(1, CT, IMPLICIT, bool(expected.as_scu), bool(expected.as_scp))
        }
    else:
        assert contexts == {}


@given(
    asked=st.sampled_from(ROLES),
    scu=st.booleans(),
    scp=st.booleans(),
    proposed=proposals,
)
def test_both_ends_hold_opposite_roles_in_the_same_contexts(
    asked: tuple[bool, bool] | None, scu: bool, scp: bool, proposed: list[tuple[str, list[str]]]
) -> None:
    """What the acceptor made of a request is what the requestor makes of the answer, as bytes."""
    classes = {abstract for abstract, _ in proposed}
    request = proposal(
        *(
            ProposedContext(2 * n + 1, abstract, tuple(syntaxes))
            for n, (abstract, syntaxes) in enumerate(proposed)
        ),
        roles=[] if asked is None else [RoleSelection(uid, *asked) for uid in sorted(classes)],
    )
    supported = Supported(first_of(UNCOMPRESSED), accept_scu_role=scu, accept_scp_role=scp)
    services = dict.fromkeys([CT, MR, VERIFICATION], supported)
    done = negotiate(request, services.get)
    data = encode(acceptance(request, done, max_length=0))
    accept = decode(data[0], data[6:])
    assert isinstance(accept, AssociateAccept)
    mirrored = {
        i: Context(i, c.abstract_syntax, c.transfer_syntax, as_scu=c.as_scp, as_scp=c.as_scu)
        for i, c in done.contexts.items()
    }
    assert accepted_contexts(request, accept) == mirrored
