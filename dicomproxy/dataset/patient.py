"""A patient ID and the domain it belongs to (PS3.3 C.7.1.1 and 10.14). Pure.

An ID means something only within the domain that issued it. Two IDs are the
same only if their domains are; a domain that is not named is none of them.
"""

from __future__ import annotations

from dataclasses import dataclass


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

        The universal ID decides where both have one; else the namespace does.
        """
        if self.universal_id and other.universal_id:
            same_type = not (self.universal_id_type and other.universal_id_type) or (
                self.universal_id_type == other.universal_id_type
            )
            return same_type and self.universal_id == other.universal_id
        return bool(self.namespace) and self.namespace == other.namespace


@dataclass(frozen=True, slots=True)
class PatientId:
    """One ID in one domain."""

    value: str
    domain: Domain = Domain()
