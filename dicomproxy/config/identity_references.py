"""What the keys about identity say about one another; as ``references``, on the text itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from dicomproxy.config.document import Document, Tree
from dicomproxy.config.faults import YamlPath, closest, show_text, show_value
from dicomproxy.config.values import ProviderName, Uid
from dicomproxy.dataset.patient import Domain

_NAME: Final[TypeAdapter[Any]] = TypeAdapter(ProviderName)
_UID: Final[TypeAdapter[Any]] = TypeAdapter(Uid)

_SAME: Final = "same"
_NEEDED: Final = {"table": ("file",), "pix": ("host", "port"), "pixm": ("url",)}
_ALLOWED: Final[dict[str, set[str]]] = {
    "table": {"file", "timeout"},
    "pix": {
        "host",
        "port",
        "sending_application",
        "sending_facility",
        "receiving_application",
        "receiving_facility",
        "charset",
        "several_ids",
        "timeout",
        "connections",
        "tls",
    },
    "pixm": {"url", "authorization_file", "several_ids", "timeout", "tls"},
}


def check_identity(document: Document) -> None:
    """Add a fault to *document* for each contradiction between keys about identity."""
    checker = _Checker(document)
    checker.domains()
    checker.providers()
    checker.sources()
    checker.notices()


@dataclass(frozen=True, slots=True)
class _Domain:
    """A domain of the file; what is missing or wrong is None."""

    path: YamlPath
    namespace: str | None
    universal_id: str | None
    universal_id_type: str

    @property
    def is_named(self) -> bool:
        return bool(self.namespace or self.universal_id)

    @property
    def value(self) -> Domain:
        return Domain(self.namespace or "", self.universal_id or "", self.universal_id_type)

    def matches(self, other: _Domain) -> bool:
        """Tell whether both are one, as patient IDs are compared."""
        return self.value.matches(other.value)


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class _Checker:
    def __init__(self, document: Document) -> None:
        self._document = document
        self._local = self._domain(("local", "patient_id_issuer"))
        self._sources = [("sources", number) for number, _ in self._members("sources")]
        self._entries = {
            ("cross_references", number): entry
            for number, entry in self._members("cross_references")
            if isinstance(entry, dict)
        }
        self._types = {
            name: entry.get("type")
            for entry in self._entries.values()
            if isinstance(name := entry.get("name"), str)
        }

    # ------------------------------------------------------------------ checks

    def domains(self) -> None:
        """A domain that is written is named, and an OID is one."""
        paths: list[YamlPath] = [("proxy", "accession_issuer"), ("local", "patient_id_issuer")]
        for source in self._sources:
            paths += [(*source, "patient_id_issuer"), (*source, "identity", "accession_issuer")]
        for path in paths:
            domain, tree = self._domain(path), self._tree(path)
            if isinstance(tree, dict) and tree and not domain.is_named:
                self._fault(path, "a domain without a name", "namespace, universal_id or both")
            if domain.universal_id and domain.universal_id_type == "ISO":
                self._check_oid(domain)
        self._check_namespaces()

    def providers(self) -> None:
        """Each cross-reference has a name of its own, and the keys of its type, no others."""
        first: dict[str, YamlPath] = {}
        for path, entry in self._entries.items():
            name = self._value((*path, "name"), _NAME)
            if name in first:
                line = self._document.values[first[name]][0]
                self._fault(
                    (*path, "name"),
                    f"{show_value(name)} a second time",
                    f"each name once (it first stands in line {line})",
                )
            elif name is not None:
                first[name] = (*path, "name")
            kind = entry.get("type")
            if not isinstance(kind, str) or kind not in _NEEDED:
                continue
            for needed in _NEEDED[kind]:
                if entry.get(needed) is None:
                    self._fault(path, f"type {kind} without {needed}", f"{needed} as well")
            of_others = set().union(*_ALLOWED.values()) - _ALLOWED[kind]
            for present in entry:
                if present in of_others and entry[present] is not None:
                    self._fault(
                        (*path, present), f"{present} of type {kind}", "keys of that type alone"
                    )
            self._check_secret(path, entry)
            self._check_tls(path, entry)

    def sources(self) -> None:
        """Each source has a way to the IDs of its domain, and a prefix where it needs one."""
        for source in self._sources:
            domain = self._domain((*source, "patient_id_issuer"))
            asked = self._asked((*source, "identity", "cross_reference"))
            self._check_names(asked)
            self._check_domain(domain, asked)
            self._check_prefix((*source, "identity"))

    def notices(self) -> None:
        """Whoever tells of merged records has something here to tell of."""
        told = isinstance(self._tree(("hl7",)), dict)
        keys = ("patient_id_issuer", "identity", "coerce")
        if told and not (
            self._local.is_named
            or self._entries
            or self._tree(("proxy", "accession_issuer"))
            or any(
                self._tree((*source, key)) is not None for source in self._sources for key in keys
            )
        ):
            self._fault(
                ("hl7",),
                "a listener while nothing is configured that its messages are about",
                "local.patient_id_issuer, and cross_references, as well",
            )

    def _check_names(self, asked: dict[YamlPath, str]) -> None:
        for path, name in asked.items():
            if name != _SAME and name not in self._types and self._is_name(name):
                meant = closest(name, (_SAME, *self._types))
                hint = f" (did you mean {meant}?)" if meant else ""
                self._fault(
                    path, show_text(name), f"same, or the name of one of cross_references{hint}"
                )

    def _check_domain(self, domain: _Domain, asked: dict[YamlPath, str]) -> None:
        if domain.is_named and not self._local.is_named:
            self._fault(
                domain.path, "an issuer while the local PACS has none", "local.patient_id_issuer"
            )
            return
        shared = not domain.is_named or domain.matches(self._local)
        if not shared and not asked:
            self._fault(
                domain.path,
                "an issuer other than the local one",
                "identity.cross_reference to name who knows the IDs there",
            )
        for path, name in asked.items():
            if name == _SAME and not shared:
                self._fault(
                    path,
                    "same, while the source has an issuer other than the local one",
                    "a table, PIX or PIXm",
                )
            kind = self._types.get(name)
            if kind in _NEEDED and shared:
                self._fault(
                    path,
                    f"type {kind} for a source that has the local domain",
                    "same, or a patient_id_issuer of the source's own",
                )
            elif kind == "pixm" and not (domain.universal_id and self._local.universal_id):
                self._fault(
                    path,
                    "type pixm between domains that are not both known by a universal_id",
                    "a universal_id for local.patient_id_issuer and for that of the source",
                )

    def _check_prefix(self, identity: YamlPath) -> None:
        policy, prefix = (self._tree((*identity, key)) for key in ("accession", "accession_prefix"))
        if policy == "prefix" and prefix is None:
            self._fault(
                (*identity, "accession"), "prefix without a prefix", "accession_prefix as well"
            )

    def _check_namespaces(self) -> None:
        """A namespace alone, as data sets may name an issuer, means one domain."""
        known = [self._local]
        for source in self._sources:
            domain = self._domain((*source, "patient_id_issuer"))
            if any(
                domain.namespace and domain.namespace == one.namespace and not domain.matches(one)
                for one in known
            ):
                self._fault(
                    domain.path,
                    "the namespace of another domain",
                    "a namespace of its own, or none: data sets may name an issuer by it alone",
                )
            known.append(domain)

    def _check_secret(self, path: YamlPath, entry: dict[str, Tree]) -> None:
        """A secret leaves this machine under TLS only."""
        url = entry.get("url")
        if entry.get("authorization_file") is None or not isinstance(url, str):
            return
        plain = re.match(r"http://(?P<host>\[[^\]]*\]|[^:/]*)", url)
        if plain is not None and not _is_this_machine(plain["host"].strip("[]")):
            self._fault((*path, "authorization_file"), "a secret over http", "an https url")

    def _check_tls(self, path: YamlPath, entry: dict[str, Tree]) -> None:
        """What is said of TLS is in force: else IDs would go out in plain text unnoticed."""
        tls, url = entry.get("tls"), entry.get("url")
        if not isinstance(tls, dict):
            return
        plain = isinstance(url, str) and not url.startswith("https")
        if plain and any(tls.values()) and tls.get("enabled") != "false":
            self._fault((*path, "tls"), "tls with an http url", "an https url")
        elif entry.get("type") == "pix" and any(tls.values()) and tls.get("enabled") is None:
            self._fault((*path, "tls"), "tls that is not enabled", "enabled: true, or false")
        if tls.get("key_file") is not None and tls.get("certificate_file") is None:
            self._fault(
                (*path, "tls", "key_file"), "a key without its certificate", "certificate_file"
            )

    def _check_oid(self, domain: _Domain) -> None:
        try:
            _UID.validate_python(domain.universal_id)
        except ValidationError:
            self._fault(
                (*domain.path, "universal_id"),
                show_value(domain.universal_id),
                "an OID, or the universal_id_type that it is",
            )

    # ------------------------------------------------------------------ access

    def _asked(self, path: YamlPath) -> dict[YamlPath, str]:
        """Return the names in a list whose only member may stand alone, with their places."""
        tree = self._tree(path)
        members = tree if isinstance(tree, list) else []
        places: dict[YamlPath, Tree] = {(*path, at): name for at, name in enumerate(members)}
        return {
            place: name for place, name in (places or {path: tree}).items() if isinstance(name, str)
        }

    def _domain(self, path: YamlPath) -> _Domain:
        tree = self._tree(path)
        if isinstance(tree, str):
            return _Domain(path, tree.strip(" "), None, "ISO")
        keys = tree if isinstance(tree, dict) else {}
        namespace, universal_id, kind = (
            value.strip(" ") if isinstance(value := keys.get(key), str) else None
            for key in ("namespace", "universal_id", "universal_id_type")
        )
        return _Domain(path, namespace, universal_id, kind or "ISO")

    def _members(self, key: str) -> Iterator[tuple[int, Tree]]:
        members = self._tree((key,))
        yield from enumerate(members if isinstance(members, list) else ())

    def _is_name(self, name: str) -> bool:
        try:
            _NAME.validate_python(name)
        except ValidationError:
            return False
        return True

    def _value(self, path: YamlPath, kind: TypeAdapter[Any]) -> Any:
        text = self._tree(path)
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

    def _fault(self, path: YamlPath, found: str, expected: str) -> None:
        self._document.fault(path, found, expected)
