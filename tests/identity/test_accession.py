"""What becomes of accession numbers: minted, prefixed, emptied or kept, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dicomproxy.dataset.accession import Origin, mint
from dicomproxy.dataset.charset import CannotEncode
from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.patient import Domain
from dicomproxy.identity.accession import (
    ACCESSION_NUMBER as TAG,
)
from dicomproxy.identity.accession import (
    ISSUER_OF_ACCESSION_NUMBER_SEQUENCE,
    AccessionNumbers,
    AccessionPolicy,
    AccessionRule,
    Accessions,
    Shown,
    issuer_items,
)
from dicomproxy.identity.domains import accession_issuer_of
from dicomproxy.state.accessions import AccessionMap
from tests.sentinel import ACCESSION_NUMBER

PROXY = Domain("DICOMPROXY")
RIS = Domain("NORTHRIS", "1.2.3", "ISO")
RULES = {
    "minted": AccessionRule(issuer=RIS),
    "prefixed": AccessionRule(AccessionPolicy.PREFIX, "N-"),
    "emptied": AccessionRule(AccessionPolicy.EMPTY, issuer=RIS),
    "kept": AccessionRule(AccessionPolicy.KEEP, issuer=RIS),
}


class Memory:
    """Assigns the first candidate, and counts how often it is asked."""

    def __init__(self) -> None:
        self.origins: dict[str, Origin] = {}
        self.calls: list[int] = []

    async def assign(self, wanted: Sequence[tuple[Origin, str]]) -> list[str]:
        self.calls.append(len(wanted))
        numbers = [prefix + one.number if prefix else mint(one) for one, prefix in wanted]
        self.origins.update(zip(numbers, (one for one, _ in wanted), strict=True))
        return numbers

    async def find(self, number: str) -> Origin | None:
        return self.origins.get(number)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("minted", Shown(mint(Origin("minted", ACCESSION_NUMBER)), PROXY)),
        ("unconfigured", Shown(mint(Origin("unconfigured", ACCESSION_NUMBER)), PROXY)),
        ("prefixed", Shown(f"N-{ACCESSION_NUMBER}", PROXY)),
        ("emptied", Shown("")),
        ("kept", Shown(ACCESSION_NUMBER, RIS)),
    ],
)
async def test_policy_decides_what_is_shown(source: str, expected: Shown) -> None:
    """Numbers that the proxy makes up are its own; one that is kept has its source's issuer."""
    numbers = AccessionNumbers(Memory(), PROXY, RULES)

    assert await numbers.shown([Origin(source, ACCESSION_NUMBER)]) == [expected]
    assert await numbers.shown([Origin(source, "")]) == [Shown("")]


async def test_issuer_that_an_answer_names_counts() -> None:
    """The configured issuer is for answers that name none."""
    memory, other = Memory(), Domain("OTHER")
    numbers = AccessionNumbers(memory, PROXY, RULES)

    assert await numbers.shown([Origin("kept", "1", other)]) == [Shown("1", other)]
    (minted, silent) = await numbers.shown([Origin("minted", "1", other), Origin("minted", "2")])
    assert memory.origins[minted.number].issuer == other
    assert memory.origins[silent.number].issuer == RIS


async def test_numbers_of_one_query_are_assigned_together() -> None:
    """Mixed policies come back in order, and cost one write at most."""
    memory = Memory()
    numbers = AccessionNumbers(memory, PROXY, RULES)
    origins = [Origin(source, "1") for source in ("kept", "minted", "emptied", "prefixed")]

    shown = await numbers.shown([*origins, Origin("minted", "")])
    assert [one.number for one in shown] == ["1", mint(origins[1]), "", "N-1", ""]
    assert memory.calls == [2]
    assert await numbers.shown([Origin("kept", "1"), Origin("minted", "")]) == [
        Shown("1", RIS),
        Shown(""),
    ]
    assert memory.calls == [2]


async def test_only_numbers_given_out_lead_back(tmp_path: Path) -> None:
    """A number that merely begins like a prefixed one, or is kept, stays here."""
    accessions: Accessions = AccessionMap(tmp_path)
    assert isinstance(accessions, AccessionMap)
    await accessions.start()
    numbers = AccessionNumbers(accessions, PROXY, RULES)
    origins = [Origin(source, ACCESSION_NUMBER) for source in ("minted", "prefixed", "kept")]
    minted, prefixed, kept = await numbers.shown(origins)

    assert await numbers.resolve(minted.number) == Origin("minted", ACCESSION_NUMBER, RIS)
    assert await numbers.resolve(prefixed.number) == origins[1]
    assert await numbers.resolve(kept.number) is None
    assert await numbers.resolve("N-4711") is None
    assert await numbers.resolve("") is None
    await accessions.close()


def test_origin_is_read_with_its_issuer() -> None:
    """Number and issuer come from where an answer has them."""
    numbers = AccessionNumbers(Memory(), PROXY, RULES)
    answer = Identifier()
    answer.set_text(TAG, ACCESSION_NUMBER)
    assert numbers.origin_of(answer, "north") == Origin("north", ACCESSION_NUMBER)
    answer.set_items(ISSUER_OF_ACCESSION_NUMBER_SEQUENCE, issuer_items(RIS))

    assert numbers.origin_of(answer, "north") == Origin("north", ACCESSION_NUMBER, RIS)
    assert numbers.origin_of(Identifier(), "north") == Origin("north", "")


@pytest.mark.parametrize(
    "issuer", [Domain("RIS"), RIS, Domain("", "1.2", "ISO"), Domain("", "h.example", "DNS")]
)
def test_issuer_is_written_as_it_is_read(issuer: Domain) -> None:
    """What goes into the sequence comes out of it, with a type wherever there is an ID."""
    assert accession_issuer_of(issuer_items(issuer)) == issuer


def test_issuer_without_a_name_has_no_item() -> None:
    """Nothing is made up where no issuer is known; an OID is one unless it says otherwise."""
    assert issuer_items(Domain()) == ()
    assert accession_issuer_of(()) == Domain()
    assert accession_issuer_of(issuer_items(Domain("", "1.2"))) == Domain("", "1.2", "ISO")


def test_issuer_is_written_in_the_character_set_of_its_data_set() -> None:
    """A name that does not fit raises, so that another character set can be chosen."""
    issuer = Domain("Röntgen")
    with pytest.raises(CannotEncode):
        issuer_items(issuer)
    answer = Identifier()
    answer.set_text(0x00080005, "ISO_IR 192")
    answer.set_items(ISSUER_OF_ACCESSION_NUMBER_SEQUENCE, issuer_items(issuer, ("ISO_IR 192",)))

    assert accession_issuer_of(answer.items(ISSUER_OF_ACCESSION_NUMBER_SEQUENCE)) == issuer


def test_representation_holds_no_number() -> None:
    """What may end in a log does not show the number."""
    assert ACCESSION_NUMBER not in f"{Shown(ACCESSION_NUMBER)!r}"
