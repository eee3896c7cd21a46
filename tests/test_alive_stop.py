"""Alive: a block whose run is lost is stopped, and nothing else is."""

import asyncio
import sys
import threading
from types import FrameType
from uuid import uuid4

import pytest

from alive_support import OFTEN, Beats, Workers, await_end, await_line, complete, stall
from orphan_recovery.alive import RunLost, keep, keep_alive
from support import Database, until

pytestmark = pytest.mark.usefixtures("no_beater_is_left", "the_minute_has_begun")


async def test_a_lost_block_is_cancelled_and_raises_what_happened(db: Database) -> None:
    db.add_run("run")
    task = asyncio.current_task()
    assert task is not None

    async def work() -> None:
        async with keep_alive("run", cancel=True, interval=OFTEN):
            complete(db, "run")
            await asyncio.wait_for(asyncio.Event().wait(), 20)

    with pytest.raises(RunLost, match=r"run run is lost \(finished\)"):
        await work()
    assert task.cancelling() == 0
    await asyncio.sleep(0)


async def test_a_block_that_ends_before_it_could_be_cancelled_is_not_cancelled_later(
    db: Database,
) -> None:
    db.add_run("run")
    complete(db, "run")
    task = asyncio.current_task()
    assert task is not None
    async with keep_alive("run", cancel=True, interval=OFTEN) as alive:
        until(alive.is_lost.is_set, "the loss")
        stall(0.3)  # its cancellation is on its way to the loop, which has no time for it
    await asyncio.sleep(0.1)
    assert task.cancelling() == 0


def test_a_lost_block_of_pure_python_is_interrupted(db: Database, workers: Workers) -> None:
    db.add_run("run")
    child = workers.holding("stop", "run")
    complete(db, "run")
    await_line(child, "stopped run finished")
    await_line(child, "went on after True")
    await_end(child)


async def test_without_cancel_a_lost_block_goes_on(db: Database) -> None:
    db.add_run("run")
    complete(db, "run")
    async with keep_alive("run", interval=OFTEN) as alive:
        assert await asyncio.to_thread(alive.is_lost.wait, 10)
        await asyncio.sleep(2 * OFTEN)
    with keep_alive("run", interval=OFTEN) as alive:
        assert alive.is_lost.wait(10)


async def test_a_cancellation_by_somebody_else_is_not_swallowed(db: Database, beats: Beats) -> None:
    db.add_run("run")

    async def work() -> None:
        async with keep_alive("run", cancel=True, interval=OFTEN):
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.to_thread(beats.await_more, "run", 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_a_cancellation_that_comes_on_top_of_a_loss_is_not_swallowed(db: Database) -> None:
    db.add_run("run")
    complete(db, "run")
    cleaning_up = asyncio.Event()

    async def work() -> None:
        async with keep_alive("run", cancel=True, interval=OFTEN):
            try:
                await asyncio.Event().wait()
            finally:
                cleaning_up.set()
                await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.wait_for(cleaning_up.wait(), 10)
    task.cancel("by a deploy")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_a_time_out_around_a_lost_block_and_one_within_stay_what_they_are(
    db: Database,
) -> None:
    db.add_run("run")
    db.add_run("lost")
    complete(db, "lost")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3), keep_alive("run", cancel=True):
            await asyncio.Event().wait()
    with pytest.raises(TimeoutError):
        async with keep_alive("run", cancel=True), asyncio.timeout(0.3):
            await asyncio.Event().wait()
    with pytest.raises(RunLost):
        async with asyncio.timeout(20), keep_alive("lost", cancel=True):
            await asyncio.Event().wait()
    with pytest.raises(RunLost):
        async with keep_alive("lost", cancel=True), asyncio.timeout(20):
            await asyncio.Event().wait()


async def test_an_exception_of_the_work_is_not_replaced(db: Database) -> None:
    db.add_run("run")
    complete(db, "run")
    task = asyncio.current_task()
    assert task is not None

    async def fail_when_stopped() -> None:
        async with keep_alive("run", cancel=True, interval=OFTEN):
            try:
                await asyncio.Event().wait()
            finally:
                _ = 1 / 0

    async def fail_before() -> None:
        async with keep_alive("run", cancel=True, interval=OFTEN) as alive:
            until(alive.is_lost.is_set, "the loss")  # the loop has no time to cancel it
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        await fail_when_stopped()
    assert task.cancelling() == 0
    with pytest.raises(ZeroDivisionError):
        await fail_before()
    assert task.cancelling() == 0
    await asyncio.sleep(0)


async def test_an_exception_of_work_that_is_interrupted_is_not_replaced(db: Database) -> None:
    db.add_run("run")
    complete(db, "run")
    raised: list[BaseException] = []

    def work() -> None:
        try:
            with keep_alive("run", cancel=True, interval=OFTEN):
                try:
                    while True:
                        pass
                finally:
                    _ = 1 / 0
        except BaseException as error:
            raised.append(error)

    await asyncio.to_thread(work)
    [error] = raised
    assert isinstance(error, ZeroDivisionError)


def test_a_thread_that_leaves_the_block_meanwhile_is_not_interrupted(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was seen within the block; before it could be interrupted, it had its turn, and left."""
    db.add_run("run")
    complete(db, "run")
    looked = threading.Event()
    is_at_a_door, main = keep._is_at_a_door, threading.get_ident()

    def look(thread: int, seen: FrameType | None) -> bool:
        told = is_at_a_door(thread, seen)
        if not looked.is_set():
            looked.set()
            until(lambda: is_at_a_door(main, sys._current_frames()[main]), "the thread at a door")
        return told

    monkeypatch.setattr(keep, "_is_at_a_door", look)
    with keep_alive("run", cancel=True, interval=OFTEN):
        while not looked.is_set():
            pass
    for _ in range(100_000):  # nor later
        pass


async def test_of_nested_blocks_the_one_whose_run_is_lost_says_so(db: Database) -> None:
    async def lose(*runs: str) -> RunLost:
        names = {name: f"{name}-{uuid4()}" for name in ("outer", "inner")}
        for name in names.values():
            db.add_run(name)
        passed: list[str] = []

        async def work() -> None:
            async with keep_alive(names["outer"], cancel=True, interval=OFTEN):
                try:
                    async with keep_alive(names["inner"], cancel=True, interval=OFTEN):
                        for run in runs:
                            complete(db, names[run])
                        await asyncio.wait_for(asyncio.Event().wait(), 20)
                finally:
                    passed.append("the inner block")

        with pytest.raises(RunLost) as raised:
            await work()
        assert passed == ["the inner block"]
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        assert raised.value.run_id in [names[run] for run in runs]
        return raised.value

    await lose("outer")
    await lose("inner")
    await lose("outer", "inner")


async def test_a_lost_block_around_a_task_group_stops_the_group(db: Database) -> None:
    db.add_run("run")
    complete(db, "run")
    stopped: list[str] = []

    async def part() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            stopped.append("part")
            raise

    async def work() -> None:
        async with keep_alive("run", cancel=True), asyncio.TaskGroup() as group:
            group.create_task(part())
            group.create_task(part())

    with pytest.raises(RunLost):
        await work()
    assert stopped == ["part", "part"]


async def test_a_lost_block_in_a_task_of_a_group_fails_the_group(db: Database) -> None:
    db.add_run("run")
    db.add_run("lost")
    complete(db, "lost")

    async def work(run: str) -> None:
        async with keep_alive(run, cancel=True):
            await asyncio.Event().wait()

    async def work_on_both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(work("run"))
            group.create_task(work("lost"))

    with pytest.raises(ExceptionGroup) as raised:
        await work_on_both()
    [error] = raised.value.exceptions
    assert isinstance(error, RunLost)
    assert error.run_id == "lost"


async def test_a_block_that_is_lost_while_it_is_entered_says_so(db: Database) -> None:
    """The loop is held up meanwhile, as loops are."""
    db.add_run("run")
    complete(db, "run")
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_soon(stall)
    with pytest.raises(RunLost):
        async with keep_alive("run", cancel=True, interval=OFTEN):
            await asyncio.wait_for(asyncio.Event().wait(), 20)
    assert task.cancelling() == 0


async def test_a_block_whose_task_is_cancelled_while_it_enters_beats_for_nobody(
    db: Database, beats: Beats
) -> None:
    """A run that is kept alive by nobody's block would never be found again."""
    db.add_run("run")
    db.add_run("other")

    async def work() -> None:
        async with keep_alive("run", interval=OFTEN):
            await asyncio.Event().wait()

    async with keep_alive("other", interval=OFTEN):
        task = asyncio.create_task(work())
        await asyncio.sleep(0)  # it is entering now
        stall(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(beats.await_more, "other", 2)
        seen = beats.of("run")
        await asyncio.to_thread(beats.await_more, "other", 3)
        assert beats.of("run") == seen
