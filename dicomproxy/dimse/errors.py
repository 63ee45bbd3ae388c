"""How an association can fail, as facts someone branches on."""

from __future__ import annotations

from dicomproxy.dimse.pdu import AssociateReject


class AssociationError(Exception):
    """An association could not be had, or was lost."""


class ConnectFailed(AssociationError):
    """No TCP connection: refused, unreachable, or the name does not resolve."""


class AssociationRejected(AssociationError):
    """A-ASSOCIATE-RJ (PS3.8 9.3.4)."""

    def __init__(self, rejection: AssociateReject) -> None:
        self.rejection = rejection
        super().__init__(f"rejected, {rejection.in_words()}")


class AssociationAborted(AssociationError):
    """A-ABORT or A-P-ABORT, by the peer or by us (PS3.8 7.3, 7.4)."""

    def __init__(self, source: int, reason: int) -> None:
        self.source = source
        self.reason = reason
        super().__init__(f"aborted (source {source}, reason {reason})")


class AssociationLost(AssociationError):
    """The TCP connection ended without release or abort."""


class AssociationReleased(AssociationError):
    """The association was released in order; nothing more will come."""


class AssociationTimeout(AssociationError):
    """A deadline passed; *phase* says which."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        super().__init__(f"deadline passed: {phase}")


class NoTurn(AssociationTimeout):
    """All associations allowed were in use for too long; the peer was asked nothing."""


class NoContext(AssociationError):
    """No accepted presentation context serves the purpose."""
