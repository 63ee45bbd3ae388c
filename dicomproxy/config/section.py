"""What every section of the model is made with."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema


class Section(BaseModel):
    """A mapping of known keys that never changes once it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def key(description: str, default: Any = ...) -> Any:
    """Declare a key; *default* is text as in the file, None where absence means something."""
    return Field(
        default=default,
        description=description,
        validate_default=default is not ... and default is not None,
    )


def section(description: str, default: dict[str, Any] | list[Any]) -> Any:
    """Declare a section that may be left out."""
    return Field(
        default_factory=lambda: type(default)(), description=description, validate_default=True
    )


class _BlankIs:
    """A section of which only the name is written stands for an empty one."""

    def __init__(self, empty: type[dict[str, Any]] | type[list[Any]]) -> None:
        self._empty = empty

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._fill, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [handler(schema), {"type": "null"}]}

    def _fill(self, value: object) -> object:
        return self._empty() if value is None else value


class TextIs:
    """A section for which a text may stand: the value of its key *name*."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._wrap, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "minLength": 1}, handler(schema), {"type": "null"}]}

    def _wrap(self, value: object) -> object:
        if value is None:
            return {}
        return {self.name: value} if isinstance(value, str) else value


MAPPING: Final = _BlankIs(dict)
LIST: Final = _BlankIs(list)
