"""Text is read whatever it declares, and written only where it fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import charset as oracle
from pydicom.valuerep import PersonName

from dicomproxy.dataset.charset import CannotEncode, choose, decode, encode, normalise

TERM_LISTS = st.lists(st.sampled_from([*sorted(oracle.python_encoding), "NONSENSE"]), max_size=3)

# The names of PS3.5 Annexes H to K, by their declared terms and their bytes.
EXAMPLES = [
    (
        ("", "ISO 2022 IR 87"),
        b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B",
        "Yamada^Tarou=山田^太郎=やまだ^たろう",
    ),
    (
        ("ISO 2022 IR 13", "ISO 2022 IR 87"),
        b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J",
        "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎",
    ),
    (
        ("", "ISO 2022 IR 149"),
        b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf",
        "Hong^Gildong=洪^吉洞=홍^길동",
    ),
    (("ISO_IR 100",), b"Buc^J\xe9r\xf4me", "Buc^Jérôme"),
    (("ISO_IR 144",), b"\xbb\xee\xda\x63\x65\xdc\xd1\x79\x70\xd3", "Люкceмбypг"),
    (("ISO_IR 192",), "Wang^XiaoDong=王^小東".encode(), "Wang^XiaoDong=王^小東"),
    (("GB18030",), "Wang^XiaoDong=王^小东".encode("gb18030"), "Wang^XiaoDong=王^小东"),
]


@pytest.mark.parametrize(("terms", "value", "text"), EXAMPLES)
def test_the_names_of_the_standard_are_read(
    terms: tuple[str, ...], value: bytes, text: str
) -> None:
    """Each example decodes, and what we write of it is read back by us and by pydicom."""
    assert decode(value, terms, "PN") == text
    encoded = encode(text, terms, "PN")
    assert decode(encoded, terms, "PN") == text
    encodings = oracle.convert_encodings(list(terms))
    assert str(PersonName(encoded, encodings)) == text


@pytest.mark.parametrize(
    ("terms", "text", "value"),
    [
        # In the default repertoire there is nothing beyond ASCII, whatever stands behind it.
        (("ISO_IR 6",), "Müller", None),
        (("ISO 2022 IR 6",), "Müller", None),
        (("",), "Müller", None),
        (("", "ISO 2022 IR 87"), "Müller", None),
        (("ISO 2022 IR 6", "ISO 2022 IR 149"), "Müller", None),
        (("NONSENSE", "ISO 2022 IR 87"), "Müller", None),
        (("", "ISO 2022 IR 100"), "Müller", b"\x1b-AM\xfcller"),
        (("ISO 2022 IR 144", "ISO 2022 IR 100"), "Müller", b"\x1b-AM\xfcller"),
        # JIS X 0201 has katakana of half width, and no kanji.
        (("ISO_IR 13",), "ﾔﾏﾀﾞ", b"\xd4\xcf\xc0\xde"),
        (("ISO_IR 13",), "山田", None),
        (("ISO_IR 13",), "¥", None),
        (("ISO_IR 13",), "a‾", None),
        (("ISO 2022 IR 13", "ISO 2022 IR 87"), "¥", None),
        (("", "ISO 2022 IR 159"), "€", None),
        (
            ("ISO 2022 IR 13", "ISO 2022 IR 87"),
            "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎",
            b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J",
        ),
        (
            ("", "ISO 2022 IR 87"),
            "Yamada^Tarou=山田^太郎",
            b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B",
        ),
        (("", "ISO 2022 IR 149"), "洪", b"\x1b$)C\xfb\xf3"),
        (("", "ISO 2022 IR 58"), "王^小东", b"\x1b$)A\xcd\xf5^\x1b$)A\xd0\xa1\xb6\xab"),
    ],
)
def test_text_is_written_in_what_is_declared_and_in_nothing_else(
    terms: tuple[str, ...], text: str, value: bytes | None
) -> None:
    """Byte for byte as in PS3.5 Annexes H to K; what the terms do not hold is refused."""
    if value is None:
        with pytest.raises(CannotEncode):
            encode(text, terms, "PN")
    else:
        assert encode(text, terms, "PN") == value


@pytest.mark.parametrize(
    ("written", "term"),
    [
        ("ISO_IR 100", "ISO_IR 100"),
        ("ISO-IR 100", "ISO_IR 100"),
        ("ISO_IR_192", "ISO_IR 192"),
        ("iso ir 144 ", "ISO_IR 144"),
        ("ISO 2022 IR 87", "ISO 2022 IR 87"),
        ("GB18030", "GB18030"),
        ("LATIN1", ""),
    ],
)
def test_misspelt_terms_are_understood(written: str, term: str) -> None:
    """Archives spell the defined terms in their own ways."""
    assert normalise(written) == term


@pytest.mark.parametrize(
    ("terms", "texts", "chosen"),
    [
        (("ISO_IR 100",), ["PLAIN", ""], ()),
        (("ISO_IR 100",), ["Grün"], ("ISO_IR 100",)),
        (("ISO_IR 100",), ["Grün", "Люкс"], ("ISO_IR 192",)),
        (("ISO_IR 144",), ["Люкс"], ("ISO_IR 144",)),
        ((), ["Grün"], ("ISO_IR 192",)),
        (("NONSENSE",), ["Grün"], ("ISO_IR 192",)),
        (("", "ISO 2022 IR 87"), ["山田"], ("", "ISO 2022 IR 87")),
    ],
)
def test_the_character_set_of_an_answer(
    terms: tuple[str, ...], texts: list[str], chosen: tuple[str, ...]
) -> None:
    """None where ASCII does, the request's where all fits, else UTF-8."""
    assert choose(terms, texts) == chosen


@given(st.binary(max_size=60), TERM_LISTS, st.sampled_from(["PN", "LO", "LT"]))
def test_any_bytes_are_read(value: bytes, terms: list[str], vr: str) -> None:
    """Decoding never fails, whatever is declared."""
    assert isinstance(decode(value, tuple(terms), vr), str)


@given(st.text(max_size=20), TERM_LISTS)
def test_any_text_is_written_or_refused(text: str, terms: list[str]) -> None:
    """Encoding gives bytes or the one exception, which shows no value."""
    try:
        encoded = encode(text, tuple(terms), "PN")
    except CannotEncode as error:
        shown, cause = str(error), error.__cause__
    else:
        assert isinstance(encoded, bytes)
        return
    assert cause is None
    assert not any(character in shown for character in text if not character.isascii())


@given(
    st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20),
    st.sampled_from(["ISO_IR 100", "ISO_IR 101", "ISO_IR 144", "ISO_IR 192", "GB18030"]),
)
def test_what_is_written_is_read_back(text: str, term: str) -> None:
    """A character set that takes a value gives it back."""
    try:
        encoded = encode(text, (term,))
    except CannotEncode:
        assert term.startswith("ISO_IR 1")
        assert term != "ISO_IR 192"
        return
    assert decode(encoded, (term,)) == text
