"""Every key of the model with its place, its default and what it expects.

Read from the model itself, so that fault messages, the reference and the JSON
Schema say the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Final, get_args, get_origin

from pydantic_core import PydanticUndefined

from dicomproxy.config.faults import YamlPath
from dicomproxy.config.model import Settings
from dicomproxy.config.section import Section, TextIs
from dicomproxy.config.values import Kind, OneOrMany


@dataclass(frozen=True, slots=True)
class Key:
    """One key. ``path`` is written as ``sources[].port``.

    ``section`` is the model of a key that holds keys of its own. ``default`` is
    the text of a scalar's default; None where the key is required, is a section,
    or where its absence means something of its own.
    """

    path: str
    name: str
    expected: str
    description: str
    required: bool
    default: str | None = None
    section: type[Section] | None = None
    repeated: bool = False


def walk(model: type[Section] = Settings, prefix: str = "") -> Iterator[Key]:
    """Yield every key under *model*, a section before its keys, in the model's order."""
    for name, field in model.model_fields.items():
        section, repeated = _section(field.annotation)
        path = f"{prefix}{name}{'[]' if repeated else ''}"
        yield Key(
            path=path,
            name=name,
            expected=_expected(section, repeated, (field.annotation, *field.metadata)),
            description=field.description or "",
            required=field.is_required(),
            default=_default_text(field.default),
            section=section,
            repeated=repeated,
        )
        if section is not None:
            yield from walk(section, f"{path}.")


def expected_at(path: YamlPath) -> str:
    """Say what belongs at *path*, whatever stands there."""
    shape = _shape(path)
    known = _BY_PATH.get(shape) or _BY_PATH.get(f"{shape}[]")
    return known.expected if known is not None else _mapping(known_keys(path))


def known_keys(path: YamlPath) -> tuple[str, ...]:
    """Return the keys that the mapping at *path* may have, none if it is no mapping of ours."""
    model: type[Section] | None = Settings
    if path:
        known = _BY_PATH.get(_shape(path))
        model = known.section if known is not None else None
    return () if model is None else tuple(model.model_fields)


def _shape(path: YamlPath) -> str:
    steps = ("[]" if isinstance(step, int) else f".{step}" for step in path)
    return "".join(steps).removeprefix(".")


def _section(annotation: Any) -> tuple[type[Section] | None, bool]:
    if get_origin(annotation) is UnionType and NoneType in get_args(annotation):
        # A section that means something by being left out.
        annotation = next(one for one in get_args(annotation) if one is not NoneType)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    if get_origin(annotation) is tuple:
        member = get_args(annotation)[0]
        if isinstance(member, type) and issubclass(member, Section):
            return member, True
    return None, False


def _expected(section: type[Section] | None, repeated: bool, hints: tuple[Any, ...]) -> str:
    if section is not None and repeated:
        return f"a list; each member {_mapping(tuple(section.model_fields))}"
    if section is not None:
        mapping = _mapping(tuple(section.model_fields))
        alone = next((hint.name for hint in hints if isinstance(hint, TextIs)), None)
        return f"{mapping}; or its {alone} alone" if alone else mapping
    found = list(_flatten(hints))
    phrase = next(hint.expected for hint in found if isinstance(hint, Kind))
    many = any(isinstance(hint, OneOrMany) for hint in found)
    return f"{phrase}; or a list of them" if many else phrase


def _mapping(names: tuple[str, ...]) -> str:
    if not names:
        return "nothing else"
    listed = ", ".join(names[:6])
    return f"a mapping with keys such as {listed}" if names[6:] else f"a mapping of {listed}"


def _flatten(hints: tuple[Any, ...]) -> Iterator[Any]:
    for hint in hints:
        yield hint
        if get_origin(hint) is Annotated:
            yield from _flatten((get_args(hint)[0], *hint.__metadata__))
        else:
            yield from _flatten(get_args(hint))


def _default_text(default: Any) -> str | None:
    if default is PydanticUndefined or default is None:
        return None
    return default if isinstance(default, str) else "[]"


_BY_PATH: Final[Mapping[str, Key]] = MappingProxyType({key.path: key for key in walk()})
