"""Patient IDs as HL7 writes them."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.hl7.message import parse
from dicomproxy.hl7.writing import Repeated, segment
from dicomproxy.identity.cx import (
    MOST_IDS,
    UNNAMED,
    UnreadableId,
    authority,
    components,
    read_ids,
)

HEADER = "MSH|^~\\&|A|B|C|D|2024||ADT^A31|1|P|2.5||||||UNICODE UTF-8\r"
DEFAULT = Domain("LOCAL", "1.9", "ISO")


def read(field: str, default: Domain = UNNAMED) -> list[PatientId]:
    return list(read_ids(parse(f"{HEADER}PID|1||{field}\r".encode()), "PID", 3, default))


@pytest.mark.parametrize(
    ("field", "found"),
    [
        ("A^^^N&1.2&ISO^PI", [PatientId("A", Domain("N", "1.2", "ISO"))]),
        ("A^^^&1.2&ISO", [PatientId("A", Domain("", "1.2", "ISO"))]),
        ("A^^^N", [PatientId("A", Domain("N"))]),
        ("A^1^M10^N&&", [PatientId("A", Domain("N"))]),
        ("A", [PatientId("A")]),
        (" A ^^^ N & 1.2 &ISO", [PatientId("A", Domain("N", "1.2", "ISO"))]),
        ('A^^^""&1.2&ISO', [PatientId("A", Domain("", "1.2", "ISO"))]),
        ("A^^^N~B^^^M", [PatientId("A", Domain("N")), PatientId("B", Domain("M"))]),
        ('^^^N~~""^^^N~B^^^M~', [PatientId("B", Domain("M"))]),
        ("", []),
        # An ampersand that its sender forgot to escape does not cut the ID short.
        ("A&B^^^N", [PatientId("A&B", Domain("N"))]),
        (r"A\T\B\S\^^^N\T\M", [PatientId("A&B^", Domain("N&M"))]),
    ],
)
def test_ids_are_read_with_their_domains(field: str, found: list[PatientId]) -> None:
    """Each repetition that holds one; null and empty ones are no ID."""
    assert read(field) == found


def test_an_id_that_names_no_domain_gets_the_one_agreed() -> None:
    """And one that names its own keeps it."""
    assert read("A~B^^^N", DEFAULT) == [PatientId("A", DEFAULT), PatientId("B", Domain("N"))]


@pytest.mark.parametrize("field", ["A\\XFF\\", "A^^^N\\XE9\\&1.2&ISO"])
def test_an_id_that_was_not_decoded_is_none(field: str) -> None:
    """Another one would be taken for it."""
    with pytest.raises(UnreadableId, match="undecoded_id"):
        read(field)


def test_ids_are_bounded() -> None:
    """Nobody has hundreds."""
    assert len(read("~".join(f"A{n}" for n in range(MOST_IDS)))) == MOST_IDS
    with pytest.raises(UnreadableId, match="too_many_ids"):
        read("~".join("A" for _ in range(MOST_IDS + 1)))


@pytest.mark.parametrize(
    ("domain", "written"),
    [
        (Domain("N", "1.2", "ISO"), ("N", "1.2", "ISO")),
        (Domain("", "1.2"), ("", "1.2", "ISO")),
        (Domain("N"), ("N", "", "")),
        (Domain("", "pix.example", "DNS"), ("", "pix.example", "DNS")),
    ],
)
def test_an_authority_has_the_type_of_its_id(domain: Domain, written: tuple[str, ...]) -> None:
    """An OID without a type is one; a namespace alone has none."""
    assert authority(domain) == written


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=12).map(
    str.strip
)


@given(TEXT, TEXT, TEXT)
def test_what_is_written_is_read_again(value: str, namespace: str, oid: str) -> None:
    """Whatever characters ID and authority hold."""
    one = PatientId(value, Domain(namespace, oid, "ISO" if oid else ""))
    assume(value and '""' not in (value, namespace, oid))
    frame = HEADER + segment("PID", "1", "", Repeated([components(one)])) + "\r"
    assert list(read_ids(parse(frame.encode()), "PID", 3)) == [one]
