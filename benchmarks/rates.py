"""Rates: how many orphans a second the start-up path marks, and what it is held against.

The hazard is to compare what was not measured side by side: every round runs all sides in turn,
each on a fresh copy of the same database, and a ratio is that of one round.
"""

from statistics import median
from typing import Final, TypeVar

import psycopg

from benchmarks.data import Fleet, Server
from benchmarks.processes import Ran, run, run_at_once, watched
from benchmarks.results import Goal, Measured, Point, Result, Side, Size

T = TypeVar("T")

SWEEP = ("benchmarks.sides", "sweep")
BARE = ("benchmarks.sides", "bare")
CONNECTED = ("benchmarks.sides", "connected")


def rates(server: Server, size: Size) -> Measured:
    """The start-up path against one bare statement, and against the usual loops."""
    fleet = Fleet(size.rows, size.orphans)
    commands: dict[str, tuple[str | int, ...]] = {
        "bare": BARE,
        "sweep": SWEEP,
        "loop 1": ("benchmarks.sides", "loop", 1, size.loop),
        "loop 100": ("benchmarks.sides", "loop", 100, size.loop),
        "orm": ("benchmarks.sides", "orm", size.loop),
    }
    ran: dict[str, list[Ran]] = {name: [] for name in commands}
    longest = list[float]()
    for number in range(size.rounds):
        for name, command in in_turn(commands, number):
            with server.copy(fleet) as url:
                with watched(server, url) as transactions:
                    ran[name].append(run(url, *command))
                if name == "sweep":
                    longest.append(transactions.seconds)
                    check_marked_once(url, size.orphans)
    ours = Side("start-up path", [one.rate for one in ran["sweep"]], "orphans/s")

    def against(name: str, told: str, goal: Goal | None, note: str) -> Result:
        theirs = [one.rate for one in ran[name]]
        return Result(
            f"rate against {told}",
            _ratios(ran["sweep"], ran[name]),
            goal,
            sides=[ours, Side(told, theirs, "orphans/s")],
            notes=[note],
        )

    a_row = "the rate of a commit a row is that of the disk's flush; no ledger, no guard"
    return Measured(
        [
            against(
                "bare",
                "one bare statement",
                Goal(0.9, at_least=True),
                f"{size.orphans:,} orphans of {size.rows:,} rows, a verdict each",
            ),
            Result(
                "longest transaction of the sweep",
                longest,
                Goal(1.0),
                unit="s",
                sides=[
                    Side("bare statement: all of it", [one.seconds for one in ran["bare"]], "s")
                ],
            ),
            against("loop 1", "the usual loop, a commit a row", Goal(25, at_least=True), a_row),
            against("orm", "the usual loop by SQLAlchemy's ORM, a commit a row", None, a_row),
            against(
                "loop 100", "the loop with a commit each 100 rows", None, "no ledger, no guard"
            ),
        ]
    )


OFTEN: Final = {"ORPHAN_RECOVERY_TARGETS__DEFAULT__HEARTBEAT_SECONDS": "0.1"}
"""Said, so that a server that was started a moment ago is believed."""


def beaten(server: Server, size: Size) -> Measured:
    """The same where the orphans have beaten once."""
    fleet = Fleet(size.rows, size.orphans, beaten=True)
    sweeps, bares = list[Ran](), list[Ran]()
    for number in range(max(1, size.rounds // 2)):
        for _, (ran, side) in in_turn({"bare": (bares, BARE), "sweep": (sweeps, SWEEP)}, number):
            with server.copy(fleet) as url:
                _beat(url)
                ran.append(run(url, *side, **OFTEN))
    server.forget(fleet)
    return Measured(
        [
            Result(
                "rate against one bare statement, orphans that beat once",
                _ratios(sweeps, bares),
                sides=[
                    Side("start-up path", [ran.rate for ran in sweeps], "orphans/s"),
                    Side("bare statement", [ran.rate for ran in bares], "orphans/s"),
                ],
            )
        ]
    )


def four(server: Server, size: Size) -> Measured:
    """Four sweepers at once on the same orphans, against one; and what one has to bear from any
    three processes beside it."""
    fleet, seconds = Fleet(size.rows, size.orphans), dict[str, list[float]]()
    sides = {"one": [SWEEP], "four": [SWEEP] * 4, "beside three": [SWEEP, *[CONNECTED] * 3]}
    # Three times the rounds of others: what is to be told apart is small, and a round is short.
    for number in range(3 * size.rounds):
        for name, commands in in_turn(sides, number):
            with server.copy(fleet) as url:
                ran = run_at_once(url, commands)
                check_marked_once(url, size.orphans)
            assert sum(one.count for one in ran) == size.orphans
            until_marked = max(one.seconds for one in ran if one.count)
            seconds.setdefault(name, []).append(until_marked)
            if name == "four":
                seconds.setdefault("ended", []).append(max(one.seconds for one in ran))

    def against_one(told: str, ours: str, goal: Goal | None, note: str) -> Result:
        took, ones = seconds[ours], seconds["one"]
        return Result(
            told,
            [many / one for one, many in zip(ones, took, strict=True)],
            goal,
            sides=[Side(ours, took, "s"), Side("one", ones, "s")],
            notes=[note],
        )

    return Measured(
        [
            against_one(
                "four sweepers at once, against one, until all orphans are marked",
                "four",
                Goal(1.1),
                "each was marked once, with one verdict, as the ledger says",
            ),
            against_one(
                "four sweepers at once, against one, until the last has ended",
                "ended",
                Goal(1.1),
                "the other three wait, and take over what was seen: each pays for its start",
            ),
            against_one(
                "one sweeper beside three processes that only connect, against one alone",
                "beside three",
                None,
                "the least that three more processes cost",
            ),
        ]
    )


def scaling(server: Server, size: Size) -> Measured:
    """Rate and peak memory of the start-up path, from few orphans to many."""
    points, peaks = list[Point](), dict[int, list[float]]()
    for orphans in sorted({*size.scaling, *size.memory}):
        fleet = Fleet(max(size.rows, orphans + 1_000), orphans)
        sweeps, bares = list[Ran](), list[Ran]()
        for number in range(min(size.rounds, 2 if orphans >= 1_000_000 else 3)):
            for _, (ran, side) in in_turn(
                {"bare": (bares, BARE), "sweep": (sweeps, SWEEP)}, number
            ):
                with server.copy(fleet) as url:
                    ran.append(run(url, *side))
        with server.copy(fleet) as url:
            loop = run(url, "benchmarks.sides", "loop", 1, min(orphans, size.loop))
        if fleet != Fleet(size.rows, size.orphans):
            server.forget(fleet)
        peaks[orphans] = [one.peak_kib / 1024 for one in sweeps]
        points.append(
            {
                "orphans": orphans,
                "start-up path": median(one.rate for one in sweeps),
                "bare statement": median(one.rate for one in bares),
                "loop": loop.rate,
                "peak MiB": median(peaks[orphans]),
            }
        )
    few, many = size.memory
    ratio = Result(
        f"peak memory of a sweep, {many:,} orphans against {few:,}",
        [max(peaks[many]) / median(peaks[few])],
        Goal(1.2),
        sides=[Side(f"{many:,}", peaks[many], "MiB"), Side(f"{few:,}", peaks[few], "MiB")],
    )
    return Measured([ratio], {"rates": points})


def in_turn(sides: dict[str, T], number: int) -> list[tuple[str, T]]:
    """The sides of a round, in another order than in the one before; each comes to every place."""
    first = number // 2 % len(sides)
    ordered = list(sides.items())
    return (ordered[first:] + ordered[:first])[:: -1 if number % 2 else 1]


def check_marked_once(url: str, orphans: int) -> None:
    """Hold the ledger and the runs against what was to be marked."""
    with psycopg.connect(url) as db:
        counts = db.execute(
            "SELECT count(*) FILTER (WHERE outcome = 'marked'),"
            " count(DISTINCT run_id) FILTER (WHERE outcome = 'marked'),"
            " (SELECT count(*) FROM worker_runs WHERE status = 'crashed')"
            " FROM orphan_recovery.verdicts"
        ).fetchone()
    assert counts == (orphans,) * 3, f"verdicts, runs, crashed: {counts}, of {orphans}"


def _beat(url: str) -> None:
    """Those that live beat now; else the sweep doubts the silence of the others, and waits."""
    with psycopg.connect(url) as db:
        db.execute(
            "UPDATE worker_runs SET heartbeat_at = now() WHERE status = 'running'"
            " AND heartbeat_at > now() - interval '1 day'"
        )


def _ratios(ours: list[Ran], theirs: list[Ran]) -> list[float]:
    return [mine.rate / other.rate for mine, other in zip(ours, theirs, strict=True)]
