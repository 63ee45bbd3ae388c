"""An ID has the domain that its data set names, else its source's; one domain is one value."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.dataset.header import InstanceHeader
from dicomproxy.dataset.identifier import Identifier
from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.identity.domains import (
    ISSUER_OF_PATIENT_ID,
    ISSUER_OF_PATIENT_ID_QUALIFIERS_SEQUENCE,
    OTHER_PATIENT_IDS_SEQUENCE,
    UNIVERSAL_ENTITY_ID,
    UNIVERSAL_ENTITY_ID_TYPE,
    Domains,
    issuer_of,
    resolve,
)
from tests.sentinel import PATIENT_ID

PATIENT_ID_TAG = 0x00100020

HOSPITAL = Domain("HOSPITAL", "1.2.1", "ISO")
NORTH = Domain("NORTH", "1.2.2", "ISO")
SOUTH = Domain("SOUTH")
OID_ONLY = Domain("", "1.2.4", "ISO")

DOMAINS = Domains(
    HOSPITAL,
    {"north": NORTH, "south": SOUTH, "sister": Domain(), "loose": NORTH},
    ignore_issuers=["loose"],
)


def identifier(
    *ids: str, namespace: str = "", universal_id: str = "", kind: str = "ISO"
) -> Identifier:
    made = Identifier()
    made.set_text(PATIENT_ID_TAG, ids)
    if namespace:
        made.set_text(ISSUER_OF_PATIENT_ID, namespace)
    if universal_id:
        item = Identifier()
        item.set_text(UNIVERSAL_ENTITY_ID, universal_id)
        if kind:
            item.set_text(UNIVERSAL_ENTITY_ID_TYPE, kind)
        made.set_items(ISSUER_OF_PATIENT_ID_QUALIFIERS_SEQUENCE, [item])
    return made


def header(patient_id: str, namespace: str = "", universal_id: str = "") -> InstanceHeader:
    made = InstanceHeader("1.2", "1.3", "1.4", "1.5", patient_id, namespace, "", "")
    kind = "ISO" if universal_id else ""
    return replace(made, issuer_universal_id=universal_id, issuer_universal_id_type=kind)


@pytest.mark.parametrize(
    ("source", "namespace", "universal_id", "expected"),
    [
        ("local", "", "", HOSPITAL),
        ("north", "", "", NORTH),
        ("sister", "", "", HOSPITAL),
        ("north", "NORTH", "", NORTH),
        ("north", "", "1.2.2", NORTH),
        ("north", "another spelling", "1.2.2", NORTH),  # the universal ID decides
        ("north", "NORTH", "1.9.9", Domain("NORTH", "1.9.9", "ISO")),
        ("north", "SOUTH", "", SOUTH),
        ("north", "HOSPITAL", "", HOSPITAL),
        ("north", "ELSEWHERE", "", Domain("ELSEWHERE")),
        ("sister", "ELSEWHERE", "", Domain("ELSEWHERE")),
        ("loose", "ELSEWHERE", "", NORTH),
    ],
)
def test_issuer_in_the_data_set_counts_for_more_than_the_configured_one(
    source: str, namespace: str, universal_id: str, expected: Domain
) -> None:
    """A named issuer is believed and comes out as configured; without one the source's counts."""
    answer = identifier(PATIENT_ID, namespace=namespace, universal_id=universal_id)

    assert DOMAINS.patient_of(answer, source) == PatientId(PATIENT_ID, expected)
    assert DOMAINS.patient_of_header(header(PATIENT_ID, namespace, universal_id), source) == (
        PatientId(PATIENT_ID, expected)
    )


def test_type_of_a_universal_id_counts_where_both_name_one() -> None:
    """An OID and a UUID of the same text are two domains; a type left out is no difference."""
    other = identifier(PATIENT_ID, universal_id="1.2.2", kind="UUID")
    untyped = identifier(PATIENT_ID, universal_id="1.2.2", kind="")

    assert DOMAINS.patient_of(other, "north") != PatientId(PATIENT_ID, NORTH)
    assert DOMAINS.patient_of(untyped, "north") == PatientId(PATIENT_ID, NORTH)


@pytest.mark.parametrize("ids", [(), ("",), (PATIENT_ID, "other"), (PATIENT_ID, "")])
def test_answer_without_exactly_one_id_is_nobodys(ids: tuple[str, ...]) -> None:
    """No ID and two IDs are both no patient."""
    assert DOMAINS.patient_of(identifier(*ids), "north") is None


def test_header_without_an_id_is_nobodys() -> None:
    """An instance that does not say whose it is has no patient."""
    assert DOMAINS.patient_of_header(header(""), "north") is None


def test_site_without_domains_has_only_one() -> None:
    """Where nothing is configured, an issuer can be compared with nothing and does not count."""
    domains = Domains(Domain(), {"north": Domain()})

    assert domains.patient_of(identifier(PATIENT_ID, namespace="ANY"), "north") == PatientId(
        PATIENT_ID
    )
    assert domains.shares_local("north")


def test_source_shares_the_local_domain_if_it_has_none_or_the_same() -> None:
    """Which sources number patients as the site does is decided by domains, not by spelling."""
    domains = Domains(HOSPITAL, {"a": Domain(), "b": Domain("HOSPITAL"), "c": NORTH})

    assert [name for name in ("a", "b", "c") if domains.shares_local(name)] == ["a", "b"]
    assert domains.of("b") == HOSPITAL


def test_one_domain_under_two_spellings_is_one_value() -> None:
    """Two sources of one domain have equal domains, so that what is known of one serves both."""
    domains = Domains(HOSPITAL, {"a": NORTH, "b": Domain("NORTH"), "c": Domain("", "1.2.2")})

    assert domains.of("a") == domains.of("b") == domains.of("c") == NORTH
    assert list(domains) == [HOSPITAL, NORTH]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("local", HOSPITAL),
        ("north", NORTH),
        ("sister", HOSPITAL),
        ("SOUTH", SOUTH),
        ("1.2.2", NORTH),
        ("", None),
        ("nowhere", None),
    ],
)
def test_domain_has_the_names_that_a_table_may_use(name: str, expected: Domain | None) -> None:
    """A domain is called by a source's name, its namespace or its universal ID."""
    assert DOMAINS.named(name) == expected


def test_ids_are_known_at_every_source_of_their_domain() -> None:
    """What is remembered by source and ID can be forgotten for a person."""
    gone = [PatientId(PATIENT_ID, HOSPITAL), PatientId("N1", Domain("NORTH")), PatientId("X")]

    assert DOMAINS.at_sources(gone) == {("sister", PATIENT_ID), ("north", "N1"), ("loose", "N1")}


def test_other_ids_are_read_with_their_issuers() -> None:
    """Other Patient IDs count only with an issuer, each once, in the domain as configured."""
    answer = identifier(PATIENT_ID)
    answer.set_items(
        OTHER_PATIENT_IDS_SEQUENCE,
        [
            identifier("N1", namespace="NORTH"),
            identifier("N1", universal_id="1.2.2"),
            identifier("X1"),
            identifier("S1", "S2", namespace="SOUTH"),
        ],
    )
    assert DOMAINS.other_ids_of(answer) == (PatientId("N1", NORTH),)


def test_spaces_around_an_id_mean_nothing() -> None:
    """An ID is the same with the padding that some peers send."""
    assert DOMAINS.canonical_id(PatientId(f" {PATIENT_ID} ", Domain("NORTH"))) == PatientId(
        PATIENT_ID, NORTH
    )


DOMAIN = st.builds(
    Domain,
    namespace=st.sampled_from(["", "A", "B"]),
    universal_id=st.sampled_from(["", "1.1", "1.2"]),
    universal_id_type=st.sampled_from(["", "ISO", "iso"]),
)


@given(DOMAIN, DOMAIN)
def test_resolving_never_takes_a_contradicting_issuer_for_the_default(
    named: Domain, default: Domain
) -> None:
    """What comes out is the default or the named one, and the default only if nothing differs."""
    resolved = resolve(named, default)

    assert resolved in (named, default)
    if named.is_named and default.is_named:
        assert (resolved == default) == (named.matches(default) or named == default)


@given(DOMAIN, st.lists(DOMAIN, max_size=3), DOMAIN)
def test_canonical_domains_stay_as_they_are(
    local: Domain, others: list[Domain], asked: Domain
) -> None:
    """Putting a domain in its configured form twice is the same as once."""
    domains = Domains(local, {f"s{number}": domain for number, domain in enumerate(others)})

    assert domains.canonical(domains.canonical(asked)) == domains.canonical(asked)
    for number in range(len(others)):
        assert domains.canonical(domains.of(f"s{number}")) == domains.of(f"s{number}")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("A", "1.2", "ISO"), ("B", "1.2", "iso"), True),
        (("", "1.2", "ISO"), ("", "1.2", ""), True),
        (("A", "1.2", "ISO"), ("A", "1.20", "ISO"), False),
        (("", "1.2", "ISO"), ("", "1.2", "DNS"), False),
        (("", "AB-cd", "UUID"), ("", "ab-CD", "guid"), True),
        (("", "PIX.example", "DNS"), ("", "pix.Example", ""), True),
        (("", "urn:A", "URI"), ("", "urn:a", "URI"), False),
        (("A", "", ""), ("a", "", ""), False),
        (("A", "1.2", "ISO"), ("A", "", ""), True),
        (("", "", ""), ("", "", ""), False),
    ],
)
def test_domains_are_compared_as_their_types_are_written(
    one: tuple[str, str, str], other: tuple[str, str, str], same: bool
) -> None:
    """A manager that writes iso, or a UUID in capitals, means the same domain."""
    assert Domain(*one).matches(Domain(*other)) is same
    assert Domain(*other).matches(Domain(*one)) is same


def test_issuer_is_read_whole() -> None:
    """Namespace and qualifiers come from where the data set has them; none is no domain."""
    named = identifier(PATIENT_ID, namespace="N", universal_id="1.2", kind="ISO")

    assert issuer_of(named) == Domain("N", "1.2", "ISO")
    assert issuer_of(identifier(PATIENT_ID)) == Domain()
    assert not issuer_of(identifier(PATIENT_ID)).is_named
