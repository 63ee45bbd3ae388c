"""A file becomes settings, or the list of everything that is wrong with it.

Text is parsed, then checked by the model, then across keys; each step adds its
faults, so that one run shows all of them. Relative paths in the file are
relative to the file, so that its meaning does not depend on where it is read from.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import ErrorDetails
from pydantic_core.core_schema import WithDefaultSchema

from dicomproxy.config.document import Document, Tree, parse
from dicomproxy.config.faults import ConfigError, Fault, YamlPath, closest, show_key, show_value
from dicomproxy.config.hl7 import Hl7Section
from dicomproxy.config.identity import CrossReferenceEntry
from dicomproxy.config.keys import expected_at, known_keys
from dicomproxy.config.model import LATER_KEYS, LATER_TYPES, Settings
from dicomproxy.config.references import check_references
from dicomproxy.config.section import Section

MAX_FILE_BYTES: Final = 1024 * 1024
MAX_FAULTS: Final = 200
"""Shown at most; a file with more of them is no configuration of ours."""

_AnySection = TypeVar("_AnySection", bound=Section)


def load(path: Path) -> Settings:
    """Read the file at *path*. Blocks: not for an event loop's thread.

    Raises:
        ConfigError: with every fault that could be found.
    """
    return _resolve(loads(_read(path), str(path)), path.absolute().parent)


def loads(text: str, file: str = "<text>") -> Settings:
    """Read *text*, calling it *file* in faults; relative paths stay as they are.

    Raises:
        ConfigError: with every fault that could be found.
    """
    document = parse(text, file)
    if document.tree is None:
        document.tree = {}
    settings = _validate(document)
    check_references(document)
    if document.faults or settings is None:
        raise ConfigError(_limited(document))
    return settings


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the file, for editors."""
    schema = Settings.model_json_schema(schema_generator=_SchemaGenerator)
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        **schema,
        "title": "dicomproxy configuration",
    }


def json_schema_text() -> str:
    """Return the JSON Schema as it is shipped in a file."""
    return json.dumps(json_schema(), indent=2) + "\n"


# ---------------------------------------------------------------------- reading


def _read(path: Path) -> str:
    file = str(path)

    def refuse(found: str, expected: str, line: int = 0) -> ConfigError:
        return ConfigError([Fault(file, line, 1 if line else 0, "", found, expected)])

    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            # A pipe or a device may never end, or never begin.
            kind = "a directory" if stat.S_ISDIR(mode) else "something that is not a file"
            raise refuse(kind, "a YAML file")
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise refuse("no such file", "a YAML file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise refuse(
            f"what cannot be read ({reason or type(error).__name__})", "a YAML file"
        ) from None
    if len(data) > MAX_FILE_BYTES:
        raise refuse("more than 1 MiB", "a configuration of at most that size")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise refuse("bytes that are not UTF-8", "text in UTF-8", line) from None


def _resolve(settings: Settings, base: Path) -> Settings:
    return _updated(
        settings,
        cache=_updated(settings.cache, directory=base / settings.cache.directory),
        state=_updated(settings.state, directory=_below(base, settings.state.directory)),
        audit=_updated(settings.audit, file=_below(base, settings.audit.file)),
        cross_references=tuple(_cross_reference(base, one) for one in settings.cross_references),
        hl7=_hl7(base, settings.hl7) if settings.hl7 is not None else None,
    )


def _hl7(base: Path, section: Hl7Section) -> Hl7Section:
    tls = section.tls
    if tls is None:
        return section
    return _updated(
        section,
        tls=_updated(
            tls,
            certificate_file=base / tls.certificate_file,
            key_file=_below(base, tls.key_file),
            ca_file=_below(base, tls.ca_file),
        ),
    )


def _cross_reference(base: Path, entry: CrossReferenceEntry) -> CrossReferenceEntry:
    tls = entry.tls
    return _updated(
        entry,
        file=_below(base, entry.file),
        authorization_file=_below(base, entry.authorization_file),
        tls=_updated(
            tls,
            ca_file=_below(base, tls.ca_file),
            certificate_file=_below(base, tls.certificate_file),
            key_file=_below(base, tls.key_file),
        ),
    )


def _below(base: Path, path: Path | None) -> Path | None:
    return None if path is None else base / path


def _updated(section: _AnySection, **values: Any) -> _AnySection:
    return section.model_copy(update=values)


# ----------------------------------------------------------------- the model's say


def _validate(document: Document) -> Settings | None:
    """Convert the tree; on failure add the model's faults and return None."""
    already = {fault.path for fault in document.faults if fault.path}
    try:
        return Settings.model_validate(document.tree)
    except ValidationError as error:
        details = error.errors(include_url=False)
    later = set(_sources_of_later_types(document.tree))
    seen = len(document.faults)
    for detail in details:
        if len(document.faults) - seen >= MAX_FAULTS:
            break
        path = _in_file(document, detail["loc"])
        if path[:2] in later and path[2:] not in (("type",), ("name",)):
            # Its other keys are those of its type, which is refused already.
            continue
        missing = detail["type"] == "missing" or detail["input"] is None
        if document.truncated and missing:
            continue
        before = len(document.faults)
        _translate(document, path, detail)
        # What the parser refused there is the reason; once is enough.
        if document.faults[before].path in already:
            del document.faults[before:]
    return None


def _translate(document: Document, path: YamlPath, detail: ErrorDetails) -> None:
    kind = detail["type"]
    if kind == "extra_forbidden":
        _refuse_key(document, path)
    elif kind == "missing":
        document.fault(path, "nothing", expected_at(path))
    elif kind == "unexpected":
        document.fault(path, show_value(detail["input"]), detail["msg"])
    else:
        document.fault(path, show_value(detail["input"]), expected_at(path))


def _refuse_key(document: Document, path: YamlPath) -> None:
    # The value is not shown: it may be a password under a wrong name.
    name = str(path[-1])
    found = f"the key {show_key(name)}"
    known = known_keys(path[:-1])
    if name in LATER_KEYS:
        expected = "no such key: it is not available in this version"
    else:
        meant = closest(name, known)
        expected = f"a key such as {meant}" if meant else f"one of {', '.join(known)}"
    document.fault(path, found, expected, at_key=True)


def _in_file(document: Document, location: YamlPath) -> YamlPath:
    """Return the path as it is in the file, where a list's only member may stand alone."""
    path = tuple(location)
    while path and isinstance(path[-1], int) and path not in document.values:
        path = path[:-1]
    return path


def _sources_of_later_types(tree: Tree) -> list[YamlPath]:
    sources = tree.get("sources") if isinstance(tree, dict) else None
    return [
        ("sources", number)
        for number, source in enumerate(sources if isinstance(sources, list) else ())
        if isinstance(source, dict) and source.get("type") in LATER_TYPES
    ]


def _limited(document: Document) -> list[Fault]:
    faults = sorted(document.faults, key=lambda fault: (fault.line, fault.column, fault.path))
    if len(faults) > MAX_FAULTS:
        rest = len(faults) - MAX_FAULTS
        last = faults[MAX_FAULTS - 1]
        faults = faults[:MAX_FAULTS]
        faults.append(
            Fault(last.file, last.line, last.column + 1, "", f"{rest} or more faults", "none")
        )
    return faults


class _SchemaGenerator(GenerateJsonSchema):
    """Leaves out titles made up from key names, and defaults that mean "not given"."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: WithDefaultSchema) -> JsonSchemaValue:
        if schema.get("default", ...) is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)
