"""The guards of the truth guarantee, each taken out of the product: the machine has to notice.

A mutation takes the product's own guard out: a clause of a statement, a constraint or a trigger
of the database, a doubt of the sweep. Where another guard stands behind it, the comment says
which, and what is left to be noticed; where that would be nothing, both are taken out together.
"""

import dataclasses
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, LiteralString

import pytest
from psycopg import sql
from sqlalchemy import Select, Table, Update, cast, false, literal, select, true
from sqlalchemy.dialects.postgresql import TIMESTAMP, Insert, insert

from orphan_recovery import condemn, detect, hold, ledger, mark, miss, record, runs, sweep, turn
from orphan_recovery.alive import beat, write
from orphan_recovery.detect import Silence
from stateful_world import LEDGER, LONG_BEFORE
from support import Database
from tables_support import do

Mutation = Callable[[pytest.MonkeyPatch, Database], None]


def _all(*mutations: Mutation) -> Mutation:
    def mutate(patch: pytest.MonkeyPatch, db: Database) -> None:
        for mutation in mutations:
            mutation(patch, db)

    return mutate


def _to(module: Any, name: str, other: Any) -> Mutation:
    return lambda patch, _: patch.setattr(module, name, other)


def _instead(module: Any, name: str, other: Callable[..., Any]) -> Mutation:
    """``other`` in its place, which is given the original first."""
    return _to(module, name, partial(other, getattr(module, name)))


def _without(module: Any, *names: str) -> Mutation:
    """So much less of ``module.guards``."""

    def guards(whole: Any, *asked: Any) -> dict[str, Any]:
        return {name: clause for name, clause in whole(*asked).items() if name not in names}

    return _instead(module, "guards", guards)


class _Unlocked(Select[Any]):
    inherit_cache = False

    def with_for_update(self, **_: Any) -> "_Unlocked":
        return self


class _FirstClause(Update):
    """An update by its first `where` only, which names the row."""

    inherit_cache = False

    def where(self, *clauses: Any) -> "_FirstClause":
        return self if self._where_criteria else super().where(clauses[0])


class _Inserted(Insert):
    inherit_cache = False

    def on_conflict_do_nothing(self, *_: Any, **__: Any) -> "_Inserted":
        return self


def _conflicting(table: Table) -> Mutation:
    """What is in ``table`` already is inserted all the same."""
    return _to(record, "insert", lambda into: (_Inserted if into is table else insert)(into))


def _seeing(**clauses: Any) -> Mutation:
    """Detection reads the table as ever, but for these."""

    async def runs_table(whole: Any, *asked: Any) -> Any:
        table = dataclasses.replace(await whole(*asked))
        for name, clause in clauses.items():
            table.__dict__[name] = clause
        return table

    return _instead(detect, "runs_table", runs_table)


def _claiming_without(number: int) -> Mutation:
    def claiming(whole: Any, *asked: Any) -> Update:
        statement: Update = whole(*asked)
        clauses = list(statement._where_criteria)
        del clauses[number]
        statement._where_criteria = tuple(clauses)
        return statement

    return _instead(write, "_claiming", claiming)


def _never_tried(name: str) -> Mutation:
    """Each try of a worker's write takes itself for the first."""
    return _instead(write, name, lambda whole, *asked: lambda db, _: whole(*asked)(db, True))


def _doubting(other: Callable[..., Any]) -> Mutation:
    """``sweep.doubts``, of other circumstances."""
    return _instead(sweep, "doubts", lambda whole, now, *rest: whole(other(now), *rest))


def _dropping(trigger: LiteralString, table: str, event: str | None = None) -> Mutation:
    """Without that trigger; or, of one for several events, for all events but that."""

    def dropped(_: pytest.MonkeyPatch, db: Database) -> None:
        how = "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgname = %s AND tgrelid = %s"
        whole = db.one(how + "::regclass", trigger, table)
        name = sql.Identifier(*table.split("."))
        do(db, sql.SQL("DROP TRIGGER {} ON {}").format(sql.Identifier(trigger), name))
        rest = re.sub(rf" OR {event}|{event} OR ", "", whole, count=1)
        if rest != whole:
            do(db, sql.SQL(rest))

    return dropped


def _without_key(table: str) -> Mutation:
    drop = sql.SQL("ALTER TABLE orphan_recovery.{} DROP CONSTRAINT {} CASCADE").format(
        sql.Identifier(table), sql.Identifier(f"{table}_pkey")
    )

    def dropped(_: pytest.MonkeyPatch, db: Database) -> None:
        do(db, drop)

    return dropped


def _naive(whole: Any, stored: Any, facts: Any) -> Any:
    """A naive time as Postgres takes it: in the session's TimeZone."""
    return whole(
        cast(stored, TIMESTAMP(timezone=True)), dataclasses.replace(facts, kind="timestamptz")
    )


async def _uncontested(*_: Any) -> bool:
    return False


async def _unsettled(_: Any, __: Any, failed: Any) -> Any:
    return list(failed)


def _anybodys(whole: Any, *asked: Any, worker_id: str | None, **told: Any) -> Any:
    return whole(*asked, worker_id=None, **told)


def _approved_once(of: Any = ledger.holds) -> Any:
    return (
        select(ledger.approvals.c.hold_id)
        .where(ledger.approvals.c.hold_id == of.c.hold_id)
        .exists()
    )


TRUTH: Final = "prevent_worker_run_mutation"

MARK: dict[str, Mutation] = {
    f"a mark without: {guard}": _without(mark, guard)
    for guard in (
        *("same worker", "same sign of life", "silent", "silent by its rule", "same server"),
        # Two more stand behind this one: "same status", as detection sees only runs in flight,
        # and the truth trigger. What is left is an error where a verdict is due, and for it a
        # snapshot that is not as detection took it; see also IN_DATABASE.
        "in flight",
        # The ledger's key stands behind it. What is left is a retry that can never succeed.
        "no verdict yet",
    )
} | {
    # The update names the status once more, for partitioned tables: each covers the other.
    "a mark without: same status": _all(
        _without(mark, "same status"), _to(condemn, "update", _FirstClause)
    ),
    "a mark without a lock": _to(mark, "select", _Unlocked),
    "a mark that forgets its own verdict": _instead(
        miss, "_outcome_of_miss", lambda whole, row: whole({**row, "own_outcome": None})
    ),
    "a mark by a client's clock": _to(mark, "NOW", literal(datetime.now(UTC))),
    "a naive time that is not read as UTC": _instead(runs, "as_utc", _naive),
}

WORKER: dict[str, Mutation] = {
    "a beat without: in flight": _without(beat, "in flight"),
    "a beat without: own": _without(beat, "own"),
    # The truth trigger stands behind it. What is left is an error where a loss is due.
    "a result without: in flight": _without(write, "in flight"),
    "a result without: own": _without(write, "own"),
    "a result that forgets its own try": _never_tried("_finish"),
    "a result without a contest": _to(write, "_contest", _uncontested),
    "a contest by anybody": _instead(write, "record_contest", _anybodys),
    "a claim without: free status": _claiming_without(1),
    "a claim without: nobody's": _claiming_without(2),
    "a claim that forgets its own try": _never_tried("_claim"),
}

SWEEP: dict[str, Mutation] = {
    "detection without: in flight": _seeing(in_flight=true()),
    "detection without: silence": _seeing(silent_since=lambda *_: true()),
    "a failure that nobody hears of": _to(sweep, "settle", _unsettled),
    "no doubt after a restart": _doubting(
        lambda now: dataclasses.replace(now, server_started_at=LONG_BEFORE)
    ),
    "no doubt after no sweep for long": _doubting(
        lambda now: dataclasses.replace(now, last_sweep_at=None)
    ),
    # Of the doubt "most workers look dead" there is none: the hold stands behind it.
    "a sweep without a hold": _to(Silence, "is_too_much", lambda *_, **__: False),
    "a hold that lets through what it names": _to(hold, "_blocked", lambda *_: false()),
    "an approval for ever": _to(hold, "_released", _approved_once),
    "another's look taken over, whenever that was": _to(
        turn, "_since", lambda _: timedelta(days=1)
    ),
    "a hold that sees no recovery": _to(hold, "_close_all", _uncontested),
    "a mark of what fell silent after the last look": _all(
        _to(hold, "seen_silent", lambda *_: lambda _: true()),
        _to(sweep, "_none", lambda _: true()),
    ),
}

RECORD: dict[str, Mutation] = {
    # The keys stand behind these three. What is left is a retry that can never succeed.
    "misses recorded twice": _conflicting(ledger.verdicts),
    "sweeps recorded twice": _conflicting(ledger.sweeps),
    "contests recorded twice": _conflicting(ledger.contests),
}

IN_CODE: Final = {**MARK, **WORKER, **SWEEP, **RECORD}
IN_DATABASE: Final[dict[str, Mutation]] = {
    "terminal rows are marked": _all(
        _without(mark, "in flight", "same status"),
        _to(condemn, "update", _FirstClause),
        _dropping(TRUTH, "worker_runs", "UPDATE"),
    ),
    **{
        f"{table} without their key": _without_key(table)
        for table in ("verdicts", "contests", "sweeps")
    },
    "terminal rows change": _dropping(TRUTH, "worker_runs", "UPDATE"),
    "terminal rows are deleted": _dropping(TRUTH, "worker_runs", "DELETE"),
    **{
        f"{table} are {how}": _dropping("append_only", f"orphan_recovery.{table}", event)
        for table in ("verdicts", "contests", "hold_runs", "approvals")
        for how, event in (("edited", "UPDATE"), ("deleted", "DELETE"))
    },
    **{
        f"{table} are truncated": _dropping("no_truncate", f"orphan_recovery.{table}")
        for table in ("verdicts", "contests", "hold_runs", "approvals")
    },
    "sweeps are edited": _dropping("one_close", "orphan_recovery.sweeps"),
    "holds are edited": _dropping("one_close", "orphan_recovery.holds"),
    "sweeps are deleted": _dropping("append_only", "orphan_recovery.sweeps"),
    # What refers to a hold keeps it from being deleted, and its trigger refuses to be truncated
    # along with it; the same is true of a sweep.
    "holds are deleted": _all(
        *(
            _dropping("append_only", f"orphan_recovery.{t}", "DELETE")
            for t in ("hold_runs", "approvals")
        ),
        _dropping("append_only", "orphan_recovery.holds"),
    ),
    "holds are truncated": _all(
        *(
            _dropping("no_truncate", f"orphan_recovery.{t}")
            for t in ("hold_runs", "approvals", "holds")
        )
    ),
    "sweeps are truncated": _all(
        *(_dropping("no_truncate", f"orphan_recovery.{table}") for table in LEDGER)
    ),
}
