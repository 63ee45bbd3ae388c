"""Small changes to a data set that leave alone what says the same already. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from dicomproxy.dataset.identifier import Element, Identifier, vr_of
from dicomproxy.dataset.patient import Domain
from dicomproxy.identity.domains import UNIVERSAL_ENTITY_ID, UNIVERSAL_ENTITY_ID_TYPE


def put(work: Identifier, tag: int, text: str) -> None:
    """Give an attribute one value, or none; one that is absent does not become empty.

    Raises:
        CannotEncode: a character does not fit.
    """
    if not text:
        if not work.is_empty(tag):
            work.put(Element(tag, vr_of(tag), b""))
    elif work.values(tag) != (text,):
        work.set_text(tag, text, vr_of(tag))


def put_items(work: Identifier, tag: int, items: Sequence[Identifier]) -> None:
    """Give a sequence its items, made for or copied from *work*; without any it is removed."""
    if not items:
        work.remove(tag)
    elif not same_items(work.items(tag), items):
        # As they are: each is written in the character set of *work* already.
        work.put(Element(tag, "SQ", tuple(items)))


def same_items(some: Sequence[Identifier], others: Sequence[Identifier]) -> bool:
    """Tell whether two sequences say the same; padding and order of writing say nothing."""
    return len(some) == len(others) and all(map(_same, some, others))


def _same(one: Identifier, other: Identifier) -> bool:
    if one == other:
        return True
    return [element.tag for element in one] == [element.tag for element in other] and all(
        same_items(one.items(tag), other.items(tag))
        if isinstance(element.value, tuple)
        else one.values(tag) == other.values(tag) != () or one.element(tag) == other.element(tag)
        for element in one
        for tag in (element.tag,)
    )


def item_within(work: Identifier) -> Identifier:
    """Return a new item that is written in the character set of *work*."""
    return Identifier(inherited=work.specific_character_set)


def universal(item: Identifier, domain: Domain) -> None:
    """Write the universal ID of *domain* into an item (PS3.3 10.14, 10.17)."""
    put(item, UNIVERSAL_ENTITY_ID, domain.universal_id)
    if domain.universal_id:
        put(item, UNIVERSAL_ENTITY_ID_TYPE, domain.universal_id_type or "ISO")
