"""``dicomproxy coerce --source NAME IN OUT``: what becomes of a source's object, on one file.

Shows what changes, line by line, and writes the result. Nobody is asked who the
patient is: that is told on the command line, and whether a delivery would
withhold the object from that patient is said. What is shown names the patient,
since that is what the command is for; nothing of it is logged.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from difflib import unified_diff
from pathlib import Path
from typing import BinaryIO, Final

from pydicom.datadict import dictionary_has_tag, keyword_for_tag

from dicomproxy.config import Settings
from dicomproxy.config.model import SourceEntry
from dicomproxy.dataset.accession import Origin, candidates
from dicomproxy.dataset.attributes import fits
from dicomproxy.dataset.charset import UTF8
from dicomproxy.dataset.identifier import CannotEncode, Element, Identifier
from dicomproxy.dataset.part10 import Part10Error, read_file_meta
from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.dataset.splice import Decision, Read, Rewriter, SpliceError
from dicomproxy.identity.accession import Shown
from dicomproxy.identity.coercion import SIGNATURES, LocalPatient, accession_numbers, coerce
from dicomproxy.identity.safety import (
    Demographics,
    Unverified,
    Verdict,
    compare,
    demographics_of,
)
from dicomproxy.wiring import coercion_settings, domain

_PATIENT_ID: Final = 0x00100020
_LONGEST_SHOWN: Final = 200
_OPTIONS: Final = (
    ("patient_id", "LO"),
    ("patient_name", "PN"),
    ("birth_date", "DA"),
    ("sex", "CS"),
)


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Coerce one file and return the exit code: 0, 1 if it cannot be done, 2 for wrong options."""
    entry = next((source for source in settings.sources if source.name == options.source), None)
    if entry is None:
        names = ", ".join(source.name for source in settings.sources) or "none"
        return _complain(f"there is no source {options.source!r}; sources are: {names}", 2)
    for name, vr in _OPTIONS:
        if not fits(vr, getattr(options, name) or ""):
            return _complain(f"--{name.replace('_', '-')} is no value of VR {vr}", 2)
    if not options.patient_id and any(getattr(options, name) for name, _ in _OPTIONS):
        return _complain("a local patient needs --patient-id", 2)
    try:
        if options.outfile.exists() and options.outfile.samefile(options.infile):
            return _complain("OUT is the same file as IN", 2)
        with options.infile.open("rb") as file:
            return _coerce(settings, entry, options, file)
    except _NotWritten as error:
        return _complain(f"{options.outfile}: {error}", 1)
    except OSError as error:
        return _complain(f"{error.filename or options.infile}: {error.strerror}", 1)
    except (Part10Error, SpliceError, CannotEncode) as error:
        return _complain(f"{options.infile}: {error}", 1)


class _NotWritten(Exception):
    """The result cannot be written."""


def _complain(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


def _coerce(
    settings: Settings, entry: SourceEntry, options: argparse.Namespace, file: BinaryIO
) -> int:
    meta = read_file_meta(_reading(file, 0))
    begin = meta.data_set_offset
    own = coercion_settings(settings, entry)
    at = datetime.now(UTC).replace(microsecond=0)
    shown: list[str] = []

    def decide(view: Identifier) -> Decision:
        patient = _patient(settings, options, view)
        accessions = _accessions(settings, entry, view)
        decision = coerce(view, patient, own, accessions, at, options.destination)
        shown.extend(_difference(view, decision, options))
        shown.extend(_objections(patient, view, entry))
        return decision

    size = os.fstat(file.fileno()).st_size - begin
    rewriter = Rewriter(own.tags, decide, required=(_PATIENT_ID,), further=SIGNATURES)
    result = rewriter.rewrite(_reading(file, begin), size, meta.transfer_syntax_uid)
    _write(options.outfile, _all(_reading(file, 0)(0, begin), result.chunks()))
    _show("\n".join(shown) if shown else "nothing is changed")
    return 0


def _show(text: str) -> None:
    """Print *text*, in whatever the terminal can write of it."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))


def _reading(file: BinaryIO, begin: int) -> Read:
    return lambda offset, size: os.pread(file.fileno(), size, begin + offset)


def _all(head: bytes, chunks: Iterable[bytes]) -> Iterator[bytes]:
    yield head
    yield from chunks


def _write(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a whole file or none."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise _NotWritten(error.strerror) from None
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                _put(file, chunk)
        try:
            os.replace(name, path)
        except OSError as error:
            raise _NotWritten(error.strerror) from None
    except BaseException:
        os.unlink(name)
        raise


def _put(file: BinaryIO, chunk: bytes) -> None:
    try:
        file.write(chunk)
    except OSError as error:
        raise _NotWritten(error.strerror) from None


# ---------------------------------------------------------------- what is local


def _patient(
    settings: Settings, options: argparse.Namespace, view: Identifier
) -> LocalPatient | None:
    if not options.patient_id:
        return None
    foreign = demographics_of(view)
    given = Demographics(
        foreign.name if options.patient_name is None else options.patient_name,
        foreign.birth_date if options.birth_date is None else options.birth_date,
        foreign.sex if options.sex is None else options.sex,
    )
    local = domain(settings.local.patient_id_issuer)
    return LocalPatient(PatientId(options.patient_id, local), given)


def _accessions(
    settings: Settings, entry: SourceEntry, view: Identifier
) -> Mapping[str, Shown] | None:
    """Return the numbers as they would be made up for the first time, none taken yet."""
    policy = entry.identity.accession
    if policy == "keep":
        return None
    if policy == "empty":
        return {}
    issuer = settings.proxy.accession_issuer
    ours = domain(issuer) if issuer.is_named else Domain(settings.proxy.ae_title)
    prefix = (entry.identity.accession_prefix or "") if policy == "prefix" else ""
    return {
        number: Shown(next(candidates(Origin(entry.name, number, named), prefix)), ours)
        for number, named in accession_numbers(view).items()
    }


# ---------------------------------------------------------------- what is shown


def _difference(view: Identifier, decision: Decision, options: argparse.Namespace) -> Iterator[str]:
    after = view.with_character_set(UTF8) if decision.unicode else view.copy()
    for tag, element in decision.edits.items():
        if element is None:
            after.remove(tag)
        else:
            after.put(element)
    lines = unified_diff(
        list(_lines(view)),
        list(_lines(after)),
        str(options.infile),
        str(options.outfile),
        n=0,
        lineterm="",
    )
    # Places within the list of what was looked at would tell nobody anything.
    yield from (line for line in lines if not line.startswith("@@"))
    if decision.unicode:
        yield "all other text is converted to ISO_IR 192"


def _objections(
    patient: LocalPatient | None, view: Identifier, entry: SourceEntry
) -> Iterator[str]:
    """Say why a delivery would not go as far as this command does."""
    if patient is None:
        return
    comparison = compare(patient.demographics, demographics_of(view))
    if comparison.verdict is Verdict.CONFLICT:
        differing = " and ".join(comparison.contradictions).replace("_", " ")
        yield f"a delivery would withhold this object: another {differing}"
    elif not comparison.permits(Unverified(entry.identity.unverified)):
        yield "a delivery would withhold this object: neither birth date nor sex to compare"


def _lines(view: Identifier, depth: int = 0) -> Iterator[str]:
    for element in view:
        yield f"{'  ' * depth}{_head(element)} {_value(view, element)}".rstrip()
        if isinstance(element.value, tuple):
            for number, item in enumerate(element.value, 1):
                yield f"{'  ' * depth}  item {number}"
                yield from _lines(item, depth + 2)


def _head(element: Element) -> str:
    tag = element.tag
    name = keyword_for_tag(tag) if dictionary_has_tag(tag) else ""
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X}) {element.vr} {name}".rstrip()


def _value(view: Identifier, element: Element) -> str:
    if isinstance(element.value, tuple):
        return f"{len(element.value)} item{'' if len(element.value) == 1 else 's'}"
    text = "\\".join(view.values(element.tag))
    if not text and element.value.strip(b" \0"):
        return f"{len(element.value)} bytes"
    # A value may hold what would move the cursor of a terminal.
    printable = "".join(letter if letter.isprintable() else "?" for letter in text)
    if len(printable) > _LONGEST_SHOWN:
        printable = f"{printable[:_LONGEST_SHOWN]}..."
    return f"[{printable}]"
