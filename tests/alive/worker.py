"""One worker process: it holds runs, works as its standard input says, and says what it learns.

Started as a script, by the tests of alive. Each line that it writes is a fact.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from typing import Any

from orphan_recovery.alive import Alive, RunLost, keep_alive

_saying = threading.Lock()


def say(line: str) -> None:
    with _saying:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def compute(seconds: float) -> int:
    """Pure Python: whoever computes holds the interpreter's lock."""
    turns, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        turns += 1
    return turns


def watch(alive: Alive) -> None:
    """Say it when the run is lost, and by which second of the machine's clock."""

    def wait() -> None:
        alive.is_lost.wait()
        assert alive.lost is not None
        say(f"lost {alive.run_id} {alive.lost.by} at {time.monotonic():.2f}")

    threading.Thread(target=wait, daemon=True).start()


def obey(order: str, what: str, held: dict[str, Alive]) -> None:
    """The orders that block whoever obeys them."""
    if order == "sleep":
        time.sleep(float(what))
        say("slept")
    elif order == "compute":
        compute(float(what))
        say("computed")
    elif order == "check":
        report("check", what, held[what].check)
    elif order == "finish":
        report("finish", what, lambda: held[what].finish_sync(output={"rows": 1}))


def report(verb: str, run: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except RunLost as lost:
        say(f"{verb} {run}: lost by {lost.by}, contested {lost.contested}")
    else:
        say(f"{verb} {run}: well")


def next_order() -> tuple[str, str]:
    line = sys.stdin.readline()
    order, _, what = line.strip().partition(" ")
    return order or "end", what


def hold(asked: argparse.Namespace) -> None:
    with ExitStack() as stack:
        held = {run: stack.enter_context(block(asked, run)) for run in asked.runs}
        begin(asked, held)
        while (order := next_order())[0] != "end":
            obey(*order, held)
    say("released")
    next_order()


async def hold_async(asked: argparse.Namespace) -> None:
    async with AsyncExitStack() as stack:
        held = {run: await stack.enter_async_context(block(asked, run)) for run in asked.runs}
        begin(asked, held)
        while True:
            order, what = await asyncio.to_thread(next_order)
            if order == "end":
                break
            if order == "finish":
                try:
                    await held[what].finish(output={"rows": 1})
                except RunLost as lost:
                    say(f"finish {what}: lost by {lost.by}, contested {lost.contested}")
                else:
                    say(f"finish {what}: well")
            else:
                obey(order, what, held)  # in the loop, which it blocks
    say("released")
    await asyncio.to_thread(next_order)


def begin(asked: argparse.Namespace, held: dict[str, Alive]) -> None:
    if len(held) < 10:
        for alive in held.values():
            watch(alive)
    say("holding")


def block(asked: argparse.Namespace, run: str, *, cancel: bool = False) -> keep_alive:
    return keep_alive(
        run, worker_id=asked.worker, target=asked.target, interval=asked.interval, cancel=cancel
    )


def stop(asked: argparse.Namespace) -> None:
    """Compute until the run is lost."""
    [run] = asked.runs
    turns = 0
    try:
        with block(asked, run, cancel=True):
            say("holding")
            while True:
                turns += 1
    except RunLost as lost:
        say(f"stopped {run} {lost.by} at {time.monotonic():.2f}")
    compute(0.3)
    say(f"went on after {turns > 0}")


async def stop_async(asked: argparse.Namespace) -> None:
    """Wait until the run is lost."""
    [run] = asked.runs
    task = asyncio.current_task()
    assert task is not None
    try:
        async with block(asked, run, cancel=True):
            say("holding")
            await asyncio.Event().wait()
    except RunLost as lost:
        say(f"stopped {run} {lost.by} at {time.monotonic():.2f}")
    await asyncio.sleep(0.3)
    say(f"went on after {task.cancelling() == 0}")


BLOCKS = 2_000


def quick(asked: argparse.Namespace) -> None:
    """Blocks that end just when they are lost: each raises RunLost or nothing, then and later."""
    [run] = asked.runs
    told = {"well": 0, "lost": 0, "stray": 0}
    number = 3**3000
    typical = 0.004
    for turn in range(BLOCKS):
        try:
            try:
                entered = time.perf_counter()
                with block(asked, run, cancel=True) as alive:
                    if turn % 50 == 0:  # how long it takes to be told
                        try:
                            alive.is_lost.wait(5)
                        finally:  # by then it is interrupted, too
                            typical = (typical + time.perf_counter() - entered) / 2
                    elif turn % 2:
                        end = entered + random.uniform(0.5, 1.3) * typical  # noqa: S311
                        while time.perf_counter() < end:
                            pass
                    else:  # then something long that cannot be interrupted, and at once the end
                        time.sleep(random.uniform(0.2, 1.0) * typical)  # noqa: S311
                        number**60
            except RunLost:
                told["lost"] += 1
            else:
                told["well"] += 1
            compute(0.0005)
        except BaseException as stray:
            told["stray"] += 1
            say(f"stray {type(stray).__name__}: {stray}")
    say(f"quick {told}")


async def quick_async(asked: argparse.Namespace) -> None:
    """The same for blocks that are cancelled."""
    [run] = asked.runs
    task = asyncio.current_task()
    assert task is not None
    told = {"well": 0, "lost": 0, "stray": 0}
    typical = 0.01
    for turn in range(BLOCKS // 2):
        try:
            try:
                entered = time.perf_counter()
                async with block(asked, run, cancel=True):
                    if turn % 10 == 0:
                        try:
                            await asyncio.sleep(5)
                        finally:
                            typical = (typical + time.perf_counter() - entered) / 2
                    await asyncio.sleep(random.uniform(0.3, 1.2) * typical)  # noqa: S311
            except RunLost:
                told["lost"] += 1
            else:
                told["well"] += 1
            await asyncio.sleep(0)
            if task.cancelling():
                told["stray"] += 1
                say("stray cancellation")
        except asyncio.CancelledError as stray:
            told["stray"] += 1
            say(f"stray {stray!r}")
        while task.cancelling():
            task.uncancel()
    say(f"quick {told}")


def fork(asked: argparse.Namespace) -> None:
    """A master that holds a run itself, and a child that was forked from it and holds another."""
    ours, childs = asked.runs
    block(asked, ours).__enter__()
    say("holding")
    next_order()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        with block(asked, childs):
            say("child holding")
            os.read(reading, 1)  # until the master closes its end
        say("child released")
        return
    os.close(reading)
    next_order()
    os.close(writing)
    _, status = os.waitpid(child, 0)
    say(f"child ended with {os.waitstatus_to_exitcode(status)}")
    next_order()


def outlive(asked: argparse.Namespace) -> None:
    """A master that holds a run, and a child that was forked from it meanwhile and goes on."""
    [run] = asked.runs
    block(asked, run).__enter__()
    say("holding")
    next_order()
    if os.fork() == 0:
        say("child lives")
        next_order()
        say("child ends")
        os._exit(0)
    signal.pause()


def leave(asked: argparse.Namespace) -> None:
    """End the interpreter while a run is held."""
    [run] = asked.runs
    block(asked, run).__enter__()
    say("holding")
    next_order()


MODES: dict[str, Callable[[argparse.Namespace], Any]] = {
    mode.__name__: mode
    for mode in (hold, hold_async, stop, stop_async, quick, quick_async, fork, outlive, leave)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--worker")
    parser.add_argument("--target")
    parser.add_argument("--interval", type=float)
    asked = parser.parse_args()
    doing = MODES[asked.mode](asked)
    if doing is not None:
        asyncio.run(doing)


if __name__ == "__main__":
    main()
