"""Beaters: which beaters this process has, one for each database and interval of a target.

The hazards are a beater that is none any more, such as the parent's in the child of a fork, and
one too many: an address whose password is renewed has a new beater each time.
"""

import atexit
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from sqlalchemy import URL

from orphan_recovery.alive.beater import IDLE_SECONDS, Beater
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.target import BEATS_IN_A_THRESHOLD, Target
from orphan_recovery.targets import where

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
    least = target.shortest_threshold.total_seconds()
    if seconds <= 0 or seconds * BEATS_IN_A_THRESHOLD > least:
        raise ConfigurationError(
            f"a beat every {seconds:g} seconds does not go with a threshold of {least:g} seconds "
            f"(target {target.name!r}): beat at least {BEATS_IN_A_THRESHOLD} times within it"
        )
    return seconds


def beater_of(target: Target, url: URL, interval: float) -> Beater:
    """The beater of this process for ``target``; started when it is first asked for.

    Args:
        target: whose runs.
        url: its database.
        interval: seconds between beats.

    Raises:
        ConfigurationError: the address cannot be used, or threads are none here.
        OSError: there is no descriptor left for it.
        RuntimeError: no thread can be started any more: there are too many, or the process ends.
    """
    with _making:
        found = _at_hand(target, url, interval)
        if found is None:
            _require_threads()
            _retire(target)
            found = _beaters[target, url, interval] = Beater(target, url, interval)
        found.asked_at = time.monotonic()
        return found


def beater_at_hand(target: Target, url: URL, interval: float) -> Beater | None:
    """The same, if it is there and known to have a place for its beat: nothing is waited for."""
    with _making:
        found = _at_hand(target, url, interval)
        if found is None or not found.has_place:
            return None
        found.asked_at = time.monotonic()
        return found


@contextmanager
def reporting(beater: Beater, run_id: str, worker_id: str | None) -> Iterator[None]:
    """As :meth:`Beater.finishing`, for whatever block of this process keeps that run alive.

    Args:
        beater: one that beats for the same target.
        run_id: the run whose result is reported.
        worker_id: who held it; None for whoever did.
    """
    with _making:
        same = [one for one in _beaters.values() if (one.target, one.url) == _where(beater)]
    with ExitStack() as stack:
        for one in same:
            for own in one.own_runs_of(run_id, worker_id):
                stack.enter_context(one.finishing(own))
        yield


def _where(beater: Beater) -> tuple[Target, URL]:
    return beater.target, beater.url


def _at_hand(target: Target, url: URL, interval: float) -> Beater | None:
    found = _beaters.get((target, url, interval))
    return found if found is not None and found.lives else None


def _require_threads() -> None:
    """Refuse threads that are none: they run only while nobody else does."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        raise ConfigurationError(
            "gevent has patched threading, so that no thread could beat while the work computes: "
            "run this worker with threads or processes instead of gevent's pool, or call "
            "gevent's patch_all(thread=False)"
        )


def _retire(target: Target) -> None:
    """End the target's beaters that nobody has had a use for in a while, under another address."""
    idle_since = time.monotonic() - IDLE_SECONDS
    for key, one in list(_beaters.items()):
        if one.target == target and one.is_idle and one.asked_at < idle_since:
            del _beaters[key]
            one.end()


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
    for one in list(_beaters.values()):
        one.stop()
