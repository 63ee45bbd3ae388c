"""PIXm: asking a cross-reference manager over FHIR R4 (ITI-83, IHE ITI TF-2 3.83).

Rules kept: as for PIX, "nobody there" is believed only in the words of the
transaction: a ``Parameters`` without identifiers, or a 404 whose OperationOutcome
says that the ID is what was not found. Any other 404 is a wrong address. No redirect is
followed, an ID goes where it was configured to go; the answer is read up to a limit,
uncompressed. No URL, body or exception text of the exchange leaves this module: the
question is in the URL, and the answer may quote it.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.hl7.charset import REPLACEMENT
from dicomproxy.identity.pix import SeveralIds
from dicomproxy.ports import CrossReferenceError, Failure

_MOST_CONNECTIONS: Final = 4
_KEEPALIVE_SECONDS: Final = 30.0
_OID: Final = re.compile(r"[0-2](\.(0|[1-9][0-9]*))+")
_TOKEN_ESCAPES: Final = str.maketrans({one: f"\\{one}" for one in "\\|,$"})
"""What a token gives a meaning to (FHIR R4, Search, "Escaping Search Parameters")."""


@dataclass(frozen=True, slots=True)
class PixmSettings:
    """Where the manager is, and what its answers are taken for.

    Args:
        base_url: FHIR base, to which ``/Patient/$ihe-pix`` is added.
        authorization: value of the Authorization header, a secret; empty for none.
        deadline_seconds: for a whole lookup.
        connect_seconds: for making a connection, TLS included.
        max_answer_bytes: the longest body read.
        several_ids: what to make of several IDs in one domain.
    """

    base_url: str
    authorization: str = field(default="", repr=False)
    deadline_seconds: float = 5.0
    connect_seconds: float = 3.0
    max_answer_bytes: int = 256 * 1024
    several_ids: SeveralIds = SeveralIds.NONE


class PixmCrossReference:
    """Implements :class:`dicomproxy.ports.CrossReference` by ITI-83.

    Args:
        settings: see there.
        tls: the context for ``https``; None for the system's trust.
    """

    def __init__(self, settings: PixmSettings, *, tls: ssl.SSLContext | None = None) -> None:
        self._settings = settings
        self._url = settings.base_url.rstrip("/") + "/Patient/$ihe-pix"
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def lookup(self, patient: PatientId, domain: Domain) -> tuple[PatientId, ...]:
        """Return the person's IDs in *domain*, none if the manager knows of none.

        Raises:
            CrossReferenceError: it could not be found out.
        """
        source, target = system_of(patient.domain), system_of(domain)
        if not source or not target:
            # FHIR names domains by URI; a namespace alone cannot be asked for.
            raise CrossReferenceError(Failure.STATUS, "unknown_domain")
        if not patient.value or REPLACEMENT in patient.value:
            raise CrossReferenceError(Failure.STATUS, "unreadable_id")
        status, body = await self._asked(
            {
                "sourceIdentifier": f"{source}|{patient.value.translate(_TOKEN_ESCAPES)}",
                "targetSystem": target,
            }
        )
        values = read_answer(status, body, target)
        if len(values) > 1 and self._settings.several_ids is SeveralIds.NONE:
            raise CrossReferenceError(Failure.STATUS, "several_ids")
        return tuple(PatientId(value, domain) for value in values)

    def forget(self, patient: PatientId) -> None:
        """Do nothing: nothing is remembered."""

    async def close(self) -> None:
        """Close the connections to the manager; lookups under way fail."""
        self._closed = True
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _asked(self, parameters: dict[str, str]) -> tuple[int, bytes]:
        """Return status and body of the answer.

        Raises:
            CrossReferenceError: there is none, or too much of it.
        """
        try:
            async with asyncio.timeout(self._settings.deadline_seconds):
                async with self._opened().get(
                    self._url, params=parameters, allow_redirects=False
                ) as response:
                    return response.status, await self._body(response)
        except TimeoutError as error:
            kind = isinstance(error, aiohttp.ConnectionTimeoutError)
            failure = (
                CrossReferenceError(Failure.UNREACHABLE, "connect_timeout")
                if kind
                else CrossReferenceError(Failure.TIMEOUT)
            )
        except aiohttp.ClientConnectorCertificateError:
            failure = CrossReferenceError(Failure.UNREACHABLE, "certificate")
        except (aiohttp.ClientSSLError, ssl.SSLError):
            failure = CrossReferenceError(Failure.UNREACHABLE, "tls")
        except aiohttp.ClientConnectorError:
            failure = CrossReferenceError(Failure.UNREACHABLE)
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError):
            failure = CrossReferenceError(Failure.ABORTED)
        except (aiohttp.ClientError, ValueError):
            failure = CrossReferenceError(Failure.PROTOCOL, "no_http")
        # Outside of the handlers: the exceptions above have the URL in their text.
        raise failure

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        limit = self._settings.max_answer_bytes
        body = bytearray()
        async for piece in response.content.iter_any():
            body += piece
            if len(body) > limit:
                raise CrossReferenceError(Failure.PROTOCOL, "answer_too_long")
        return bytes(body)

    def _opened(self) -> aiohttp.ClientSession:
        if self._closed:
            raise CrossReferenceError(Failure.ABORTED, "client_closed")
        if self._session is None:
            headers = {
                "Accept": "application/fhir+json",
                # Read as it comes: what is small on the wire may be huge unpacked.
                "Accept-Encoding": "identity",
                "User-Agent": "dicomproxy",
            }
            if self._settings.authorization:
                headers["Authorization"] = self._settings.authorization
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    ssl=self._tls if self._tls is not None else True,
                    limit=_MOST_CONNECTIONS,
                    keepalive_timeout=_KEEPALIVE_SECONDS,
                ),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=self._settings.connect_seconds
                ),
                headers=headers,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
            )
        return self._session


def system_of(domain: Domain) -> str:
    """Return the URI by which FHIR names a domain (ITI TF-2 Appendix E.3), empty if it has none."""
    identifier, kind = domain.universal_id, domain.universal_id_type.upper()
    if kind == "ISO" or (not kind and _OID.fullmatch(identifier)):
        return f"urn:oid:{identifier}" if identifier else ""
    if kind in ("UUID", "GUID"):
        return f"urn:uuid:{identifier.lower()}"
    # URI, or a type that does not say what it is: taken if it is one.
    return identifier if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s|]+", identifier) else ""


# ------------------------------------------------------------ reading an answer


def read_answer(status: int, body: bytes, target: str) -> tuple[str, ...]:
    """Return the IDs that an answer gives for *target*, each once.

    Raises:
        CrossReferenceError: anything but "these" or "none".
    """
    if status == 200:
        return _identifiers(_resource(body), target)
    if 300 <= status < 400:
        raise CrossReferenceError(Failure.PROTOCOL, "redirected")
    issues = _issues(body)
    if status == 404 and issues and all(_unknown_id(issue) for issue in issues):
        return ()
    if status in (400, 403, 404) and any(map(_unknown_domain, issues)):
        raise CrossReferenceError(Failure.STATUS, "unknown_domain")
    raise CrossReferenceError(Failure.STATUS, f"http_{status}")


def _identifiers(resource: dict[str, Any], target: str) -> tuple[str, ...]:
    parameters = resource.get("parameter", [])
    if resource.get("resourceType") != "Parameters" or not isinstance(parameters, list):
        raise CrossReferenceError(Failure.PROTOCOL, "wrong_resource")
    found: dict[str, None] = {}
    others = 0
    for parameter in parameters:
        if not isinstance(parameter, dict):
            raise CrossReferenceError(Failure.PROTOCOL, "wrong_resource")
        if parameter.get("name") != "targetIdentifier":
            continue
        identifier = parameter.get("valueIdentifier")
        value = identifier.get("value") if isinstance(identifier, dict) else None
        if not isinstance(identifier, dict) or not isinstance(value, str) or not value.strip():
            raise CrossReferenceError(Failure.PROTOCOL, "wrong_resource")
        if REPLACEMENT in value:
            raise CrossReferenceError(Failure.PROTOCOL, "undecoded_id")
        if _same_system(identifier.get("system"), target):
            found[value.strip()] = None
        else:
            others += 1
    if others and not found:
        # Asked for one domain and answered for others: says nothing about the person.
        raise CrossReferenceError(Failure.PROTOCOL, "answer_of_another_domain")
    return tuple(found)


def _same_system(system: object, target: str) -> bool:
    """Tell whether an answer's system is the one asked for; a UUID has no case (RFC 9562)."""
    if isinstance(system, str) and target.startswith("urn:uuid:"):
        return system.lower() == target
    return system == target


def _resource(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CrossReferenceError(Failure.PROTOCOL, "no_json")
    return found


def _issues(body: bytes) -> list[dict[str, Any]]:
    """Return the issues of an OperationOutcome, none if the body is something else."""
    try:
        outcome = _resource(body)
    except CrossReferenceError:
        return []
    issues = outcome.get("issue")
    if outcome.get("resourceType") != "OperationOutcome" or not isinstance(issues, list):
        return []
    return [issue for issue in issues if isinstance(issue, dict)]


def _unknown_id(issue: dict[str, Any]) -> bool:
    """Tell whether an issue says that the ID asked about is not known.

    The code alone is also that of a wrong address, where a server that knows no such
    operation finds no resource of this name. The text is prescribed: "sourceIdentifier
    Patient Identifier not found".
    """
    text = _text(issue)
    return issue.get("code") == "not-found" and "identifier" in text and not _of_domain(text)


def _unknown_domain(issue: dict[str, Any]) -> bool:
    """Tell whether an issue says that one of the two domains is not known."""
    code = issue.get("code")
    return code == "code-invalid" or (code == "not-found" and _of_domain(_text(issue)))


def _of_domain(text: str) -> bool:
    return "assigning authority" in text or "targetsystem" in text


def _text(issue: dict[str, Any]) -> str:
    details = issue.get("details")
    texts = (issue.get("diagnostics"), details.get("text") if isinstance(details, dict) else None)
    return " ".join(text for text in texts if isinstance(text, str)).lower()
