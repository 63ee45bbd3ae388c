"""The sections about who a patient is elsewhere, and whose accession numbers are whose."""

from __future__ import annotations

from typing import Annotated, Literal

from dicomproxy.config.section import MAPPING, Section, TextIs, key, section
from dicomproxy.config.values import (
    AccessionPrefix,
    Duration,
    FilePath,
    Flag,
    HttpUrl,
    IssuerText,
    Minutes,
    Namespace,
    PeerHost,
    Port,
    ProviderName,
    ProviderNames,
    choice,
    whole,
)
from dicomproxy.dataset.patient import Domain

_UniversalIdType = Literal["DNS", "EUI64", "ISO", "URI", "UUID", "X400", "X500"]


class DomainSection(Section):
    """An assigning authority: a text alone is its namespace."""

    namespace: Namespace | None = key("Issuer of Patient ID (0010,0021), or HL7 namespace ID", None)
    universal_id: IssuerText | None = key(
        "Universal Entity ID (0040,0032), an OID as a rule; decides where both sides have one", None
    )
    universal_id_type: Annotated[
        _UniversalIdType, choice("DNS", "EUI64", "ISO", "URI", "UUID", "X400", "X500")
    ] = key("What kind of ID that is; ISO for an OID", "ISO")

    @property
    def is_named(self) -> bool:
        """Whether anything identifies it."""
        return self.domain.is_named

    @property
    def domain(self) -> Domain:
        """The value that it is; a type without an ID means nothing."""
        kind = self.universal_id_type if self.universal_id else ""
        return Domain(self.namespace or "", self.universal_id or "", kind)


DomainKey = Annotated[DomainSection, TextIs("namespace")]


class SourceIdentitySection(Section):
    """How patients and orders of one source are told apart from those of this site."""

    cross_reference: ProviderNames | None = key(
        "Who is asked for a patient's ID there, in this order: same (the source numbers patients "
        "as this site does), or names of cross_references (default: same)",
        None,
    )
    issuer: Annotated[Literal["read", "ignore"], choice("read", "ignore")] = key(
        "Whether an issuer that its data sets name counts; ignore where it means nothing", "read"
    )
    unverified: Annotated[Literal["show", "withhold"], choice("show", "withhold")] = key(
        "What becomes of its answers where neither birth date nor sex can be compared with "
        "the local patient's",
        "show",
    )
    accession: Annotated[
        Literal["mint", "prefix", "empty", "keep"], choice("mint", "prefix", "empty", "keep")
    ] = key("What its accession numbers become, which may equal those of other orders here", "mint")
    accession_prefix: AccessionPrefix | None = key(
        "Goes before them under accession: prefix; one that gets too long is minted", None
    )
    accession_issuer: DomainKey = section(
        "Who issues its accession numbers, where it does not say", {}
    )


class TlsClientSection(Section):
    """TLS towards one server; version 1.2 at least."""

    enabled: Flag = key("Whether to use it; for an https URL it is used anyway", "false")
    ca_file: FilePath | None = key(
        "Certificates of those who are trusted, PEM (default: the system's)", None
    )
    certificate_file: FilePath | None = key(
        "Our own certificate, PEM, where one is asked for", None
    )
    key_file: FilePath | None = key("Its key, where it is not in the same file", None)
    check_hostname: Flag = key("Whether the server's certificate must name its host", "true")


class CrossReferenceEntry(Section):
    """Somebody who knows which IDs a person has in other domains."""

    name: ProviderName = key("Name in logs, metrics and sources[].identity.cross_reference")
    type: Annotated[Literal["table", "pix", "pixm"], choice("table", "pix", "pixm")] = key(
        "table: a file; pix: HL7 v2 over MLLP (ITI-9); pixm: FHIR (ITI-83)"
    )
    file: FilePath | None = key("The table, CSV; for type table", None)
    host: PeerHost | None = key("Where the manager is; for type pix", None)
    port: Port | None = key("Its MLLP port; for type pix", None)
    url: HttpUrl | None = key("FHIR base, to which /Patient/$ihe-pix is added; for type pixm", None)
    authorization_file: FilePath | None = key(
        "Holds the value of the Authorization header, such as Bearer and a token; for type pixm",
        None,
    )
    sending_application: IssuerText | None = key(
        "MSH-3, as the manager knows us, ^ between namespace, universal ID and its type where it "
        "has them; so the next three; for type pix (default: DICOMPROXY)",
        None,
    )
    sending_facility: IssuerText | None = key("MSH-4; for type pix", None)
    receiving_application: IssuerText | None = key("MSH-5; for type pix", None)
    receiving_facility: IssuerText | None = key("MSH-6; for type pix", None)
    charset: Annotated[
        Literal["UNICODE UTF-8", "8859/1", "8859/2", "8859/5", "8859/15", "GB 18030-2000"],
        choice("UNICODE UTF-8", "8859/1", "8859/2", "8859/5", "8859/15", "GB 18030-2000"),
    ] = key("MSH-18 of questions, where ASCII does not do; for type pix", "UNICODE UTF-8")
    several_ids: Annotated[Literal["all", "none"], choice("all", "none")] = key(
        "What to make of several IDs of a person in one domain: all are theirs, or none can be "
        "relied on and the source is not asked",
        "none",
    )
    timeout: Duration = key("For one answer", "5s")
    connections: Annotated[int, whole(1, 64)] = key("Connections at a time, for type pix", "2")
    tls: Annotated[TlsClientSection, MAPPING] = section("TLS, for pix and pixm", {})


class IdentitySection(Section):
    """What is remembered of cross-references."""

    remember: Minutes = key("How long an ID that was found is remembered", "5m")
    remember_none: Minutes = key("How long it is remembered that a patient has none", "30s")
    timeout: Duration = key(
        "For one cross-reference to answer, whatever its own timeout, before the next is asked; "
        "what is left of a query's budget is for the source",
        "3s",
    )
