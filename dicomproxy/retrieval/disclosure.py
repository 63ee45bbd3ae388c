"""What is recorded of a retrieve: who was given what, and from where. Pure.

One event for each study and source, and for each patient whose studies the local
PACS delivers itself. A retrieve that found nothing, or was refused, leaves an
event as well: that somebody tried is of interest too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from dicomproxy.ports import LOCAL, AuditEvent, Caller
from dicomproxy.retrieval.delivery import DeliveryReport
from dicomproxy.retrieval.locate import LocatedStudy
from dicomproxy.retrieval.request import RetrieveRequest
from dicomproxy.retrieval.tally import CANCELLED, SUCCESS, Part


@dataclass(slots=True)
class Disclosure:
    """One study that we deliver, and what has been delivered of it."""

    study: LocatedStudy
    report: DeliveryReport = field(default_factory=DeliveryReport)


@dataclass(frozen=True, slots=True)
class Relayed:
    """The studies that the local PACS delivers itself, and its counts."""

    studies: tuple[LocatedStudy, ...]
    part: Part


def disclosure_events(
    request: RetrieveRequest,
    disclosures: Sequence[Disclosure],
    relayed: Relayed | None,
    *,
    caller: Caller,
    operation_id: str,
    destination_ae_title: str,
    status: int,
) -> list[AuditEvent]:
    """Return the events of one operation that ended with *status*."""

    def event(
        source: str,
        patient_id: str,
        study_instance_uids: tuple[str, ...],
        delivered: int,
        failed: int,
        whole: bool,
        extra: Mapping[str, int] = MappingProxyType({}),
    ) -> AuditEvent:
        if status == CANCELLED:
            outcome = "cancelled"
        elif whole and not failed:
            outcome = "success"
        else:
            outcome = "partial" if delivered else "failure"
        return AuditEvent(
            event="disclosure",
            outcome=outcome,
            caller_ae_title=caller.ae_title,
            peer_address=caller.peer_address,
            source=source,
            operation_id=operation_id,
            destination_ae_title=destination_ae_title,
            level=str(request.level),
            root=str(request.root),
            patient_id=patient_id,
            study_instance_uids=study_instance_uids,
            instances=delivered,
            failed=failed,
            status=status,
            extra=extra,
        )

    events: list[AuditEvent] = []
    for disclosure in disclosures:
        study, report = disclosure.study, disclosure.report
        sources = list(dict.fromkeys([*report.delivered, *report.failed]))
        if not sources:
            sources = [holder.name for holder in study.holders[:1]]
        outcome = report.outcome
        whole = outcome is not None and outcome.complete
        events.extend(
            event(
                source,
                study.patient_id,
                (study.study_instance_uid,),
                report.delivered[source],
                report.failed[source],
                whole,
            )
            for source in sources
        )
    if relayed is not None:
        part = relayed.part
        delivered = part.completed + part.warning
        of_patient: dict[str, list[str]] = {}
        for study in relayed.studies:
            of_patient.setdefault(study.patient_id, []).append(study.study_instance_uid)
        # Its counts are of all together, and are not known of each.
        several = {"instances_of_patients": len(of_patient)} if len(of_patient) > 1 else {}
        events.extend(
            event(
                LOCAL,
                patient_id,
                tuple(uids),
                delivered,
                part.failed,
                part.failure is None,
                several,
            )
            for patient_id, uids in of_patient.items()
        )
    if not events:
        uids = request.study_instance_uids
        events.append(event("", request.patient_id, uids, 0, 0, status == SUCCESS))
    return events
