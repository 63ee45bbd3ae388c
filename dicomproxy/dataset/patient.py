"""A patient ID and the domain it belongs to (PS3.3 C.7.1.1 and 10.14). Pure.

An ID means something only within the domain that issued it. Two IDs are the
same only if their domains are; a domain that is not named is none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Domain:
    """An assigning authority.

    Args:
        namespace: Issuer of Patient ID (0010,0021); HL7 HD.1.
        universal_id: Universal Entity ID (0040,0032), an OID as a rule; HD.2.
        universal_id_type: Universal Entity ID Type (0040,0033), ``ISO`` for an OID; HD.3.
    """

    namespace: str = ""
    universal_id: str = ""
    universal_id_type: str = ""

    @property
    def is_named(self) -> bool:
        """Whether anything identifies it."""
        return bool(self.namespace or self.universal_id)

    def matches(self, other: Domain) -> bool:
        """Tell whether both name one authority.

        The universal ID decides where both have one; else the namespace does. How its type
        is written does not count, nor is that told apart in which case a UUID or a host is.
        """
        if self.universal_id and other.universal_id:
            kinds = {_kind(one.universal_id_type) for one in (self, other)} - {""}
            if len(kinds) > 1:
                return False
            if kinds & _WITHOUT_CASE:
                return self.universal_id.casefold() == other.universal_id.casefold()
            return self.universal_id == other.universal_id
        return bool(self.namespace) and self.namespace == other.namespace


_WITHOUT_CASE: Final = frozenset({"DNS", "EUI64", "UUID"})


def _kind(universal_id_type: str) -> str:
    """Return a type of HL7 table 0301 in one spelling; GUID is another word for UUID."""
    kind = universal_id_type.upper()
    return "UUID" if kind == "GUID" else kind


@dataclass(frozen=True, slots=True)
class PatientId:
    """One ID in one domain."""

    value: str
    domain: Domain = Domain()
