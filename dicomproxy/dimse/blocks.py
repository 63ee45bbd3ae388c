"""A bounded pool of blocks of memory, shared by every association.

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
    """At most *limit* blocks of *block_bytes* each, made when first needed.

    Args:
        small_bytes: of the blocks lent while none of those is left; less than *block_bytes*.
        small_limit: how many of them there may be.
    """

    def __init__(
        self, block_bytes: int, limit: int, *, small_bytes: int = 0, small_limit: int = 0
    ) -> None:
        self.block_bytes = block_bytes
        self._limit = limit
        self._made = 0
        self._free: list[Block] = []
        self._small_bytes = small_bytes
        self._small_limit = small_limit
        self._small_made = 0
        self._small_free: list[Block] = []
        self._waiters: deque[Callable[[], None]] = deque()

    def __repr__(self) -> str:
        small = f"small={self._small_made}/{self._small_limit}, " if self._small_limit else ""
        return (
            f"BlockPool(made={self._made}/{self._limit}, {small}"
            f"free={len(self._free) + len(self._small_free)}, waiting={len(self._waiters)})"
        )

    @property
    def lent(self) -> int:
        """Blocks in somebody's hands."""
        made = self._made + self._small_made
        return made - len(self._free) - len(self._small_free)

    def acquire(self) -> Block | None:
        """Return a block with one user, or ``None`` while all are lent."""
        if self._free:
            block = self._free.pop()
        elif self._made < self._limit:
            self._made += 1
            block = Block(self.block_bytes)
        elif self._small_free:
            block = self._small_free.pop()
        elif self._small_made < self._small_limit:
            self._small_made += 1
            block = Block(self._small_bytes)
        else:
            return None
        block.users = 1
        return block

    def release(self, block: Block) -> None:
        """Take one user off *block*; the last one brings it back."""
        block.users -= 1
        if block.users:
            return
        is_large = block.view.nbytes == self.block_bytes
        (self._free if is_large else self._small_free).append(block)
        # A waiter takes its block at once; one that has no use for it any more
        # takes none, and then it is the next one's.
        while (self._free or self._small_free) and self._waiters:
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
