"""A file becomes settings, or every fault in it with file, line, path, found and expected."""

from __future__ import annotations

import json
import os
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dicomproxy.config import ConfigError, Fault, Settings, load, loads
from dicomproxy.config.loader import MAX_FAULTS

MINIMAL = """\
proxy: {ae_title: DICOMPROXY}
local: {ae_title: LOCALPACS, host: 10.0.0.5, port: 104}
cache: {directory: /var/cache/dicomproxy, max_size: 200GB}
"""
NORTH = "{name: north, type: dimse, ae_title: NORTHPACS, host: 10.9.0.4, port: 104}"


def faults_of(text: str) -> list[Fault]:
    with pytest.raises(ConfigError) as caught:
        loads(text, "site.yaml")
    return caught.value.faults


def test_defaults_are_those_promised() -> None:
    """What a file leaves out has the documented default, converted like a value."""
    settings = loads(MINIMAL)

    assert settings.proxy.host == "0.0.0.0"
    assert settings.proxy.port == 11112
    assert settings.proxy.aliases == ()
    assert settings.proxy.pending_interval == 5.0
    assert settings.proxy.max_associations == 200
    assert settings.proxy.timers.idle == 600.0
    assert settings.proxy.limits.max_pdu == 262_144
    assert settings.local.deliver == "relay"
    assert settings.local.calling_ae_title == "workstation"
    assert settings.local.query_timeout == 10.0
    assert settings.local.senders == ("LOCALPACS",)
    assert settings.cache.memory_spool == 64_000_000
    assert settings.retrieve.finish_abandoned is False
    assert settings.web.port == 8080
    assert settings.log.level == "info"
    assert settings.state_directory == Path("/var/cache/dicomproxy/state")
    assert settings.audit_file == Path("/var/cache/dicomproxy/state/audit.jsonl")


def test_stable_keys_load() -> None:
    """A file with every stable key that this version has is taken, each value converted."""
    settings = loads(
        """\
proxy: {ae_title: DICOMPROXY, host: 0.0.0.0, port: 11112, aliases: [LOCALPACS],
        pending_interval: 2s, max_associations: 50}
local: {ae_title: LOCALPACS, host: 10.0.0.5, port: 104, deliver: proxy,
        calling_ae_title: proxy, query_timeout: 10s, store_from: [LOCALPACS, 10.0.0.5]}
workstations:
  - {ae_title: READING1, host: 10.0.1.21, port: 11113, sources: [north],
     allow_from: [10.0.1.0/24], deliver_as: LOCALPACS, associations: 2, query_budget: 5s,
     availability: NEARLINE, charset: ISO_IR 100}
callers:
  - {ae_title: CT1, allow_from: 10.0.2.0/24}
sources:
  - {name: north, type: dimse, ae_title: NORTHPACS, host: 10.9.0.4, port: 104, retrieve: c-get,
     query_timeout: 5s, connect_timeout: 3s, first_instance_timeout: 300s, stall_timeout: 60s,
     parallel_associations: 4, calling_ae_title: DICOMPROXY, store_from: NORTHSEND,
     accept: [ExplicitVRLittleEndian, 1.2.840.10008.1.2]}
cache: {directory: /var/cache/dicomproxy, max_size: 200GB}
retrieve: {finish_abandoned: true}
web: {host: 127.0.0.1, port: 8080}
log: {level: info, format: json}
"""
    )

    (north,) = settings.sources
    (reading,) = settings.workstations
    assert north.retrieve == "c-get"
    assert north.senders == ("NORTHSEND",)
    assert north.accept == ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2")
    assert reading.allow_from == (ip_network("10.0.1.0/24"),)
    assert reading.charset == ("ISO_IR 100",)
    assert settings.cache.max_size == 200 * 10**9


def test_settings_do_not_change() -> None:
    """What was read stays as it was read."""
    settings = loads(MINIMAL)

    with pytest.raises(ValidationError):
        settings.proxy.port = 1  # type: ignore[misc]


def test_blank_sections_count_as_not_given() -> None:
    """A section whose keys are all commented out is an empty one."""
    blank = "sources:\nworkstations:\ncallers:\nweb:\nlog:\nretrieve:\nstate:\naudit:\n"

    assert loads(MINIMAL + blank) == loads(MINIMAL)


@pytest.mark.parametrize(
    ("text", "line", "path", "found", "expected"),
    [
        ("", 1, "proxy", "nothing", "a mapping with keys such as ae_title"),
        ("proxy: {}\n", 1, "proxy.ae_title", "nothing", "an AE title"),
        ("- a\n", 1, "", "a list", "a mapping with keys such as proxy, local"),
        ("just text\n", 1, "", "'just text'", "a mapping"),
        (MINIMAL + "web: []\n", 4, "web", "a list", "a mapping of host, port"),
        (MINIMAL + "web: {port: 22:22}\n", 4, "web.port", "'22:22'", "a port"),
        (MINIMAL + "web: {port: }\n", 4, "web.port", "nothing", "a port"),
        (MINIMAL + "retreive: {}\n", 4, "retreive", "the key retreive", "a key such as retrieve"),
        (MINIMAL + "zzz: {}\n", 4, "zzz", "the key zzz", "one of proxy, local"),
        (MINIMAL + "log: {level: INFO}\n", 4, "log.level", "'INFO'", "did you mean info?"),
        (MINIMAL + "log: {}\nlog: {}\n", 5, "log", "the key log a second time", "line 4"),
        (MINIMAL + "sources: x\n", 4, "sources", "'x'", "a list; each member a mapping"),
        (MINIMAL + "sources: {name: x}\n", 4, "sources", "a mapping", "a list"),
        (MINIMAL + "sources: [x]\n", 4, "sources[0]", "'x'", "a mapping"),
        (MINIMAL + "sources:\n  -\n", 5, "sources[0]", "nothing", "a mapping"),
        (
            MINIMAL + "sources:\n  - name: north\n    ae_title: N\n    host: h\n",
            5,
            "sources[0].port",
            "nothing",
            "a port from 1 to 65535",
        ),
        (
            MINIMAL + "workstations: [{ae_title: R, allow_from: 10.0.0.1/8}]\n",
            4,
            "workstations[0].allow_from",
            "'10.0.0.1/8'",
            "the network is 10.0.0.0/8",
        ),
        (
            MINIMAL + "workstations: [{ae_title: R, allow_from: [10.0.0.0/8, x]}]\n",
            4,
            "workstations[0].allow_from[1]",
            "'x'",
            "an IP address or a network",
        ),
        (
            MINIMAL + "sources: [{name: s, type: dicomweb, url: 'https://s.example/dicom-web'}]\n",
            4,
            "sources[0].type",
            "'dicomweb'",
            "not available in this version",
        ),
        (
            MINIMAL + "sources: [{name: s, type: xds-i, registry_url: 'https://r.example/x'}]\n",
            4,
            "sources[0].type",
            "'xds-i'",
            "not available in this version",
        ),
        *(
            (
                MINIMAL + f"sources:\n  - name: n\n    ae_title: N\n    host: h\n    port: 1\n"
                f"    {key}: {{a: b}}\n",
                9,
                f"sources[0].{key}",
                f"the key {key}",
                "not available in this version",
            )
            for key in ("tls", "auth", "wado_url")
        ),
    ],
)
def test_fault_says_where_what_and_what_instead(
    text: str, line: int, path: str, found: str, expected: str
) -> None:
    """Each fault names file, line, path, what stands there and what belongs there."""
    matching = [fault for fault in faults_of(text) if (fault.line, fault.path) == (line, path)]

    assert [(fault.file, fault.found) for fault in matching] == [("site.yaml", found)]
    assert expected in matching[0].expected


def test_types_of_a_coming_version_are_one_fault_each() -> None:
    """A source refused for its type is not also refused for that type's own keys."""
    text = MINIMAL + "sources: [{name: s, type: dicomweb, url: 'https://s.example/', auth: x}]\n"

    assert [fault.path for fault in faults_of(text)] == ["sources[0].type"]


def test_every_fault_is_found_in_one_run() -> None:
    """Faults of YAML, of values and between keys are told together, in file order."""
    text = """\
proxy: {ae_title: DICOMPROXY, aliases: DICOMPROXY}
local: {ae_title: LOCALPACS, host: 10.0.0.5, port: 70000}
workstations:
  - {ae_title: READING1, sources: nort}
  - {ae_title: READING1, charset: NO}
sources:
  - {name: north, ae_title: NORTHPACS, host: h, port: 104, port: 105}
cache: {directory: /c, max_size: lots}
"""

    assert [(fault.line, fault.path) for fault in faults_of(text)] == [
        (1, "proxy.aliases"),
        (2, "local.port"),
        (4, "workstations[0].sources"),
        (5, "workstations[1].ae_title"),
        (5, "workstations[1].charset"),
        (7, "sources[0].port"),
        (8, "cache.max_size"),
    ]


def test_a_file_that_breaks_off_does_not_miss_what_follows() -> None:
    """After a syntax fault nothing is called missing, since it may stand below."""
    faults = faults_of("proxy:\n  ae_title: A\n port: 1\nlocal: {}\n")

    assert [fault.line for fault in faults] == [3]


def test_fault_reads_as_one_line() -> None:
    """The line shown has place, path, what was found and what was expected."""
    (fault,) = faults_of(MINIMAL + "web: {port: 22:22}\n")

    assert str(fault) == (
        "site.yaml:4:13: web.port: found '22:22', "
        "expected a port (0 takes a free one), from 0 to 65535"
    )


SOURCE = "sources: [{name: n, ae_title: N, host: h, port: 104, "


@pytest.mark.parametrize(
    "text",
    [
        SOURCE + "password: hunter2}]\n",
        SOURCE + "auth: {user: u, password: hunter2}}]\n",
        SOURCE + "tls: hunter2}]\n",
        SOURCE + "retreive: hunter2}]\n",
        SOURCE + "auth: *hunter2}]\n",
        SOURCE + "auth: !hunter2 x}]\n",
        SOURCE + "auth: 'hunter2}]\n",
        "sources: [{name: n, type: dicomweb, url: 'https://u:hunter2@h/', auth: hunter2}]\n",
        "sources: [{name: n, ae_title: N, host: 'https://u:hunter2@h/', port: 1}]\n",
        "password: hunter2\n",
        "sources: [{name: n, ae_title: N, host: h, port: 1, auth: hunter2, auth: hunter2}]\n",
    ],
)
def test_secrets_are_not_shown(text: str) -> None:
    """The value of a key that is unknown, or refused, or a URL with a password is not repeated."""
    faults = faults_of(MINIMAL + text)

    assert faults
    assert "hunter2" not in " ".join(map(str, faults))


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    """A file means the same wherever it is read from."""
    file = tmp_path / "site.yaml"
    text = MINIMAL.replace("/var/cache/dicomproxy", "cache") + "audit: {file: log/audit.jsonl}\n"
    file.write_text(text)

    settings = load(file)

    assert settings.cache.directory == tmp_path / "cache"
    assert settings.state_directory == tmp_path / "cache" / "state"
    assert settings.audit_file == tmp_path / "log" / "audit.jsonl"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"\x7fELF\x02\x01\x01\x00\xff\xfe", "bytes that are not UTF-8"),
        (b"a: 1\nb: \x00\n", "the character U+0000, which YAML does not allow"),
        ("proxy: {}".encode("utf-16"), "bytes that are not UTF-8"),
        (b"# " + b"x" * 1024 * 1024, "more than 1 MiB"),
    ],
    ids=["binary", "nul", "utf-16", "huge"],
)
def test_what_is_no_configuration_is_told(tmp_path: Path, content: bytes, found: str) -> None:
    """A file that cannot be a configuration is one fault that says why."""
    file = tmp_path / "site.yaml"
    file.write_bytes(content)

    with pytest.raises(ConfigError) as caught:
        load(file)

    assert [fault.found for fault in caught.value.faults if fault.path == ""] == [found]


def test_byte_order_mark_is_allowed(tmp_path: Path) -> None:
    """Editors on Windows write one."""
    file = tmp_path / "site.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())

    assert load(file).proxy.ae_title == "DICOMPROXY"


def test_missing_file_directory_and_pipe_are_told(tmp_path: Path) -> None:
    """What is not a file is told at once, not waited for."""
    os.mkfifo(tmp_path / "pipe")
    found = {}
    for name in ("nowhere.yaml", ".", "pipe"):
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / name)
        found[name] = [(fault.line, fault.found) for fault in caught.value.faults]

    assert found == {
        "nowhere.yaml": [(0, "no such file")],
        ".": [(0, "a directory")],
        "pipe": [(0, "something that is not a file")],
    }


def test_number_of_faults_shown_is_bounded() -> None:
    """A file full of faults is cut off, and says so."""
    faults = faults_of(MINIMAL + "".join(f"k{number}: x\n" for number in range(1000)))

    assert len(faults) <= MAX_FAULTS + 1


_WORDS = st.sampled_from(
    ["NO", "22:22", "", "north", "10.0.0.5", "0", "-1", "5s", "200GB", "DICOMPROXY", "*", "[", "{a"]
)
_SCALAR: st.SearchStrategy[Any] = _WORDS | st.text(max_size=5)
_KEYS = st.sampled_from(
    [
        "proxy",
        "local",
        "sources",
        "workstations",
        "callers",
        "cache",
        "ae_title",
        "host",
        "port",
        "name",
        "aliases",
        "type",
        "breaker",
        "low_watermark",
        "allow_from",
        "deliver_as",
        "x",
    ]
)
_TREES = st.recursive(
    _SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=5),
    max_leaves=20,
)


@given(_TREES)
def test_any_shape_is_settings_or_faults(tree: Any) -> None:
    """Whatever stands where, the outcome is settings or a list of faults."""
    text = json.dumps(tree)
    try:
        settings: Settings | None = loads(text)
    except ConfigError as error:
        settings = None
        assert_places(error.faults, text)
    assert settings is None or settings.proxy.ae_title


def assert_places(faults: list[Fault], text: str) -> None:
    lines = text.count("\n") + 2
    assert faults
    assert all(1 <= fault.line <= lines for fault in faults)
