"""The machine of test_stateful: workers, sweeps, a clock and a server, in any order, on Postgres.

Each rule is something that happens. The small ones do one thing, and may leave its transaction
open; the others begin where trouble is likely: between detect and mark, behind somebody's lock,
within a whole sweep, after a restart, while a fleet falls silent. Every product call says what it
did, and is held at once against what it had to do (`stateful_checks`), by the row as the witness
saw it (`stateful_world`). After each rule the truth guarantee is checked as a whole:

1. no orphan is silently lost: `sweep`, and the last sweep of all in `teardown`;
2. no live run is marked: `_mark`, and `Guarantee`, against the row under the mark's lock;
3. a terminal row never changes: `Guarantee`; so every move is also made against terminal rows;
4. every verdict carries its evidence, the ledger is append-only: `Guarantee`, and `tamper`;
5. time is the database's: all figures are foretold by the hands of its clock, in 2130;
6. recovery is idempotent: tries are repeated, killed, made twice at once, and left unacknowledged;
7. the sweep doubts itself: `the_server_comes_back_up` and `a_fleet_falls_silent`.
"""

import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Final, LiteralString

import psycopg
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orphan_recovery import database
from orphan_recovery.approve import approve
from orphan_recovery.report import SweepReport
from stateful_checks import IN_FLIGHT, is_most, is_too_much, looks_dead, must, sign_of
from stateful_deeds import MOVES, REPORTS, Deeds, Kind
from stateful_world import LONG, SHORT, Killed, Row

TAMPERS: Final[tuple[LiteralString, ...]] = (
    "UPDATE orphan_recovery.verdicts SET silence = silence + interval '1 second'",
    "UPDATE orphan_recovery.contests SET worker_id = 'nobody'",
    "UPDATE orphan_recovery.hold_runs SET run_id = run_id || ' '",
    "UPDATE orphan_recovery.approvals SET expires_at = 'infinity'",
    "UPDATE orphan_recovery.holds SET evidence = '{}'",
    "UPDATE orphan_recovery.sweeps SET marked = 99 WHERE ended_at IS NOT NULL",
    "DELETE FROM orphan_recovery.verdicts",
    "DELETE FROM orphan_recovery.contests",
    "DELETE FROM orphan_recovery.hold_runs",
    "DELETE FROM orphan_recovery.approvals",
    "DELETE FROM orphan_recovery.holds",
    "DELETE FROM orphan_recovery.sweeps AS s WHERE NOT EXISTS"
    " (SELECT FROM orphan_recovery.verdicts AS v WHERE v.sweep_id = s.sweep_id) AND NOT EXISTS"
    " (SELECT FROM orphan_recovery.holds AS h WHERE s.sweep_id IN (h.sweep_id, h.ended_by))",
    "TRUNCATE orphan_recovery.verdicts",
    "TRUNCATE orphan_recovery.contests",
    "TRUNCATE orphan_recovery.hold_runs",
    "TRUNCATE orphan_recovery.approvals",
    "TRUNCATE orphan_recovery.holds CASCADE",
    "TRUNCATE orphan_recovery.sweeps CASCADE",
)

Scene = tuple[Kind, str, list[str], str, list[str]]

FORGERIES = (*[""] * 4, "row", "sign", "lax", "strict", "strict", "other sweep")
OFTEN = ("changes hands", "beats, if long ago", "beats, if long ago", "turns slow", "claim")
DEEDS = (*MOVES, *OFTEN, *("claim", "beat", "finish") * 2, *REPORTS)
LATE = (
    *("reports", *["reports again"] * 4, "reports failure", "finish", "beat", "claim"),
    *("completes", "beats", "vanishes", "is back in its hands", "is back in its hands"),
)
EVENTS = ("passes", "passes", "steps back", "restarts", "is swept")
WORK = ("beat", "claim", "finish")


def _some(deeds: st.SearchStrategy[str], size: int) -> st.SearchStrategy[list[str]]:
    return st.lists(deeds, min_size=size, max_size=size)


which_run = st.sampled_from("aaaabbc")
who = st.sampled_from(("ann", "bob"))
sweeper = st.sampled_from(("one", "two"))
minutes = st.sampled_from((0, 5, 29, 30, 31, 45, 121))
kinds = st.tuples(
    st.sampled_from(("running", "running", "queued")),
    st.sampled_from(("ann", "ann", "ann", "bob", None)),
    st.sampled_from(("report", "report", "quick")),
    st.booleans(),
)
"""Of runs: status, worker and task, and whether it has beaten."""
before = st.sampled_from((0, 0, 1, 1, 1, 2)).flatmap(partial(_some, st.sampled_from(DEEDS)))
after = st.sampled_from((0, 1, 1, 2)).flatmap(partial(_some, st.sampled_from(LATE)))
forgeries = st.sampled_from(FORGERIES)
scenes = st.lists(st.tuples(kinds, who, before, forgeries, after), min_size=1, max_size=4)
"""Of a run: who has to do with it, what is done before the mark, the forgery, and what after."""
waits = st.one_of(
    st.tuples(st.sampled_from((*WORK * 2, *MOVES)), st.just("mark")),
    st.tuples(st.just("mark"), st.sampled_from((*WORK, "reports", *MOVES, "mark", "mark", "mark"))),
    st.tuples(st.sampled_from((*WORK, *MOVES)), st.sampled_from((*WORK, "reports", *MOVES))),
    st.tuples(st.sampled_from((*WORK, "mark", *MOVES)), st.just("sweep")),
)
"""Who holds a row, and who comes second; a sweep does not wait until that ends."""


class Machine(Deeds, RuleBasedStateMachine):
    """Whatever happens in whatever order, the truth guarantee holds after each step."""

    # What may happen.

    @initialize(a=kinds, b=kinds, age=st.sampled_from((0, 31, 45)))
    def the_beginning(self, a: Kind, b: Kind, age: int) -> None:
        self.newborn(a, age, "a")
        self.newborn(b, age, "b")
        self.run(self.detect("one", 30))

    @rule(deed=st.sampled_from(DEEDS), name=who, run=which_run, stay=st.booleans())
    def somebody_acts(self, deed: str, name: str, run: str, *, stay: bool) -> None:
        self.run(self.do(deed, name, run, stay=stay))

    @rule(name=sweeper, threshold=st.sampled_from((30, 30, 5, 120)))
    def a_sweep_detects(self, name: str, threshold: int) -> None:
        self.run(self.detect(name, threshold))

    @precondition(lambda self: self.seen)
    @rule(name=sweeper, number=st.integers(0, 2), forgery=forgeries, stay=st.booleans())
    def a_sweep_marks(self, name: str, number: int, forgery: str, *, stay: bool) -> None:
        seen = self.forged(self.seen[number % len(self.seen)], forgery)
        self.run(self.mark(name, seen, stay=stay))

    @rule(name=st.sampled_from(("ann", "bob", "one", "two")), commit=st.sampled_from((True, False)))
    def a_transaction_ends(self, name: str, *, commit: bool) -> None:
        self.run(self.actors[name].end(commit=commit))

    @rule(event=st.sampled_from((*EVENTS, "is retried")), by=minutes)
    def time_passes(self, event: str, by: int) -> None:
        self.run(self.happen(event, by))

    async def happen(self, event: str, by: int = 45) -> None:
        if event == "passes":
            self.world.pass_time(timedelta(minutes=by))
        elif event == "steps back":
            self.world.pass_time(-timedelta(minutes=by))
        elif event == "is swept":
            await self.sweep()
        elif event == "is retried":
            await self.act("bob", self._retry, stay=False)
        elif event == "restarts":
            await self.end_all(commit=False)
            self.world.restart()

    # What is likely to be trouble.

    @rule(
        scenes=scenes,
        event=st.sampled_from(("", "", "", *EVENTS)),
        again=st.sampled_from(("", "beat", "is back in its hands", "is back in its hands")),
    )
    def something_happens_between_detect_and_mark(
        self, scenes: list[Scene], event: str, again: str
    ) -> None:
        async def work() -> None:
            runs = [self.newborn(kind) for kind, *_ in scenes]
            await self.detect("one", 30)
            found = {seen.id: seen for seen in self.seen}
            for run, (_, name, before, _, _) in zip(runs, scenes, strict=True):
                for deed in before:
                    await self.do(deed, name, run, stay=False)
            await self.happen(event)
            for run, (_, name, _, forgery, after) in zip(runs, scenes, strict=True):
                await self.mark("one", self.forged(found[run], forgery), stay=False)
                for deed in after:
                    await self.do(deed, name, run, stay=False)
                if again:  # the sweep has not heard of its first try
                    await self.do(again, name, run, stay=False)
                    await self.mark("two", found[run], stay=False)

        self.run(work())

    @rule(kind=kinds, wait=waits, commit=st.sampled_from((True, True, False)))
    def one_waits_for_another(self, kind: Kind, wait: tuple[str, str], *, commit: bool) -> None:
        async def work() -> None:
            first, second = wait
            run = self.newborn(kind)
            await self.detect("one", 30)
            [seen] = [seen for seen in self.seen if seen.id == run]
            holder, other = ("one", "ann") if first == "mark" else ("ann", "bob")
            if first == "mark":
                await self.mark(holder, seen, stay=True)
            else:
                await self.do(first, holder, run, stay=True)
            if second == "sweep":
                await self.end_all(commit=commit, but=holder)
                await self.sweep()
                return
            if second == "mark":
                waiting = self.mark("two", seen, stay=False)
            else:
                waiting = self.do(second, other, run, stay=False)
            await self.behind(holder, waiting, commit=commit)

        self.run(work())

    @rule(
        runs=st.lists(kinds, min_size=1, max_size=3),
        what=st.sampled_from(("is killed", "is killed", "passes", "restarts", *MOVES)),
        at=st.integers(1, 30),
        same=st.booleans(),
    )
    def something_happens_within_a_sweep(
        self, runs: list[Kind], what: str, at: int, *, same: bool
    ) -> None:
        """Before any of its statements; then it is tried again, or another sweep comes."""

        def happens() -> None:
            if what == "is killed":
                raise Killed
            if what == "passes":
                self.world.pass_time(timedelta(minutes=45))
            elif what == "restarts":
                self.world.restart()
            else:
                self.db.do(f"SET lock_timeout = {SHORT}")
                with suppress(psycopg.errors.LockNotAvailable, psycopg.errors.RaiseException):
                    self.db.do(MOVES[what].replace(":id", "%s"), run)
                self.db.do(f"SET lock_timeout = {LONG}")

        async def work() -> None:
            await self.end_all(commit=True)
            asked = self.request()
            is_killed = False
            try:
                with self.world.interrupted(at, happens):
                    await self.swept(asked)
            except Killed:
                is_killed = True
            # Nobody tries again a sweep that has ended.
            await self.sweep(again=asked if same and is_killed else None)

        run, *_ = [self.newborn(kind) for kind in runs]
        self.run(work())

    @rule(
        cause=st.sampled_from(("a restart", "no sweep for long")),
        runs=st.lists(st.tuples(which_run, st.booleans()), min_size=1, max_size=3),
    )
    def the_server_comes_back_up(self, cause: str, runs: list[tuple[str, bool]]) -> None:
        """Nobody could beat, or be seen to: who lives is given the time before silence counts."""

        async def work() -> None:
            if cause == "a restart":
                await self.happen("restarts")
            else:
                await self.end_all(commit=True)
                await self.sweep()
                self.world.pass_time(timedelta(minutes=45))
            last = self.db.one(
                "SELECT max(opened_at) FROM orphan_recovery.sweeps WHERE timeline IS NOT NULL"
            )
            lately = last is not None and self.world.hands["now"] - last <= timedelta(minutes=30)
            for _, lives in runs:
                run = self.newborn(("running", "ann", "report", True))
                if lives and not (cause == "no sweep for long" and lately):  # the clock was ahead
                    self.world.living[run] = "ann"
            await self.sweep()
            rows, living = self.rows(), list(self.world.living)
            self.world.living.clear()
            for run in living:
                must(rows[run]["status"] in IN_FLIGHT, "marked before it could beat:", rows[run])

        self.run(work())

    @rule(
        silent=st.integers(2, 6),
        at=st.one_of(st.just(0), st.integers(3, 12)),
        then=st.sampled_from(("is approved", "was approved for too short", "stands", "is back")),
    )
    def a_fleet_falls_silent(self, silent: int, at: int, then: str) -> None:
        """Too much of it: the sweep stops and asks. It is silent before, or from ``at`` on."""

        async def work() -> None:
            await self.end_all(commit=True)
            fleet = {}
            for n in range(6):
                age = 1 if n >= silent else 20 if at else 40
                fleet[self.newborn(("running", f"w{n}", "report", True), age)] = f"w{n}"
            dead = list(fleet)[:silent]
            if at:
                while_it_looks = partial(self.world.pass_time, timedelta(minutes=15))
                with self.world.interrupted(at, while_it_looks):
                    await self.sweep_of(dead, otherwise=self.swept)
            report = await self.sweep_of(dead, otherwise=self.sweep)
            # An earlier hold may stand that is about others.
            if report.held is not None and self.named_in_holds() >= set(dead):
                hold = str(report.held.hold_id)
                if then in ("is approved", "was approved for too short"):
                    async with database.transaction(self.world.engine) as db:
                        await approve(db, hold, by="a person")
                if then == "was approved for too short":
                    self.world.pass_time(timedelta(minutes=61))
                if then == "is back":
                    self.world.living = fleet
                report = await self.sweep()
                self.world.living = {}
                marked = [run for run in dead if self.rows()[run]["status"] == "crashed"]
                must(then != "is approved" or marked == dead, "released, and yet left:", marked)
                must(then == "is approved" or not marked, "held, and yet marked:", marked)
                holds = [] if report.held is None else [report.held.hold_id, *report.held.others]
                is_held = hold in map(str, holds)
                must(is_held == (then in ("stands", "was approved for too short")), then, report)
            self.db.do("DELETE FROM worker_runs WHERE worker_id LIKE 'w%%' AND status = 'running'")
            dead_still = self.look_dead()
            report = await self.sweep()
            must(
                report.postponed or not self.standing() or is_most(dead_still),
                *("the fleet has recovered, and yet held:", self.standing()),
            )

        self.run(work())

    def look_dead(self) -> dict[str, bool]:
        now = self.world.hands["now"]
        return looks_dead(list(self.rows().values()), now, timedelta(minutes=30))

    def standing(self) -> list[Row]:
        return self.db.do("SELECT * FROM orphan_recovery.holds WHERE ended_at IS NULL")

    def named_in_holds(self) -> set[str]:
        return {
            row["run_id"]
            for row in self.db.do(
                "SELECT run_id FROM orphan_recovery.hold_runs JOIN orphan_recovery.holds"
                " USING (hold_id) WHERE ended_at IS NULL"
            )
        }

    async def sweep_of(
        self, fleet: list[str], *, otherwise: Callable[[], Awaitable[SweepReport]]
    ) -> SweepReport:
        """A sweep that marks none of a fleet if too much of it looks dead."""
        was, held_before = list(self.rows().values()), self.standing()
        named = self.named_in_holds()
        report = await otherwise()
        now, threshold = self.world.hands["now"], timedelta(minutes=30)
        # Beside a hold it is what is left that counts.
        left = looks_dead([row for row in was if row["id"] not in named], now, threshold)
        too_much = is_too_much(looks_dead(was, now, threshold)) and is_most(left)
        marked = [row for row in self.rows().values() if row["id"] in fleet]
        marked = [row for row in marked if row["status"] == "crashed"]
        must(not (too_much and marked), "marked most of a fleet, and asked nobody:", marked)
        if otherwise == self.sweep and not report.postponed:
            must(report.held is not None or not too_much, "not held, of", was)
            must(report.held is None or too_much or held_before, "held:", report.held, "of", was)
        return report

    # More likely than the rest, for what they find.
    another_restart = the_server_comes_back_up
    something_else_happens = something_happens_between_detect_and_mark
    something_more_happens = something_happens_between_detect_and_mark
    another_waits = one_waits_for_another

    def a_story_with_everything(self) -> None:
        """No search: a mark, a contest, a hold, an approval; for guards that need no luck."""
        silent: Kind = ("running", "ann", "report", True)
        try:
            self.the_beginning(silent, silent, 45)
            scene: Scene = (silent, "ann", [], "", ["reports again", "vanishes"])
            self.something_happens_between_detect_and_mark([scene], "", "is back in its hands")
            self.the_truth_guarantee()
            self.a_fleet_falls_silent(6, 0, "is approved")
            self.the_truth_guarantee()
        finally:
            self.teardown()

    # What holds.

    @invariant()
    def the_truth_guarantee(self) -> None:
        async def held() -> None:
            self.guarantee.check()

        self.run(held())

    def tamper(self) -> None:
        for statement in TAMPERS:
            with suppress(psycopg.errors.RaiseException, psycopg.errors.ForeignKeyViolation):
                self.db.do(statement)

    def teardown(self) -> None:
        """All end, time passes, a sweep finds whatever is dead, and somebody tampers with it."""

        async def work() -> None:
            is_broken = sys.exception() is not None
            await self.end_all(commit=not is_broken)
            if is_broken:
                return
            hands = self.world.hands
            latest = max([*hands.values(), *map(sign_of, self.rows().values())])
            self.world.pass_time(latest - hands["now"] + timedelta(days=1))
            await self.sweep()
            if held := self.standing():  # nobody was heard of: then a person decides
                async with database.transaction(self.world.engine) as db:
                    for hold in held:
                        await approve(db, str(hold["hold_id"]), by="a person")
                await self.sweep()
            left = [row for row in self.rows().values() if row["status"] in IN_FLIGHT]
            left = [row for row in left if row["task"] != "nightly"]
            must(not left, "never recovered:", left)
            self.guarantee.check()
            self.tamper()
            self.guarantee.check()

        self.run(work())
