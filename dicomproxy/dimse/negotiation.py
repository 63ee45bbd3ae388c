"""Presentation context negotiation: lists in, lists out (PS3.8 9.3.2-9.3.3, PS3.7 D.3.3).

Pure: no socket, no clock. The role table is pynetdicom's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from pynetdicom.presentation import SCP_SCU_ROLES

from dicomproxy.dimse.pdu import (
    AssociateAccept,
    AssociateRequest,
    ContextAnswer,
    ContextResult,
    ProposedContext,
    RoleSelection,
    UserInformation,
)

IMPLEMENTATION_CLASS_UID: Final = "2.25.252160217301868846853204863927168093417"
IMPLEMENTATION_VERSION_NAME: Final = "DICOMPROXY_01"

IMPLICIT_VR_LITTLE_ENDIAN: Final = "1.2.840.10008.1.2"
EXPLICIT_VR_LITTLE_ENDIAN: Final = "1.2.840.10008.1.2.1"
EXPLICIT_VR_BIG_ENDIAN: Final = "1.2.840.10008.1.2.2"
DEFLATED_EXPLICIT_VR_LITTLE_ENDIAN: Final = "1.2.840.10008.1.2.1.99"
UNCOMPRESSED: Final = (EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN)


@dataclass(frozen=True, slots=True)
class Context:
    """An accepted presentation context, with the roles that *we* have in it."""

    context_id: int
    abstract_syntax: str
    transfer_syntax: str
    as_scu: bool
    as_scp: bool


@dataclass(frozen=True, slots=True)
class Supported:
    """What an acceptor supports of one abstract syntax.

    ``choose`` picks one of the proposed transfer syntaxes, ``None`` for none.
    ``accept_scp_role`` says whether a requestor may be SCP of it (C-GET, and
    the reverse role of Storage Commitment).
    """

    choose: Callable[[Sequence[str]], str | None]
    accept_scp_role: bool = False
    accept_scu_role: bool = True


def first_of(preferred: Sequence[str]) -> Callable[[Sequence[str]], str | None]:
    """Return a chooser that takes the first of *preferred* that is proposed."""

    def choose(proposed: Sequence[str]) -> str | None:
        return next((syntax for syntax in preferred if syntax in proposed), None)

    return choose


def requestors_order(supported: Iterable[str]) -> Callable[[Sequence[str]], str | None]:
    """Return a chooser that takes the first proposed that is in *supported*."""
    known = frozenset(supported)

    def choose(proposed: Sequence[str]) -> str | None:
        return next((syntax for syntax in proposed if syntax in known), None)

    return choose


@dataclass(frozen=True, slots=True)
class Negotiated:
    """The acceptor's answers, and the contexts that came of them."""

    answers: tuple[ContextAnswer, ...]
    contexts: dict[int, Context]
    roles: tuple[RoleSelection, ...]


def negotiate(
    request: AssociateRequest, supported: Callable[[str], Supported | None]
) -> Negotiated:
    """Answer every proposed context, in the order proposed (PS3.8 9.3.3.2).

    Roles follow PS3.7 D.3.3.4: without role selection the requestor is SCU
    and we are SCP; a role is answered only where one was proposed.
    """
    proposed_roles = {role.sop_class_uid: role for role in request.user.roles}
    answers: list[ContextAnswer] = []
    contexts: dict[int, Context] = {}
    roles: dict[str, RoleSelection] = {}
    for proposal in request.contexts:
        service = supported(proposal.abstract_syntax)
        # A rejected context still names one syntax, which has no meaning.
        syntax = proposal.transfer_syntaxes[0]
        if service is None:
            result = ContextResult.ABSTRACT_SYNTAX_NOT_SUPPORTED
        elif (chosen := service.choose(proposal.transfer_syntaxes)) is None:
            result = ContextResult.TRANSFER_SYNTAXES_NOT_SUPPORTED
        else:
            result, syntax = ContextResult.ACCEPTED, chosen
            role = proposed_roles.get(proposal.abstract_syntax)
            requestor_scu, requestor_scp = True, False
            if role is not None:
                requestor_scu = role.scu and service.accept_scu_role
                requestor_scp = role.scp and service.accept_scp_role
                roles[role.sop_class_uid] = RoleSelection(
                    role.sop_class_uid, requestor_scu, requestor_scp
                )
            if not (requestor_scu or requestor_scp):
                result = ContextResult.USER_REJECTION
            else:
                contexts[proposal.context_id] = Context(
                    proposal.context_id,
                    proposal.abstract_syntax,
                    syntax,
                    as_scu=requestor_scp,
                    as_scp=requestor_scu,
                )
        answers.append(ContextAnswer(proposal.context_id, int(result), syntax))
    return Negotiated(tuple(answers), contexts, tuple(roles.values()))


def acceptance(
    request: AssociateRequest,
    negotiated: Negotiated,
    *,
    max_length: int,
    extended: tuple[tuple[str, bytes], ...] = (),
) -> AssociateAccept:
    """Build the A-ASSOCIATE-AC for *negotiated*; the window is always 1/1 (PS3.7 D.3.3.3)."""
    return AssociateAccept(
        request.called_ae_title or " ",
        request.calling_ae_title or " ",
        negotiated.answers,
        UserInformation(
            max_length=max_length,
            implementation_class_uid=IMPLEMENTATION_CLASS_UID,
            implementation_version_name=IMPLEMENTATION_VERSION_NAME,
            # Absent means 1/1 as well; it may be answered only if it was offered.
            async_window=(1, 1) if request.user.async_window is not None else None,
            roles=negotiated.roles,
            extended=extended,
        ),
    )


def accepted_contexts(request: AssociateRequest, accept: AssociateAccept) -> dict[int, Context]:
    """Return what the acceptor accepted of our request, with our roles.

    Answers to contexts that were not proposed, or with a transfer syntax that
    was not, are left out: nothing can be sent in them.
    """
    proposed: dict[int, ProposedContext] = {c.context_id: c for c in request.contexts}
    asked = {role.sop_class_uid: (role.scu, role.scp) for role in request.user.roles}
    answered = {role.sop_class_uid: (role.scu, role.scp) for role in accept.user.roles}
    contexts: dict[int, Context] = {}
    for answer in accept.contexts:
        proposal = proposed.get(answer.context_id)
        if (
            proposal is None
            or answer.result != ContextResult.ACCEPTED
            or answer.transfer_syntax not in proposal.transfer_syntaxes
        ):
            continue
        uid = proposal.abstract_syntax
        as_scu, as_scp = _requestor_roles(asked.get(uid), answered.get(uid))
        if as_scu or as_scp:
            contexts[answer.context_id] = Context(
                answer.context_id, uid, answer.transfer_syntax, as_scu, as_scp
            )
    return contexts


def _requestor_roles(
    asked: tuple[bool, bool] | None, answered: tuple[bool, bool] | None
) -> tuple[bool, bool]:
    if asked is None or answered is None:
        return True, False  # the default roles (PS3.7 D.3.3.4)
    outcome = SCP_SCU_ROLES.get(asked, {}).get(answered)
    if outcome is None:
        return asked[0] and answered[0], asked[1] and answered[1]
    return bool(outcome[0]), bool(outcome[1])
