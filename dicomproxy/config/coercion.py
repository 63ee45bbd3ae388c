"""The section about what becomes of a source's objects and answers on their way to readers."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from dicomproxy.config.section import LIST, Section, key, section
from dicomproxy.config.values import AETitles, Kind, OneOrMany, choice
from dicomproxy.dataset.attributes import LONGEST, Attribute, attribute, may_be_changed

_LONGEST_PREFIX: Final = 32
_MODALITY: Final = r"[A-Z0-9_]{1,16}"
_CODE: Final = re.compile(r"([^\\^]{1,64})\^([^\\^]{1,16})")


def _attribute(value: object) -> Attribute:
    found = attribute(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError
    if found.vr not in LONGEST:
        raise ValueError(f"{found.keyword} is not written as text")
    return found


def _changeable(value: object) -> Attribute:
    found = _attribute(value)
    if not may_be_changed(found.tag, found.vr):
        raise ValueError("identity, UIDs, and what describes or places pixels are not for rules")
    return found


def _words(longest: int) -> Kind:
    def convert(value: object) -> str:
        if not isinstance(value, str) or not value.isprintable():
            raise ValueError
        if not value.strip() or len(value) > longest or "\\" in value:
            raise ValueError
        return value

    return Kind(
        f"a text of 1 to {longest} characters, no backslash",
        convert,
        {"type": "string", "pattern": rf"^(?=.*[^ ])[^\\]{{1,{longest}}}$"},
    )


def _value(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError
    return value


def _modality(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(_MODALITY, value):
        raise ValueError
    return value


def _code(value: object) -> tuple[str, str]:
    found = _CODE.fullmatch(value) if isinstance(value, str) and value.isprintable() else None
    if found is None:
        raise ValueError
    return found[1], found[2]


_ATTRIBUTE_JSON: Final = {
    "type": "string",
    "pattern": r"^([A-Z][A-Za-z0-9]+|\(?[0-9A-Fa-f]{4},?[0-9A-Fa-f]{4}\)?)$",
}
_ATTRIBUTE_WORDS: Final = "a keyword such as InstitutionName, or a tag such as 0008,0080"

AnyAttribute = Annotated[Attribute, Kind(_ATTRIBUTE_WORDS, _attribute, _ATTRIBUTE_JSON)]
RuledAttribute = Annotated[Attribute, Kind(_ATTRIBUTE_WORDS, _changeable, _ATTRIBUTE_JSON)]
Name = Annotated[str, _words(LONGEST["LO"])]
Prefix = Annotated[str, _words(_LONGEST_PREFIX)]
AnyValue = Annotated[
    str, Kind("a text; several values with a backslash between them", _value, {"type": "string"})
]
CodeKey = Annotated[
    tuple[str, str],
    Kind(
        "a code value and its coding scheme, such as 12345^99NORTH",
        _code,
        {"type": "string", "pattern": r"^[^\\^]{1,64}\^[^\\^]{1,16}$"},
    ),
]
Modalities = Annotated[
    tuple[
        Annotated[
            str,
            Kind(
                "a modality such as CT", _modality, {"type": "string", "pattern": f"^{_MODALITY}$"}
            ),
        ],
        ...,
    ],
    OneOrMany(at_least=1),
]


class NameEntry(Section):
    """One of a source's names, and the local one."""

    remote: Name = key("As the source writes it, whole and in its case")
    local: Name = key("As it is called here")


class CodeEntry(Section):
    """One of a source's procedure codes, and the local one."""

    remote: CodeKey = key("Code value and coding scheme as the source has them")
    local: CodeKey = key("Those of this site")
    meaning: Name = key("Code meaning that goes with them")


class ValueEntry(Section):
    """One value of an attribute, and what it becomes."""

    remote: AnyValue = key("As the source writes it, whole and in its case")
    local: AnyValue = key("What it becomes")


class RuleEntry(Section):
    """What is done to one attribute; rules are followed in their order."""

    action: Annotated[
        Literal["set", "copy", "prefix", "map", "remove"],
        choice("set", "copy", "prefix", "map", "remove"),
    ] = key(
        "set a value; copy that of another attribute, if it has any; prefix a text to the values "
        "that are there; map values by a table; remove the attribute"
    )
    attribute: RuledAttribute = key("Which one; not of an item of a sequence")
    value: AnyValue | None = key("What to set, or the text to prefix", None)
    from_attribute: AnyAttribute | None = key("Which one to copy from", None)
    values: Annotated[tuple[ValueEntry, ...], LIST] = section("The table of map", [])
    modalities: Modalities | None = key("Only for objects of these (default: all)", None)
    destinations: AETitles | None = key(
        "Only for what goes to these AE titles (default: all)", None
    )


class CoercionSection(Section):
    """How objects of one source, and answers about them, are made to look local."""

    study_description_prefix: Prefix | None = key(
        "Goes before Study Description, so that readers see where a study is from", None
    )
    study_id: Annotated[Literal["empty", "keep"], choice("empty", "keep")] = key(
        "What becomes of Study ID, which may equal one of this site", "empty"
    )
    descriptions: Annotated[tuple[NameEntry, ...], LIST] = section(
        "Local names of its studies and requested procedures, for hanging protocols", []
    )
    procedure_codes: Annotated[tuple[CodeEntry, ...], LIST] = section(
        "Local codes of its procedures", []
    )
    rules: Annotated[tuple[RuleEntry, ...], LIST] = section(
        "What else is changed; patient, accession number and UIDs are not for rules", []
    )
