"""The block pool: never more memory than its limit, and nobody forgotten while waiting."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomproxy.dimse.blocks import Block, BlockPool


def taken(pool: BlockPool) -> Block:
    block = pool.acquire()
    assert block is not None
    return block


async def parked(*tasks: asyncio.Task[Block]) -> None:
    """Let *tasks* run until each of them waits."""
    for _ in range(5):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)


def test_blocks_are_made_when_needed_and_reused() -> None:
    """Memory is taken at first use, up to the limit, and a returned block serves again."""
    pool = BlockPool(1024, 2)
    assert repr(pool) == "BlockPool(made=0/2, free=0, waiting=0)"
    first, second = taken(pool), taken(pool)
    assert (len(first.view), first.view.readonly) == (1024, False)
    assert pool.acquire() is None
    assert pool.lent == 2
    pool.release(first)
    assert pool.lent == 1
    assert taken(pool) is first
    pool.release(second)
    pool.release(first)
    assert repr(pool) == "BlockPool(made=2/2, free=2, waiting=0)"


def test_block_with_two_users_comes_back_with_the_last() -> None:
    """A block still being read is not reused."""
    pool = BlockPool(16, 1)
    block = taken(pool)
    block.users += 1
    pool.release(block)
    assert pool.acquire() is None
    pool.release(block)
    assert taken(pool).users == 1


def test_small_blocks_are_lent_when_no_other_is_left() -> None:
    """Who comes late gets less, and each block goes back to its kind."""
    pool = BlockPool(1024, 1, small_bytes=16, small_limit=2)
    large, *small = taken(pool), taken(pool), taken(pool)
    assert [len(block.view) for block in (large, *small)] == [1024, 16, 16]
    assert pool.acquire() is None
    assert (pool.lent, repr(pool)) == (3, "BlockPool(made=1/1, small=2/2, free=0, waiting=0)")
    for block in (small[0], large):
        pool.release(block)
    assert (pool.lent, repr(pool)) == (1, "BlockPool(made=1/1, small=2/2, free=2, waiting=0)")
    assert taken(pool) is large
    assert taken(pool) is small[0]


async def test_waiter_takes_a_small_block_too() -> None:
    """Whoever waits goes on with whatever comes back first."""
    pool = BlockPool(1024, 1, small_bytes=16, small_limit=1)
    _, small = taken(pool), taken(pool)
    waiting = asyncio.create_task(pool.acquire_wait())
    await parked(waiting)
    pool.release(small)
    async with asyncio.timeout(5):
        assert await waiting is small


@given(steps=st.lists(st.booleans(), max_size=60), limit=st.integers(1, 5))
def test_pool_is_bounded_and_lends_no_block_twice(steps: list[bool], limit: int) -> None:
    """However it is used, at most *limit* blocks exist and each has one holder."""
    pool = BlockPool(1, limit)
    held: list[Block] = []
    seen: set[int] = set()
    for acquire in steps:
        if acquire:
            block = pool.acquire()
            assert (block is None) is (len(held) == limit)
            if block is not None:
                assert block not in held
                held.append(block)
                seen.add(id(block))
        elif held:
            pool.release(held.pop(0))
        assert pool.lent == len(held)
    assert len(seen) <= limit


async def test_waiters_are_served_in_turn() -> None:
    """First come, first served; a latecomer does not overtake who waits."""
    pool = BlockPool(16, 1)
    block = taken(pool)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        first = group.create_task(pool.acquire_wait())
        await parked(first)
        second = group.create_task(pool.acquire_wait())
        await parked(second)
        pool.release(block)
        assert pool.acquire() is None  # it is the first waiter's already
        assert await first is block
        await parked(second)
        pool.release(block)
        assert await second is block


async def test_wait_is_over_at_once_where_a_block_is_free() -> None:
    """Nobody waits for what is there."""
    async with asyncio.timeout(5):
        assert (await BlockPool(16, 1).acquire_wait()).users == 1


async def test_waiter_cancelled_before_its_turn_is_forgotten() -> None:
    """A block goes to who still waits."""
    pool = BlockPool(16, 1)
    block = taken(pool)
    gone = asyncio.create_task(pool.acquire_wait())
    stays = asyncio.create_task(pool.acquire_wait())
    await parked(gone, stays)
    assert repr(pool) == "BlockPool(made=1/1, free=0, waiting=2)"
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert repr(pool) == "BlockPool(made=1/1, free=0, waiting=1)"
    pool.release(block)
    async with asyncio.timeout(5):
        assert await stays is block


@pytest.mark.parametrize("release_first", [True, False], ids=["woken", "being cancelled"])
async def test_waiter_cancelled_in_its_turn_passes_it_on(release_first: bool) -> None:
    """A block that came in the same moment as the cancellation is not lost."""
    pool = BlockPool(16, 1)
    block = taken(pool)
    gone = asyncio.create_task(pool.acquire_wait())
    stays = asyncio.create_task(pool.acquire_wait())
    await parked(gone, stays)
    if release_first:
        pool.release(block)
        gone.cancel()
    else:
        gone.cancel()
        pool.release(block)
    with pytest.raises(asyncio.CancelledError):
        await gone
    async with asyncio.timeout(5):
        assert await stays is block
    pool.release(block)
    assert pool.lent == 0


async def test_last_waiter_cancelled_in_its_turn_returns_the_block() -> None:
    """With nobody to pass it on to, the block is free again."""
    pool = BlockPool(16, 1)
    block = taken(pool)
    gone = asyncio.create_task(pool.acquire_wait())
    await parked(gone)
    pool.release(block)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert pool.lent == 0


async def test_callback_without_use_for_the_block_leaves_it_to_the_next() -> None:
    """A connection lost while it waited does not keep the others waiting."""
    pool = BlockPool(16, 1)
    block = taken(pool)
    called: list[str] = []
    pool.when_free(lambda: called.append("lost"))
    pool.when_free(lambda: called.append(f"took {pool.acquire() is block}"))
    pool.when_free(lambda: called.append("out of turn"))
    pool.release(block)
    assert called == ["lost", "took True"]


async def test_every_waiter_is_served_whatever_is_cancelled() -> None:
    """Many waiters, few blocks, every third cancelled at some moment: the rest all get one."""
    pool = BlockPool(1, 3)

    async def use() -> None:
        block = await pool.acquire_wait()
        try:
            assert pool.lent <= 3
            await asyncio.sleep(0)
        finally:
            pool.release(block)

    tasks = [asyncio.create_task(use()) for _ in range(60)]
    async with asyncio.timeout(5):
        for task in tasks[::3]:
            await asyncio.sleep(0)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    kept = [result for number, result in enumerate(results) if number % 3]
    assert kept == [None] * 40
    assert pool.lent == 0
