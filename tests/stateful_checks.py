"""What the truth guarantee makes of rows: the stateful test's own judgement, in plain Python.

None of it is the product's: the predicate, the verdict that is due, and what may stand in the
ledger are written here a second time, from the row that the witness saw. `Guarantee` remembers
what was there after the last step, and holds what is there now against it.
"""

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from orphan_recovery import WorkerRun
from orphan_recovery.alive import LostBy
from orphan_recovery.run import Evidence
from orphan_recovery.verdict import Outcome
from stateful_world import LEAST_WORKERS, LEDGER, RULES, SHARE, Row
from support import Database

IN_FLIGHT: Final = ("queued", "running")
KEPT: Final = (
    *("id", "status", "success", "error", "started_at", "completed_at"),
    *("worker_id", "tenant_id", "output_json"),
)
"""What a terminal row keeps for ever."""
ENDING: Final = (
    *("ended_at", "ended_as", "ended_by", "detected", "marked", "missed", "failed"),
    *("looked_twice", "hold", "error"),
)
"""What a sweep, or a hold, gets when it is closed, once."""
ENTRIES: Final = " UNION ALL ".join(
    f"SELECT '{table}' AS table, array[{', '.join(f'{name}::text' for name in key)}] AS key,"
    f" to_jsonb(t) AS entry FROM orphan_recovery.{table} AS t"
    for table, key in LEDGER.items()
)


class Violation(AssertionError):  # noqa: N818 - of the guarantee, by the code under test
    """The truth guarantee was broken."""


def must(holds: object, *what: object) -> None:
    if not holds:
        raise Violation(" ".join(map(str, what)))


def sign_of(row: Row) -> datetime:
    times: list[datetime | None] = [row["created_at"], row["started_at"], row["heartbeat_at"]]
    return max(time if time.tzinfo else time.replace(tzinfo=UTC) for time in times if time)


def evidence_of(row: Row) -> Evidence:
    return Evidence.RUN_HEARTBEAT if row["heartbeat_at"] == sign_of(row) else Evidence.AGE


def threshold_of(row: Row, otherwise: timedelta) -> timedelta | None:
    if row["task"] not in RULES:
        return otherwise
    minutes = RULES[row["task"]]
    return None if minutes is None else timedelta(minutes=minutes)


def is_orphan(row: Row, now: datetime, threshold: timedelta) -> bool:
    own = threshold_of(row, threshold)
    return row["status"] in IN_FLIGHT and own is not None and now - sign_of(row) >= own


def due(seen: WorkerRun, row: Row | None, hands: Row, *, marked_by_another: bool) -> Outcome | None:
    """The verdict on a snapshot, from the row as it stands; None: there is none to be given."""
    if row is None:
        return Outcome.VANISHED
    if row["status"] not in IN_FLIGHT:
        crashed = row["status"] == "crashed" and marked_by_another
        return Outcome.ALREADY_MARKED if crashed else Outcome.FINISHED_FIRST
    if row["worker_id"] != seen.worker_id:
        return Outcome.CHANGED_HANDS
    unchanged = row["status"] == seen.status and sign_of(row) == seen.sign_of_life
    long_enough = hands["now"] - sign_of(row) >= seen.threshold
    if not (unchanged and long_enough and is_orphan(row, hands["now"], seen.threshold)):
        return Outcome.SIGN_OF_LIFE
    if seen.evidence is not Evidence.AGE and seen.seen_at <= hands["started"]:
        return None
    return Outcome.MARKED


def lost(row: Row | None, worker: str) -> LostBy | None:
    """How a run was lost to a worker; None if it is still its own."""
    if row is None:
        return LostBy.VANISHED
    if row["status"] not in IN_FLIGHT:
        return LostBy.MARKED if row["status"] == "crashed" else LostBy.FINISHED
    return None if row["worker_id"] == worker else LostBy.CHANGED_HANDS


def looks_dead(rows: list[Row], now: datetime, threshold: timedelta) -> dict[str, bool]:
    """Of each worker, whether it holds an orphan, and nothing was heard of it by another run."""
    dead = {}
    fleet = [row for row in rows if row["status"] in IN_FLIGHT and row["worker_id"] is not None]
    for worker in {row["worker_id"] for row in fleet}:
        own = [row for row in fleet if row["worker_id"] == worker]
        orphans = [row for row in own if is_orphan(row, now, threshold)]
        allowed = [threshold_of(row, threshold) or threshold for row in orphans]
        silence = now - max(sign_of(row) for row in own)
        dead[worker] = bool(orphans) and silence >= min(allowed)
    return dead


def is_most(dead: dict[str, bool]) -> bool:
    return sum(dead.values()) > SHARE * len(dead)


def is_too_much(dead: dict[str, bool]) -> bool:
    """Whether a sweep has to stop and ask: most of a fleet of some size looks dead."""
    return len(dead) >= LEAST_WORKERS and is_most(dead)


class Guarantee:
    """What stood after the last step, and whether all that stands now is true."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.marked_as: dict[tuple[Any, str], WorkerRun] = {}
        """The snapshot by which a run was marked, by its sweep."""
        self.reported: set[str] = set()
        """Runs with a verdict whose own worker reported a result later."""
        self._terminal: dict[str, Row] = {}
        self._ledger: dict[tuple[str, ...], Row] = {}

    def check(self) -> None:
        rows = {row["id"]: row for row in self.db.do("SELECT * FROM worker_runs")}
        self._terminal_rows_stand(rows)
        new = self._the_ledger_stands()
        self._one_mark_has_one_verdict(rows, new)

    def _terminal_rows_stand(self, rows: dict[str, Row]) -> None:
        for run, kept in self._terminal.items():
            now = {name: rows[run][name] for name in KEPT} if run in rows else None
            must(now == kept, "terminal, and yet changed:", kept, "is now", now)
        ended = {run: row for run, row in rows.items() if row["status"] not in IN_FLIGHT}
        self._terminal = {run: {name: row[name] for name in KEPT} for run, row in ended.items()}

    def _the_ledger_stands(self) -> set[tuple[str, ...]]:
        """Append-only, nothing twice, and a sweep counts its own verdicts. Returns what is new."""
        written: dict[tuple[str, ...], Row] = {}
        for found in self.db.do(ENTRIES):
            key = (found["table"], *found["key"])
            must(key not in written, "twice in the ledger:", key)
            written[key] = found["entry"]
        for key, entry in self._ledger.items():
            is_open = "ended_at" in entry and entry["ended_at"] is None
            was, now = dict(entry), dict(written.get(key, {}))
            for name in ENDING if is_open else ():
                was.pop(name, None)
                now.pop(name, None)
            must(now == was, "in the ledger", entry, "is now", written.get(key))
        new = {key for key in written.keys() - self._ledger.keys() if key[0] == "verdicts"}
        for key, sweep in written.items():
            just_closed = self._ledger.get(key, {}).get("ended_at") is None
            if key[0] == "sweeps" and just_closed and sweep["marked"] is not None:
                given = Counter(
                    v["outcome"] for k, v in written.items() if k[:2] == ("verdicts", key[1])
                )
                counts = {name: given.pop(name, 0) for name in ("marked", "failed")}
                counts["missed"] = given.total()
                must({name: sweep[name] for name in counts} == counts, sweep, "counts", counts)
        self._ledger = written
        return new

    def _one_mark_has_one_verdict(self, rows: dict[str, Row], new: set[tuple[str, ...]]) -> None:
        given = "SELECT * FROM orphan_recovery.verdicts WHERE outcome = 'marked'"
        marked = self.db.do(given)
        swept = [run for run, row in rows.items() if ", sweep " in (row["error"] or "")]
        must(Counter(v["run_id"] for v in marked) == Counter(swept), swept, "have", marked)
        contested = {key[2] for key in self._ledger if key[0] == "contests"}
        must(contested == self.reported, "contested by their own:", self.reported, "not", contested)
        for verdict in marked:
            if ("verdicts", str(verdict["sweep_id"]), verdict["run_id"]) in new:
                self._is_true(verdict, rows[verdict["run_id"]])

    def _is_true(self, verdict: Row, row: Row) -> None:
        """A mark is held against the row as it was under the mark's lock."""
        marks = self.db.do(
            "SELECT at, (old).* FROM clock.witness WHERE id = %s AND (new).status = 'crashed'"
            " AND (old).status IN ('queued', 'running')",
            row["id"],
        )
        must(len(marks) == 1, "marked more than once, or never:", marks)
        before, sign = marks[0], sign_of(marks[0])
        as_seen = (verdict["status_seen"], verdict["worker_id"], verdict["sign_of_life"])
        must(as_seen == (before["status"], before["worker_id"], sign), verdict, "of", before)
        seen = self.marked_as.get((verdict["sweep_id"], verdict["run_id"]))
        if seen is not None:
            must(as_seen == (seen.status, seen.worker_id, seen.sign_of_life), verdict, "by", seen)
        must(verdict["judged_at"] == before["at"] == row["completed_at"], verdict, "at", before)
        must(verdict["silence"] == before["at"] - sign >= verdict["threshold"], verdict)
        must(is_orphan(before, before["at"], verdict["threshold"]), verdict, "of", before)
        must(verdict["evidence"] == evidence_of(before), verdict, "of", before)
        must(verdict["rule"] and verdict["reason"] and row["success"] is False, verdict)
        must(f", sweep {verdict['sweep_id']}" in row["error"], row, "by", verdict)
