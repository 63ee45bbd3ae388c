"""Who may send HL7 messages: nobody unless it is said who, and never to no purpose."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import pytest

from dicomproxy.cli import check
from dicomproxy.config import ConfigError, load, loads

REST = "proxy: {ae_title: DICOMPROXY}\ncache: {directory: /c, max_size: 1GB}\n"
NO_ISSUER = REST + "local: {ae_title: LOCALPACS, host: 10.0.0.5, port: 104}\n"
HERE = NO_ISSUER.replace("104}", "104, patient_id_issuer: HOSPITAL}")
SOURCE = "sources: [{name: north, ae_title: NORTH, host: h, port: 104}]\n"


def test_nobody_is_listened_to_unless_asked_for() -> None:
    """A file without the section has no listener."""
    assert loads(HERE).hl7 is None


def test_who_may_call_is_enough() -> None:
    """Everything else has a default: the registered port, plain TCP, bounds."""
    section = loads(f"{HERE}hl7: {{allow_from: 10.0.2.7}}\n").hl7

    assert section is not None
    assert section.allow_from == (ip_network("10.0.2.7/32"),)
    assert (section.host, section.port, section.tls) == ("0.0.0.0", 2575, None)
    assert (section.max_connections, section.max_message) == (20, 1024 * 1024)
    assert (section.frame_timeout, section.idle_timeout) == (30, 3600)
    assert (section.max_waiting, section.max_journal) == (10_000, 64 * 1024 * 1024)


def test_files_are_relative_to_the_configuration(tmp_path: Path) -> None:
    """Certificates beside the file are found from anywhere."""
    file = tmp_path / "site.yaml"
    tls = "{certificate_file: us.pem, ca_file: region.pem}"
    file.write_text(f"{HERE}hl7: {{allow_from: 10.0.2.7, tls: {tls}}}\n")
    section = load(file).hl7

    assert section is not None
    assert section.tls is not None
    assert section.tls.certificate_file == tmp_path / "us.pem"
    assert section.tls.ca_file == tmp_path / "region.pem"
    assert section.tls.key_file is None


@pytest.mark.parametrize(
    ("before", "written", "path", "found", "expected"),
    [
        (HERE, "hl7:", "hl7.allow_from", "nothing", "an IP address or a network"),
        (HERE, "hl7: {port: 1}", "hl7.allow_from", "nothing", "an IP address or a network"),
        (HERE, "hl7: {allow_from: []}", "hl7.allow_from", "a list", "at least one member"),
        (
            HERE,
            "hl7: {allow_from: 10.0.2.7, tls: {key_file: k}}",
            "hl7.tls.certificate_file",
            "nothing",
            "a path",
        ),
        # TLS that was begun and not finished is no plain TCP.
        (
            HERE,
            "hl7: {allow_from: 10.0.2.7, tls: }",
            "hl7.tls.certificate_file",
            "nothing",
            "a path",
        ),
        (
            HERE,
            "hl7: {allow_from: 10.0.2.7, port: 11112}",
            "hl7.port",
            "the port of proxy.port",
            "a port of its own",
        ),
        (
            HERE,
            "hl7: {allow_from: 10.0.2.7, host: localhost, port: 8080}",
            "hl7.port",
            "the port of web.port",
            "a port of its own",
        ),
        (
            HERE,
            "hl7: {allow_from: 10.0.2.7, max_journal: 1MiB}",
            "hl7.max_journal",
            "1MiB",
            "from 32MiB",
        ),
        (
            NO_ISSUER + SOURCE,
            "hl7: {allow_from: 10.0.2.7}",
            "hl7",
            "nothing is configured that its messages are about",
            "local.patient_id_issuer",
        ),
    ],
)
def test_what_is_wrong_is_told(
    before: str, written: str, path: str, found: str, expected: str
) -> None:
    """One fault, at its place, in plain words."""
    with pytest.raises(ConfigError) as raised:
        loads(before + written + "\n")
    (fault,) = raised.value.faults
    assert fault.path == path
    assert found in fault.found
    assert expected in fault.expected


@pytest.mark.parametrize(
    "source",
    [
        SOURCE.replace("104}", "104, identity: {accession: keep}}"),
        SOURCE.replace("104}", "104, coerce: {}}"),
    ],
)
def test_any_word_of_identity_is_enough(source: str) -> None:
    """What is remembered of patients where one ID is valid everywhere is told of as well."""
    assert loads(f"{NO_ISSUER}{source}hl7: {{allow_from: 10.0.2.7}}\n").hl7 is not None


def test_check_says_who_is_listened_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The summary has address, TLS and callers."""
    file = tmp_path / "site.yaml"
    file.write_text(
        f"{HERE}hl7: {{allow_from: [10.0.2.7, 10.9.0.0/24], tls: {{certificate_file: us.pem}}}}\n"
    )

    assert check.run(file) == 0
    assert "on 0.0.0.0:2575, TLS, from 10.0.2.7, 10.9.0.0/24" in capsys.readouterr().out
