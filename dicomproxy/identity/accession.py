"""What becomes of the accession numbers of a source, on their way to a workstation and back.

A foreign number may be that of another order here, so that by default it is
replaced (``mint``). The other ways: ``prefix`` puts a few characters before it
and mints where the result is longer than an SH or stands for another number
already; ``empty`` leaves it out; ``keep`` lets it through, for a source that has
its numbers from the same system as this site.

Rule kept: only a number that this proxy gave out leads back to a source. One
that merely looks like it stays here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from dicomproxy.dataset.accession import Origin
from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.patient import Domain
from dicomproxy.identity.domains import (
    LOCAL_NAMESPACE_ENTITY_ID,
    UNIVERSAL_ENTITY_ID,
    UNIVERSAL_ENTITY_ID_TYPE,
    accession_issuer_of,
)

ACCESSION_NUMBER: Final = 0x00080050
ISSUER_OF_ACCESSION_NUMBER_SEQUENCE: Final = 0x00080051

_UNKNOWN: Final = Domain()


class Accessions(Protocol):
    """The memory of which number stands for what; survives a restart."""

    async def assign(self, wanted: Sequence[tuple[Origin, str]]) -> list[str]:
        """Return for each origin its number: its prefix and its own, or one made up."""
        ...

    async def find(self, number: str) -> Origin | None:
        """Return what an assigned number stands for; None if it is none of ours.

        Raises:
            AccessionsUnavailable: that cannot be known at the moment.
        """
        ...


class AccessionPolicy(StrEnum):
    """What is done with the numbers of a source."""

    MINT = "mint"
    PREFIX = "prefix"
    EMPTY = "empty"
    KEEP = "keep"


@dataclass(frozen=True, slots=True)
class AccessionRule:
    """The policy for one source.

    ``prefix`` is for that policy only. ``issuer`` is who issues the source's own
    numbers, where an answer does not say.
    """

    policy: AccessionPolicy = AccessionPolicy.MINT
    prefix: str = ""
    issuer: Domain = _UNKNOWN


@dataclass(frozen=True, slots=True)
class Shown:
    """An accession number as a workstation gets it, with its issuer if that is known."""

    number: str
    issuer: Domain = _UNKNOWN

    def __repr__(self) -> str:
        # The number stays out: a representation may end in a log.
        return "<Shown>"


_DEFAULT_RULE: Final = AccessionRule()


class AccessionNumbers:
    """Translates accession numbers between sources and workstations.

    Args:
        accessions: which number stands for what.
        issuer: who issues the numbers that the proxy gives out.
        rules: by source; one left out has its numbers minted.
    """

    def __init__(
        self, accessions: Accessions, issuer: Domain, rules: Mapping[str, AccessionRule]
    ) -> None:
        self._accessions = accessions
        self._issuer = issuer
        self._rules = dict(rules)

    def origin_of(self, identifier: Identifier, source: str) -> Origin:
        """Return the number in an answer or a header from *source*, empty if there is none."""
        issuer = accession_issuer_of(identifier.items(ISSUER_OF_ACCESSION_NUMBER_SEQUENCE))
        return Origin(source, identifier.text(ACCESSION_NUMBER), issuer)

    async def shown(self, origins: Sequence[Origin]) -> list[Shown]:
        """Return what to show for each; together, since new ones cost a write to the disk.

        An empty number stays empty, whatever the policy. Never raises for the disk.
        """
        assigned: dict[int, str] = {}
        wanted: list[tuple[Origin, str]] = []
        for at, origin in enumerate(origins):
            rule = self._rule(origin)
            if origin.number and rule.policy in (AccessionPolicy.MINT, AccessionPolicy.PREFIX):
                assigned[at] = ""
                prefix = rule.prefix if rule.policy is AccessionPolicy.PREFIX else ""
                wanted.append((self._completed(origin), prefix))
        if wanted:
            assigned = dict(zip(assigned, await self._accessions.assign(wanted), strict=True))
        return [
            Shown(assigned[at], self._issuer) if at in assigned else self._as_it_is(origin)
            for at, origin in enumerate(origins)
        ]

    async def resolve(self, number: str) -> Origin | None:
        """Return what a number that a workstation sent stands for; None if we never gave it out.

        Raises:
            AccessionsUnavailable: that cannot be known at the moment.
        """
        return await self._accessions.find(number) if number else None

    def _rule(self, origin: Origin) -> AccessionRule:
        return self._rules.get(origin.source, _DEFAULT_RULE)

    def _completed(self, origin: Origin) -> Origin:
        if origin.issuer.is_named:
            return origin
        return Origin(origin.source, origin.number, self._rule(origin).issuer)

    def _as_it_is(self, origin: Origin) -> Shown:
        if not origin.number or self._rule(origin).policy is AccessionPolicy.EMPTY:
            return Shown("")
        return Shown(origin.number, self._completed(origin).issuer)


def issuer_items(issuer: Domain, terms: tuple[str, ...] = ()) -> tuple[Identifier, ...]:
    """Return the items of Issuer of Accession Number Sequence (PS3.3 10.17), none if unnamed.

    Args:
        issuer: who issues the number.
        terms: Specific Character Set of the data set that they go into.

    Raises:
        CannotEncode: the issuer's name does not fit into it.
    """
    if not issuer.is_named:
        return ()
    item = Identifier(inherited=terms)
    if issuer.namespace:
        item.set_text(LOCAL_NAMESPACE_ENTITY_ID, issuer.namespace)
    if issuer.universal_id:
        item.set_text(UNIVERSAL_ENTITY_ID, issuer.universal_id)
        item.set_text(UNIVERSAL_ENTITY_ID_TYPE, issuer.universal_id_type or "ISO")
    return (item,)
