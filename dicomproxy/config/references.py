"""What one key of the configuration says about another.

Works on the text as it stands in the file, value by value, so that these
checks run even while other keys are wrong; a value that is itself wrong is
reported elsewhere and compared with nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from dicomproxy.config.coercion_references import check_coercion
from dicomproxy.config.document import Document, Tree
from dicomproxy.config.faults import YamlPath, closest, show_path, show_text, show_value
from dicomproxy.config.hl7 import Hl7Section
from dicomproxy.config.identity_references import check_identity
from dicomproxy.config.model import CacheSection, ProxySection, WebSection
from dicomproxy.config.section import Section
from dicomproxy.config.values import AETitle, BindHost, BindPort, Fraction, SourceName

_TITLE: Final[TypeAdapter[Any]] = TypeAdapter(AETitle)
_HOST: Final[TypeAdapter[Any]] = TypeAdapter(BindHost)
_PORT: Final[TypeAdapter[Any]] = TypeAdapter(BindPort)
_NAME: Final[TypeAdapter[Any]] = TypeAdapter(SourceName)
_FRACTION: Final[TypeAdapter[Any]] = TypeAdapter(Fraction)

_LOOPBACK: Final = "the loopback interface"
_EVERYWHERE: Final = "every interface"


def check_references(document: Document) -> None:
    """Add a fault to *document* for each contradiction between keys."""
    checker = _Checker(document)
    checker.titles()
    checker.source_names()
    checker.addresses()
    checker.destinations()
    checker.watermarks()
    check_identity(document)
    check_coercion(document)


@dataclass(frozen=True, slots=True)
class _Entity:
    """One application entity of the file; what is missing or wrong is None."""

    path: YamlPath
    ae_title: str | None
    host: str | None
    port: int | None

    def at(self, key: str) -> YamlPath:
        return (*self.path, key)


class _Checker:
    def __init__(self, document: Document) -> None:
        self._document = document
        self._proxy = self._entity(("proxy",), ProxySection)
        self._web = self._entity(("web",), WebSection)
        self._hl7 = self._entity(("hl7",), Hl7Section)
        self._local = self._entity(("local",))
        self._workstations = list(self._entities("workstations"))
        self._callers = list(self._entities("callers"))
        self._sources = list(self._entities("sources"))

    # ------------------------------------------------------------------ checks

    def titles(self) -> None:
        """Two entities that must be told apart do not share an AE title."""
        own = self._proxy.ae_title
        if own is not None:
            for path in self._each(("proxy", "aliases")):
                if self._value(path, _TITLE) == own:
                    self._fault(path, "the proxy's own title", "titles other than proxy.ae_title")
            if self._local.ae_title == own:
                self._fault(
                    self._local.at("ae_title"),
                    "the proxy's own title",
                    "another one (give the proxy a title of its own, and "
                    "list this one in proxy.aliases for workstations that call it)",
                )
        for source in self._sources:
            calling = self._value(source.at("calling_ae_title"), _TITLE) or own
            if source.ae_title is not None and source.ae_title == calling:
                self._fault(
                    source.at("ae_title"),
                    "the title that the proxy has there",
                    "another one, or a calling_ae_title for this source",
                )
        first: dict[str, YamlPath] = {}
        for entity in (*self._workstations, *self._callers):
            title = entity.ae_title
            if title is None:
                continue
            if title == own:
                self._fault(entity.at("ae_title"), "the proxy's own title", "another one")
            self._once(first, title, entity.at("ae_title"), "each AE title once")

    def source_names(self) -> None:
        """Names of sources are unique, and the names that workstations use exist."""
        first: dict[str, YamlPath] = {}
        for source in self._sources:
            name = self._value(source.at("name"), _NAME)
            if name is not None:
                self._once(first, name, source.at("name"), "each name once")
        for workstation in self._workstations:
            for member in self._each(workstation.at("sources")):
                name = self._value(member, _NAME)
                if name is not None and name not in first:
                    meant = closest(name, first)
                    hint = f" (did you mean {meant}?)" if meant else ""
                    self._fault(member, show_text(name), f"the name of one of the sources{hint}")

    def addresses(self) -> None:
        """No peer is the proxy itself, no archive stands there twice, and ports do not collide."""
        for peer in (self._local, *self._workstations, *self._sources):
            if _same_socket(self._proxy, peer):
                self._fault(peer.at("port"), "the proxy's own host and port", "another address")
        if _same_socket(self._proxy, self._web):
            self._fault(self._web.at("port"), "the port of proxy.port", "a port of its own")
        if self._tree(("hl7",)) is not None:
            for other, name in ((self._proxy, "proxy.port"), (self._web, "web.port")):
                if _same_socket(other, self._hl7):
                    self._fault(self._hl7.at("port"), f"the port of {name}", "a port of its own")
        first: dict[tuple[object, ...], YamlPath] = {}
        for archive in (self._local, *self._sources):
            if archive.ae_title is None or archive.host is None or archive.port is None:
                continue
            address = (archive.ae_title, _normal(archive.host), archive.port)
            if address in first:
                self._fault(
                    archive.at("ae_title"),
                    f"the title, host and port of {show_path(first[address])}",
                    "each archive once",
                )
            first.setdefault(address, archive.path)

    def destinations(self) -> None:
        """A workstation has host and port, or neither and then nothing about delivering."""
        for workstation in self._workstations:
            present = self._tree(workstation.path)
            if not isinstance(present, dict):
                continue
            host, port = present.get("host") is not None, present.get("port") is not None
            if host != port:
                there, missing = ("host", "port") if host else ("port", "host")
                self._fault(
                    workstation.at(there),
                    f"a {there} without a {missing}",
                    "both, or neither for a workstation that only queries",
                )
            elif not host:
                for name in ("deliver_as", "associations"):
                    if present.get(name) is not None:
                        self._fault(
                            workstation.at(name),
                            f"{name} of a workstation without host and port",
                            "host and port, since nothing is delivered without them",
                        )

    def watermarks(self) -> None:
        """Eviction ends below where it begins."""
        low, high = (
            self._value(("cache", name), _FRACTION, CacheSection)
            for name in ("low_watermark", "high_watermark")
        )
        if low is not None and high is not None and low >= high:
            low_path: YamlPath = ("cache", "low_watermark")
            if self._tree(low_path) is not None:
                self._fault(low_path, f"{low:g}", f"less than high_watermark ({high:g})")
            else:
                self._fault(
                    ("cache", "high_watermark"), f"{high:g}", f"more than low_watermark ({low:g})"
                )

    # ------------------------------------------------------------------ access

    def _entities(self, key: str) -> Iterator[_Entity]:
        for number, _ in enumerate(self._members((key,))):
            yield self._entity((key, number))

    def _entity(self, path: YamlPath, model: type[Section] | None = None) -> _Entity:
        return _Entity(
            path,
            self._value((*path, "ae_title"), _TITLE, model),
            self._value((*path, "host"), _HOST, model),
            self._value((*path, "port"), _PORT, model),
        )

    def _members(self, path: YamlPath) -> list[Tree]:
        members = self._tree(path)
        return members if isinstance(members, list) else []

    def _each(self, path: YamlPath) -> list[YamlPath]:
        """Return where the members of a list stand, whose only one may stand alone."""
        members = self._members(path)
        return [(*path, number) for number in range(len(members))] or [path]

    def _value(
        self, path: YamlPath, kind: TypeAdapter[Any], model: type[Section] | None = None
    ) -> Any:
        """Return the converted value at *path*, else the default of *model*, else None."""
        text: object = self._tree(path)
        if text is None and model is not None:
            field = model.model_fields.get(str(path[-1]))
            text = None if field is None or field.is_required() else field.default
        try:
            return None if text is None else kind.validate_python(text)
        except ValidationError:
            return None

    def _tree(self, path: YamlPath) -> Tree:
        node = self._document.tree
        for step in path:
            if isinstance(node, dict) and isinstance(step, str):
                node = node.get(step)
            elif isinstance(node, list) and isinstance(step, int) and step < len(node):
                node = node[step]
            else:
                return None
        return node

    def _once(self, first: dict[str, YamlPath], value: str, path: YamlPath, expected: str) -> None:
        if value in first:
            line = self._document.values[first[value]][0]
            self._fault(
                path,
                f"{show_value(value)} a second time",
                f"{expected} (it first stands in line {line})",
            )
        first.setdefault(value, path)

    def _fault(self, path: YamlPath, found: str, expected: str) -> None:
        self._document.fault(path, found, expected)


def _same_socket(ours: _Entity, other: _Entity) -> bool:
    """Tell whether both are one address; port 0 is a free port and never the same."""
    if not ours.port or ours.port != other.port or ours.host is None or other.host is None:
        return False
    places = {_normal(ours.host), _normal(other.host)}
    # Which other addresses this machine has is not known without asking it.
    return len(places) == 1 or places == {_EVERYWHERE, _LOOPBACK}


def _normal(host: str) -> str:
    name = host.lower().rstrip(".")
    try:
        address = ip_address(name)
    except ValueError:
        return _LOOPBACK if name == "localhost" else name
    if address.is_loopback:
        return _LOOPBACK
    return _EVERYWHERE if address.is_unspecified else str(address)
