"""The process: signals, restarts, who may call, and the commands beside the running service."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from pynetdicom import AE, evt
from pynetdicom.pdu import A_ASSOCIATE_RJ

from tests.e2e.conftest import MakeProxy, Region, start_in_front
from tests.e2e.scene import contents, figures, setup, the_study
from tests.e2e.support import (
    PROXY_TITLE,
    Proxy,
    a_study,
    collect,
    command,
    identifier,
    received,
    uids,
)
from tests.peers.dcmtk import Response, StoreScp, echoscu
from tests.peers.ports import free_port
from tests.peers.workstation import Result, Workstation
from tests.sentinel import PATIENT_ID
from tests.support.datasets import study

# ---------------------------------------------------------------------- signals


async def test_sigterm_lets_a_move_finish_and_takes_no_new_association(start: MakeProxy) -> None:
    """While draining, not ready and rejecting; the move under way ends whole; then exit 0."""
    held = study(1, 10)
    async with setup(start, held, proxy={"shutdown_grace": "120s"}) as made:
        [north] = made.archives
        proxy = made.proxy
        north.hold()
        async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
            # The query that looks for the study is what is held back at first.
            moving = tasks.create_task(made.reading.move(the_study(held)))
            await north.held()
            proxy.signal(signal.SIGTERM)
            await proxy.until(lambda: proxy.http("/health/ready")[0] == 503, "draining")
            assert proxy.http("/health/live")[0] == 200
            rejected = await echoscu(proxy.port, calling="READING1", called=PROXY_TITLE)
            assert rejected.rejected
            north.release()

        assert figures(moving.result().final) == (0x0000, 10, 0, 0)
        assert received(made.reading.received) == contents(held)
        assert await proxy.ended() == 0
        assert proxy.named("stopped")


async def test_sigterm_cancels_a_move_that_outlasts_the_grace_period(start: MakeProxy) -> None:
    """A move that goes on too long ends with FE00 and true counts, and the exit code is 0."""
    held = study(1, 200)
    async with setup(start, held, proxy={"shutdown_grace": "1s"}) as made:
        [north] = made.archives
        north.delay_seconds = 0.1

        told = False

        def on_response(response: Response) -> None:
            nonlocal told
            if response.completed == 2 and not told:
                told = True  # a second one would end the grace period
                made.proxy.signal(signal.SIGTERM)

        result = await made.reading.move(the_study(held), on_response=on_response)

        assert result.final.status == 0xFE00
        assert result.final.completed == len(made.reading.received)
        assert await made.proxy.ended() == 0
        assert made.proxy.named("draining_cancelled")


async def test_sighup_adds_a_workstation(start: MakeProxy) -> None:
    """A workstation added to the file may call and receive after SIGHUP; nothing else changes."""
    held = study(1, 3)
    async with setup(start, held, count=2) as made:
        proxy = made.proxy
        second = proxy.settings["workstations"].pop()
        proxy.write()
        await reload(proxy, 1)
        before = await echoscu(proxy.port, calling="READING2", called=PROXY_TITLE)
        assert before.rejected

        proxy.settings["workstations"].append(second)
        proxy.write()
        await reload(proxy, 2)
        result = await made.workstations[1].move(the_study(held))

        assert figures(result.final) == (0x0000, 3, 0, 0)
        assert received(made.workstations[1].received) == contents(held)

        # A file with a fault is refused in the log, and the proxy goes on as it was.
        proxy.config.write_text("proxy: {ae_title: }\n", encoding="utf-8")
        proxy.signal(signal.SIGHUP)
        await proxy.until(lambda: bool(proxy.named("reload_refused")), "refused")
        assert (await made.workstations[1].move(the_study(held))).final.status == 0x0000


async def reload(proxy: Proxy, count: int) -> None:
    proxy.signal(signal.SIGHUP)
    await proxy.until(lambda: len(proxy.named("reloaded")) == count, "reloaded")


@pytest.mark.parametrize("asked_again", [False, True])
async def test_sighup_breaks_off_nothing_that_is_fetched_to_its_end(
    start: MakeProxy, asked_again: bool
) -> None:
    """What nobody waits for any more comes whole over what the former configuration opened.

    So it does if somebody else asks for the same study by the new one meanwhile.
    """
    held = study(1, 30)
    async with setup(start, held, count=2, retrieve={"finish_abandoned": True}) as made:
        proxy, [north] = made.proxy, made.archives
        north.delay_seconds = 0.5
        left = await made.reading.move(the_study(held), cancel_after=2)
        assert left.final.status == 0xFE00
        north.hold()
        north.delay_seconds = 0.0
        await reload(proxy, 1)
        assert await proxy.metric("dicomproxy_flights") == 1
        if asked_again:
            async with asyncio.TaskGroup() as tasks:
                asking = tasks.create_task(made.workstations[1].move(the_study(held)))
                await proxy.until(lambda: proxy.retrieves_running() == 1, "asked again")
                north.release()
            assert figures(asking.result().final) == (0x0000, 30, 0, 0)
        north.release()
        async with asyncio.timeout(60):
            while await proxy.metric("dicomproxy_flights"):  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.05)

        assert await proxy.fetched() == 30
        assert set(north.sent.values()) == {1}
        assert north.cancelled == 0
        assert not proxy.named("flight_incomplete")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_a_restart_keeps_cache_and_locations(start: MakeProxy, how: signal.Signals) -> None:
    """After a stop, and after a kill, the study is there still, and so is where others are."""
    held, other = study(1, 3), study(1, 2)
    async with setup(start, held, other) as made:
        proxy, (north, south) = made.proxy, made.archives
        await made.reading.find(identifier("STUDY", PatientID=PATIENT_ID, StudyInstanceUID=""))
        await made.reading.move(the_study(held))
        made.reading.received.clear()
        # Locations are written a moment after they are known.
        state = proxy.cache_directory / "state"
        await proxy.until(lambda: knows(state, other[0].StudyInstanceUID), "remembered")
        proxy.signal(how)
        assert await proxy.ended() == (0 if how is signal.SIGTERM else -signal.SIGKILL)
        await proxy.start()
        for archive in (north, south):
            archive.requests.clear()

        series = await made.reading.find(
            identifier("SERIES", StudyInstanceUID=other[0].StudyInstanceUID, SeriesInstanceUID="")
        )
        result = await made.reading.move(the_study(held))

        assert len(series.rows) == 1
        assert len(south.asked("find", "SERIES")) == 1
        assert north.asked("find", "SERIES") == [] or {
            str(one.identifier.StudyInstanceUID) for one in north.asked("find", "SERIES")
        } == {str(held[0].StudyInstanceUID)}
        assert figures(result.final) == (0x0000, 3, 0, 0)
        assert received(made.reading.received) == contents(held)
        assert north.asked("move") == []
        assert await proxy.fetched() == 0


def knows(directory: Path, study_instance_uid: str) -> bool:
    """Tell whether any file of the state holds this UID."""
    return any(
        str(study_instance_uid).encode() in path.read_bytes()
        for path in directory.iterdir()
        if path.is_file() and path.name != "audit.jsonl"
    )


# ------------------------------------------------------------------- who may call


async def test_strangers_are_rejected_with_the_reason(proxy: Proxy) -> None:
    """An unknown calling title, and a title that is not ours (PS3.8 9.3.4)."""
    stranger = await echoscu(proxy.port, calling="STRANGER", called=PROXY_TITLE)
    assert stranger.rejected
    assert "Result: Rejected Permanent, Source: Service User" in stranger.output
    assert "Reason: Calling AE Title Not Recognized" in stranger.output
    astray = await echoscu(proxy.port, calling="READING1", called="SOMEBODY")
    assert astray.rejected
    assert "Reason: Called AE Title Not Recognized" in astray.output
    reasons = [line["reason"] for line in proxy.named("association_rejected")]
    assert len(reasons) == 2
    known = await echoscu(proxy.port, calling="READING1", called=PROXY_TITLE)
    assert known.final.status == 0x0000


async def test_associations_beyond_the_limit_are_rejected_for_the_moment(
    start: MakeProxy, region: Region
) -> None:
    """Local limit exceeded is transient, and room is made when one ends."""
    proxy = await start_in_front(start, region, proxy={"max_associations": 2})

    def work() -> list[tuple[int, int, int]]:
        rejected: list[tuple[int, int, int]] = []

        def received(event: evt.Event) -> None:
            # As it comes: of a rejection that is quick the association itself may know nothing.
            if isinstance(event.pdu, A_ASSOCIATE_RJ):
                rejected.append((event.pdu.result, event.pdu.source, event.pdu.reason_diagnostic))

        entity = AE("READING1")
        entity.acse_timeout = entity.network_timeout = 60
        entity.add_requested_context("1.2.840.10008.1.1")
        held = [
            entity.associate(
                "127.0.0.1",
                proxy.port,
                ae_title=PROXY_TITLE,
                evt_handlers=[(evt.EVT_PDU_RECV, received)],
            )
            for _ in range(3)
        ]
        assert [one.is_established for one in held] == [True, True, False]
        for association in held[:2]:
            association.release()
        return rejected

    assert await asyncio.to_thread(work) == [(2, 3, 2)]


async def test_garbage_costs_a_line_in_the_log(start: MakeProxy, region: Region) -> None:
    """What is no DICOM is answered with an abort or nothing, and others do not notice."""
    proxy = await start_in_front(start, region)
    garbage = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x01\x00\xff\xff\xff\xff",
        b"\x01\x00\x00\x00\x00\x10" + bytes(16),
        b"\x04\x00\x00\x00\x00\x06\x00\x00\x00\x02\x01\x03",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
    ]
    for one in garbage:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(one)
        writer.write_eof()
        async with asyncio.timeout(60):
            try:
                answer = await reader.read()
            except ConnectionResetError:
                answer = b""
        assert answer[:1] in (b"", b"\x07")
        writer.close()

    assert (await echoscu(proxy.port, calling="READING1", called=PROXY_TITLE)).exit_code == 0
    await proxy.until(lambda: len(proxy.named("protocol_error")) >= 3, "logged")


# --------------------------------------------------------------------- the record


async def test_every_disclosure_is_on_disk_before_the_final_response(
    start: MakeProxy,
) -> None:
    """When the workstation hears the outcome, the record of it can be read."""
    held = study(1, 4)
    async with setup(start, held) as made:
        proxy = made.proxy
        seen: list[list[dict[str, Any]]] = []

        def on_response(response: Response) -> None:
            if not response.pending:
                seen.append(proxy.audit())

        result: Result = await made.reading.move(the_study(held), on_response=on_response)

        assert result.final.status == 0x0000
        [record] = [one for one in seen[0] if one["event"] == "disclosure"]
        assert record["outcome"] == "success"
        assert record["caller_ae_title"] == record["destination_ae_title"] == "READING1"
        assert record["peer_address"] == "127.0.0.1"
        assert record["source"] == "north"
        assert record["instances"] == 4
        assert record["study_instance_uids"] == [str(held[0].StudyInstanceUID)]
        path = proxy.cache_directory / "state" / "audit.jsonl"
        assert path.stat().st_mode & 0o077 == 0


async def test_operations_and_associations_have_a_line_each(start: MakeProxy) -> None:
    """The log tells of each association and operation once, and of no patient."""
    held = study(1, 2)
    async with setup(start, held) as made:
        await made.reading.find(identifier("STUDY", PatientID=PATIENT_ID, StudyInstanceUID=""))
        await made.reading.move(the_study(held))
        proxy = made.proxy
        await proxy.until(
            lambda: len([one for one in acceptors(proxy) if called_by(one, "READING1")]) == 2,
            "logged",
        )

        [query], [retrieve] = proxy.named("query"), proxy.named("retrieve")
        assert retrieve["completed"] == 2
        assert query["status"] == retrieve["status"] == "0x0000"
        assert query["duration_seconds"] > 0
        status, page = proxy.http("/")
        assert status == 200
        assert PATIENT_ID not in page
        assert await proxy.metric("dicomproxy_operations_total", kind="retrieve") == 1
        assert await proxy.metric("dicomproxy_delivered_bytes_total") > 0


def acceptors(proxy: Proxy) -> list[dict[str, Any]]:
    return [line for line in proxy.named("association") if line["role"] == "acceptor"]


def called_by(line: dict[str, Any], title: str) -> bool:
    return bool(line["calling_ae_title"] == title)


# ------------------------------------------------------------------- the commands


async def test_cache_commands_beside_the_running_service(
    region: Region, storescp: StoreScp, proxy: Proxy
) -> None:
    """All of them work while the proxy serves; what is evicted is fetched anew."""
    uid = str(region.at_south[0].StudyInstanceUID)
    config = ("--config", str(proxy.config))
    await proxy.movescu(a_study(uid))
    collect(storescp)

    stats = await proxy.command("cache", "stats", *config)
    listed = await proxy.command("cache", "list", *config)
    verified = await proxy.command("cache", "verify", *config)
    evicted = await proxy.command("cache", "evict", uid, *config)
    empty = await proxy.command("cache", "list", *config)
    again = await proxy.command("cache", "evict", uid, *config)
    result = await proxy.movescu(a_study(uid))

    assert stats[0] == listed[0] == verified[0] == evicted[0] == empty[0] == 0
    assert "studies      1" in stats[1]
    assert uid in listed[1]
    assert "complete" in listed[1]
    assert "1 studies checked, 0 damaged" in verified[1]
    assert uid not in empty[1]
    assert again[0] == 1
    assert result.final.completed == len(region.at_south)
    assert sorted(collect(storescp)) == uids(region.at_south)
    assert await proxy.fetched() == 2 * len(region.at_south)


async def test_doctor_beside_the_running_service(
    region: Region, storescp: StoreScp, reading2: Workstation, start: MakeProxy
) -> None:
    """All routes fine is 0, a dead one is 1 and is named."""
    test_study = str(region.at_north[0].StudyInstanceUID)
    proxy = await start_in_front(start, region, north={"test_study": test_study})
    fine = await proxy.command("doctor", "--config", str(proxy.config))
    proxy.settings["sources"][1]["port"] = free_port()
    proxy.write()
    broken = await proxy.command("doctor", "--config", str(proxy.config))

    assert fine[0] == 0, fine[1]
    assert broken[0] == 1
    assert "south" in broken[1]


async def test_check_says_every_fault_and_exits_with_2(proxy: Proxy, tmp_path: Path) -> None:
    """The running configuration is fine; one with two faults names both."""
    fine = await proxy.command("check", str(proxy.config))
    broken = {**proxy.settings, "proxy": {"ae_title": "A TITLE THAT IS TOO LONG", "prot": 104}}
    path = tmp_path / "broken.yaml"
    path.write_text(json.dumps(broken), encoding="utf-8")
    faulty = await proxy.command("check", str(path))
    missing = await proxy.command("serve", "--config", str(tmp_path / "missing.yaml"))
    usage = await proxy.command("serve")

    assert fine[0] == 0
    assert faulty[0] == 2
    assert "ae_title" in faulty[1]
    assert "prot" in faulty[1]
    assert missing[0] == 2
    assert usage[0] == 2


async def test_a_second_proxy_on_the_same_cache_does_not_start(
    region: Region, proxy: Proxy
) -> None:
    """Exit 1 and a reason in the log, and the first goes on."""
    proxy.settings["proxy"]["port"] = free_port()
    proxy.settings["web"]["port"] = free_port()
    other = proxy.directory / "other.yaml"
    other.write_text(json.dumps(proxy.settings), encoding="utf-8")

    code, output = await proxy.command("serve", "--config", str(other))

    assert code == 1
    assert "start_failed" in output
    proxy.settings["proxy"]["port"] = region.proxy_port
    assert (await echoscu(proxy.port, calling="READING1", called=PROXY_TITLE)).exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_demo_that_is_kept_ends_when_told(tmp_path: Path, number: signal.Signals) -> None:
    """It says where to point a workstation, waits, and leaves no proxy behind."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dicomproxy", "demo", "--keep"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        cwd=tmp_path,
        # Started in the background, the tests may have been told to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        text = ""
        async with asyncio.timeout(240):
            while "Ctrl-C ends it." not in text:
                text += (await process.stdout.readline()).decode("utf-8")
            assert "DICOMPROXY at 127.0.0.1, port" in text
            process.send_signal(number)
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_demo_runs_to_its_end(tmp_path: Path) -> None:
    """The embedded region shows the main job and compares what arrived with what was stored."""
    code, output = await command("demo", directory=tmp_path, seconds=240)

    assert code == 0, output[-2000:]
    assert "Everything arrived exactly as it was stored" in output


async def test_version_is_told() -> None:
    """A user who reports a fault can say of which version."""
    code, output = await command("--version", directory=Path.cwd())

    assert code == 0
    assert output.startswith("dicomproxy ")
