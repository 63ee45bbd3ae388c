"""YAML text becomes a tree of text with places; what is wrong is a fault, never an exception."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.config.document import MAX_DEPTH, parse


def test_scalars_stay_text() -> None:
    """What other readers turn into booleans, numbers and dates is text here."""
    document = parse("a: NO\nb: 22:22\nc: 0x10\nd: 2020-01-01\ne: 1e3\nf: ''\ng: '~'\n", "f")

    assert document.faults == []
    assert document.tree == {
        "a": "NO",
        "b": "22:22",
        "c": "0x10",
        "d": "2020-01-01",
        "e": "1e3",
        "f": "",
        "g": "~",
    }


def test_every_node_has_its_place() -> None:
    """Lines and columns count from one, for keys and for values."""
    document = parse("top:\n  list:\n    - x\n    - {k: v}\n", "f")

    assert document.keys[("top", "list")] == (2, 3)
    assert document.values[("top", "list", 0)] == (3, 7)
    assert document.values[("top", "list", 1, "k")] == (4, 11)


@pytest.mark.parametrize(
    ("text", "line", "path", "found"),
    [
        ("a: 1\na: 2\n", 2, "a", "the key a a second time"),
        ("s: {k: 1, k: 2}\n", 1, "s.k", "the key k a second time"),
        ("a: &x 1\nb: 2\n", 1, "a", "a YAML anchor or alias"),
        ("a: &x 1\nb: *x\n", 2, "b", "a YAML anchor or alias"),
        ("a: !!python/object:os.system 1\n", 1, "a", "a YAML tag"),
        ("a: !secret 1\n", 1, "a", "a YAML tag"),
        ("a:\n  <<: {b: 1}\n", 2, "a.'<<'", "a merge key (<<)"),
        ("a: 1\n---\nb: 2\n", 2, "", "a second document"),
        ("? [a, b]\n: 1\n", 1, "", "a key that is not a word"),
        ("a:\n\t- 1\n", 2, "", "a tab"),
        ("a: [1, 2\n", 1, "", "while parsing a flow sequence"),
        ("a: [1, 2\n", 1, "", "the end of the file"),
        ("a: {b: 1\nc: 2\n", 2, "", "':' (while parsing a flow mapping"),
        ("a: b: c\n", 1, "", "mapping values are not allowed here"),
        ("a: 1\x00\n", 1, "", "the character U+0000, which YAML does not allow"),
        ('a: "\\UFFFFFFFF"\n', 1, "", "an escape or a number out of range"),
    ],
)
def test_fault_of_yaml_has_its_place(text: str, line: int, path: str, found: str) -> None:
    """What is wrong as YAML is told with line, path and what was found."""
    faults = parse(text, "f.yaml").faults

    assert (line, path) in [(fault.line, fault.path) for fault in faults if found in fault.found]
    assert {fault.file for fault in faults} == {"f.yaml"}


def test_deep_nesting_is_a_fault() -> None:
    """Nesting is bounded, so that a hostile file cannot exhaust the stack."""
    document = parse("[" * 5000, "f")

    assert document.truncated
    assert f"more than {MAX_DEPTH} levels of nesting" in [fault.found for fault in document.faults]


def test_what_the_parser_quotes_is_not_shown() -> None:
    """A syntax fault never repeats the text around it, which may be a password."""
    for text in (
        "password: *hunter2\n",
        "password: !hunter2 x\n",
        "p: 'hunter2\n",
        "p: !hunter2!x y\n",
    ):
        faults = parse(text, "f").faults
        assert faults
        assert "hunter2" not in " ".join(map(str, faults))


@given(st.text())
def test_any_text_is_a_tree_or_faults(text: str) -> None:
    """No text whatever raises."""
    document = parse(text, "f")

    assert document.tree is None or document.faults or isinstance(document.tree, dict | list | str)


@given(st.text(alphabet="ab:-[]{}&*!|>'\"#%@`,? \n\t<~", max_size=60))
def test_any_punctuation_is_a_tree_or_faults(text: str) -> None:
    """Nor does text made of what means something to YAML."""
    for fault in parse(text, "f").faults:
        assert fault.line >= 1
        assert fault.column >= 1
        assert "\n" not in str(fault)
