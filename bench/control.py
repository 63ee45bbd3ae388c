"""A process of the benchmark's own, and the lines of JSON that tell it what to do.

The driver writes ``{"do": name, ...}`` to its standard input, one at a time, and
reads ``{"result": ...}`` or ``{"error": text}`` from its standard output. It ends
when its input does, so that none outlives the driver.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
_LINE_BYTES: Final = 1024 * 1024

Command = Callable[..., Awaitable[Any]]


async def obey(commands: dict[str, Command]) -> None:
    """Do what standard input says until it ends; the child's side."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(_LINE_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    _answer({"result": "ready"})
    while line := await reader.readline():
        asked = json.loads(line)
        try:
            _answer({"result": await commands[asked.pop("do")](**asked)})
        except Exception as error:
            _answer({"error": f"{type(error).__name__}: {error}"})


def _answer(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


class ChildFailed(RuntimeError):
    """A child reported an error, ended or did not answer."""


class Child:
    """One such process; the driver's side."""

    def __init__(self, module: str, process: asyncio.subprocess.Process) -> None:
        self.module = module
        self._process = process

    @classmethod
    async def start(cls, module: str, settings: Any, log: Path) -> Child:
        """Start ``python -m bench.MODULE SETTINGS``; what it logs goes to *log*.

        Raises:
            ChildFailed: it is not ready in time.
        """
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                f"bench.{module}",
                json.dumps(settings),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
                limit=_LINE_BYTES,
            )
        child = cls(module, process)
        try:
            await child._result(30)
        except BaseException:
            await child.stop()
            raise
        return child

    async def ask(self, do: str, seconds: float = 120.0, **arguments: Any) -> Any:
        """Have it do something and return the result.

        Raises:
            ChildFailed: it reported an error, ended, or did not answer in *seconds*.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        await self._process.stdin.drain()
        return await self._result(seconds)

    async def _result(self, seconds: float) -> Any:
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(seconds):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise ChildFailed(f"{self.module}: no answer in {seconds:g} s") from None
        if not line:
            raise ChildFailed(f"{self.module}: it has ended")
        answer = json.loads(line)
        if "error" in answer:
            raise ChildFailed(f"{self.module}: {answer['error']}")
        return answer["result"]

    async def stop(self) -> None:
        """End it, at once."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
