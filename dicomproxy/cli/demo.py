"""``dicomproxy demo``: the main job, told as a story, and checked byte for byte."""

from __future__ import annotations

import signal
import time
from typing import Final

from pydicom import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dicomproxy.demo.content import PATIENT_ID
from dicomproxy.demo.peers import data_set_bytes
from dicomproxy.demo.region import DemoFailed, Region

_SUCCESS: Final = 0x0000
_WIDTH: Final = 110
_LOOK_SECONDS: Final = 0.5


def run(*, keep: bool = False) -> int:
    """Show it; return 0, or 1 if anything differs from what was stored."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)  # what reads a pipe does not wrap
    # Ended like by Ctrl-C, so that the proxy's process never stays behind. Not
    # by a blocked signal: the proxy would inherit that, and not hear its own.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Region(keep=keep) as region:
            _introduce(console, region)
            _tell(console, region)
            if keep:
                _leave_running(console, region)
            code = region.stop()
            if code != 0:
                raise DemoFailed(f"the proxy exited with {code}")
    except (DemoFailed, ConnectionError) as error:
        console.print(f"[bold red]Failed:[/] {error}")
        return 1
    except KeyboardInterrupt:
        return 1
    console.print("\n[bold green]Everything arrived exactly as it was stored.[/]")
    return 0


def _introduce(console: Console, region: Region) -> None:
    console.print("[bold]An embedded region[/]\n")
    for origin, archive in region.archives.items():
        studies = len({one.StudyInstanceUID for one in archive.instances})
        console.print(
            f"  {origin:<6} archive {archive.ae_title:<10} "
            f"{studies} studies, {len(archive.instances)} instances"
        )
    console.print(
        f"  proxy  {region.proxy.ae_title} on port {region.proxy.port}\n"
        f"  workstation {region.workstation.ae_title}, which knows the proxy only\n"
    )


def _tell(console: Console, region: Region) -> None:
    rows = _query(console, region)
    remote = next(row for row in rows if row.StudyDescription == "CT abdomen, elsewhere")
    for attempt in ("from the archive", "again, from the cache"):
        _open(console, region, str(remote.StudyInstanceUID), "north", attempt)
    for origin in ("south", "local"):
        study = region.held[origin][0].StudyInstanceUID
        words = "from the archive" if origin != "local" else "sent by the local archive itself"
        _open(console, region, str(study), origin, words)


def _query(console: Console, region: Region) -> list[Dataset]:
    identifier = Dataset()
    identifier.QueryRetrieveLevel = "STUDY"
    identifier.PatientID = PATIENT_ID
    for keyword in (
        "PatientName",
        "StudyInstanceUID",
        "StudyDate",
        "StudyDescription",
        "ModalitiesInStudy",
        "NumberOfStudyRelatedInstances",
        "RetrieveAETitle",
    ):
        setattr(identifier, keyword, None)
    started = time.monotonic()
    status, rows = region.workstation.find(identifier)
    elapsed = time.monotonic() - started
    origins = {
        str(one.StudyInstanceUID): origin
        for origin, instances in region.held.items()
        for one in instances
    }
    table = Table(title="The workstation asks for one patient's studies", title_justify="left")
    for heading in ("Date", "Modality", "Description", "Images", "Retrieve AE", "Held by"):
        table.add_column(heading, no_wrap=True)
    for row in sorted(rows, key=lambda row: str(row.StudyDate), reverse=True):
        modalities = row.ModalitiesInStudy
        table.add_row(
            str(row.StudyDate),
            modalities if isinstance(modalities, str) else "/".join(modalities or ()),
            str(row.StudyDescription),
            str(row.NumberOfStudyRelatedInstances),
            str(row.RetrieveAETitle),
            origins.get(str(row.StudyInstanceUID), "?"),
        )
    console.print(table)
    console.print(f"  {len(rows)} studies in {elapsed * 1000:.0f} ms\n")
    found = [str(row.StudyInstanceUID) for row in rows]
    if status != _SUCCESS or sorted(found) != sorted(origins):
        raise DemoFailed(f"the query ended with {status:04X} and {len(rows)} rows")
    return rows


def _open(console: Console, region: Region, study: str, origin: str, words: str) -> None:
    wanted = {
        str(one.SOPInstanceUID): one for one in region.held[origin] if one.StudyInstanceUID == study
    }
    description = str(next(iter(wanted.values())).StudyDescription)
    region.workstation.received.clear()
    sent_before = region.archives[origin].sent
    identifier = Dataset()
    identifier.QueryRetrieveLevel = "STUDY"
    identifier.StudyInstanceUID = study
    started = time.monotonic()
    with Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        task = progress.add_task(f"{description}, {words}", total=len(wanted))
        status, completed = region.workstation.move(
            identifier, lambda done, _total: progress.update(task, completed=done)
        )
    elapsed = time.monotonic() - started
    sent = region.archives[origin].sent - sent_before
    _compare(region, wanted, status, completed)
    if "again" in words and sent:
        raise DemoFailed(f"{sent} instances were fetched again although they were cached")
    console.print(
        f"  {completed} instances in {elapsed:.2f} s, status {status:04X}, "
        f"{sent} sent by the {origin} archive\n"
    )


def _compare(region: Region, wanted: dict[str, Dataset], status: int, completed: int) -> None:
    received = {one.sop_instance_uid: one for one in region.workstation.received}
    if status != _SUCCESS or completed != len(wanted) or set(received) != set(wanted):
        raise DemoFailed(
            f"status {status:04X}, {completed} of {len(wanted)} completed, {len(received)} received"
        )
    for uid, stored in wanted.items():
        if received[uid].transfer_syntax_uid != stored.file_meta.TransferSyntaxUID:
            raise DemoFailed(f"{uid} came in another transfer syntax than it is stored in")
        if received[uid].data_set != data_set_bytes(stored):
            raise DemoFailed(f"{uid} differs from what is stored")


def _leave_running(console: Console, region: Region) -> None:
    try:
        console.print(
            "[bold]Left running.[/] Point a workstation at it:\n"
            f"  call    {region.proxy.ae_title} at {region.proxy.host}, port {region.proxy.port}\n"
            f"  call as {region.viewer.ae_title}, and receive on port {region.viewer.port}\n"
            f"  query   Patient ID {PATIENT_ID}\n"
            f"  status  {region.web}/\n"
            f"  log     {region.log_file}\n\n"
            f"  findscu -aet {region.viewer.ae_title} -aec {region.proxy.ae_title} -S "
            f"-k QueryRetrieveLevel=STUDY -k PatientID={PATIENT_ID} -k StudyInstanceUID "
            f"-k StudyDescription {region.proxy.host} {region.proxy.port}\n\n"
            "Ctrl-C ends it."
        )
        while True:
            # Not for ever: a signal between this line and the wait itself would not end it.
            time.sleep(_LOOK_SECONDS)
    except KeyboardInterrupt:
        pass
