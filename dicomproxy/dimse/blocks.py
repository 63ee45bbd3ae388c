"""A bounded pool of equal blocks of memory, shared by every association.

What the process holds for data in flight is the pool, whatever the number of
peers, the size of objects or the speed of disks: who finds it empty waits.
Used from the event loop's thread only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Block:
    """One block. ``users`` counts who still reads it; at zero it may be reused."""

    __slots__ = ("users", "view")

    def __init__(self, size_bytes: int) -> None:
        self.view = memoryview(bytearray(size_bytes))
        self.users = 0


class BlockPool:
    """At most *limit* blocks of *block_bytes* each, made when first needed."""

    def __init__(self, block_bytes: int, limit: int) -> None:
        self.block_bytes = block_bytes
        self._limit = limit
        self._made = 0
        self._free: list[Block] = []
        self._waiters: deque[Callable[[], None]] = deque()

    def __repr__(self) -> str:
        return (
            f"BlockPool(made={self._made}/{self._limit}, free={len(self._free)}, "
            f"waiting={len(self._waiters)})"
        )

    @property
    def lent(self) -> int:
        """Blocks in somebody's hands."""
        return self._made - len(self._free)

    def acquire(self) -> Block | None:
        """Return a block with one user, or ``None`` while all are lent."""
        if self._free:
            block = self._free.pop()
        elif self._made < self._limit:
            self._made += 1
            block = Block(self.block_bytes)
        else:
            return None
        block.users = 1
        return block

    def release(self, block: Block) -> None:
        """Take one user off *block*; the last one brings it back."""
        block.users -= 1
        if block.users:
            return
        self._free.append(block)
        # A waiter takes its block at once; one that has no use for it any more
        # takes none, and then it is the next one's.
        while self._free and self._waiters:
            self._waiters.popleft()()

    def when_free(self, callback: Callable[[], None]) -> None:
        """Call *callback* once, when a block is free for it to acquire."""
        self._waiters.append(callback)

    async def acquire_wait(self) -> Block:
        """Return a block, waiting for one to come back if need be."""
        if (block := self.acquire()) is not None:
            return block
        came: asyncio.Future[Block] = asyncio.get_running_loop().create_future()

        def take() -> None:
            if not came.done() and (block := self.acquire()) is not None:
                came.set_result(block)

        self._waiters.append(take)
        try:
            return await came
        except asyncio.CancelledError:
            if take in self._waiters:
                self._waiters.remove(take)
            elif came.done() and not came.cancelled():
                self.release(came.result())  # pass the turn on
            raise
