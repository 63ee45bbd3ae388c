"""C-STORE as SCP (PS3.4 B): instances that sources send us for a flight.

Who sends decides. An instance belongs to a flight if its study is being fetched
from a source for which this sender sends; otherwise it is refused and logged,
never passed on: an archive of the region does not write into the local PACS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, cast

from prometheus_client import Counter

from dicomproxy.dimse.association import Association, BytesSink, Message, Sink
from dicomproxy.dimse.command import Command
from dicomproxy.dimse.negotiation import Context
from dicomproxy.logs import get_logger
from dicomproxy.ports import Arrival, Arrivals
from dicomproxy.services.access import Peer

NOT_AUTHORIZED: Final = 0x0124
_CANNOT_UNDERSTAND: Final = 0xC000

_STORED = Counter("dicomproxy_stores_received_total", "C-STORE requests answered.", ("status",))

_log = get_logger()


class Refusing:
    """Takes a data set that nobody wants, and forgets it."""

    def write(self, segments: Sequence[memoryview], release: Callable[[], None]) -> None:
        release()

    def discard(self) -> None:
        return


class StorageService:
    """Receives instances.

    Args:
        arrivals: where they go.
        accept: by source, the transfer syntaxes taken, in order; None for any.
    """

    def __init__(self, arrivals: Arrivals, accept: Mapping[str, tuple[str, ...] | None]) -> None:
        self._arrivals = arrivals
        self._accept = accept

    def accept_order(self, sources: Sequence[str]) -> tuple[str, ...] | None:
        """Return what is accepted from a sender for *sources*: the first one's order."""
        return self._accept.get(sources[0]) if sources else None

    def expects(self, peer: Peer) -> bool:
        """Tell whether anything is being fetched from a source for which *peer* sends."""
        return self._arrivals.source_for(peer.sends_for) is not None

    def sink(
        self, association: Association, peer: Peer, context: Context, command: Command
    ) -> Sink:
        """Choose where a data set goes that is about to come."""
        source = self._arrivals.source_for(peer.sends_for)
        if source is None or not command.affected_sop_instance_uid:
            return Refusing()
        return self._arrivals.receive(
            source,
            command.affected_sop_class_uid or context.abstract_syntax,
            command.affected_sop_instance_uid,
            context.transfer_syntax,
        )

    async def finish(self, association: Association, peer: Peer, message: Message) -> int:
        """Return the status of the response, once the instance is stored or refused."""
        sink = message.sink
        if sink is None or isinstance(sink, BytesSink):
            status = _CANNOT_UNDERSTAND  # a C-STORE-RQ has a data set (PS3.7 9.3.1.1)
        elif isinstance(sink, Refusing):
            status = NOT_AUTHORIZED
            _log.warning(
                "store_refused",
                association_id=association.association_id,
                calling_ae_title=peer.ae_title,
                peer_address=peer.address,
                sources=list(peer.sends_for),
                sop_class_uid=message.command.affected_sop_class_uid,
                sop_instance_uid=message.command.affected_sop_instance_uid,
                reason="no_flight",
            )
        else:
            status = await cast(Arrival, sink).finish()
        _STORED.labels(f"{status:04X}").inc()
        return status
