"""Text becomes values: what each kind takes, and what it refuses."""

from __future__ import annotations

import contextlib
from ipaddress import ip_network
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from dicomproxy.config import values

SIZE = Annotated[int, values.size("1kB", "1TB")]
COUNT = Annotated[int, values.whole(1, 10)]
WORD = Annotated[str, values.choice("relay", "proxy", later=("later",))]


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (values.Duration, "500ms", 0.5),
        (values.Duration, "5", 5.0),
        (values.Duration, "1.5 m", 90.0),
        (values.Duration, "7d", 604800.0),
        (values.Pause, "0s", 0.0),
        (SIZE, "64KiB", 65536),
        (SIZE, "200gb", 200 * 10**9),
        (SIZE, "1.5MB", 1_500_000),
        (SIZE, "2048", 2048),
        (COUNT, "10", 10),
        (WORD, "relay", "relay"),
        (values.Fraction, "0.95", 0.95),
        (values.Fraction, "1", 1.0),
        (values.Flag, "NO", False),
        (values.Flag, "True", True),
        (values.Port, "65535", 65535),
        (values.BindPort, "0", 0),
        (values.AETitle, "NO", "NO"),
        (values.AETitle, " PACS 1 ", "PACS 1"),
        (values.AETitles, "ONE", ("ONE",)),
        (values.AETitles, ["ONE", "TWO"], ("ONE", "TWO")),
        (values.PeerHost, "pacs.example", "pacs.example"),
        (values.PeerHost, "2001:DB8::1", "2001:db8::1"),
        (values.BindHost, "0.0.0.0", "0.0.0.0"),
        (values.Networks, "10.0.1.0/24", (ip_network("10.0.1.0/24"),)),
        (values.Senders, ["PACS", "10.0.0.1"], ("PACS", ip_network("10.0.0.1/32"))),
        (values.SourceName, "north-1", "north-1"),
        (values.Uid, "1.2.840.0.5", "1.2.840.0.5"),
        (values.TransferSyntaxes, "JPEG2000Lossless", ("1.2.840.10008.1.2.4.90",)),
        (values.TransferSyntaxes, ["1.2.3.4"], ("1.2.3.4",)),
        (values.Charset, "ISO_IR 192", ("ISO_IR 192",)),
        (
            values.Charset,
            ["ISO 2022 IR 6", "ISO 2022 IR 87"],
            ("ISO 2022 IR 6", "ISO 2022 IR 87"),
        ),
    ],
)
def test_text_becomes_the_value(kind: Any, text: object, value: object) -> None:
    """Each kind converts what a person would write for it."""
    assert TypeAdapter(kind).validate_python(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "hint"),
    [
        (values.Duration, "5 seconds", "a duration"),
        (values.Duration, "-5s", "a duration"),
        (values.Duration, "0s", "more than 0"),
        (values.Duration, "9999d", "at most 3650d"),
        (values.Duration, "1:30", "a duration"),
        (values.Duration, None, "a duration"),
        (values.Duration, "9" * 400, "a duration"),
        (SIZE, "200XB", "a size"),
        (SIZE, "999", "from 1kB to 1TB"),
        (SIZE, "2TB", "from 1kB to 1TB"),
        (COUNT, "0", "from 1 to 10"),
        (COUNT, "1.0", "from 1 to 10"),
        (COUNT, "07", "from 1 to 10"),
        (COUNT, "٣", "from 1 to 10"),
        (COUNT, "true", "from 1 to 10"),
        (WORD, "Relay", "did you mean relay?"),
        (WORD, "later", "later is not available in this version"),
        (values.Fraction, "0", "a fraction"),
        (values.Fraction, "95%", "a fraction"),
        (values.Flag, "1", "true or false"),
        (values.Port, "0", "a port from 1"),
        (values.Port, "22:22", "a port from 1"),
        (values.AETitle, "", "an AE title"),
        (values.AETitle, "   ", "an AE title"),
        (values.AETitle, "X" * 17, "an AE title"),
        (values.AETitle, "A\\B", "an AE title"),
        (values.AETitle, "PÄCS", "an AE title"),
        (values.AETitles, ["A", "A"], "each member once"),
        (values.PeerHost, "0.0.0.0", "can be connected to"),
        (values.PeerHost, "10.0.0.5:104", "the port is a key of its own"),
        (values.PeerHost, "10.0.0.300", "a host name"),
        (values.PeerHost, "http://pacs", "a host name"),
        (values.Networks, "10.0.1.7/24", "the network is 10.0.1.0/24"),
        (values.Networks, [], "at least one"),
        (values.Networks, "READING1", "an IP address"),
        (values.SourceName, "North", "a name of"),
        (values.SourceName, "local", "local is the local PACS"),
        (values.Uid, "1.02.3", "a UID"),
        (values.Uid, "1." + "2" * 64, "a UID"),
        (values.TransferSyntaxes, "JPEG2000Losless", "did you mean JPEG2000Lossless?"),
        (values.TransferSyntaxes, "1.2.840.10008.1.1", "no instance can be sent in"),
        (values.Charset, "ISO IR 100", "did you mean ISO_IR 100?"),
        (values.Charset, ["ISO_IR 100", "ISO 2022 IR 87"], "code extensions"),
        (values.Charset, "ISO 2022 IR 87", "a single-byte set"),
        (values.FilePath, "~/cache", "~ is not expanded"),
        (values.FilePath, "", "a path"),
    ],
)
def test_text_is_refused_in_words(kind: Any, text: object, hint: str) -> None:
    """What a kind cannot take is refused by one fault that says what it expects."""
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(text)

    assert [hint in error["msg"] for error in caught.value.errors()] == [True]


@given(st.sampled_from(["B", "kB", "MB", "GB", "KiB", "MiB"]), st.integers(0, 10**5))
def test_sizes_follow_their_unit(unit: str, number: int) -> None:
    """A size is its number times a power of 1000 or, with an i, of 1024."""
    factors = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20}
    adapter: TypeAdapter[int] = TypeAdapter(Annotated[int, values.size("0B")])

    assert adapter.validate_python(f"{number}{unit}") == number * factors[unit]


@given(
    st.sampled_from(
        [
            values.Duration,
            SIZE,
            COUNT,
            values.Fraction,
            values.Flag,
            values.AETitle,
            values.PeerHost,
            values.Networks,
            values.Senders,
            values.Uid,
            values.TransferSyntaxes,
            values.Charset,
            values.FilePath,
        ]
    ),
    st.text() | st.none() | st.lists(st.text(), max_size=3),
)
def test_anything_is_a_value_or_refused(kind: Any, value: object) -> None:
    """No text raises anything but a refusal."""
    with contextlib.suppress(ValidationError):
        TypeAdapter(kind).validate_python(value)
