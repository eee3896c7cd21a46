"""The beater: one thread of a process that beats for all its runs, over one connection.

The hazard is a worker that believes it lives. So a run counts as proven only from the moment at
which a beat that came through was sent; and a run that was not proven for as long as its
threshold is lost, whatever the database would say if it could be asked. Nothing that goes wrong
here is ever raised into the work.
"""

import asyncio
import atexit
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

from orphan_recovery.alive.beat import Run, beat_for, require_beat
from orphan_recovery.alive.lock import Locks
from orphan_recovery.alive.lost import LostBy, RunLost
from orphan_recovery.database import describe, make_engine, transaction
from orphan_recovery.describe import runs_table
from orphan_recovery.log import logger
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.target import BEATS_IN_A_THRESHOLD, Target
from orphan_recovery.targets import where

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")

JITTER: Final = 0.1
"""Share of the interval that is left to chance, so that a fleet does not beat as one."""
RETRY_SHARE: Final = 0.2
"""Share of the interval after which a beat that failed is tried again."""


@dataclass(slots=True, eq=False)
class OwnRun:
    """One run that this process keeps alive. Read and written under the beater's lock."""

    run_id: str
    worker_id: str | None
    on_loss: Callable[[RunLost], None]
    lost_after: float
    """Seconds without proof after which it is lost; infinite for a run that is never an orphan."""
    proven_at: float = field(default_factory=time.monotonic)
    """When the last beat that came through was sent, by this process's monotonic clock."""
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
        self._failing = self._has_place = False
        self._refused: set[Run] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"orphan-recovery alive {target.name}", daemon=True
        )
        self._thread.start()
        self._ready.wait()

    def keep(
        self, run_id: str, worker_id: str | None, on_loss: Callable[[RunLost], None]
    ) -> OwnRun:
        """Beat for a run from now on. The first beat goes out at once."""
        threshold = timedelta(minutes=self.target.threshold_minutes)
        if self._locks is not None:
            threshold = self._locks.lost_after
        own = OwnRun(run_id, worker_id, on_loss, threshold.total_seconds())
        with self._lock:
            self._own_runs.append(own)
        self._loop.call_soon_threadsafe(self._wake)
        return own

    def release(self, own: OwnRun) -> None:
        """Beat for it no more; it cannot be lost from here on."""
        with self._lock:
            if own in self._own_runs:
                self._own_runs.remove(own)
        if self._locks is not None:  # its lock is let go of at once
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
        if self._has_place:
            return
        try:
            self.submit(self._look).result(self.interval)
        except ConfigurationError:
            raise
        except Exception:  # the first beat says it
            return
        self._has_place = True

    async def _look(self, engine: AsyncEngine) -> None:
        async with transaction(engine) as db:
            table = await runs_table(db, self.target)
        if self._locks is None:
            require_beat(table)

    def submit(self, work: Callable[[AsyncEngine], Coroutine[Any, Any, T]]) -> "Future[T]":
        """Do ``work`` on the beater's connections, in its thread."""
        return asyncio.run_coroutine_threadsafe(work(self._engine), self._loop)

    def leave_to_parent(self) -> None:
        """In the child of a fork: let the parent's locks go with the parent."""
        if self._locks is not None:
            self._locks.leave_to_parent()

    def stop(self) -> None:
        """End the thread. For the end of the process."""
        if self._thread.is_alive() and self.pid == os.getpid():
            self._loop.call_soon_threadsafe(self._ending.set)
            self._thread.join(5)

    def _run(self) -> None:
        asyncio.run(self._live())

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine = make_engine(self.url)
        self._ending, self._news = asyncio.Event(), asyncio.Event()
        self._ready.set()
        tasks = [asyncio.create_task(self._beat_on()), asyncio.create_task(self._watch())]
        await self._ending.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._locks is not None:
            await self._locks.let_go()
        await self._engine.dispose()

    def _wake(self) -> None:
        self._news.set()

    async def _beat_on(self) -> None:
        """Beat by the interval; at once for a new run; soon again after a beat that failed."""
        while True:
            self._news.clear()
            well = await self._beat_all()
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
            return True
        sent_at = time.monotonic()
        try:
            async with asyncio.timeout(self.interval):
                runs = list({(own.run_id, own.worker_id) for own in own_runs})
                if self._locks is not None:
                    told = await self._locks.prove(self._engine, runs)
                else:
                    told = await beat_for(self._engine, self.target, runs)
        except Exception as error:
            if not self._failing:
                fields = {"target": self.target.name, "error": describe(error)}
                logger.warning("beat_failed", extra=fields)
            self._failing = True
            return False
        if self._failing:
            logger.info("beat_recovered", extra={"target": self.target.name})
        self._failing = False
        self._tell_of_refused(told.refused)
        for own in own_runs:
            run = (own.run_id, own.worker_id)
            if run in told.thresholds:
                threshold = told.thresholds[run]
                own.proven_at = sent_at
                own.lost_after = float("inf") if threshold is None else threshold.total_seconds()
            elif lost := told.lost.get(run):
                self._lose(own, lost)
        return True

    def _tell_of_refused(self, refused: dict[Run, str]) -> None:
        """Once for each run, for as long as it is so; the fence sees to the rest."""
        for run_id, worker_id in refused.keys() - self._refused:
            fields = {"target": self.target.name, "run_id": run_id}
            logger.warning("beat_failed", extra={**fields, "error": refused[run_id, worker_id]})
        self._refused = set(refused)

    async def _watch(self) -> None:
        """See to it that a run is lost on time, while a beat hangs or the database is away."""
        while True:
            await asyncio.sleep(min(1.0, self.interval * RETRY_SHARE))
            self._fence()

    def _fence(self) -> None:
        now = time.monotonic()
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
        logger.error("run_lost", extra={**fields, "found": lost.found})
        try:
            own.on_loss(lost)
        except Exception as error:  # such as a loop that was closed under its block
            logger.error("loss_not_told", extra={**fields, "error": describe(error)})


_beaters: dict[tuple[Target, URL, float], Beater] = {}
_making = threading.Lock()


def interval_for(target: Target, interval: float | None) -> float:
    """Seconds between two beats for the runs of ``target``.

    Args:
        target: whose runs.
        interval: as somebody asks for; None for the target's ``heartbeat_seconds``, else 10.

    Raises:
        ConfigurationError: the interval is not above 0, or three beats do not fit into the
            shortest threshold, or it is not the target's own where locks are kept.
    """
    seconds = target.beat.total_seconds() if interval is None else interval
    if target.lock is not None and seconds != target.beat.total_seconds():
        raise ConfigurationError(
            f"a beat every {seconds:g} seconds does not go with target {target.name!r}, whose "
            "sweeps wait two beats of its own for a lock: leave the interval out, and set "
            f"{where(target, 'heartbeat_seconds')}"
        )
    rules = [rule.threshold_minutes for rule in target.rules if rule.threshold_minutes]
    least = 60 * min([target.threshold_minutes, *rules])
    if seconds <= 0 or seconds * BEATS_IN_A_THRESHOLD > least:
        raise ConfigurationError(
            f"a beat every {seconds:g} seconds does not go with a threshold of {least} seconds "
            f"(target {target.name!r}): beat at least {BEATS_IN_A_THRESHOLD} times within it"
        )
    return seconds


def beater_of(target: Target, url: URL, interval: float) -> Beater:
    """The beater of this process for ``target``; started when it is first asked for.

    Args:
        target: whose runs.
        url: its database.
        interval: seconds between beats.
    """
    with _making:
        key = (target, url, interval)
        found = _beaters.get(key)
        if found is None or found.pid != os.getpid():  # threads do not survive a fork
            found = _beaters[key] = Beater(target, url, interval)
        return found


def _forget() -> None:
    """In the child of a fork there is none of the parent's threads, and its lock may be held."""
    global _making
    _making = threading.Lock()
    for one in _beaters.values():
        one.leave_to_parent()
    _beaters.clear()


os.register_at_fork(after_in_child=_forget)


@atexit.register
def _stop_all() -> None:
    for one in _beaters.values():
        one.stop()


async def await_future(future: "Future[T]") -> T:
    """Wait for work of the beater's thread without holding up this one's loop."""
    waited: Awaitable[T] = asyncio.wrap_future(future)
    return await waited
