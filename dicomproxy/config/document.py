"""YAML text becomes a tree of text, with the place of every node.

No scalar is interpreted here: ``NO`` stays ``NO`` and ``22:22`` stays ``22:22``,
and the model converts, knowing what it expects. The tree is built from the
parser's events, one pass, so that a duplicate key, an alias or too deep a
nesting is a fault with a place rather than an exception, and nothing is ever
constructed from a tag.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import yaml

from dicomproxy.config.faults import Fault, YamlPath, show_key, show_path

Tree = dict[str, "Tree"] | list["Tree"] | str | None

_Attach = Callable[[Tree], object]
"""Takes the tree of a node into its parent."""

MAX_DEPTH: Final = 12
"""Containers in containers; the model needs five."""

_NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})
_EXPECTED: Final = re.compile(r"expected (.+), but (?:found|got) (.+)")
_TOKENS: Final = {"'<stream end>'": "the end of the file"}
_QUOTED: Final = re.compile(r""" ?(?:'((?:\\.|[^'\\])*)'|"((?:\\.|[^"\\])*)")""")
_HARMLESS: Final = re.compile(r"<[a-z ]+>|\\?.")


@dataclass(slots=True)
class Document:
    """A parsed file: its tree, and where each value and key stands (line, column).

    ``truncated``: the text broke off, so that what is missing may follow.
    """

    file: str
    tree: Tree = None
    truncated: bool = False
    faults: list[Fault] = field(default_factory=list)
    values: dict[YamlPath, tuple[int, int]] = field(default_factory=dict)
    keys: dict[YamlPath, tuple[int, int]] = field(default_factory=dict)

    def fault(self, path: YamlPath, found: str, expected: str, *, at_key: bool = False) -> None:
        """Record a fault at the node of *path*, or at its nearest ancestor in the file."""
        place = self.keys.get(path) if at_key else None
        nearest = path
        while place is None:
            # A value that is not written has its key's place, and a key that
            # is not written that of the group in which it is missed.
            place = self.values.get(nearest) or self.keys.get(nearest)
            if not nearest:
                break
            nearest = nearest[:-1]
        line, column = place or (1, 1)
        self.faults.append(Fault(self.file, line, column, show_path(path), found, expected))


def parse(text: str, file: str) -> Document:
    """Parse *text*; what is wrong with it as YAML is in the document's faults.

    After a syntax fault the tree holds what stood before it.
    """
    document = Document(file)
    try:
        loader = yaml.BaseLoader(text)
    except yaml.reader.ReaderError as error:
        document.truncated = True
        before = text[: error.position]
        line = before.count("\n") + 1
        column = len(before) - (before.rfind("\n") + 1) + 1
        found = f"the character U+{error.character:04X}"
        document.faults.append(
            Fault(file, line, column, "", f"{found}, which YAML does not allow", "printable text")
        )
        return document
    try:
        _Builder(loader, document).build()
    except _TooDeep:
        document.truncated = True
    except yaml.MarkedYAMLError as error:
        document.truncated = True
        document.faults.append(_syntax_fault(file, error))
    except (ValueError, OverflowError):
        # The parser does not guard a numeric escape or a version number that
        # Python cannot represent.
        document.truncated = True
        line, column = loader.line + 1, loader.column + 1
        document.faults.append(
            Fault(file, line, column, "", "an escape or a number out of range", "valid YAML")
        )
    finally:
        loader.dispose()
    return document


class _TooDeep(Exception):
    """Nesting passed MAX_DEPTH; the fault is recorded already."""


class _Builder:
    """Turns the events of one stream into a document."""

    def __init__(self, loader: yaml.BaseLoader, document: Document) -> None:
        self._events = _events(loader)
        self._document = document

    def build(self) -> None:
        document = self._document
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents == 2:
                    place = _place(event)
                    document.faults.append(
                        Fault(document.file, *place, "", "a second document", "one document")
                    )
                if documents >= 2:
                    document.truncated = True
                    return
            elif isinstance(event, yaml.NodeEvent):
                self._node(event, (), self._set_root)

    def _set_root(self, tree: Tree) -> None:
        self._document.tree = tree

    def _node(self, event: yaml.Event, path: YamlPath, attach: _Attach) -> None:
        """Read the node that *event* begins. Containers are attached before they are filled."""
        place = _place(event)
        self._document.values.setdefault(path, place)
        self._refuse_extras(event, path)
        if isinstance(event, yaml.ScalarEvent):
            plain = event.style is None
            attach(None if plain and event.value in _NULLS else event.value)
        elif isinstance(event, yaml.SequenceStartEvent):
            self._check_depth(path)
            items: list[Tree] = []
            attach(items)
            for child in self._children(yaml.SequenceEndEvent):
                self._node(child, (*path, len(items)), items.append)
        elif isinstance(event, yaml.MappingStartEvent):
            self._check_depth(path)
            self._mapping(path, attach)
        else:
            attach(None)

    def _mapping(self, path: YamlPath, attach: _Attach) -> None:
        document = self._document
        entries: dict[str, Tree] = {}
        attach(entries)
        for key_event in self._children(yaml.MappingEndEvent):
            key = self._key(key_event, path)
            value_event = next(self._events)
            if key is None:
                self._node(value_event, (*path, "?"), _forget)
                continue
            below = (*path, key)
            line, column = _place(key_event)
            if key in entries:
                first = document.keys[below][0]
                document.faults.append(
                    Fault(
                        document.file,
                        line,
                        column,
                        show_path(below),
                        f"the key {show_key(key)} a second time",
                        f"each key once (it first stands in line {first})",
                    )
                )
                self._node(value_event, below, _forget)
                continue
            document.keys[below] = (line, column)
            if key == "<<":
                document.fault(
                    below, "a merge key (<<)", "every value written where it belongs", at_key=True
                )
                self._node(value_event, below, _forget)
                continue
            entries[key] = None
            self._node(value_event, below, partial(entries.__setitem__, key))

    def _key(self, event: yaml.Event, path: YamlPath) -> str | None:
        if isinstance(event, yaml.ScalarEvent):
            self._refuse_extras(event, path)
            return str(event.value)
        line, column = _place(event)
        self._document.faults.append(
            Fault(
                self._document.file,
                line,
                column,
                show_path(path),
                "a key that is not a word",
                "a word, a colon and a space",
            )
        )
        self._node(event, (*path, "?"), _forget)
        return None

    def _children(self, end: type[yaml.Event]) -> Iterator[yaml.Event]:
        for event in self._events:
            if isinstance(event, end):
                return
            yield event

    def _check_depth(self, path: YamlPath) -> None:
        if len(path) >= MAX_DEPTH:
            self._document.fault(
                path, f"more than {MAX_DEPTH} levels of nesting", "a configuration of dicomproxy"
            )
            raise _TooDeep

    def _refuse_extras(self, event: yaml.Event, path: YamlPath) -> None:
        # Names of anchors, aliases and tags are not shown: an unquoted
        # password may begin with *, & or !.
        line, column = _place(event)
        expected = "the value itself (quote it where it begins with one of * & !)"
        for name, found in (("anchor", "a YAML anchor or alias"), ("tag", "a YAML tag")):
            if getattr(event, name, None) is not None:
                self._document.faults.append(
                    Fault(self._document.file, line, column, show_path(path), found, expected)
                )


def _forget(tree: Tree) -> None:
    """Take nothing: the node is read for its faults alone."""


def _events(loader: yaml.BaseLoader) -> Iterator[yaml.Event]:
    while loader.check_event():
        yield loader.get_event()  # type: ignore[no-untyped-call]


def _place(event: yaml.Event) -> tuple[int, int]:
    if event.start_mark is None:  # the type allows it; the parser always sets one
        return 1, 1
    return event.start_mark.line + 1, event.start_mark.column + 1


def _unless_harmless(quoted: re.Match[str]) -> str:
    """Keep one character or the name of a token; leave out what is longer, a piece of the file."""
    return quoted[0] if _HARMLESS.fullmatch(quoted[1] or quoted[2] or "") else ""


def _syntax_fault(file: str, error: yaml.MarkedYAMLError) -> Fault:
    """Put the parser's complaint in words; what it quotes is left out, it may be a secret."""
    problem = error.problem or "text that is not YAML"
    mark = error.problem_mark
    unclosed = "end of stream" in problem or "<stream end>" in problem
    if unclosed and error.context_mark is not None:
        # What is never closed is found at the end, and mended where it opens.
        mark = error.context_mark
    expected = "valid YAML"
    if r"'\t'" in problem:
        problem, expected = "a tab", "spaces: YAML does not indent with tabs"
    elif "could not find expected ':'" in problem or "mapping values" in problem:
        expected = "a key, a colon and a space, then its value (quoted if it holds ': ')"
    elif "<block end>" in problem or "<document start>" in problem:
        expected = "the keys of one group to begin in the same column"
    problem = _QUOTED.sub(_unless_harmless, problem).removeprefix("found ")
    if (halves := _EXPECTED.fullmatch(problem)) is not None:
        problem = _TOKENS.get(halves[2], halves[2])
        if expected == "valid YAML":
            expected = f"valid YAML: {halves[1].replace('the node content', 'a value')}"
    if error.context and error.context_mark is not None:
        began = error.context_mark.line + 1
        problem = f"{problem} ({_QUOTED.sub('', error.context)} that began in line {began})"
    line, column = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
    return Fault(file, line, column, "", problem, expected)
