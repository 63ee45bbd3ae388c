"""What the keys of a rule say about one another; as ``references``, on the text itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from dicomproxy.config.coercion import AnyAttribute
from dicomproxy.config.document import Document, Tree
from dicomproxy.config.faults import YamlPath, show_text
from dicomproxy.dataset.attributes import LONGEST, Attribute, fits, has_form

_ATTRIBUTE: Final[TypeAdapter[Any]] = TypeAdapter(AnyAttribute)

_NEEDED: Final = {"set": "value", "prefix": "value", "copy": "from_attribute", "map": "values"}
_OPTIONS: Final = ("value", "from_attribute", "values")
_ACTIONS: Final = (*_NEEDED, "remove")
_PREFIXED: Final = frozenset({"AE", "CS"})
"""VRs with a form that values keep behind a prefix."""


def check_coercion(document: Document) -> None:
    """Add a fault to *document* for each rule or map that contradicts itself."""
    for number, source in _members(document.tree, "sources"):
        coercion = source.get("coerce") if isinstance(source, dict) else None
        if not isinstance(coercion, dict):
            continue
        path: YamlPath = ("sources", number, "coerce")
        _once(document, (*path, "descriptions"), coercion.get("descriptions"))
        _once(document, (*path, "procedure_codes"), coercion.get("procedure_codes"))
        for place, rule in _members(coercion, "rules"):
            if isinstance(rule, dict):
                _rule(document, (*path, "rules", place), rule)


def _rule(document: Document, path: YamlPath, rule: dict[str, Tree]) -> None:
    action = rule.get("action")
    if action not in _ACTIONS or not isinstance(action, str):
        return  # reported elsewhere
    needed = _NEEDED.get(action)
    for option in _OPTIONS:
        given = rule.get(option)
        if option == needed and (given is None or given == []):
            document.fault((*path, option), "nothing", f"{option}, which {action} needs")
        elif option != needed and given is not None:
            document.fault(
                (*path, option), f"{option} beside {action}", f"no {option}: {action} has none"
            )
    if action == "map":
        _once(document, (*path, "values"), rule.get("values"))
    try:
        attribute: Attribute = _ATTRIBUTE.validate_python(rule.get("attribute"))
    except ValidationError:
        return
    if action == "set":
        _fits(document, (*path, "value"), rule.get("value"), attribute)
    elif action == "prefix":
        prefix = rule.get("value")
        if has_form(attribute.vr) and attribute.vr not in _PREFIXED:
            document.fault(
                (*path, "attribute"),
                f"{attribute.keyword} (VR {attribute.vr})",
                "an attribute of text or codes, before which something can be put",
            )
        elif has_form(attribute.vr):
            _fits(document, (*path, "value"), prefix, attribute)
        elif isinstance(prefix, str) and len(prefix) >= LONGEST[attribute.vr]:
            expected = f"less than the {LONGEST[attribute.vr]} characters that it holds"
            document.fault((*path, "value"), f"{len(prefix)} characters", expected)
    elif action == "copy":
        _copies(document, (*path, "from_attribute"), rule.get("from_attribute"), attribute)
    elif action == "map":
        for number, entry in _members(rule, "values"):
            if isinstance(entry, dict):
                _fits(document, (*path, "values", number, "local"), entry.get("local"), attribute)


def _copies(document: Document, path: YamlPath, name: Tree, attribute: Attribute) -> None:
    try:
        origin: Attribute = _ATTRIBUTE.validate_python(name)
    except ValidationError:
        return  # reported elsewhere
    if has_form(attribute.vr) and origin.vr != attribute.vr:
        found = f"{origin.keyword} (VR {origin.vr})"
        expected = f"an attribute of VR {attribute.vr}, as {attribute.keyword} is"
        document.fault(path, found, expected)


def _fits(document: Document, path: YamlPath, text: Tree, attribute: Attribute) -> None:
    if isinstance(text, str) and not fits(attribute.vr, text):
        expected = f"a value of {attribute.keyword} (VR {attribute.vr}, PS3.5 6.2)"
        document.fault(path, show_text(text), expected)


def _once(document: Document, path: YamlPath, entries: Tree) -> None:
    """Each remote value has one local one."""
    first: dict[object, int] = {}
    if not isinstance(entries, list):
        return
    for number, entry in enumerate(entries):
        remote = entry.get("remote") if isinstance(entry, dict) else None
        if not isinstance(remote, str):
            continue
        if remote in first:
            line = document.values[(*path, first[remote], "remote")][0]
            document.fault(
                (*path, number, "remote"),
                f"{show_text(remote)} a second time",
                f"each once (it first stands in line {line})",
            )
        first.setdefault(remote, number)


def _members(tree: Tree, name: str) -> Iterator[tuple[int, Tree]]:
    members = tree.get(name) if isinstance(tree, dict) else None
    yield from enumerate(members if isinstance(members, list) else ())
