"""One person under several IDs, among others who look like them: archives, and what holds.

The archives number patients in domains of their own; a table or a manager says who
is who. What the checks here compare is read by pydicom, not by the program.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from pydicom import Dataset

from tests.e2e.conftest import MakeProxy
from tests.e2e.scene import Setup, setup
from tests.e2e.support import Proxy, identifier
from tests.peers.archive import Archive
from tests.peers.workstation import Result, Workstation
from tests.sentinel import PATIENT_ID
from tests.support.datasets import study

HOSPITAL, NORTH, SOUTH = ("HOSPITAL", "1.2.1"), ("NORTH", "1.2.2"), ("SOUTH", "1.2.3")
EAST: Final = ("EAST", "1.2.4")
NORTH_ID, SOUTH_ID = "N-0815", "S/22"
NAMESAKE = "N-4"  # has the same name, and is somebody else
# A third person's ID in the north is the first one's here.
TABLE = f"local,north,south\n{PATIENT_ID},{NORTH_ID},{SOUTH_ID}\n17,{PATIENT_ID},\n18,{NAMESAKE},\n"
PERSONS = [
    [(PATIENT_ID, *HOSPITAL), (NORTH_ID, *NORTH), (SOUTH_ID, *SOUTH)],
    [("17", *HOSPITAL), (PATIENT_ID, *NORTH)],
    [("18", *HOSPITAL), (NAMESAKE, *NORTH)],
]
SHOWN: Final = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex")


class Listing(Archive):
    """An archive that knows accession numbers; ``careless``, it ignores who is asked for."""

    careless = False

    def matching(self, identifier: Dataset) -> list[Dataset]:
        if self.careless and not identifier.get("StudyInstanceUID"):
            with self.lock:
                found = list(self.instances)
        else:
            found = super().matching(identifier)
        wanted = identifier.get("AccessionNumber")
        return [one for one in found if not wanted or one.AccessionNumber == wanted]


def domain(of: tuple[str, str]) -> dict[str, str]:
    return {"namespace": of[0], "universal_id": of[1]}


def ct(patient: str, **more: Any) -> list[Dataset]:
    return study(1, 2, **{"PatientID": patient, "PatientSex": "F", **more})


class Held:
    """What the archives hold; ``more`` of it by archive, ``local`` too."""

    def __init__(self) -> None:
        self.here = ct(PATIENT_ID)
        self.north = ct(NORTH_ID, PatientName="Patient^Sentinel^^Dr.", SpecificCharacterSet="")
        self.south = ct(SOUTH_ID, PatientName="SENTINEL^PATIËNT")
        self.third = ct(PATIENT_ID, PatientBirthDate="19800101", AccessionNumber="3")
        self.namesake = ct(NAMESAKE, AccessionNumber="4")
        self.more: dict[str, list[Dataset]] = {"local": [], "north": [], "south": []}

    @property
    def mine(self) -> set[str]:
        return {uid(one) for one in (self.here, self.north, self.south)}


@asynccontextmanager
async def scene(
    start: MakeProxy, held: Held, *references: dict[str, Any], **more: Any
) -> AsyncIterator[Setup]:
    """Run the region, with cross-references between its three domains.

    Args:
        references: the first is asked unless a source says otherwise.
        more: as for ``setup``; what it says of a source is laid over what is usual.
    """
    asked = references[0]["name"]
    usual: dict[str, Any] = {
        name: {
            "patient_id_issuer": domain(issuer),
            **more.get(name, {}),
            "identity": {"cross_reference": asked, **more.get(name, {}).get("identity", {})},
        }
        for name, issuer in (("north", NORTH), ("south", SOUTH))
    }
    usual["local"] = {"patient_id_issuer": domain(HOSPITAL), **more.get("local", {})}
    async with setup(
        start,
        [*held.north, *held.third, *held.namesake, *held.more["north"]],
        [*held.south, *held.more["south"]],
        here=[*held.here, *held.more["local"]],
        kind=Listing,
        **{"cross_references": list(references), **more, **usual},
    ) as made:
        yield made


class Since:
    """What a proxy logs from now on."""

    def __init__(self, of: Setup | Proxy) -> None:
        self._proxy = of if isinstance(of, Proxy) else of.proxy
        self._from = len(self._proxy.lines())

    def lines(self) -> list[dict[str, Any]]:
        return self._proxy.lines()[self._from :]

    def named(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line["event"] == event]


def table(directory: Path, text: str = TABLE, name: str = "regional") -> dict[str, Any]:
    """Write a table and return the cross-reference that it is."""
    file = directory / f"{name}.csv"
    fresh = directory / f"{name}.new"
    fresh.write_text(text)
    fresh.replace(file)
    return {"name": name, "type": "table", "file": str(file)}


async def loaded(it: Setup | Proxy, count: int = 1) -> None:
    """Wait until a table was taken over *count* times."""
    proxy = it if isinstance(it, Proxy) else it.proxy
    await proxy.until(lambda: len(proxy.named("cross_reference_table_loaded")) >= count, "loaded")


async def mine(it: Setup, **keys: Any) -> Result:
    """Ask for the person's studies by their ID here; *keys* besides, or instead."""
    given: dict[str, Any] = {
        "PatientID": PATIENT_ID,
        "IssuerOfPatientID": "",
        "PatientName": "",
        "PatientBirthDate": "",
        "PatientSex": "",
        "AccessionNumber": "",
        "StudyInstanceUID": "",
    }
    return await it.reading.find(identifier("STUDY", **(given | keys)))


def uid(instances: list[Dataset]) -> str:
    """Return the study's UID."""
    return str(instances[0].StudyInstanceUID)


def arrived(workstation: Workstation) -> dict[str, Dataset]:
    """Return what came since the last call, by SOP Instance UID, each once."""
    with workstation.lock:
        received, workstation.received = workstation.received, []
    found = {one.sop_instance_uid: one.dataset() for one in received}
    assert len(found) == len(received)
    return found


def studies(result: Result | Iterable[Dataset]) -> set[str]:
    """Return the studies of an answer; each may be in it once."""
    rows = result.rows if isinstance(result, Result) else tuple(result)
    found = [str(row.StudyInstanceUID) for row in rows]
    assert len(found) == len(set(found))
    return set(found)


def restored(delivered: Dataset) -> Dataset:
    """Undo the latest coercion, by its record alone (PS3.3 C.12.1.1.9)."""
    made = copy.deepcopy(delivered)
    *earlier, record = made.OriginalAttributesSequence
    assert record.ReasonForTheAttributeModification == "COERCE"
    (before,) = record.ModifiedAttributesSequence
    made.OriginalAttributesSequence = earlier
    for element in before:
        made[element.tag] = element
    return made


_NOT_COMPARED: Final = {
    "OriginalAttributesSequence",
    "InstanceCoercionDateTime",
    "SpecificCharacterSet",
}


def differences(one: Dataset, other: Dataset) -> list[str]:
    """Name what differs, absent and empty being equal, and text compared as text."""
    some, others = plain(one), plain(other)
    return sorted(
        name
        for name in some.keys() | others.keys()
        if name not in _NOT_COMPARED and some.get(name) != others.get(name)
    )


def plain(dataset: Dataset) -> dict[str, Any]:
    """Return what a data set says, by keyword or tag, without what is empty."""
    made: dict[str, Any] = {}
    for element in dataset:
        value = element.value
        if element.VR == "SQ":
            value = [plain(item) for item in value]
        elif element.VR == "PN":
            value = str(value or "").rstrip("=^")
        if value not in (None, "", b"", []):
            made[element.keyword or str(element.tag)] = value
    return made
