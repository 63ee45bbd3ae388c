"""``dicomproxy cache``: beside a running service and without one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dicomproxy.cache.layout import Layout
from dicomproxy.cache.requests import answer_requests, ask_to_evict
from dicomproxy.cli import cache
from tests.cache.support import fill, opened, settings


def _filled(directory: Path) -> None:
    async def build() -> None:
        store = await opened(directory)
        await fill(store, "1.2.3", 2)
        await fill(store, "1.2.44", 1)
        await store.pin("1.2.44", True)
        await store.close()

    asyncio.run(build())


def _spoil(directory: Path, study: str) -> None:
    path = next(Layout(directory).study(study).glob("*.dcm"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def test_list_and_stats_show_what_is_held(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line a study with its measures; the figures add up."""
    _filled(tmp_path)
    assert cache.run("list", settings(tmp_path)) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[0] == "1.2.44"
    assert {"1", "complete", "pinned"} <= set(first.split())
    assert second.split()[:1] == ["1.2.3"]
    assert {"2", "complete", "-"} <= set(second.split())
    assert cache.run("stats", settings(tmp_path)) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (rows["studies"], rows["instances"], rows["pinned"]) == ("2", "3", "1")
    assert rows["size"].endswith("of 100.0 MB")


@pytest.mark.parametrize(("study", "code"), [("1.2.3", 0), ("1.2.44", 1), ("1.9", 1)])
def test_evict_without_a_service(
    tmp_path: Path, study: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A study goes unless it is pinned or not held; the refusal says why."""
    _filled(tmp_path)
    assert cache.run("evict", settings(tmp_path), study=study) == code
    said = capsys.readouterr()
    expected = {"1.2.3": "evicted 1.2.3", "1.2.44": "pinned", "1.9": "not hold"}
    assert expected[study] in (said.out if code == 0 else said.err)
    assert Layout(tmp_path).study("1.2.3").exists() is (study != "1.2.3")


def test_verify_drops_the_damaged_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A study with a changed byte is reported and dropped; the next run finds nothing."""
    _filled(tmp_path)
    _spoil(tmp_path, "1.2.3")
    assert cache.run("verify", settings(tmp_path)) == 1
    assert "1.2.3: 1 of 2 instances damaged, dropped" in capsys.readouterr().out
    assert not Layout(tmp_path).study("1.2.3").exists()
    assert cache.run("verify", settings(tmp_path)) == 0
    assert "1 studies checked, 0 damaged" in capsys.readouterr().out


async def test_commands_work_beside_a_running_service(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading changes nothing; evicting is done by the service, unless the study is in use."""
    store = await opened(tmp_path)
    await fill(store, "1.2.3", 2)
    await fill(store, "1.2.4", 1)
    lease = await store.lease("1.2.4")
    where = settings(tmp_path)
    assert await asyncio.to_thread(cache.run, "list", where) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert await asyncio.to_thread(cache.run, "stats", where) == 0
    capsys.readouterr()
    _spoil(tmp_path, "1.2.3")
    assert await asyncio.to_thread(cache.run, "verify", where) == 1
    assert "1 of 2 instances damaged, not dropped" in capsys.readouterr().out
    assert len(store.studies()) == 2
    assert await asyncio.to_thread(lambda: cache.run("evict", where, study="1.2.3")) == 0
    assert await asyncio.to_thread(lambda: cache.run("evict", where, study="1.2.4")) == 1
    assert "in use" in capsys.readouterr().err
    assert [study.study_instance_uid for study in store.studies()] == ["1.2.4"]
    assert list(Layout(tmp_path).requests.iterdir()) == []
    lease.release()
    await store.close()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"evict": 7}', b"[" * 5000])
def test_request_that_makes_no_sense_is_answered(tmp_path: Path, content: bytes) -> None:
    """Whatever lies in the directory evicts nothing and stops nothing."""
    (tmp_path / "x.request").write_bytes(content)
    (tmp_path / "stranger").mkdir()
    asked: list[str] = []

    def evict(uid: str) -> str:
        asked.append(uid)
        return "evicted"

    answer_requests(tmp_path, evict)
    assert asked == []
    assert (tmp_path / "x.answer").read_text() == '{"outcome": "bad_request"}'


def test_request_without_an_answer_is_withdrawn(tmp_path: Path) -> None:
    """A service that hangs evicts nothing later, when nobody expects it."""
    assert ask_to_evict(tmp_path, "1.2.3", 0.2) == "no_answer"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("action", "code"), [("evict", 2), ("polish", 2), ("list", 1), ("stats", 1), ("verify", 1)]
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, action: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """No study named, an unknown action, no cache: a message and an exit code."""
    assert cache.run(action, settings(tmp_path / "none")) == code
    assert capsys.readouterr().err
    assert not (tmp_path / "none").exists()
