"""Contradictions between keys are faults, also while other keys are wrong."""

from __future__ import annotations

import pytest

from dicomproxy.config import ConfigError, loads

PROXY = "proxy: {ae_title: DICOMPROXY}\n"
LOCAL = "local: {ae_title: LOCALPACS, host: 10.0.0.5, port: 104}\n"
CACHE = "cache: {directory: /c, max_size: 1GB}\n"
BASE = PROXY + LOCAL + CACHE


def source(name: str = "north", title: str = "NORTH", host: str = "h", more: str = "") -> str:
    return f"{{name: {name}, ae_title: {title}, host: {host}, port: 104{more}}}"


@pytest.mark.parametrize(
    ("text", "path", "found", "expected"),
    [
        (
            PROXY.replace("}", ", aliases: [X, DICOMPROXY]}") + LOCAL + CACHE,
            "proxy.aliases[1]",
            "the proxy's own title",
            "titles other than",
        ),
        (
            PROXY.replace("}", ", aliases: [X, X]}") + LOCAL + CACHE,
            "proxy.aliases",
            "a list",
            "each member once",
        ),
        (
            PROXY + LOCAL.replace("LOCALPACS", "DICOMPROXY") + CACHE,
            "local.ae_title",
            "the proxy's own title",
            "proxy.aliases",
        ),
        (
            PROXY + LOCAL.replace("10.0.0.5, port: 104", "localhost, port: 11112") + CACHE,
            "local.port",
            "the proxy's own host and port",
            "another address",
        ),
        (
            BASE + "workstations: [{ae_title: R}, {ae_title: R}]\n",
            "workstations[1].ae_title",
            "'R' a second time",
            "it first stands in line 4",
        ),
        (
            BASE + "workstations: [{ae_title: R}]\ncallers: [{ae_title: R}]\n",
            "callers[0].ae_title",
            "'R' a second time",
            "it first stands in line 4",
        ),
        (
            BASE + "workstations: [{ae_title: DICOMPROXY}]\n",
            "workstations[0].ae_title",
            "the proxy's own title",
            "another one",
        ),
        (
            BASE + "workstations: [{ae_title: R, host: h}]\n",
            "workstations[0].host",
            "a host without a port",
            "both, or neither",
        ),
        (
            BASE + "workstations: [{ae_title: R, port: 1}]\n",
            "workstations[0].port",
            "a port without a host",
            "both, or neither",
        ),
        (
            BASE + "workstations: [{ae_title: R, deliver_as: X}]\n",
            "workstations[0].deliver_as",
            "deliver_as of a workstation without host and port",
            "host and port",
        ),
        (
            BASE + "workstations: [{ae_title: R, host: 127.0.0.1, port: 11112}]\n",
            "workstations[0].port",
            "the proxy's own host and port",
            "another address",
        ),
        (
            BASE + f"sources: [{source()}]\nworkstations: [{{ae_title: R, sources: [nort]}}]\n",
            "workstations[0].sources[0]",
            "'nort'",
            "did you mean north?",
        ),
        (
            BASE + "workstations: [{ae_title: R, sources: [north]}]\n",
            "workstations[0].sources[0]",
            "'north'",
            "the name of one of the sources",
        ),
        (
            BASE + f"sources: [{source()}, {source(title='OTHER')}]\n",
            "sources[1].name",
            "'north' a second time",
            "it first stands in line 4",
        ),
        (
            BASE + f"sources: [{source()}, {source(name='south')}]\n",
            "sources[1].ae_title",
            "the title, host and port of sources[0]",
            "each archive once",
        ),
        (
            BASE + f"sources: [{source(title='LOCALPACS', host='10.0.0.5')}]\n",
            "sources[0].ae_title",
            "the title, host and port of local",
            "each archive once",
        ),
        (
            BASE + f"sources: [{source(title='DICOMPROXY')}]\n",
            "sources[0].ae_title",
            "the title that the proxy has there",
            "calling_ae_title",
        ),
        (
            PROXY.replace("}", ", port: 104, host: H.example}")
            + LOCAL
            + CACHE
            + f"sources: [{source(host='h.EXAMPLE.')}]\n",
            "sources[0].port",
            "the proxy's own host and port",
            "another address",
        ),
        (
            BASE + "web: {port: 11112}\n",
            "web.port",
            "the port of proxy.port",
            "a port of its own",
        ),
        (
            PROXY + LOCAL + CACHE.replace("}", ", low_watermark: 0.95}"),
            "cache.low_watermark",
            "0.95",
            "less than high_watermark (0.95)",
        ),
        (
            PROXY + LOCAL + CACHE.replace("}", ", high_watermark: 0.5}"),
            "cache.high_watermark",
            "0.5",
            "more than low_watermark (0.85)",
        ),
    ],
)
def test_contradiction_is_a_fault(text: str, path: str, found: str, expected: str) -> None:
    """Each contradiction is one fault, with or without another fault elsewhere in the file."""
    for broken in (text, text + "log: {level: loud}\n"):
        with pytest.raises(ConfigError) as caught:
            loads(broken)
        told = [fault for fault in caught.value.faults if fault.path != "log.level"]
        assert [(fault.path, fault.found) for fault in told] == [(path, found)]
        assert expected in told[0].expected


@pytest.mark.parametrize(
    "text",
    [
        PROXY.replace("}", ", aliases: LOCALPACS}") + LOCAL + CACHE,
        BASE + "workstations: [{ae_title: R}]\n",
        BASE + "workstations: [{ae_title: LOCALPACS, host: 10.0.0.5, port: 104}]\n",
        BASE + f"sources: [{source()}]\nworkstations: [{{ae_title: R, sources: []}}]\n",
        BASE + f"sources: [{source()}, {source(name='south', title='SOUTH')}]\n",
        BASE + f"sources: [{source()}]\nworkstations: [{{ae_title: NORTH}}]\n",
        BASE + f"sources: [{source(title='DICOMPROXY', more=', calling_ae_title: OTHER')}]\n",
        PROXY.replace("}", ", host: 127.0.0.1, port: 0}") + LOCAL + CACHE + "web: {port: 0}\n",
        PROXY.replace("}", ", host: 10.0.0.9, port: 104}") + LOCAL + CACHE,
    ],
)
def test_what_is_no_contradiction_is_taken(text: str) -> None:
    """Files that only look like one of the above are taken."""
    assert loads(text).proxy.ae_title == "DICOMPROXY"
