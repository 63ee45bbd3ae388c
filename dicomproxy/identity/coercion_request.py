"""Orders and procedures of a foreign object in local words. Pure.

Accession numbers are replaced wherever they stand: at the top, in Request
Attributes Sequence and in Referenced Request Sequence. The other identifiers of
a request (placer and filler order numbers, procedure and step IDs) mean nothing
here and may equal ours, so they go; what a request was for stays, under its
local name where the site gives one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.patient import Domain
from dicomproxy.identity.accession import Shown, issuer_items
from dicomproxy.identity.coercion_values import put, put_items
from dicomproxy.identity.domains import accession_issuer_of

_ACCESSION_NUMBER: Final = 0x00080050
_ACCESSION_ISSUER: Final = 0x00080051
_CODE_VALUE: Final = 0x00080100
_CODING_SCHEME: Final = 0x00080102
_CODE_MEANING: Final = 0x00080104
_LONG_CODE_VALUE: Final = 0x00080119
_STUDY_DESCRIPTION: Final = 0x00081030
_PROCEDURE_CODES: Final = 0x00081032
_REQUESTED_PROCEDURE_DESCRIPTION: Final = 0x00321060
_REQUESTED_PROCEDURE_CODES: Final = 0x00321064
_SCHEDULED_STEP_ID: Final = 0x00400009
_PLACER_ISSUER: Final = 0x00400026
_FILLER_ISSUER: Final = 0x00400027
_REQUEST_ATTRIBUTES: Final = 0x00400275
_REQUESTED_PROCEDURE_ID: Final = 0x00401001
_PLACER_NUMBER: Final = 0x00402016
_FILLER_NUMBER: Final = 0x00402017
_REFERENCED_REQUESTS: Final = 0x0040A370

_DESCRIPTIONS: Final = (_STUDY_DESCRIPTION, _REQUESTED_PROCEDURE_DESCRIPTION)
_CODES: Final = (_PROCEDURE_CODES, _REQUESTED_PROCEDURE_CODES)
_REQUESTS: Final = (_REQUEST_ATTRIBUTES, _REFERENCED_REQUESTS)
_IDS: Final = (_PLACER_NUMBER, _FILLER_NUMBER, _REQUESTED_PROCEDURE_ID, _SCHEDULED_STEP_ID)
_ISSUERS: Final = (_PLACER_ISSUER, _FILLER_ISSUER)

REQUEST_TAGS: Final = frozenset(
    {_ACCESSION_NUMBER, _ACCESSION_ISSUER, *_DESCRIPTIONS, *_CODES, *_REQUESTS, *_IDS, *_ISSUERS}
)

_LONGEST_CODE_VALUE: Final = 16


class Code(NamedTuple):
    """A coded entry (PS3.3 8.8)."""

    value: str
    scheme: str
    meaning: str


_EMPTY: Final = Shown("")


def accession_numbers(view: Identifier) -> dict[str, Domain]:
    """Return every accession number that an object or an answer names, with its issuer.

    At the top, in Request Attributes Sequence and in Referenced Request Sequence.
    """
    found: dict[str, Domain] = {}
    for holder in _holders(view):
        number = holder.text(_ACCESSION_NUMBER)
        if number:
            issuer = accession_issuer_of(holder.items(_ACCESSION_ISSUER))
            if issuer.is_named or number not in found:
                found[number] = issuer
    return found


def _holders(view: Identifier) -> Iterator[Identifier]:
    yield view
    for tag in _REQUESTS:
        yield from view.items(tag)


def make_requests_local(work: Identifier, accessions: Mapping[str, Shown]) -> None:
    """Replace accession numbers, and take away the other identifiers of requests.

    Raises:
        CannotEncode: a number does not fit into the character set of *work*.
    """
    _accession(work, accessions)
    _forget(work, removed=_ISSUERS, emptied=_IDS)

    def attributes(item: Identifier) -> None:
        _accession(item, accessions)
        # Of Type 1C and 3 there: absent, not empty (PS3.3 10.6).
        _forget(item, removed=(*_IDS, *_ISSUERS), emptied=())

    def referenced(item: Identifier) -> None:
        _accession(item, accessions)
        _forget(item, removed=_ISSUERS, emptied=_IDS)

    _each_item(work, _REQUEST_ATTRIBUTES, attributes)
    _each_item(work, _REFERENCED_REQUESTS, referenced)


def _accession(holder: Identifier, accessions: Mapping[str, Shown]) -> None:
    number = holder.text(_ACCESSION_NUMBER)
    if not number:
        return
    local = accessions.get(number, _EMPTY)
    if local.number == number and not local.issuer.is_named:
        return
    put(holder, _ACCESSION_NUMBER, local.number)
    issuer = local.issuer if local.number else Domain()
    put_items(holder, _ACCESSION_ISSUER, issuer_items(issuer, holder.specific_character_set))


def _forget(holder: Identifier, removed: tuple[int, ...], emptied: tuple[int, ...]) -> None:
    for tag in removed:
        holder.remove(tag)
    for tag in emptied:
        put(holder, tag, "")


def _each_item(work: Identifier, tag: int, change: Callable[[Identifier], None]) -> None:
    """Change copies of a sequence's items; one in which nothing is left goes."""
    items = work.items(tag)
    if not items:
        return
    changed = [item.copy() for item in items]
    for item in changed:
        change(item)
    put_items(work, tag, [item for item in changed if len(item)])


# ---------------------------------------------------------------- local names


def map_descriptions(work: Identifier, local: Mapping[str, str]) -> None:
    """Give studies and procedures their local names.

    Raises:
        CannotEncode: one does not fit into the character set of *work*.
    """

    def name(holder: Identifier, tags: tuple[int, ...]) -> None:
        for tag in tags:
            text = holder.text(tag)
            if text and text in local:
                put(holder, tag, local[text])

    name(work, _DESCRIPTIONS)
    for tag in _REQUESTS:
        _each_item(work, tag, lambda item: name(item, (_REQUESTED_PROCEDURE_DESCRIPTION,)))


def map_codes(work: Identifier, local: Mapping[tuple[str, str], Code]) -> None:
    """Give procedures their local codes.

    Raises:
        CannotEncode: one does not fit into the character set of *work*.
    """

    def code(holder: Identifier, tags: tuple[int, ...]) -> None:
        for tag in tags:
            items = [_mapped(item, local) for item in holder.items(tag)]
            if items:
                put_items(holder, tag, items)

    code(work, _CODES)
    for tag in _REQUESTS:
        _each_item(work, tag, lambda item: code(item, (_REQUESTED_PROCEDURE_CODES,)))


def _mapped(item: Identifier, local: Mapping[tuple[str, str], Code]) -> Identifier:
    value = item.text(_CODE_VALUE) or item.text(_LONG_CODE_VALUE)
    new = local.get((value, item.text(_CODING_SCHEME)))
    if new is None:
        return item
    made = Identifier(inherited=item.specific_character_set)
    fits = len(new.value) <= _LONGEST_CODE_VALUE
    put(made, _CODE_VALUE if fits else _LONG_CODE_VALUE, new.value)
    put(made, _CODING_SCHEME, new.scheme)
    put(made, _CODE_MEANING, new.meaning)
    return made
