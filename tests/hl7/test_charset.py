"""Character sets of HL7 v2 as MSH-18 names them."""

from __future__ import annotations

import pytest

from dicomproxy.hl7.charset import REPLACEMENT, codec_for, declared, decode, encode
from dicomproxy.hl7.errors import MalformedMessage


def header(charset: str) -> str:
    return f"MSH|^~\\&|A|B|C|D|2024||ADT^A31|1|P|2.5||||||{charset}\r"


@pytest.mark.parametrize(
    ("charset", "codec", "name"),
    [
        ("UNICODE UTF-8", "utf-8", "Иванов^Иван"),
        ("UTF-8", "utf-8", "Ÿ^ł"),
        ("8859/1", "latin-1", "Müller^José"),
        ("ISO-8859-1", "latin-1", "Müller^José"),
        ("8859/5", "iso8859-5", "Иванов"),
        ("8859/15", "iso8859-15", "Œuvre^€"),
        ("GB 18030-2000", "gb18030", "王^小东"),
        ("KS X 1001", "euc_kr", "김희중"),
        ("BIG-5", "big5", "王小明"),
        # Half of these characters' bytes are separators: @, ^, |, ~, & and the backslash.
        ("ISO IR87", "iso2022_jp", "山田^太郎"),
        ("~ISO IR87", "iso2022_jp", "Yamada=山田^太郎"),
        ("ASCII~ISO IR159", "iso2022_jp_2", "丂山^太郎"),
        ("ISO IR13", "shift_jis", "ソ表^十能"),
    ],
)
def test_text_is_read_in_the_character_set_that_the_message_declares(
    charset: str, codec: str, name: str
) -> None:
    """Whatever MSH-18 names is how the rest is decoded, separators' bytes or not."""
    text = f"{header(charset)}PID|1||X||{name}\r"
    assert decode(text.encode(codec)) == text


@pytest.mark.parametrize("name", ["Muller", "Müller", "王"])
def test_without_a_declaration_it_is_utf_8(name: str) -> None:
    """ASCII is what the standard says, and UTF-8 reads that and what senders leave undeclared."""
    text = f"MSH|^~\\&|A\rPID|1||X||{name}\r"
    assert decode(text.encode()) == text


def test_a_byte_that_does_not_decode_costs_its_character_only() -> None:
    """Latin-1 under a false name harms the letter, not the separators around it."""
    text = decode((header("UNICODE UTF-8") + "PID|1||X|Mü|Y\r").encode("latin-1"))
    assert text.endswith(f"PID|1||X|M{REPLACEMENT}|Y\r")


@pytest.mark.parametrize("charset", ["EBCDIC", "UNICODE UTF-16", "8859/12"])
def test_an_unknown_set_is_refused_only_where_it_matters(charset: str) -> None:
    """Plain ASCII reads the same in all of them; anything else would be a guess."""
    plain = f"{header(charset)}PID|1||X\r"
    assert decode(plain.encode()) == plain
    with pytest.raises(MalformedMessage, match="unknown_character_set"):
        decode((plain + "PID|2||é\r").encode("latin-1"))
    with pytest.raises(MalformedMessage, match="unknown_character_set"):
        decode((plain + "PID|2||").encode() + b"\x1b$B;3\x1b(B\r")


@pytest.mark.parametrize(
    ("frame", "terms"),
    [
        (b"", ()),
        (b"MSH", ()),
        (b"MSH|^~\\&|A", ()),
        (header("").encode(), ("",)),
        (header("ASCII~ISO IR87").encode(), ("ASCII", "ISO IR87")),
        (header("8859/1").replace("\r", "\n").encode(), ("8859/1",)),
        (b"MSH#:!\\&" + b"#" * 16 + b"a!b", ("a", "b")),
    ],
)
def test_the_declaration_is_found_by_the_messages_own_separators(
    frame: bytes, terms: tuple[str, ...]
) -> None:
    """MSH-18 is field 18 whatever separates fields, and is missing where the header is short."""
    assert declared(frame) == terms


def test_the_first_set_holds_unless_the_others_are_switched_to() -> None:
    """Escape sequences within the text are known of the Japanese sets alone."""
    assert codec_for(["8859/1", "8859/5"]) == "iso8859-1"
    assert codec_for(["ASCII", "ISO IR87"]) == "iso2022_jp_2"
    assert codec_for(["", " "]) == "utf-8"
    assert codec_for(["nonsense"]) is None


def test_what_a_set_does_not_have_is_not_written() -> None:
    """Nothing is replaced in what we send: it would be another ID."""
    assert encode("Müller", "8859/1") == b"M\xfcller"
    with pytest.raises(MalformedMessage, match="not_in_character_set"):
        encode("王", "8859/1")
    with pytest.raises(MalformedMessage, match="unknown_character_set"):
        encode("A", "EBCDIC")
