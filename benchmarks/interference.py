"""Interference: how much longer workers wait for their own writes while a sweep marks many runs.

The hazard is to blame a sweep for what any writer would do, or to hide it behind a mean. So the
99th percentile is taken before, during and after, and for long, since a machine's own mood changes
meanwhile: without any sweep it was 1.9 ms and 5.2 ms within minutes. With the bare statement in
the sweep's place as well: where all share few processors, that one hinders too.
"""

import time
from collections.abc import Callable
from statistics import quantiles
from typing import Any

from benchmarks.data import Fleet, Server
from benchmarks.processes import Process, run
from benchmarks.rates import BARE, SWEEP
from benchmarks.results import Goal, Measured, Result, Side, Size

Span = tuple[float, float]
WORKERS = 8
LOOPS_A_SECOND = 25
"""Of each worker; a loop is four small transactions."""
HASTE = {"ORPHAN_RECOVERY_TARGETS__DEFAULT__ORPHANS_PER_SECOND": "1000000"}
"""A pace that is set is kept whatever others do; nothing can be marked so fast."""


def interference(server: Server, size: Size) -> Measured:
    """Workers under a sweep, and under a bare statement, against workers alone."""
    fleet = Fleet(size.rows, size.orphans)
    settings: dict[str, dict[str, str]] = {"bare": {}, "haste": HASTE, "sweep": {}}
    p99s: dict[str, list[tuple[float, float]]] = {name: [] for name in settings}
    seconds, errors, deadlocks = list[float](), list[str](), 0
    for _ in range(size.load_rounds):
        for name, environment in settings.items():
            side = BARE if name == "bare" else SWEEP
            seconds_alone = size.alone_seconds if name == "sweep" else size.load_seconds
            with server.copy(fleet) as url:
                alone, during, took, failed = _under_load(url, side, seconds_alone, environment)
                if name == "sweep":
                    seconds.append(took)
                p99s[name].append((alone, during))
                errors += failed
                with server.connect() as admin:
                    row = admin.execute(
                        "SELECT sum(deadlocks) AS deadlocks FROM pg_stat_database"
                        " WHERE datname = %s",
                        [url.rpartition("/")[2].partition("?")[0]],
                    ).fetchone()
                    deadlocks += int((row or {})["deadlocks"])

    def slower(name: str) -> list[float]:
        return [during / alone for alone, during in p99s[name]]

    def sides(name: str) -> list[Side]:
        return [
            Side("p99 during it", [during for _, during in p99s[name]], "ms"),
            Side("p99 alone", [alone for alone, _ in p99s[name]], "ms"),
        ]

    against_bare = zip(p99s["haste"], p99s["bare"], strict=True)
    return Measured(
        [
            Result(
                "p99 of a worker's loop under a sweep, against none",
                slower("sweep"),
                Goal(1.5),
                sides=[*sides("sweep"), Side("the sweep", seconds, "s")],
                notes=[f"{WORKERS} workers, {LOOPS_A_SECOND} loops/s each: claim, beat, finish"],
            ),
            Result(
                "p99 of a worker's loop under a sweep that does not give way, against none",
                slower("haste"),
                sides=sides("haste"),
            ),
            Result(
                "p99 of a worker's loop under the bare statement, against none",
                slower("bare"),
                sides=sides("bare"),
            ),
            Result(
                "p99 of a worker's loop under a sweep that does not give way, "
                "against the bare statement",
                [swept / bare for (_, swept), (_, bare) in against_bare],
            ),
            Result(
                "deadlocks and errors of workers",
                [float(deadlocks + len(errors))],
                Goal(0),
                unit="in all",
                notes=sorted(set(errors))[:3],
            ),
        ]
    )


def _under_load(
    url: str, side: tuple[str, ...], seconds: float, environment: dict[str, str]
) -> tuple[float, float, float, list[str]]:
    """The 99th percentile in milliseconds before and after ``side`` and during it, how many
    seconds that took, and what went wrong."""
    load = Process(url, "benchmarks.load", WORKERS, LOOPS_A_SECOND)
    load.go()
    time.sleep(min(1.0, seconds))  # first statements of a connection are slow
    before = _sleep(seconds)
    ran = run(url, *side, **environment)
    time.sleep(min(1.0, seconds))  # its last log is being written
    after = _sleep(seconds)
    load.go()  # and it ends
    told: dict[str, Any] = load.answer()
    p99 = _p99_of(told["loops"])
    alone = p99(before, after)
    during = p99((ran.began, ran.began + max(ran.seconds, 0.5)))
    return alone, during, ran.seconds, told["errors"]


def _sleep(seconds: float) -> Span:
    began = time.monotonic()
    time.sleep(seconds)
    return began, time.monotonic()


def _p99_of(loops: list[tuple[float, float]]) -> Callable[..., float]:
    def p99(*spans: Span) -> float:
        """Of the loops that were due or under way then, by the clock that all processes share."""
        took = [
            took_s * 1000
            for due, took_s in loops
            if any(due < until and due + took_s > since for since, until in spans)
        ]
        assert len(took) > 1, "no worker did anything"
        return quantiles(took, n=100, method="inclusive")[98]

    return p99
