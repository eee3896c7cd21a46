"""Keep alive: beat for a run while a block of code works on it, and stop it when it is lost.

The hazard is to finish twice: a worker that was frozen, or cut off from the database, comes back
and goes on as if nothing had been. So the block is told, by an event to check, or on request by
being cancelled; and what it reports in the end is written only if the run is still its own.
"""

import asyncio
import ctypes
import os
import sys
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL

from orphan_recovery.alive.beater import Beater, OwnRun, await_future
from orphan_recovery.alive.beaters import beater_at_hand, beater_of, interval_for
from orphan_recovery.alive.lost import RunLost
from orphan_recovery.alive.thread import in_own_thread
from orphan_recovery.alive.write import Result, as_text, submit_finish
from orphan_recovery.database import address
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.target import Target
from orphan_recovery.targets import find_target

if TYPE_CHECKING:
    from concurrent.futures import Future


class keep_alive:  # noqa: N801 - used as a function
    """Beat for a run for as long as the block lasts: ``with`` or ``async with``.

    The beat comes from a thread of its own, so work that blocks the event loop, or that is pure
    computation, still beats. All runs of a process share one connection, which is the beat's own,
    and one statement a beat. A beat that fails is tried again within the interval, and never
    raises into the block.

    Args:
        run_id: the run's key, as text; of a key of several columns, a JSON array of texts.
        worker_id: who holds it: a run that is another's is lost. None not to check.
        target: its target; None for the one that is meant by default.
        interval: seconds between beats; None for the target's ``heartbeat_seconds``, else 10. A
            target with ``lock`` takes no other.
        cancel: whether to stop the block when the run is lost: an ``async with`` block is
            cancelled, a ``with`` block gets the exception between two bytecodes (a call that
            blocks in C is not interrupted). Without it, check :attr:`Alive.lost`.

    Returns:
        An :class:`Alive`, on entering.

    Raises:
        ConfigurationError: on entering, where the target or the interval cannot be used, or where
            a ``with`` block with ``cancel`` is one of an event loop: that would be stopped.
        RuntimeError: on entering, where it has been entered before: each block needs its own.
        RunLost: on leaving, with ``cancel`` where the block was stopped.
    """

    def __init__(
        self,
        run_id: str,
        *,
        worker_id: str | None = None,
        target: str | None = None,
        interval: float | None = None,
        cancel: bool = False,
    ) -> None:
        self._run_id, self._worker_id = str(run_id), as_text(worker_id)
        self._target, self._interval, self._cancel = find_target(target), interval, cancel
        self._beater: Beater
        self._own: OwnRun
        self._is_used = False
        self._stopped = False
        """Whether the block was told to stop. Under the lock."""
        self._lock = threading.Lock()

    def __enter__(self) -> "Alive":
        if self._cancel and _is_in_a_loop():
            raise ConfigurationError(
                f"keep_alive({self._run_id!r}, cancel=True) would stop the event loop that this "
                "block runs in: use async with"
            )
        self._use()
        self._thread = threading.get_ident()
        self._beater = self._find_beater(*self._asked())
        return self._begin(self._interrupt)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_a_copy:
            return
        with self._lock:  # nobody interrupts a thread at a door of a block
            stopped, self._cancel = self._stopped, False
        self._beater.release(self._own)
        if stopped and (kind is None or kind is _Stop):
            raise self._lost() from None

    async def __aenter__(self) -> "Alive":
        self._use()
        self._loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None  # noqa: S101 - inside a coroutine
        self._task = task
        self._cancelling = task.cancelling()
        self._beater = self._at_hand() or await self._sought()
        # From here to the block nothing is awaited: a cancellation arrives in it, or not at all.
        return self._begin(self._cancel_task)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_a_copy:
            return
        with self._lock:
            self._beater.release(self._own)
            stopped, self._cancel = self._stopped, False
        # As asyncio.timeout does: a cancellation by somebody else is not swallowed.
        if stopped and self._task.uncancel() <= self._cancelling and kind in _CANCELLED:
            raise self._lost() from error

    def _use(self) -> None:
        with self._lock:
            if self._is_used:
                raise RuntimeError(
                    f"this keep_alive({self._run_id!r}) has been entered before: make one for "
                    "each block"
                )
            self._is_used = True

    @property
    def _is_a_copy(self) -> bool:
        """Whether this is the child of a fork that the block was made before: it keeps nothing
        alive there, and whoever held a lock of it has stayed behind."""
        return self._beater.pid != os.getpid()

    def _at_hand(self) -> Beater | None:
        """The beater, if nothing has to be waited for, such as an address that Prefect keeps."""
        if self._target.database_url_secret:
            return None
        return beater_at_hand(*self._asked())

    async def _sought(self) -> Beater:
        """The beater, however long it takes. The loop's own threads may all be at work."""
        return await await_future(in_own_thread(lambda: self._find_beater(*self._asked())))

    def _asked(self) -> tuple[Target, URL, float]:
        if self._target.lock == "worker" and self._worker_id is None:
            raise ConfigurationError(
                f"target {self._target.name!r} keeps a lock for each worker: name the worker that "
                f"holds run {self._run_id!r}"
            )
        interval = interval_for(self._target, self._interval)
        return self._target, address(self._target), interval

    @staticmethod
    def _find_beater(target: Target, url: URL, interval: float) -> Beater:
        beater = beater_of(target, url, interval)
        beater.require_place()
        return beater

    def _begin(self, on_loss: Any) -> "Alive":
        self._own = self._beater.keep(self._run_id, self._worker_id, on_loss)
        return Alive(self._own, self._beater)

    def _cancel_task(self, _: RunLost) -> None:
        self._loop.call_soon_threadsafe(self._cancel_now)

    def _cancel_now(self) -> None:
        with self._lock:
            if self._cancel and not self._stopped:
                self._stopped = True
                self._task.cancel()

    def _interrupt(self, lost: RunLost) -> None:
        with self._lock:
            if not self._cancel or self._stopped:
                return
            interrupt = ctypes.pythonapi.PyThreadState_SetAsyncExc
            thread, stop = ctypes.c_ulong(self._thread), ctypes.py_object(_Stop)
            frame = sys._current_frames().get(self._thread)
            at = None if frame is None else frame.f_lasti
            if not _is_at_a_door(self._thread, frame):
                self._stopped = True
                # From the comparison to the interruption no other thread can go on. Before it one
                # may have: then it is nobody knows where, and it is looked at anew.
                if frame is None or frame.f_lasti == at:
                    interrupt(thread, stop)
                    return
                self._stopped = False
        self._beater.later(_AT_A_DOOR_SECONDS, lambda: self._interrupt(lost))

    def _lost(self) -> RunLost:
        assert self._own.lost is not None  # noqa: S101 - it is what stopped the block
        return self._own.lost


def _is_in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class _Stop(BaseException):
    """Stops a synchronous block. No Exception, so that the work does not take it for its own."""


_CANCELLED = (None, asyncio.CancelledError)
_DOORS = (keep_alive.__enter__.__code__, keep_alive.__exit__.__code__)
_AT_A_DOOR_SECONDS = 0.01


def _is_at_a_door(thread: int, seen: FrameType | None) -> bool:
    """Whether a thread is entering or leaving a block, where what is raised escapes the block; or
    has left the frame in which it was seen a moment ago."""
    frame = sys._current_frames().get(thread)
    if frame is not seen:
        return True
    while frame is not None:
        if frame.f_code in _DOORS:
            return True
        frame = frame.f_back
    return False


class Alive:
    """A run that is being kept alive."""

    def __init__(self, own: OwnRun, beater: Beater) -> None:
        self._own, self._beater = own, beater

    @property
    def run_id(self) -> str:
        return self._own.run_id

    @property
    def lost(self) -> RunLost | None:
        """How the run was lost; None while it is not. Cheap: look as often as you like."""
        return self._own.lost

    @property
    def is_lost(self) -> threading.Event:
        """Set when the run is lost: to wait on, or to hand to other threads."""
        return self._own.is_lost

    def check(self) -> None:
        """Raise :class:`RunLost` if the run is lost."""
        if self._own.lost is not None:
            raise self._own.lost

    async def finish(
        self, *, status: str | int = "completed", output: Any = None, error: str | None = None
    ) -> None:
        """Write the run's result, if the run still is the worker's own. Commits.

        It goes to the table that the beats go to, whatever the settings say by now.

        Args:
            status: what it ends as, in the table's words.
            output: what it gave back, ready for JSON, where the target has a column for it.
            error: what went wrong, where it has a column for that.

        Raises:
            RunLost, ConfigurationError, sqlalchemy.exc.DBAPIError: as :func:`finish_run`.
        """
        with self._beater.finishing(self._own):
            await await_future(self._submit(Result(str(status), output, error)))

    def finish_sync(
        self, *, status: str | int = "completed", output: Any = None, error: str | None = None
    ) -> None:
        """:meth:`finish` from synchronous code."""
        with self._beater.finishing(self._own):
            self._submit(Result(str(status), output, error)).result()

    def _submit(self, result: Result) -> "Future[None]":
        mine = self._beater
        beater = beater_of(mine.target, mine.url, mine.interval)  # itself, but for a fork's child
        return submit_finish(beater, self._own.run_id, self._own.worker_id, result)
