"""Domains, cross-references and accession policies: read whole, refused where they contradict."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicomproxy.config import ConfigError, Settings, load, loads
from dicomproxy.dataset.patient import Domain

PROXY = "proxy: {ae_title: DICOMPROXY}\n"
CACHE = "cache: {directory: /c, max_size: 1GB}\n"
LOCAL = "local: {ae_title: LOCALPACS, host: 10.0.0.5, port: 104, patient_id_issuer: HOSPITAL}\n"
NO_ISSUER = LOCAL.replace(", patient_id_issuer: HOSPITAL", "")
WITH_OID = LOCAL.replace("HOSPITAL", "{namespace: HOSPITAL, universal_id: 1.2.3}")
TABLE = "cross_references: [{name: regional, type: table, file: ids.csv}]\n"
PIX = "cross_references: [{name: mpi, type: pix, host: h, port: 3700}]\n"
PIXM = "cross_references: [{name: mpi, type: pixm, url: 'https://mpi.example/fhir'}]\n"


def text(*, local: str = LOCAL, source: str = "", rest: str = "") -> str:
    entry = f"{{name: north, ae_title: NORTH, host: h, port: 104{source}}}"
    return f"{PROXY}{CACHE}{local}sources: [{entry}]\n{rest}"


def read(*, local: str = LOCAL, source: str = "", rest: str = "") -> Settings:
    return loads(text(local=local, source=source, rest=rest))


def test_everything_has_a_default() -> None:
    """A file that says nothing about identity has one domain, and numbers that are minted."""
    settings = read(local=NO_ISSUER)

    source = settings.sources[0]
    assert not settings.local.patient_id_issuer.is_named
    assert not source.patient_id_issuer.is_named
    assert source.identity.cross_reference is None
    assert (source.identity.issuer, source.identity.unverified) == ("read", "show")
    assert source.identity.accession == "mint"
    assert settings.cross_references == ()
    assert (settings.identity.remember, settings.identity.remember_none) == (300, 30)
    # One that hangs leaves time for the next, and for the source, within a query's budget.
    assert settings.identity.timeout == 3


@pytest.mark.parametrize(
    ("written", "domain"),
    [
        ("HOSPITAL", Domain("HOSPITAL")),
        ("{namespace: HOSPITAL}", Domain("HOSPITAL")),
        ("{universal_id: 1.2.3}", Domain("", "1.2.3", "ISO")),
        (
            "{namespace: H, universal_id: h.example, universal_id_type: DNS}",
            Domain("H", "h.example", "DNS"),
        ),
        ("", Domain()),
    ],
)
def test_domain_is_a_namespace_or_a_mapping(written: str, domain: Domain) -> None:
    """A text is a namespace; universal IDs are written as a mapping; nothing is no domain."""
    found = read(local=LOCAL.replace("HOSPITAL", written)).local.patient_id_issuer

    assert found.domain == domain
    assert found.is_named == domain.is_named


def test_cross_references_are_read_with_their_keys() -> None:
    """Each type has its keys, and a source names whom it asks, in order."""
    settings = read(
        source=", patient_id_issuer: NORTH, identity: {cross_reference: [regional, mpi]}",
        rest="cross_references:\n"
        "  - {name: regional, type: table, file: ids.csv}\n"
        "  - {name: mpi, type: pix, host: h, port: 3700, several_ids: all, timeout: 2s}\n",
    )

    table, pix = settings.cross_references
    assert (table.type, table.file) == ("table", Path("ids.csv"))
    assert (pix.host, pix.port, pix.several_ids, pix.timeout) == ("h", 3700, "all", 2)
    assert settings.sources[0].identity.cross_reference == ("regional", "mpi")


def test_files_are_relative_to_the_configuration(tmp_path: Path) -> None:
    """A table, certificates and secrets beside the file are found from anywhere."""
    file = tmp_path / "site.yaml"
    file.write_text(
        text(
            local=WITH_OID,
            source=", patient_id_issuer: {universal_id: 1.2.4}, identity: {cross_reference: fhir}",
            rest="cross_references:\n"
            "  - {name: regional, type: table, file: ids.csv}\n"
            "  - {name: fhir, type: pixm, url: 'https://h/fhir', authorization_file: secret,\n"
            "     tls: {ca_file: ca.pem}}\n",
        )
    )
    table, pixm = load(file).cross_references

    assert table.file == tmp_path / "ids.csv"
    assert pixm.authorization_file == tmp_path / "secret"
    assert pixm.tls.ca_file == tmp_path / "ca.pem"
    assert pixm.tls.key_file is None


@pytest.mark.parametrize(
    ("written", "path", "found", "expected"),
    [
        (
            text(local=NO_ISSUER, source=", patient_id_issuer: NORTH"),
            "sources[0].patient_id_issuer",
            "while the local PACS has none",
            "local.patient_id_issuer",
        ),
        (
            text(source=", patient_id_issuer: NORTH"),
            "sources[0].patient_id_issuer",
            "an issuer other than the local one",
            "identity.cross_reference",
        ),
        (
            text(source=", patient_id_issuer: NORTH, identity: {cross_reference: same}"),
            "sources[0].identity.cross_reference",
            "same, while the source has an issuer other",
            "a table, PIX or PIXm",
        ),
        (
            text(
                source=", patient_id_issuer: NORTH, identity: {cross_reference: [regionl]}",
                rest=TABLE,
            ),
            "sources[0].identity.cross_reference[0]",
            "'regionl'",
            "did you mean regional?",
        ),
        (
            text(source=", identity: {cross_reference: regional}", rest=TABLE),
            "sources[0].identity.cross_reference",
            "type table for a source that has the local domain",
            "a patient_id_issuer of the source's own",
        ),
        (
            text(
                local=WITH_OID,
                source=", patient_id_issuer: NORTH, identity: {cross_reference: mpi}",
                rest=PIXM,
            ),
            "sources[0].identity.cross_reference",
            "not both known by a universal_id",
            "a universal_id for",
        ),
        (
            text(
                local=LOCAL.replace("HOSPITAL", "{namespace: PACS, universal_id: 1.2.3}"),
                source=", patient_id_issuer: {namespace: PACS, universal_id: 1.2.4},"
                " identity: {cross_reference: regional}",
                rest=TABLE,
            ),
            "sources[0].patient_id_issuer",
            "the namespace of another domain",
            "a namespace of its own, or none",
        ),
        (
            text(
                local=WITH_OID,
                source=", patient_id_issuer: {universal_id: 1.2.4},"
                " identity: {cross_reference: mpi}",
                rest=PIXM.replace("https", "http").replace("}]", ", authorization_file: f}]"),
            ),
            "cross_references[0].authorization_file",
            "a secret over http",
            "an https url",
        ),
        (
            text(rest=PIX.replace("}]", ", tls: {ca_file: ca.pem}}]")),
            "cross_references[0].tls",
            "tls that is not enabled",
            "enabled: true, or false",
        ),
        (
            text(rest=PIX.replace("}]", ", tls: {enabled: true, key_file: k.pem}}]")),
            "cross_references[0].tls.key_file",
            "a key without its certificate",
            "certificate_file",
        ),
        (
            text(rest=PIXM.replace("https", "http").replace("}]", ", tls: {enabled: true}}]")),
            "cross_references[0].tls",
            "tls with an http url",
            "an https url",
        ),
        (
            text(rest="identity: {remember: 7d}\n"),
            "identity.remember",
            "'7d'",
            "at most 1h",
        ),
        (
            text(local=LOCAL.replace("HOSPITAL", "{universal_id_type: ISO}")),
            "local.patient_id_issuer",
            "a domain without a name",
            "namespace, universal_id or both",
        ),
        (
            text(local=LOCAL.replace("HOSPITAL", "{universal_id: hospital}")),
            "local.patient_id_issuer.universal_id",
            "'hospital'",
            "an OID",
        ),
        (
            text(local=LOCAL.replace("HOSPITAL", "[HOSPITAL]")),
            "local.patient_id_issuer",
            "a list",
            "or its namespace alone",
        ),
        (
            text(local=LOCAL.replace("HOSPITAL", "'HOSP\\\\ITAL'")),
            "local.patient_id_issuer.namespace",
            "HOSP",
            "no backslash",
        ),
        (
            text(source=", identity: {accession: prefix}"),
            "sources[0].identity.accession",
            "prefix without a prefix",
            "accession_prefix as well",
        ),
        (
            text(source=", identity: {accession: hide}"),
            "sources[0].identity.accession",
            "'hide'",
            "mint or prefix or empty or keep",
        ),
        (
            text(rest="cross_references: [{name: same, type: table, file: f}]\n"),
            "cross_references[0].name",
            "'same'",
            "there without being listed",
        ),
        (
            text(rest=TABLE.replace("]", ", {name: regional, type: pix, host: h, port: 1}]")),
            "cross_references[1].name",
            "'regional' a second time",
            "it first stands in line 5",
        ),
        (
            text(rest="cross_references: [{name: r, type: table}]\n"),
            "cross_references[0]",
            "type table without file",
            "file as well",
        ),
        (
            text(rest="cross_references: [{name: r, type: pix, host: h}]\n"),
            "cross_references[0]",
            "type pix without port",
            "port as well",
        ),
        (
            text(rest="cross_references: [{name: r, type: pixm}]\n"),
            "cross_references[0]",
            "type pixm without url",
            "url as well",
        ),
        (
            text(rest=PIX.replace("3700", "3700, url: 'https://h'")),
            "cross_references[0].url",
            "url of type pix",
            "keys of that type alone",
        ),
        (
            text(rest=PIXM.replace("https://mpi", "https://user:secret@mpi")),
            "cross_references[0].url",
            "not shown",
            "without user",
        ),
    ],
)
def test_contradiction_is_a_fault(written: str, path: str, found: str, expected: str) -> None:
    """check says what does not go together, where, and what would."""
    with pytest.raises(ConfigError) as refused:
        loads(written)

    shown = {fault.path: fault for fault in refused.value.faults}
    assert path in shown, str(refused.value)
    assert found in shown[path].found
    assert expected in shown[path].expected


@pytest.mark.parametrize(
    "rest",
    [
        PIX.replace("}]", ", tls: {enabled: true, ca_file: ca.pem}}]"),
        PIX.replace("}]", ", tls: {enabled: false, ca_file: ca.pem}}]"),
        PIX.replace("}]", ", tls: {}}]"),
        PIXM.replace("}]", ", tls: {ca_file: ca.pem}}]"),
        PIXM.replace("https", "http").replace("}]", ", tls: {enabled: false}}]"),
    ],
)
def test_tls_that_is_in_force_or_put_off_is_no_fault(rest: str) -> None:
    """For an https URL it needs no word; where it is off, that was said."""
    read(rest=rest)


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost", "[::1]:80"])
def test_secret_for_a_program_on_this_machine_needs_no_tls(host: str) -> None:
    """Something beside the proxy may put the TLS around it."""
    read(
        local=WITH_OID,
        source=", patient_id_issuer: {universal_id: 1.2.4}, identity: {cross_reference: fhir}",
        rest="cross_references:\n  - {name: fhir, type: pixm, authorization_file: f,"
        f" url: 'http://{host}/fhir'}}\n",
    )


def test_domain_in_another_case_is_one() -> None:
    """A UUID has none: such a source shares the local domain, here as in answers."""
    here, there = (f"{{universal_id: {one}, universal_id_type: UUID}}" for one in ("AB-1", "ab-1"))
    read(local=LOCAL.replace("HOSPITAL", here), source=f", patient_id_issuer: {there}")


def test_domain_written_twice_is_one() -> None:
    """A source whose issuer is the local one, under another spelling, needs no cross-reference."""
    settings = read(local=WITH_OID, source=", patient_id_issuer: HOSPITAL")

    assert settings.sources[0].patient_id_issuer.namespace == "HOSPITAL"
