"""A site's own rules: what else becomes of the attributes of a source's objects. Pure.

A rule changes one top-level attribute that is written as text. Rules are
followed in their order, each seeing what those before it left; one that would
make a value which the VR does not have changes nothing. What identifies a
patient or an object is none of their business: see
:func:`dicomproxy.dataset.attributes.may_be_changed`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from dicomproxy.dataset.attributes import LONGEST, well_formed
from dicomproxy.dataset.identifier import Identifier

_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


class Action(StrEnum):
    """What a rule does to its attribute."""

    SET = "set"  # gives it a value, also where it is absent
    COPY = "copy"  # gives it the value of another one, if that has any
    PREFIX = "prefix"  # puts a text before its value, if it has any
    MAP = "map"  # replaces the values that are in a table
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.

    Args:
        tag: the attribute.
        vr: its VR.
        value: of ``set`` and ``prefix``; several values with a backslash between them.
        other: the tag from which ``copy`` takes.
        table: of ``map``, from a whole value to another one.
        modalities: objects of which it is for; none for all. An answer that names
            several modalities is meant if any of them is.
        destinations: AE titles that it is for; none for all.
    """

    action: Action
    tag: int
    vr: str
    value: str = ""
    other: int = 0
    table: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    modalities: frozenset[str] = frozenset()
    destinations: frozenset[str] = frozenset()

    def concerns(self, modalities: Collection[str], destination: str) -> bool:
        """Tell whether it is for objects of those modalities, sent to *destination*."""
        return (not self.modalities or not self.modalities.isdisjoint(modalities)) and (
            not self.destinations or destination in self.destinations
        )

    def apply(self, work: Identifier) -> None:
        """Change *work*.

        Raises:
            CannotEncode: a character does not fit into its character set.
        """
        if self.action is Action.REMOVE:
            work.remove(self.tag)
            return
        values = work.values(self.tag)
        match self.action:
            case Action.SET:
                new = tuple(self.value.split("\\")) if self.value else ()
            case Action.COPY:
                new = work.values(self.other) or values
            case Action.PREFIX:
                new = tuple(prefixed(self.value, value, self.vr) for value in values)
            case _:
                new = tuple(self.table.get(value, value) for value in values)
        if new == values:
            return
        longest = LONGEST[self.vr]
        new = tuple(value[:longest] for value in new)
        # A source may break rules of form; a site's own do not, nor fail for it.
        if all(value in values or well_formed(self.vr, value) for value in new):
            work.set_text(self.tag, new, self.vr)


def needed_by(rules: Sequence[Rule], keys: Collection[int], modality: int = 0) -> list[int]:
    """Return what has to be asked for besides *keys*, so that *rules* find what they look at.

    What a rule looks at may be what one before it makes of something else.

    Args:
        modality: the key by which an answer says of which modality it is; 0 if none does.
    """
    needed: dict[int, None] = {}
    for rule in reversed(rules):
        if rule.tag in keys or rule.tag in needed:
            needed[rule.other] = None
            if rule.modalities:
                needed[modality] = None
    return [tag for tag in needed if tag and tag not in keys]


def prefixed(prefix: str, value: str, vr: str) -> str:
    """Return *value* behind *prefix*, once, and cut at what *vr* holds."""
    # A mark alone has lost the space behind it.
    is_marked = value.startswith(prefix) or value == prefix.rstrip()
    marked = value if is_marked else prefix + value
    return marked[: LONGEST[vr]].rstrip()
