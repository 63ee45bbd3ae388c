"""What ``dicomproxy doctor`` tries of cross-references: tables are read, managers are asked.

A manager is asked for an ID that nobody has, in every domain for which it would
be asked: that it knows nobody by it is the right answer, and the only one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Final

from dicomproxy.config import Settings
from dicomproxy.config.identity import CrossReferenceEntry
from dicomproxy.dataset.patient import Domain, PatientId
from dicomproxy.identity.pix import PixCrossReference
from dicomproxy.identity.pixm import PixmCrossReference
from dicomproxy.identity.table import check_table
from dicomproxy.ports import CrossReferenceError
from dicomproxy.wiring_identity import domains, manager, read_secrets_of

NOBODY: Final = "DICOMPROXY-DOCTOR"

Step = Callable[[str, Callable[[], Awaitable[str]]], Awaitable[bool]]
"""Tries something under a name, and says what came of it."""


class StepFailed(Exception):
    """A step failed; the text says how, for the person who reads it."""


async def try_cross_references(settings: Settings, step: Step) -> None:
    """Try each of them."""
    for entry in settings.cross_references:
        if entry.type == "table":
            print(f"\n{entry.name}: table {entry.file}")
            await step("table", partial(_table, settings, entry))
            continue
        where = f"{entry.host}:{entry.port}" if entry.type == "pix" else entry.url
        print(f"\n{entry.name}: {entry.type} at {where}")
        await _manager(settings, entry, step)


async def _table(settings: Settings, entry: CrossReferenceEntry) -> str:
    faults = await asyncio.to_thread(check_table, entry.file or Path(), domains(settings))
    if faults:
        raise StepFailed("; ".join(map(str, faults)))
    return "can be used"


async def _manager(settings: Settings, entry: CrossReferenceEntry, step: Step) -> None:
    made: list[PixCrossReference | PixmCrossReference] = []

    async def files() -> str:
        try:
            secrets = await asyncio.to_thread(read_secrets_of, entry)
        except OSError as error:
            raise StepFailed(error.strerror or type(error).__name__) from None
        except UnicodeDecodeError:
            raise StepFailed("authorization_file is no text") from None
        made.append(manager(entry, secrets))
        return ""

    if not await step("files", files):
        return
    known = domains(settings)
    try:
        for source in settings.sources:
            if entry.name in (source.identity.cross_reference or ()):
                ask = partial(_ask, made[0], known.local, known.of(source.name))
                await step(f"{source.name} IDs", ask)
    finally:
        await made[0].close()


async def _ask(
    reference: PixCrossReference | PixmCrossReference, local: Domain, wanted: Domain
) -> str:
    try:
        found = await reference.lookup(PatientId(NOBODY, local), wanted)
    except CrossReferenceError as error:
        words = str(error.failure).replace("_", " ")
        raise StepFailed(f"{words}, {error.reason}" if error.reason else words) from None
    if found:
        raise StepFailed("knows somebody by an ID that nobody has")
    return "knows both domains, and nobody by an ID that nobody has"
