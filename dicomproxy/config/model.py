"""The configuration: every section, every key, its default and what it means.

Rules kept: a default is written as text, as it would stand in the file, and
converted like a value from there; unknown keys are refused; the description of
a key is the one that the reference and the JSON Schema show. What one key says
about another is checked in ``references``, because a model's own checks do not
run once one of its fields is wrong. Durations are seconds, sizes are bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from dicomproxy.config.coercion import CoercionSection
from dicomproxy.config.hl7 import Hl7Section
from dicomproxy.config.identity import (
    CrossReferenceEntry,
    DomainKey,
    IdentitySection,
    SourceIdentitySection,
)
from dicomproxy.config.section import LIST, MAPPING, Section, key, section
from dicomproxy.config.values import (
    AETitle,
    AETitles,
    BindHost,
    BindPort,
    Charset,
    Duration,
    FilePath,
    Flag,
    Fraction,
    Networks,
    Pause,
    PeerHost,
    Port,
    Senders,
    SourceName,
    SourceNames,
    TransferSyntaxes,
    Uid,
    choice,
    size,
    whole,
)

LATER_KEYS: Final = frozenset({"tls", "auth", "wado_url"})
"""Keys that a coming version brings; until then they are refused, not ignored."""

LATER_TYPES: Final = ("dicomweb", "xds-i")
"""Types of source that a coming version brings."""

Retrieve = Annotated[Literal["c-move", "c-get"], choice("c-move", "c-get")]


# ------------------------------------------------------------------------ proxy


class TimersSection(Section):
    """How long associations, ours and our callers', may take for each thing they do."""

    artim: Duration = key(
        "ARTIM (PS3.8 9.1.5): for a first request to come, and for a connection to close", "30s"
    )
    association: Duration = key("For the answer to an association request or release", "30s")
    response: Duration = key("For the next response to a request already sent", "60s")
    idle: Duration = key("After which a caller's silent association is aborted", "600s")
    stall: Duration = key("Without a byte moving inside a message, either way", "60s")


class LimitsSection(Section):
    """What one caller or peer may make the proxy hold in memory."""

    max_pdu: Annotated[int, size("4KiB", "16MiB")] = key(
        "Largest PDU accepted, told to peers as Maximum Length", "256KiB"
    )
    max_identifier: Annotated[int, size("4KiB", "64MiB")] = key(
        "Largest data set accepted that is not an instance: identifiers",
        "1MiB",
    )
    max_command: Annotated[int, size("1KiB", "1MiB")] = key("Largest command set accepted", "64KiB")
    max_pending_messages: Annotated[int, whole(1, 10_000)] = key(
        "Requests of one association that may wait to be answered", "32"
    )


class ProxySection(Section):
    """The application entity that workstations talk to."""

    ae_title: AETitle = key("The proxy's own AE title, and the move destination it names")
    host: BindHost = key("Address to listen on", "0.0.0.0")
    port: BindPort = key("Port to listen on", "11112")
    aliases: AETitles = key(
        "Other titles answered to, such as the local PACS's own, so that workstations "
        "need no change",
        [],
    )
    pending_interval: Duration = key(
        "How often a waiting workstation is told that its retrieve is still under way", "5s"
    )
    max_associations: Annotated[int, whole(1, 10_000)] = key(
        "Associations at a time; more are rejected as transient, local limit exceeded", "200"
    )
    accession_issuer: DomainKey = section(
        "Who issues the accession numbers that the proxy makes up (default: a namespace that "
        "is its ae_title)",
        {},
    )
    shutdown_grace: Pause = key("How long work under way may go on after SIGTERM", "30s")
    timers: Annotated[TimersSection, MAPPING] = section("Deadlines of associations", {})
    limits: Annotated[LimitsSection, MAPPING] = section("Bounds on what peers may send", {})


# ------------------------------------------------------------------------ peers


class LocalSection(Section):
    """The PACS of this site."""

    ae_title: AETitle = key("AE title of the local PACS")
    host: PeerHost = key("Where it is")
    port: Port = key("Its DICOM port")
    patient_id_issuer: DomainKey = section(
        "Who issues its patient IDs; needed where a source has another issuer", {}
    )
    deliver: Annotated[Literal["relay", "proxy"], choice("relay", "proxy")] = key(
        "Who sends local studies to workstations: relay leaves it to the local PACS, "
        "proxy where the local PACS does not know the workstations",
        "relay",
    )
    calling_ae_title: Annotated[Literal["workstation", "proxy"], choice("workstation", "proxy")] = (
        key("Whose title the local PACS is called with", "workstation")
    )
    query_timeout: Duration = key("For the local PACS to answer a query in full", "10s")
    connect_timeout: Duration = key("For the TCP connection", "3s")
    first_instance_timeout: Duration = key(
        "For the first instance of a retrieve, tape recall included; "
        "up to four times that while it sends other studies",
        "300s",
    )
    stall_timeout: Duration = key("Without a byte or a changed count in a retrieve", "60s")
    retrieve: Retrieve = key("How the proxy fetches from it, under deliver: proxy", "c-move")
    parallel_associations: Annotated[int, whole(1, 64)] = key(
        "Associations at a time, at most", "4"
    )
    store_from: Senders | None = key(
        "Who sends its instances: AE titles, addresses, networks (default: its ae_title)", None
    )
    accept: TransferSyntaxes | None = key(
        "Transfer syntaxes accepted from it, best first (default: lossless, uncompressed, lossy)",
        None,
    )
    test_study: Uid | None = key("Study from which doctor has one instance sent back", None)

    @property
    def senders(self) -> Senders:
        """Who its instances come from: AE titles and networks."""
        return (self.ae_title,) if self.store_from is None else self.store_from


class WorkstationEntry(Section):
    """An application entity that queries, and to which studies are delivered."""

    ae_title: AETitle = key("AE title it calls with, and names as move destination")
    host: PeerHost | None = key("Where it receives; without it, it may only query", None)
    port: Port | None = key("Port on which it receives", None)
    sources: SourceNames | None = key("Names of the sources it may see (default: all)", None)
    allow_from: Networks | None = key(
        "Addresses and networks it may call from (default: its host; anywhere if it has none)",
        None,
    )
    deliver_as: AETitle | None = key(
        "Calling AE title of deliveries to it (default: the title that it called)", None
    )
    associations: Annotated[int, whole(1, 64)] = key(
        "Associations on which one delivery may send to it", "2"
    )
    query_budget: Duration = key("After which its queries end, whoever has not answered", "5s")
    availability: Annotated[
        Literal["ONLINE", "NEARLINE", "OFFLINE", "UNAVAILABLE"],
        choice("ONLINE", "NEARLINE", "OFFLINE", "UNAVAILABLE"),
    ] = key("Instance Availability shown for a remote study that is not cached", "NEARLINE")
    charset: Charset | None = key(
        "Specific Character Set of its answers (default: whatever fits the values)", None
    )


class CallerEntry(Section):
    """A modality or another that may only verify the connection: no query, no retrieve."""

    ae_title: AETitle = key("AE title it calls with")
    host: PeerHost | None = key("Where it calls from", None)
    allow_from: Networks | None = key(
        "Addresses and networks it may call from (default: its host; anywhere if it has none)",
        None,
    )


class BreakerSection(Section):
    """When a failing source is left alone for a while."""

    failures: Annotated[int, whole(1, 1000)] = key("Failures in a row after which it opens", "3")
    pause: Duration = key("How long it stays open before one probe is let through", "30s")


class SourceEntry(Section):
    """A remote archive; the order of the list is the order of precedence."""

    name: SourceName = key("Name in logs, metrics and workstations[].sources")
    type: Annotated[Literal["dimse"], choice("dimse", later=LATER_TYPES)] = key(
        "How it is spoken to", "dimse"
    )
    ae_title: AETitle = key("AE title of the archive")
    host: PeerHost = key("Where it is")
    port: Port = key("Its DICOM port")
    patient_id_issuer: DomainKey = section(
        "Who issues its patient IDs, unless its data sets say (default: local.patient_id_issuer)",
        {},
    )
    identity: Annotated[SourceIdentitySection, MAPPING] = section(
        "How its patients and orders are told apart from those of this site", {}
    )
    coerce: Annotated[CoercionSection, MAPPING] = section(
        "How its objects, and answers about them, are made to look local", {}
    )
    retrieve: Retrieve = key(
        "c-move where the archive can connect back to the proxy, c-get where it cannot", "c-move"
    )
    query_timeout: Duration = key("For it to answer a query in full", "5s")
    connect_timeout: Duration = key("For the TCP connection", "3s")
    first_instance_timeout: Duration = key(
        "For the first instance of a retrieve, tape recall included; "
        "up to four times that while it sends other studies",
        "300s",
    )
    stall_timeout: Duration = key("Without a byte or a changed count in a retrieve", "60s")
    parallel_associations: Annotated[int, whole(1, 64)] = key(
        "Associations at a time, at most, over all queries and retrieves", "4"
    )
    calling_ae_title: AETitle | None = key(
        "Our AE title and move destination there (default: proxy.ae_title)", None
    )
    store_from: Senders | None = key(
        "Who sends its instances: AE titles, addresses, networks (default: its ae_title)", None
    )
    accept: TransferSyntaxes | None = key(
        "Transfer syntaxes accepted from it, best first (default: lossless, uncompressed, lossy)",
        None,
    )
    max_matches: Annotated[int, whole(1, 100_000)] = key(
        "Answers to one query after which it is cancelled", "1000"
    )
    study_root_only: Flag = key(
        "It has no Patient Root model: requests in that model are translated", "false"
    )
    breaker: Annotated[BreakerSection, MAPPING] = section("Its circuit breaker", {})
    test_study: Uid | None = key("Study from which doctor has one instance sent back", None)

    @property
    def senders(self) -> Senders:
        """Who its instances come from: AE titles and networks."""
        return (self.ae_title,) if self.store_from is None else self.store_from


# ------------------------------------------------------------------------- rest


class CacheSection(Section):
    """Where fetched instances are kept, and how many."""

    directory: FilePath = key("Holds everything cached; used by one proxy at a time")
    max_size: Annotated[int, size("1KB")] = key("Instance files never take more than this")
    min_free: Annotated[int, size("0B")] | None = key(
        "What the file system must keep free (default: 2 % of it)", None
    )
    high_watermark: Fraction = key("Fraction of max_size at which eviction begins", "0.95")
    low_watermark: Fraction = key("Fraction of max_size at which eviction ends", "0.85")
    max_age: Duration | None = key(
        "Studies not used for so long are evicted (default: kept while there is room)", None
    )
    memory_spool: Annotated[int, size("0B", "16GiB")] = key(
        "How much is held in memory, over all instances, while the disk takes none", "64MB"
    )


class StateSection(Section):
    """Where the proxy remembers at which source each study was seen."""

    directory: FilePath | None = key("Default: state, in the cache's directory", None)


class AuditSection(Section):
    """The record of disclosures; unlike logs it names patients."""

    file: FilePath | None = key("Default: audit.jsonl, in the state directory", None)


class RetrieveSection(Section):
    """How studies are fetched."""

    finish_abandoned: Flag = key("Go on fetching a study that nobody waits for any more", "false")
    attempts: Annotated[int, whole(1, 10)] = key(
        "Attempts per instance and source in one retrieve", "2"
    )
    retry_pause: Pause = key("How long a study that failed is not asked for again", "30s")
    destination_retry: Pause = key(
        "How long a destination that rejects for the moment is tried again", "30s"
    )


class WebSection(Section):
    """Health, metrics and the status page, over HTTP without authentication."""

    host: BindHost = key("Address to listen on", "127.0.0.1")
    port: BindPort = key("Port to listen on", "8080")


class LogSection(Section):
    """Lines on stderr."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"], choice("debug", "info", "warning", "error")
    ] = key("Lowest level written", "info")
    format: Annotated[Literal["json", "console"], choice("json", "console")] = key(
        "json for machines, console for a terminal", "json"
    )


class Settings(Section):
    """Configuration of dicomproxy."""

    proxy: ProxySection = key("The proxy itself")
    local: LocalSection = key("The local PACS")
    workstations: Annotated[tuple[WorkstationEntry, ...], LIST] = section(
        "Who may query and retrieve, and where studies are delivered", []
    )
    callers: Annotated[tuple[CallerEntry, ...], LIST] = section(
        "Modalities and others who may verify the connection (C-ECHO), and nothing else yet", []
    )
    sources: Annotated[tuple[SourceEntry, ...], LIST] = section(
        "Remote archives, in order of precedence", []
    )
    cross_references: Annotated[tuple[CrossReferenceEntry, ...], LIST] = section(
        "Who knows which IDs a person has elsewhere", []
    )
    identity: Annotated[IdentitySection, MAPPING] = section(
        "What is remembered of cross-references", {}
    )
    hl7: Annotated[Hl7Section | None, MAPPING] = key(
        "Who tells that patients' records were merged or their IDs changed (default: nobody)", None
    )
    cache: CacheSection = key("The cache")
    state: Annotated[StateSection, MAPPING] = section("What is remembered", {})
    audit: Annotated[AuditSection, MAPPING] = section("The record of disclosures", {})
    retrieve: Annotated[RetrieveSection, MAPPING] = section("Fetching and delivering", {})
    web: Annotated[WebSection, MAPPING] = section("Health, metrics, status page", {})
    log: Annotated[LogSection, MAPPING] = section("Log lines", {})

    @property
    def state_directory(self) -> Path:
        """Where the state file is, given or not."""
        return self.state.directory or self.cache.directory / "state"

    @property
    def audit_file(self) -> Path:
        """Where disclosures are recorded, given or not."""
        return self.audit.file or self.state_directory / "audit.jsonl"
