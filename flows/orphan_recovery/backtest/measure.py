"""Backtest: what other thresholds would have done, replayed over runs that are known to have lived.

The hazard is a number that sounds surer than it is: a threshold that looks safe because what it
would have killed left no trace, and is then set. What is read here are traces:

- of a finished run, the time from the last sign of life that its row still shows to its end.
  Where runs beat that is a LOWER bound: each beat wiped out the one before it, and any longer
  silence between them is gone. A run whose last beat is its end, or that has a sign of life after
  it, shows nothing and is left out, as are runs without an end or without any sign of life; all
  are counted.
- what workers, or events, leave in tables elsewhere tells of now and not of then, and is ignored,
  and so is a lock. Where there is any that makes it an UPPER bound instead: more looks silent than
  was.
- the time from its creation to its start, where a run that waits is in flight (several statuses
  in flight, and none called waiting): a backlog is silent too. Of a run that was started more
  than once it covers all but the last start.
- in the ledger, the silence of verdicts that turned out to be wrong (contested) or would have
  been (it gave a sign of life, or finished, between detect and mark): the run lived at that
  silence, for certain. How long a contested run was silent in all nobody knows, for a marked run
  cannot beat; up to its report, perhaps, and that is told apart.

A threshold *would have crashed* a run if such a silence is no shorter than it: a sweep that came
at the worst moment would have. A run under a rule has the rule's threshold, whatever is asked
for, and is told apart; under ``never`` it has none. A rule for a status is held against the
status that the run had while it waited, or at last while it was held, as far as the target's
description tells. The other way round, a run that died and that something else than a sweep
brought to an end passes here for one that lived; and an outage of the database, during which
nobody could beat, passes for silence.

All on the server, by the database's clock and in a transaction that cannot write; the statements
are in :mod:`orphan_recovery.backtest.replay`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from orphan_recovery.backtest.replay import (
    AT,
    COUNTED,
    Asked,
    finished_runs,
    no_finished_runs,
    no_runs_that_lived,
    replayed,
    runs_that_lived,
    verdicts_that_stand,
)
from orphan_recovery.database import Executor, address, make_engine, transaction
from orphan_recovery.describe import describe_runs
from orphan_recovery.ledger import SCHEMA
from orphan_recovery.settings import ConfigurationError, check_threshold
from orphan_recovery.target import Target

LADDER: Final = (1, 2, 5, 10, 15, 30, 60, 120, 240)
"""The thresholds in minutes that are replayed where none are asked for; with the target's own."""
DEFAULT_DAYS: Final = 30
MAX_DAYS: Final = 36_500
MOST_THRESHOLDS: Final = 50
FEW: Final = 20
"""With fewer runs than that, nothing should be decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCount:
    task: str | None
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AtThreshold:
    """What one threshold would have done. Counts are of runs, none twice, unless they say so."""

    minutes: int
    crashed: int
    """Runs that lived, and that it would have crashed."""
    tasks: tuple[TaskCount, ...]
    """The tasks with most of them, at most ``MOST_TASKS`` of ``replay.py``."""
    waiting: int
    """Those of them that would have been crashed only while they waited to be started."""
    contested: int
    """Those of them that the ledger has as contested verdicts."""
    escaped: int
    """Those of them that a sweep detected, and that gave a sign of life or finished in time."""
    perhaps: int
    """Further contested runs, whose silence may have been that long before they reported."""
    deaths_later: int
    """Uncontested verdicts that would have waited longer than they did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnderRule:
    """The runs of one rule, by the rule's own threshold."""

    number: int
    name: str
    minutes: int | None
    """None: never an orphan."""
    runs: int
    crashed: int
    longest: timedelta | None
    """The longest silence of any of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backtest:
    """What was replayed, and what came of it."""

    target: Target
    days: int
    as_of: datetime
    """The database's time of the look."""
    has_ends: bool
    """Whether the table says when a run ended; else only the ledger was read."""
    has_ledger: bool
    is_ledger_hidden: bool
    """Whether there is one that this role may not read."""
    heartbeats: bool
    """Whether the table has a column for them."""
    finished: int
    """Finished runs in the table; of them, those that show no silence are the next four."""
    without_end: int
    """Terminal, whenever that was, without a time of its end."""
    end_ahead: int
    """With an end in the database's future."""
    without_sign: int
    """Without any sign of life."""
    overwritten: int
    """With a last beat at its end, or a sign of life after it: what was before is wiped out."""
    beaten: int
    """Of the rest, those whose last sign of life is a beat: their silence is a lower bound."""
    replayed: int
    """Runs that are known to have lived and are under no rule, those from the ledger among them."""
    only_in_ledger: int
    """Those of all runs known to have lived that are not among the finished."""
    longest: timedelta | None
    """The longest silence of any that was replayed."""
    deaths: int
    """Uncontested verdicts by the threshold, on runs that are under no rule."""
    at: tuple[AtThreshold, ...]
    """By threshold, shortest first; the target's own is among them."""
    rules: tuple[UnderRule, ...]

    @property
    def present(self) -> AtThreshold:
        """The target's own threshold."""
        return next(at for at in self.at if at.minutes == self.target.threshold_minutes)

    @property
    def least_safe(self) -> AtThreshold | None:
        """The least threshold from which on none would have been crashed, not even perhaps."""
        if not self.replayed:
            return None
        return next((at for at in self.at if not at.crashed and not at.perhaps), None)

    def later(self, at: AtThreshold) -> int:
        """How many minutes later recovery comes than now; fewer than 0 for sooner."""
        return at.minutes - self.target.threshold_minutes


_MAY_READ: Final = """
SELECT bool_and(has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT'))
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = :schema AND c.relname IN ('verdicts', 'contests')
"""


async def backtest_target(
    target: Target, thresholds: Sequence[int] | None = None, days: int = DEFAULT_DAYS
) -> Backtest:
    """Replay thresholds over what is known to have lived. Opens its own connection; reads only.

    Args:
        target: which table.
        thresholds: in whole minutes; None for ``LADDER``. The target's own is always added, as
            what the others are compared with.
        days: only runs that ended, and verdicts that were given, in so many days before now.

    Returns:
        What each threshold would have done, shortest first, and each rule; with counts of 0 where
        there is nothing to replay.

    Raises:
        ConfigurationError: the address, the table, a threshold or the days cannot be used.
        sqlalchemy.exc.DBAPIError: as the database raised it.
    """
    check_asked(thresholds, days)
    engine = make_engine(address(target))
    try:
        async with transaction(engine) as connection:
            await connection.execute(text("SET TRANSACTION READ ONLY"))
            # It may go through years of history, and somebody waits for it.
            await connection.execute(text("SET LOCAL max_parallel_workers_per_gather TO DEFAULT"))
            return await backtest(connection, target, thresholds, days)
    finally:
        await engine.dispose()


async def backtest(
    db: Executor,
    target: Target,
    thresholds: Sequence[int] | None = None,
    days: int = DEFAULT_DAYS,
) -> Backtest:
    """The same on a connection or session of the caller's."""
    minutes = check_asked(thresholds, days)
    asked = Asked(target, tuple(sorted({*minutes, target.threshold_minutes})), days)
    connection = db if isinstance(db, AsyncConnection) else await db.connection()
    runs = await connection.run_sync(describe_runs, target)
    # None where there is no ledger; False where this role may not read it.
    has_ledger = (await db.execute(text(_MAY_READ), {"schema": SCHEMA})).scalar_one()
    lived = runs_that_lived(runs, asked) if has_ledger else no_runs_that_lived(asked)
    has_ends = runs.has("completed_at")
    finished = finished_runs(runs, asked, bool(has_ledger)) if has_ends else no_finished_runs()
    rows = (await db.execute(replayed(asked, finished, lived))).mappings().all()
    deaths, later = 0, [0] * len(asked.minutes)
    if has_ledger:
        row = (await db.execute(verdicts_that_stand(runs, asked))).mappings().one()
        deaths, later = row["deaths"], row["later"]
    whole = next(row for row in rows if row["whole"])
    counts = {row["minutes"]: row for row in rows if row["whole"]}
    return Backtest(
        target=target,
        days=days,
        as_of=whole["as_of"].astimezone(UTC),
        has_ends=has_ends,
        has_ledger=bool(has_ledger),
        is_ledger_hidden=has_ledger is False,
        heartbeats=runs.has("heartbeat_at"),
        **{name: whole[name] for name in COUNTED},
        longest=whole["longest"],
        deaths=deaths,
        at=tuple(
            AtThreshold(
                minutes=minutes,
                **{name: counts[minutes][name] for name in AT},
                tasks=tuple(
                    TaskCount(task=row["task"], runs=row["crashed"])
                    for row in rows
                    if not row["whole"] and row["minutes"] == minutes
                ),
                deaths_later=deaths_later,
            )
            for minutes, deaths_later in zip(asked.minutes, later, strict=True)
        ),
        rules=tuple(
            UnderRule(
                number=number,
                name=rule.name,
                minutes=rule.threshold_minutes,
                runs=whole["rule_runs"][number - 1],
                crashed=whole["rule_crashed"][number - 1],
                longest=whole["rule_longest"][number - 1],
            )
            for number, rule in enumerate(target.rules, 1)
        ),
    )


def check_asked(thresholds: Sequence[int] | None, days: int) -> Sequence[int]:
    """The thresholds to replay, or a refusal by name."""
    for minutes in thresholds or ():
        check_threshold(minutes)
    if thresholds is not None and len(set(thresholds)) > MOST_THRESHOLDS:
        raise ConfigurationError(
            f"{len(set(thresholds))} thresholds were given: give at most {MOST_THRESHOLDS}"
        )
    if isinstance(days, bool) or not isinstance(days, int) or not 1 <= days <= MAX_DAYS:
        raise ConfigurationError(
            f"days is {days!r}: give a whole number of days from 1 to {MAX_DAYS}"
        )
    return thresholds or LADDER
