"""From the configuration to who patients are elsewhere: domains, cross-references, numbers.

Rule kept: a configuration that says nothing of identity makes nothing here, and
then every patient is taken to have one ID everywhere, as before there was any.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dicomproxy.config import Settings
from dicomproxy.config.coercion import RuleEntry
from dicomproxy.config.identity import CrossReferenceEntry, TlsClientSection
from dicomproxy.config.model import SourceEntry
from dicomproxy.dataset.patient import Domain
from dicomproxy.hl7.client import MllpClient
from dicomproxy.hl7.tls import TlsSettings, client_context
from dicomproxy.identity.accession import AccessionNumbers, AccessionPolicy, AccessionRule
from dicomproxy.identity.coercion import Action, Code, CoercionSettings, Rule
from dicomproxy.identity.crossref import Identities, Provider
from dicomproxy.identity.domains import Domains
from dicomproxy.identity.pix import PixCrossReference, PixSettings, SeveralIds
from dicomproxy.identity.pixm import PixmCrossReference, PixmSettings
from dicomproxy.identity.safety import KnownPatients, Unverified
from dicomproxy.identity.same import SameDomain
from dicomproxy.identity.service import AskLocal, IdentityService, Part, SourceIdentity
from dicomproxy.identity.table import TableCrossReference, remove_indexes
from dicomproxy.logs import error_fields, get_logger
from dicomproxy.state.accessions import AccessionMap

_SAME = "same"

_log = get_logger()


class Locations(Protocol):
    """What hangs on identities."""

    def forget_patients(self, patients: Collection[tuple[str, str]]) -> None: ...


@dataclass(frozen=True, slots=True)
class Secrets:
    """What is read from files on behalf of one cross-reference."""

    tls: ssl.SSLContext | None = None
    authorization: str = ""


def is_configured(settings: Settings) -> bool:
    """Tell whether a configuration says anything of identity."""
    return bool(
        settings.local.patient_id_issuer.is_named
        or settings.proxy.accession_issuer.is_named
        or settings.cross_references
        or any(
            source.patient_id_issuer.is_named
            or "identity" in source.model_fields_set
            or "coerce" in source.model_fields_set
            for source in settings.sources
        )
    )


def domains(settings: Settings) -> Domains:
    """The domain of this site and of each source."""
    return Domains(
        settings.local.patient_id_issuer.domain,
        {entry.name: entry.patient_id_issuer.domain for entry in settings.sources},
        [entry.name for entry in settings.sources if entry.identity.issuer == "ignore"],
    )


def read_secrets(settings: Settings) -> dict[str, Secrets]:
    """Read certificates and tokens, by cross-reference. Blocks.

    Raises:
        OSError: a file cannot be read, or does not hold what it should.
        UnicodeDecodeError: a token is no text.
    """
    return {
        entry.name: read_secrets_of(entry)
        for entry in settings.cross_references
        if entry.type != "table"
    }


def read_secrets_of(entry: CrossReferenceEntry) -> Secrets:
    """As :func:`read_secrets`, for one cross-reference."""
    return Secrets(_tls(entry), _authorization(entry.authorization_file))


def manager(entry: CrossReferenceEntry, secrets: Secrets) -> PixCrossReference | PixmCrossReference:
    """Make the one who asks a manager."""
    return _pix(entry, secrets) if entry.type == "pix" else _pixm(entry, secrets)


def _tls(entry: CrossReferenceEntry) -> ssl.SSLContext | None:
    section: TlsClientSection = entry.tls
    if not section.enabled and not (entry.type == "pixm" and (entry.url or "").startswith("https")):
        return None
    return client_context(
        TlsSettings(
            section.ca_file, section.certificate_file, section.key_file, section.check_hostname
        )
    )


def _authorization(file: Path | None) -> str:
    if file is None:
        return ""
    value = file.read_text("utf-8").strip()
    if not value or not value.isascii() or not value.isprintable():
        # Without it, or with half of it, questions would go out and be refused.
        raise OSError(errno.EINVAL, "not one line of text for a header")
    return value


class Identity:
    """Identity as one configuration has it: made, started, closed.

    Args:
        settings: one for which :func:`is_configured` holds.
        secrets: as :func:`read_secrets` read them.
        accessions: the memory of accession numbers, which outlives this.
        locations: told what to forget.
        ask_local: how the local PACS is asked who a patient is.
    """

    def __init__(
        self,
        settings: Settings,
        secrets: dict[str, Secrets],
        accessions: AccessionMap,
        locations: Locations,
        ask_local: AskLocal,
    ) -> None:
        known_domains = domains(settings)
        self._tables: list[TableCrossReference] = []
        self._table_names = {one.name for one in settings.cross_references if one.type == "table"}
        self._table_directory = settings.state_directory / "tables"
        parts: list[Part] = []
        providers: dict[str, Provider] = {_SAME: Provider(_SAME, SameDomain())}
        for entry in settings.cross_references:
            made: TableCrossReference | PixCrossReference | PixmCrossReference
            if entry.type == "table":
                made = self._table(settings, entry, known_domains)
            else:
                made = manager(entry, secrets[entry.name])
            parts.append(made)
            providers[entry.name] = Provider(entry.name, made)
        self.identities = Identities(
            known_domains,
            {
                entry.name: _chain(providers, entry.identity.cross_reference)
                for entry in settings.sources
            },
            remember_seconds=settings.identity.remember,
            remember_none_seconds=settings.identity.remember_none,
            deadline_seconds=settings.identity.timeout,
        )
        self.service = IdentityService(
            self.identities,
            AccessionNumbers(
                accessions,
                accession_issuer(settings),
                {entry.name: _accession_rule(entry) for entry in settings.sources},
            ),
            KnownPatients(asyncio.get_running_loop().time),
            {
                entry.name: SourceIdentity(
                    coercion_settings(settings, entry),
                    Unverified(entry.identity.unverified),
                    entry.identity.accession == "keep",
                )
                for entry in settings.sources
            },
            ask_local,
            deadline_seconds=settings.local.query_timeout,
            parts=parts,
            forget_locations=locations.forget_patients,
        )

    def _table(
        self, settings: Settings, entry: CrossReferenceEntry, known: Domains
    ) -> TableCrossReference:
        table = TableCrossReference(
            entry.name,
            entry.file or Path(),
            self._table_directory,
            known,
            on_change=lambda: self.identities.forget_all(),
            deadline_seconds=entry.timeout,
        )
        self._tables.append(table)
        return table

    async def start(self) -> None:
        """Begin to read tables; that is not waited for."""
        try:
            await asyncio.to_thread(remove_indexes, self._table_directory, self._table_names)
        except OSError as error:
            _log.warning("cross_reference_index_left", **error_fields(error))
        for table in self._tables:
            await table.start()

    async def close(self) -> None:
        """End what is under way, then the cross-references."""
        await self.service.close()


def _chain(providers: dict[str, Provider], names: Sequence[str] | None) -> tuple[Provider, ...]:
    return tuple(providers[name] for name in names or (_SAME,))


def _pix(entry: CrossReferenceEntry, secrets: Secrets) -> PixCrossReference:
    client = MllpClient(
        entry.host or "",
        entry.port or 0,
        tls=secrets.tls,
        deadline_seconds=entry.timeout,
        max_connections=entry.connections,
    )
    return PixCrossReference(
        client,
        PixSettings(
            sending_application=_hd(entry.sending_application) or "DICOMPROXY",
            sending_facility=_hd(entry.sending_facility),
            receiving_application=_hd(entry.receiving_application),
            receiving_facility=_hd(entry.receiving_facility),
            charset=entry.charset,
            several_ids=SeveralIds(entry.several_ids),
        ),
    )


def _hd(text: str | None) -> str | tuple[str, ...]:
    """Return a namespace, or the components of an HD."""
    return tuple(text.split("^")) if text and "^" in text else text or ""


def _pixm(entry: CrossReferenceEntry, secrets: Secrets) -> PixmCrossReference:
    return PixmCrossReference(
        PixmSettings(
            entry.url or "",
            authorization=secrets.authorization,
            deadline_seconds=entry.timeout,
            several_ids=SeveralIds(entry.several_ids),
        ),
        tls=secrets.tls,
    )


# ------------------------------------------------------------ accession numbers


def accession_issuer(settings: Settings) -> Domain:
    """Who issues the accession numbers that the proxy makes up."""
    named = settings.proxy.accession_issuer.domain
    return named if named.is_named else Domain(settings.proxy.ae_title)


def _accession_rule(entry: SourceEntry) -> AccessionRule:
    section = entry.identity
    return AccessionRule(
        AccessionPolicy(section.accession),
        section.accession_prefix or "",
        section.accession_issuer.domain,
    )


# --------------------------------------------------------------------- coercion


def coercion_settings(settings: Settings, entry: SourceEntry) -> CoercionSettings:
    """How objects of a source, and answers about them, are made to look local."""
    section = entry.coerce
    own = entry.patient_id_issuer
    return CoercionSettings(
        source=entry.ae_title,
        modifying_system=settings.proxy.ae_title,
        domain=(own if own.is_named else settings.local.patient_id_issuer).domain,
        ignore_issuers=entry.identity.issuer == "ignore",
        study_description_prefix=section.study_description_prefix or "",
        descriptions={name.remote: name.local for name in section.descriptions},
        procedure_codes={
            code.remote: Code(*code.local, code.meaning) for code in section.procedure_codes
        },
        rules=tuple(_rule(rule) for rule in section.rules),
        keep_study_id=section.study_id == "keep",
    )


def _rule(entry: RuleEntry) -> Rule:
    return Rule(
        action=Action(entry.action),
        tag=entry.attribute.tag,
        vr=entry.attribute.vr,
        value=entry.value or "",
        other=entry.from_attribute.tag if entry.from_attribute else 0,
        table={value.remote: value.local for value in entry.values},
        modalities=frozenset(entry.modalities or ()),
        destinations=frozenset(entry.destinations or ()),
    )
