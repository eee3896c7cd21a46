"""What workers and sweeps do in the stateful test, each call held at once against what was due.

A deed runs the product's own statements in an actor's transaction, which may stay open from one
step to the next; the `worker's own way` to claim and to report, and a whole sweep, run in
transactions of their own. Then the deed asks the witness what the row was when it was written to
(`stateful_world`), and judges what the product said and did by that (`stateful_checks`).
"""

import asyncio
import pickle
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, ClassVar, Final, LiteralString
from uuid import uuid4

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from orphan_recovery import WorkerRun, database, detect_orphaned_runs, mark_run_as_crashed, recover
from orphan_recovery.alive import RunLost, write
from orphan_recovery.alive.beat import beat
from orphan_recovery.describe import runs_table
from orphan_recovery.mark import UndecidedError
from orphan_recovery.policy import is_transient, sqlstate
from orphan_recovery.report import SweepReport
from orphan_recovery.request import SweepRequest
from orphan_recovery.run import Evidence
from orphan_recovery.verdict import Outcome
from stateful_checks import (
    IN_FLIGHT,
    Guarantee,
    Violation,
    due,
    evidence_of,
    is_orphan,
    lost,
    must,
    sign_of,
    threshold_of,
)
from stateful_world import LONG, SHORT, Actor, Row, World

TIMED_OUT: Final = "55P03"
REFUSED: Final = "P0001"

MOVES: Final[dict[str, LiteralString]] = {
    "completes": "UPDATE worker_runs SET status = 'completed', success = true WHERE id = :id",
    "crashes by hand": "UPDATE worker_runs SET status = 'crashed', error = 'own' WHERE id = :id",
    "beats": "UPDATE worker_runs SET heartbeat_at = statement_timestamp() WHERE id = :id",
    "beats, if long ago": "UPDATE worker_runs SET heartbeat_at = statement_timestamp()"
    " - interval '39 minutes 7 seconds' WHERE id = :id",
    "is put back": "UPDATE worker_runs SET status = 'queued' WHERE id = :id",
    "is given up": "UPDATE worker_runs SET status = 'queued', worker_id = NULL WHERE id = :id",
    "changes hands": "UPDATE worker_runs SET worker_id = 'bob' WHERE id = :id",
    "is back in its hands": "UPDATE worker_runs SET worker_id = 'ann', status = 'running'"
    " WHERE id = :id",
    "turns quick": "UPDATE worker_runs SET task = 'quick' WHERE id = :id",
    "turns slow": "UPDATE worker_runs SET task = 'slow' WHERE id = :id",
    "turns nightly": "UPDATE worker_runs SET task = 'nightly' WHERE id = :id",
    "vanishes": "DELETE FROM worker_runs WHERE id = :id",
}
"""What is done to a run without asking, by a worker that ignores the fence, or by a person."""
REPORTS = ("reports", "reports again", "reports failure", "claims again")
"""By the worker's own way, in transactions of its own."""
WAITING: Final = (
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
)
NEWBORN: Final = (
    "INSERT INTO worker_runs (id, status, worker_id, task, created_at, heartbeat_at) SELECT %s, %s,"
    " %s, %s, (now - %s) AT TIME ZONE 'UTC', CASE WHEN %s THEN now - %s END FROM clock.hands"
)
RETRY: Final = (
    "INSERT INTO worker_runs (id, parent_run_id, is_retry, attempt, task, created_at)"
    " SELECT :id, id, true, attempt + 1, task, clock.statement_timestamp() AT TIME ZONE 'UTC'"
    " FROM worker_runs WHERE id = :parent AND status IN ('failed', 'crashed')"
    " ON CONFLICT DO NOTHING"
)
WITNESSED: Final = (
    "SELECT 0 AS of, r.* FROM worker_runs AS r WHERE id = :id UNION ALL (SELECT 1, (old).*"
    " FROM clock.witness WHERE id = :id AND n > :n ORDER BY n DESC LIMIT 1)"
)
HELD: Final = (
    "SELECT run_id FROM orphan_recovery.hold_runs JOIN orphan_recovery.holds USING (hold_id)"
    " WHERE ended_at IS NULL"
)
GIVEN: Final = (
    "SELECT *, xmin = pg_current_xact_id()::xid AS mine FROM orphan_recovery.verdicts"
    " WHERE run_id = :run"
)

Kind = tuple[str, str | None, str, bool]
"""Of a run: status, worker and task, and whether it has beaten."""
Act = Callable[[AsyncSession], Awaitable[None]]


class Found(BaseException):
    """There is a violation, and that is all that was asked: Hypothesis does not look again."""


class Deeds:
    """All that can be done in the world of one example."""

    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        self.world.begin_anew()
        self.db = self.world.db
        self.actors = {name: Actor(self.world.engine) for name in ("ann", "bob", "one", "two")}
        self.patience = SHORT
        self.born = 0
        self.seen: list[WorkerRun] = []
        """The snapshots of the latest sweep that found any, the newest run first."""
        self.guarantee = Guarantee(self.db)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            self.world.runner.run(work)
        except Violation as violation:
            self.world.violation = violation
            if self.world.stops_at_once:
                raise Found from violation
            raise

    def rows(self) -> dict[str, Row]:
        return {row["id"]: row for row in self.db.do("SELECT * FROM worker_runs")}

    def newborn(self, kind: Kind, age: int = 40, run: str | None = None) -> str:
        """A further run, which was created so many minutes ago."""
        self.born += 1
        run, (status, worker, task, beaten) = run or f"new-{self.born}", kind
        span = timedelta(minutes=age)
        self.db.do(NEWBORN, run, status, worker, task, span, beaten, span)
        return run

    # What the row was at the moment of a write.

    def writes(self) -> int:
        """How many writes the witness has seen, those of open transactions among them."""
        count = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM clock.witness_n_seq"
        return int(self.db.one(count))

    async def witnessed(
        self, db: AsyncSession | None, run: str, since: int
    ) -> tuple[Row | None, Row | None]:
        """The run's row as ``db`` sees it, and as it was before the latest write since then."""
        async with AsyncSession(self.world.engine) as own:
            asked = await (db or own).execute(text(WITNESSED), {"id": run, "n": since})
            found = {row["of"]: dict(row) for row in asked.mappings()}
        return found.get(0), found.get(1)

    # How it is done.

    async def act(self, name: str, deed: Act, *, stay: bool) -> None:
        """Do it in the actor's transaction. A lock time-out is legal, and rolls that back.

        What is transient is tried once more, as the retry policy would; then it has to be well.
        """
        actor = self.actors[name]
        for is_last in (False, True):
            try:
                await deed(await actor.begin(self.patience))
            except DBAPIError as error:
                await actor.end(commit=False)
                if sqlstate(error) == TIMED_OUT:
                    return
                if is_last or not is_transient(error):
                    raise Violation(f"{name} got an error: {database.describe(error)}") from error
            else:
                break
        if not stay:
            await actor.end(commit=True)

    async def end_all(self, *, commit: bool, but: str | None = None) -> None:
        for name, actor in self.actors.items():
            if name != but:
                await actor.end(commit=commit)

    async def do(self, deed: str, name: str, run: str, *, stay: bool) -> None:
        """A worker's deed, or what is done to its run without asking."""
        if deed in MOVES:
            await self.act(name, lambda db: self._move(db, run, deed), stay=stay)
        elif deed == "claims again":
            await self.actors[name].end(commit=True)
            await self.take(name, run, first=True)
            await self.take(name, run, first=False)
        elif deed in REPORTS:
            await self.actors[name].end(commit=True)
            status = "failed" if deed == "reports failure" else "completed"
            await self.report(name, run, status, first=True)
            if deed == "reports again":  # it has not heard of the first time
                await self.report(name, run, status, first=False)
        else:
            how = {"claim": self._claim, "beat": self._beat, "finish": self._finish}[deed]
            await self.act(name, lambda db: how(db, name, run), stay=stay)

    async def _move(self, db: AsyncSession, run: str, move: str) -> None:
        row, _ = await self.witnessed(db, run, 0)
        try:
            await db.execute(text(MOVES[move]), {"id": run})
        except DBAPIError as error:
            if sqlstate(error) != REFUSED:
                raise
            await db.rollback()
            if row and row["status"] in IN_FLIGHT:  # it has waited since
                row, _ = await self.witnessed(db, run, 0)
            must(row and row["status"] not in IN_FLIGHT, "refused to change", row)

    async def _retry(self, db: AsyncSession) -> None:
        await db.execute(text(RETRY), {"id": "c", "parent": "a"})

    # A worker.

    async def _claim(self, db: AsyncSession, worker: str, run: str) -> None:
        table, before = await runs_table(db, self.world.target), self.writes()
        won = (await db.execute(write._claiming(table, run, worker, "running"))).first()
        row, old = await self.witnessed(db, run, before)
        must((won is None) == (old is None), "a claim says", won, "and wrote over", old)
        free = old or row
        is_free = free and free["status"] == "queued" and free["worker_id"] in (None, worker)
        must((won is not None) == bool(is_free), worker, "claims", free, "and wins:", won)

    async def take(self, worker: str, run: str, *, first: bool) -> None:
        """The worker's own way to claim, in a transaction of its own."""
        before, [row] = self.writes(), [self.rows().get(run)]
        self.world.wait_for_locks(self.patience)
        try:
            won = await write._claim(self.world.target, run, worker, None)(self.world.engine, first)
        except DBAPIError as error:
            must(sqlstate(error) == TIMED_OUT, worker, "claims:", database.describe(error))
            return
        now, old = await self.witnessed(None, run, before)
        mine = now and (now["status"], now["worker_id"]) == ("running", worker)
        is_due = old is not None or (not first and bool(mine))
        must(won == is_due, worker, "is told", won, "of", row, "now", now)

    async def _beat(self, db: AsyncSession, worker: str, run: str) -> None:
        table, before = await runs_table(db, self.world.target), self.writes()
        mine = (run, worker)
        beaten = await beat(await db.connection(), table, [mine])
        row, old = await self.witnessed(db, run, before)
        must((mine in beaten.thresholds) == (old is not None), "a beat says", beaten, "wrote", old)
        if old is not None:
            must(lost(old, worker) is None, worker, "revives", old)
        else:
            told = beaten.lost[mine].by if mine in beaten.lost else None
            must(told is lost(row, worker), worker, "is told", told, "of", row)
            held = any(a.session not in (None, db) for a in self.actors.values())
            must(told or held, "nobody holds the row, and yet it did not beat:", row)

    async def _finish(self, db: AsyncSession, worker: str, run: str) -> None:
        table, before = await runs_table(db, self.world.target), self.writes()
        result = write.Result("completed", {"by": worker}, None)
        won = (await db.execute(write._finishing(table, run, worker, result))).first()
        row, old = await self.witnessed(db, run, before)
        must((won is None) == (old is None), "a result says", won, "and wrote over", old)
        must((won is None) == (lost(old or row, worker) is not None), worker, "wrote over", old)

    async def report(self, worker: str, run: str, status: str, *, first: bool) -> None:
        """The worker's own way to report a result, in transactions of its own."""
        before = self.writes()
        result = write.Result(status, {"by": worker}, None)
        told: RunLost | None = None
        self.world.wait_for_locks(self.patience)
        try:
            await write._finish(self.world.target, run, worker, result)(self.world.engine, first)
        except RunLost as error:
            told = error
        except DBAPIError as error:
            must(sqlstate(error) == TIMED_OUT, worker, "reports:", database.describe(error))
            return
        row, old = await self.witnessed(None, run, before)
        heard = not first and row and (row["status"], row["worker_id"]) == (status, worker)
        if told is None:
            must(heard or (old and lost(old, worker) is None), worker, "wrote over", old, row)
            must(row and row["status"] == status, "the result is not in", row)
            must(heard or (row and row["output_json"] == {"by": worker}), "no result in", row)
            return
        must(old is None, "lost, and yet wrote over", old)
        must(told.by is lost(row, worker), worker, "is told", told.by, "of", row)
        must(not heard, "an earlier try was heard, and yet", worker, "is told", told)
        verdict = self.db.do(
            "SELECT worker_id FROM orphan_recovery.verdicts WHERE run_id = %s"
            " AND outcome = 'marked'",
            run,
        )
        its_own = bool(verdict) and verdict[0]["worker_id"] == worker
        must(told.contested == its_own, worker, "contests:", told.contested, verdict)
        if its_own:
            self.guarantee.reported.add(run)

    # A sweep, verb by verb.

    async def detect(self, name: str, threshold: int) -> None:
        async def deed(db: AsyncSession) -> None:
            found = await detect_orphaned_runs(db, threshold)
            now, asked = self.world.hands["now"], timedelta(minutes=threshold)
            rows = (await db.execute(text("SELECT * FROM worker_runs"))).mappings()
            orphans = {row["id"]: dict(row) for row in rows if is_orphan(dict(row), now, asked)}
            must({r.id for r in found} == set(orphans), "detected", found, "of", orphans)
            for run in found:
                row = orphans[run.id]
                says = (run.status, run.worker_id, run.sign_of_life, run.threshold)
                is_so = (row["status"], row["worker_id"], sign_of(row), threshold_of(row, asked))
                must(says == is_so and run.seen_at == now, run, "of", row)
            self.seen = found[::-1] or self.seen

        await self.act(name, deed, stay=True)

    def forged(self, seen: WorkerRun, how: str) -> WorkerRun:
        """Another snapshot than detection took: the mark's contract accepts any."""
        row = self.rows().get(seen.id)
        if how == "lax":
            return replace(seen, threshold=timedelta(minutes=1))
        if how == "strict":
            return replace(seen, threshold=timedelta(hours=4))
        if how == "other sweep":
            return replace(seen, sweep_id=uuid4())
        if row is None or not how:
            return seen
        seen = replace(seen, status=row["status"], worker_id=row["worker_id"])
        if how == "sign":
            return replace(seen, sign_of_life=sign_of(row), evidence=evidence_of(row))
        return seen

    async def mark(self, name: str, seen: WorkerRun, *, stay: bool) -> None:
        await self.act(name, lambda db: self._mark(db, seen), stay=stay)

    async def _mark(self, db: AsyncSession, seen: WorkerRun) -> None:
        async def given() -> tuple[Row | None, bool]:
            """The sweep's own verdict on this run, and whether another sweep has marked it."""
            found = (await db.execute(text(GIVEN), {"run": seen.id})).mappings().all()
            own = [dict(v) for v in found if v["sweep_id"] == seen.sweep_id]
            others = [v for v in found if v["sweep_id"] != seen.sweep_id]
            return (own[0] if own else None), any(v["outcome"] == "marked" for v in others)

        (earlier, _), before = await given(), self.writes()
        marked: bool | None = None
        with suppress(UndecidedError):
            marked = await mark_run_as_crashed(db, pickle.loads(pickle.dumps(seen)))  # noqa: S301
        row, old = await self.witnessed(db, seen.id, before)
        verdict, another = await given()
        stood = row if old is None else old
        expected: Outcome | None
        if earlier is not None:
            expected = Outcome(earlier["outcome"])
        elif verdict is not None and not verdict["mine"]:  # given while this try waited
            expected = Outcome(verdict["outcome"])
        else:
            expected = due(seen, stood, self.world.hands, marked_by_another=another)
        told = verdict and verdict["outcome"]
        must(told == expected, "outcome", told, "is due to be", expected, "for", seen, "of", stood)
        must((marked or False) == (expected is Outcome.MARKED), "marked:", marked, expected)
        must((marked is None) == (expected is None), "undecided:", marked, expected)
        is_new = earlier is None and verdict is not None and verdict["mine"]
        wrote = is_new and expected is Outcome.MARKED
        must((old is not None) == wrote, "the mark of", expected, "wrote over", old)
        if wrote:
            self.guarantee.marked_as[seen.sweep_id, seen.id] = seen
        elif is_new and verdict is not None and stood is not None:
            says = {name: verdict["found"][name] for name in ("status", "worker_id")}
            must(says == {name: stood[name] for name in says}, "found", says, "in", stood)

    async def behind(self, holder: str, second: Awaitable[None], *, commit: bool) -> None:
        """``second`` waits for a row until its holder commits, or rolls back."""
        await self.end_all(commit=commit, but=holder)
        self.patience = LONG
        waiting = asyncio.ensure_future(second)
        try:
            while not waiting.done() and not self.db.one(WAITING):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            await self.actors[holder].end(commit=commit)
            await waiting
        finally:
            self.patience = SHORT

    # A whole sweep.

    async def sweep(self, again: SweepRequest | None = None) -> SweepReport:
        """One as it is run at a worker's start-up, or tried ``again``. Nothing else happens."""
        asked = again or self.request()
        report = await self.swept(asked)
        must(report.error is None, "a sweep ended with", report.error)
        given = "SELECT * FROM orphan_recovery.verdicts WHERE sweep_id = %s"
        verdicts = self.db.do(given, asked.sweep_id)
        counts = Counter(Outcome(verdict["outcome"]) for verdict in verdicts)
        must(counts == report.counts if again is None else counts >= report.counts, report, counts)
        if any(actor.session for actor in self.actors.values()):
            return report
        must(set(report.counts) <= {Outcome.MARKED}, "nobody did anything, and yet:", verdicts)
        hands, span = self.world.hands, asked.threshold
        left = [row for row in self.rows().values() if is_orphan(row, hands["now"], span)]
        if report.postponed:  # the clock is behind the server's own start
            must(hands["now"] < hands["started"], "postponed:", report.postponed)
            left = [row for row in left if evidence_of(row) is Evidence.AGE]
        if report.held:
            held = {row["run_id"] for row in self.db.do(HELD)}
            left = [row for row in left if row["id"] not in held]
        must(not left, "left by a whole sweep:", left)
        return report

    def request(self) -> SweepRequest:
        return SweepRequest(asked_by="test", target=self.world.target, threshold_minutes=30)

    async def swept(self, asked: SweepRequest | None = None) -> SweepReport:
        self.world.wait_for_locks(SHORT)
        asked = asked or self.request()
        report = SweepReport(asked)
        await recover._sweep(self.world.engine, asked, report)
        return report
