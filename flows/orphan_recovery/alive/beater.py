"""The beater: one thread of a process that beats for all its runs, over one connection of its own.

The hazard is a worker that believes it lives. So a run counts as proven only from the moment at
which a beat that came through was sent; and a run that was not proven for as long as its
threshold is lost, whatever the database would say if it could be asked. Nothing that goes wrong
here is ever raised into the work.
"""

import asyncio
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from orphan_recovery.alive.beat import Beaten, Run, beat_for, require_beat
from orphan_recovery.alive.lock import Locks
from orphan_recovery.alive.lost import LostBy, RunLost
from orphan_recovery.alive.thread import OwnThreads
from orphan_recovery.attempt import bounded
from orphan_recovery.database import describe, make_engine, transaction
from orphan_recovery.describe import runs_table
from orphan_recovery.log import logger
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.target import BEATS_IN_A_THRESHOLD, Target

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")

JITTER: Final = 0.1
"""Share of the interval that is left to chance, so that a fleet does not beat as one."""
RETRY_SHARE: Final = 0.2
"""Share of the interval after which a beat that failed is tried again."""
IDLE_SECONDS: Final = 30.0
"""After so long without a use, connections are given back to the server."""
_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def host_seconds() -> float:
    """This host's clock, which nobody sets; with the time in which the host was suspended, where
    the system tells: the database's went on meanwhile, and so did the threshold."""
    return time.clock_gettime(_CLOCK)


@dataclass(slots=True, eq=False)
class OwnRun:
    """One run that this process holds. Read and written under the beater's lock."""

    run_id: str
    worker_id: str | None
    on_loss: Callable[[RunLost], None]
    lost_after: float
    """Seconds without proof after which it is lost; infinite for a run that is never an orphan."""
    proven_at: float = field(default_factory=lambda: host_seconds())
    """When the last beat that came through was sent, by this host's clock."""
    is_finishing: bool = False
    """Whether its own result is on its way: then it is no loss that the run has ended."""
    lost: RunLost | None = None
    is_lost: threading.Event = field(default_factory=threading.Event)


class Beater:
    """Beats for the runs of one target. Use :func:`beater_of`."""

    def __init__(self, target: Target, url: URL, interval: float) -> None:
        self.target, self.url, self.interval = target, url, interval
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._own_runs: list[OwnRun] = []
        self._locks = None if target.lock is None else Locks(target, timedelta(seconds=interval))
        self._failing = False
        self.has_place = False
        """Whether the database has said that there is a place for the beat."""
        self.asked_at = time.monotonic()
        """When somebody last asked for this beater."""
        self._refused: set[Run] = set()
        # No number of claims and results, all of which may wait for a row, keeps it from beating.
        self._beats, self._engine = make_engine(url, connections=1), make_engine(url)
        self._beaten_at: float | None = None
        self._used_at: float | None = None
        """When the connections of either were last used; None: there are none."""
        self._at_work = 0
        """Claims and results under way."""
        self._patience = interval
        """Seconds that a beat may take: more, once one has needed more."""
        self._failed: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"orphan-recovery alive {target.name}", daemon=True
        )
        self._thread.start()
        self._ready.wait()
        if self._failed is not None:
            raise self._failed

    @property
    def lives(self) -> bool:
        """Whether its thread is there: none survives a fork, or the end of the interpreter."""
        return self.pid == os.getpid() and self._thread.is_alive()

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to beat for, and nothing else to do."""
        return not self._own_runs and not self._at_work

    def keep(
        self, run_id: str, worker_id: str | None, on_loss: Callable[[RunLost], None]
    ) -> OwnRun:
        """Beat for a run from now on. The first beat goes out at once."""
        threshold = self.target.shortest_threshold  # until a beat has told the run's own
        if self._locks is not None:
            threshold = self._locks.lost_after
        own = OwnRun(run_id, worker_id, on_loss, threshold.total_seconds())
        with self._lock:
            self._own_runs.append(own)
        self._loop.call_soon_threadsafe(self._wake)
        return own

    def own_runs_of(self, run_id: str, worker_id: str | None) -> list[OwnRun]:
        """What it beats for of that run, and of that worker's; None: of any."""
        with self._lock:
            return [
                own
                for own in self._own_runs
                if own.run_id == run_id
                and (worker_id is None or own.worker_id in (None, worker_id))
            ]

    def release(self, own: OwnRun) -> None:
        """Beat for it no more; it cannot be lost from here on."""
        with self._lock:
            if own in self._own_runs:
                self._own_runs.remove(own)
        if self._locks is not None and self.lives:  # its lock is let go of at once
            self._loop.call_soon_threadsafe(self._wake)

    @contextmanager
    def finishing(self, own: OwnRun) -> Iterator[None]:
        """While it reports its result; once that is written, it can be lost no more."""
        own.is_finishing = True
        try:
            yield
        except BaseException:
            own.is_finishing = False
            raise
        self.release(own)

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call something from the beater's thread, after so long."""
        self._loop.call_later(seconds, call)

    def require_place(self) -> None:
        """Refuse a target that has no place for a beat, unless the database cannot be asked.

        Raises:
            ConfigurationError: as :func:`require_beat`.
        """
        if self.has_place:
            return
        try:
            asyncio.run_coroutine_threadsafe(self._look(), self._loop).result(self.interval)
        except ConfigurationError:
            raise
        except Exception:  # the first beat says it
            return
        self.has_place = True

    async def _look(self) -> None:
        engine = make_engine(self.url, connections=1)  # once, and nothing of it stays open
        try:
            async with bounded(self.interval), transaction(engine) as db:
                table = await runs_table(db, self.target)
        finally:
            await engine.dispose()
        if self._locks is None:
            require_beat(table)

    def submit(self, work: Callable[[AsyncEngine], Coroutine[Any, Any, T]]) -> "Future[T]":
        """Do ``work`` in the beater's thread, on connections that no beat waits for."""
        return asyncio.run_coroutine_threadsafe(self._do(work), self._loop)

    async def _do(self, work: Callable[[AsyncEngine], Coroutine[Any, Any, T]]) -> T:
        self._at_work += 1
        try:
            return await work(self._engine)
        finally:
            self._at_work -= 1
            self._used_at = time.monotonic()

    def leave_to_parent(self) -> None:
        """In the child of a fork: let the parent's locks go with the parent."""
        self._lock, self._own_runs = threading.Lock(), []  # the parent's thread may have held it
        if self._locks is not None:
            self._locks.leave_to_parent()

    def end(self) -> None:
        """Have the thread end, and its connections, without waiting for it."""
        if self.lives:
            self._loop.call_soon_threadsafe(self._ending.set)

    def stop(self) -> None:
        """End the thread. For the end of the process."""
        if self.lives:
            self.end()
            self._thread.join(5)

    def _run(self) -> None:
        try:
            asyncio.run(self._live())
        except BaseException as error:
            if self._ready.is_set():
                raise
            self._failed = error  # told where it was started, such as for want of a descriptor
        finally:
            self._ready.set()

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(OwnThreads())
        self._ending, self._news = asyncio.Event(), asyncio.Event()
        self._ready.set()
        tasks = [asyncio.create_task(self._beat_on()), asyncio.create_task(self._watch())]
        await self._ending.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._locks is not None:
            await self._locks.let_go()
        await self._beats.dispose()
        await self._engine.dispose()

    def _wake(self) -> None:
        self._news.set()

    async def _beat_on(self) -> None:
        """Beat by the interval; at once for a new run; soon again after a beat that failed."""
        while True:
            self._news.clear()
            try:
                well = await self._beat_all()
            except Exception as error:  # whatever it is, the next beat goes out
                well = self._tell_of_failure(error)
            spread = random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311
            pause = self.interval * spread if well else self.interval * RETRY_SHARE
            try:
                async with asyncio.timeout(pause):
                    await self._news.wait()
            except TimeoutError:
                continue

    async def _beat_all(self) -> bool:
        self._fence()  # a process that was frozen learns of it before it beats again
        with self._lock:
            own_runs = [own for own in self._own_runs if own.lost is None]
        if not own_runs and not (self._locks and self._locks.any_held):
            await self._rest()
            return True
        told, well = Beaten({}, {}, {}), True
        limit = self._longest(own_runs)
        sent_at = self._beaten_at = host_seconds()
        try:
            async with bounded(limit):
                runs = list(dict.fromkeys((own.run_id, own.worker_id) for own in own_runs))
                if self._locks is not None:
                    told = await self._locks.prove(self._beats, runs)
                else:
                    await beat_for(self._beats, self.target, runs, told)
        except Exception as error:
            well = self._tell_of_failure(error)
            if isinstance(error, TimeoutError):
                self._patience = 2 * limit
                await self._beats.dispose()  # its connection may hang for ever
        else:
            self._patience = max(self._patience / 2, 2 * (host_seconds() - sent_at))
            self._tell_of_success(told.refused)
        self._note(own_runs, told, sent_at)  # what came through before it failed, too
        return well

    def _longest(self, own_runs: list[OwnRun]) -> float:
        """Seconds that this beat may take. A database that is slow needs patience, up to what
        leaves time to try again; a connection that hangs is better given up soon."""
        shortest = min((own.lost_after for own in own_runs), default=0.0)
        return max(self.interval, min(self._patience, shortest / BEATS_IN_A_THRESHOLD))

    def _note(self, own_runs: list[OwnRun], told: Beaten, sent_at: float) -> None:
        for own in own_runs:
            run = (own.run_id, own.worker_id)
            if run in told.thresholds:
                threshold = told.thresholds[run]
                own.proven_at = sent_at
                own.lost_after = float("inf") if threshold is None else threshold.total_seconds()
            elif lost := told.lost.get(run):
                self._lose(own, lost)

    async def _rest(self) -> None:
        """Give the beat's connection back, once there was nothing to beat for in a while."""
        if self._beaten_at is not None and host_seconds() - self._beaten_at > IDLE_SECONDS:
            self._beaten_at = None
            if self._locks is not None:
                await self._locks.let_go()
            await self._beats.dispose()

    def _tell_of_failure(self, error: Exception) -> bool:
        """Once, until a beat succeeds again. Returns False: how well the beat went."""
        if not self._failing:
            fields = {"target": self.target.name, "error": describe(error)}
            logger.warning("beat_failed", extra=fields)
        self._failing = True
        return False

    def _tell_of_success(self, refused: dict[Run, str]) -> None:
        """What was refused once for each run, for as long as it is so; the fence does the rest."""
        if self._failing:
            logger.info("beat_recovered", extra={"target": self.target.name})
        self._failing = False
        for run_id, worker_id in refused.keys() - self._refused:
            fields = {"target": self.target.name, "run_id": run_id}
            logger.warning("beat_failed", extra={**fields, "error": refused[run_id, worker_id]})
        self._refused = set(refused)

    async def _watch(self) -> None:
        """See to it that a run is lost on time, while a beat hangs or the database is away."""
        while True:
            await asyncio.sleep(min(1.0, self.interval * RETRY_SHARE))
            try:
                self._fence()
                await self._give_back()
            except Exception as error:  # whatever it is, the watch goes on
                self._tell_of_failure(error)

    async def _give_back(self) -> None:
        """Close the connections for claims and results, once they were idle for a while."""
        used = self._used_at
        if used is not None and not self._at_work and time.monotonic() - used > IDLE_SECONDS:
            self._used_at = None
            await self._engine.dispose()

    def _fence(self) -> None:
        now = host_seconds()
        with self._lock:
            overdue = [
                own
                for own in self._own_runs
                if own.lost is None and now - own.proven_at >= own.lost_after
            ]
        for own in overdue:
            silent = f"{now - own.proven_at:.0f} seconds"
            self._lose(own, RunLost(own.run_id, LostBy.UNPROVEN, {"no beat for": silent}))

    def _lose(self, own: OwnRun, lost: RunLost) -> None:
        with self._lock:
            if own.lost is not None or own not in self._own_runs:
                return
            if own.is_finishing and lost.by is LostBy.FINISHED:
                return
            own.lost = lost
        own.is_lost.set()
        fields = {"run_id": own.run_id, "target": self.target.name, "by": lost.by.value}
        not_told: dict[str, str] = {}
        try:  # the work hears of it first
            own.on_loss(lost)
        except Exception as error:  # such as a loop that was closed under its block
            not_told = {"error": describe(error)}
        logger.error("run_lost", extra={**fields, "found": lost.found})
        if not_told:
            logger.error("loss_not_told", extra={**fields, **not_told})


async def await_future(future: "Future[T]") -> T:
    """Wait for work of the beater's thread without holding up this one's loop."""
    waited: Awaitable[T] = asyncio.wrap_future(future)
    return await waited
