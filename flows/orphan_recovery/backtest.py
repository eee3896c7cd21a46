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

All on the server, in two statements whatever the size of the table, by the database's clock and
in a transaction that cannot write.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    FromClause,
    Integer,
    Interval,
    Select,
    Text,
    and_,
    case,
    cast,
    column,
    exists,
    false,
    func,
    literal,
    null,
    or_,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP, array
from sqlalchemy.ext.asyncio import AsyncConnection

from orphan_recovery.database import Executor, Span, address, make_engine, transaction
from orphan_recovery.describe import describe_runs
from orphan_recovery.ledger import SCHEMA, contests, verdicts
from orphan_recovery.rules import BY_THRESHOLD
from orphan_recovery.runs import TIMES, RunsTable
from orphan_recovery.settings import ConfigurationError, check_threshold
from orphan_recovery.targets import MATCHED, Rule, Target
from orphan_recovery.verdict import Outcome

LADDER: Final = (1, 2, 5, 10, 15, 30, 60, 120, 240)
"""The thresholds in minutes that are replayed where none are asked for; with the target's own."""
DEFAULT_DAYS: Final = 30
MAX_DAYS: Final = 36_500
MOST_THRESHOLDS: Final = 50
MOST_TASKS: Final = 5
"""Tasks that are named for each threshold, those with most runs first."""
FEW: Final = 20
"""With fewer runs than that, nothing should be decided."""

_AWARE = TIMESTAMP(timezone=True)
_NOW = func.statement_timestamp(type_=_AWARE)
_NO_SPAN: ColumnElement[timedelta] = cast(null(), Interval)


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
    """The tasks with most of them, at most ``MOST_TASKS``."""
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


@dataclass(frozen=True, slots=True)
class _Asked:
    target: Target
    minutes: tuple[int, ...]
    days: int


async def backtest_target(
    target: Target, thresholds: Sequence[int] | None = None, days: int = DEFAULT_DAYS
) -> Backtest:
    """Replay thresholds over what is known to have lived. Opens its own connection; reads only.

    Args:
        target: which table.
        thresholds: in whole minutes; None for ``LADDER``. The target's own is always added, as
            what the others are compared with.
        days: only runs that ended, and verdicts that were given, in so many days before now.

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
    asked = _Asked(target, tuple(sorted({*minutes, target.threshold_minutes})), days)
    connection = db if isinstance(db, AsyncConnection) else await db.connection()
    runs = await connection.run_sync(describe_runs, target)
    has_ledger = (await db.execute(select(func.to_regclass(f"{SCHEMA}.contests")))).scalar_one()
    lived = _lived(asked) if has_ledger else _nothing_lived(asked)
    has_ends = runs.has("completed_at")
    finished = _finished(runs, asked, has_ledger is not None) if has_ends else _nothing_finished()
    rows = (await db.execute(_replayed(asked, finished, lived))).mappings().all()
    deaths, later = 0, [0] * len(asked.minutes)
    if has_ledger:
        row = (await db.execute(_deaths(asked))).mappings().one()
        deaths, later = row["deaths"], row["later"]
    whole = next(row for row in rows if row["whole"])
    counts = {row["minutes"]: row for row in rows if row["whole"]}
    return Backtest(
        target=target,
        days=days,
        as_of=whole["as_of"].astimezone(UTC),
        has_ends=has_ends,
        has_ledger=has_ledger is not None,
        heartbeats=runs.has("heartbeat_at"),
        **{name: whole[name] for name in _COUNTED},
        longest=whole["longest"],
        deaths=deaths,
        at=tuple(
            AtThreshold(
                minutes=minutes,
                **{name: counts[minutes][name] for name in _AT},
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


# What the table shows


def _finished(runs: RunsTable, asked: _Asked, has_ledger: bool) -> CTE:
    """Each finished run: its longest silences, which rules they come under, or why it has none."""
    target = asked.target
    ended_at = runs.columns.completed_at
    since = runs.stored("completed_at", _NOW - literal(timedelta(days=asked.days), Span))
    row = (
        select(
            runs.run_id.label("run_id"),
            *(runs.text(role).label(role) for role in MATCHED if role != "status"),
            *(runs.utc(role).label(role) for role in (*TIMES, "completed_at")),
        )
        .where(_lived_to_its_end(runs, has_ledger))
        .where(or_(ended_at.is_(None), ended_at >= since))  # an index may serve it
        .subquery("row")
    ).c
    end, beat = row.completed_at, row.heartbeat_at
    sign = func.greatest(*(row[role] for role in TIMES), type_=_AWARE)
    unread = case(
        (end.is_(None), "without_end"),
        (end > _NOW, "end_ahead"),
        (sign.is_(None), "without_sign"),
        (or_(sign > end, beat == end), "overwritten"),
    )
    waited = _NO_SPAN
    if _waits_in_flight(target) and runs.has("created_at") and runs.has("started_at"):
        waited = case(
            (row.started_at.between(row.created_at, end), row.started_at - row.created_at)
        )
    held_as, waited_as = _statuses(target)
    texts = {role: row[role] for role in MATCHED if role != "status"}
    return select(
        row.run_id,
        row.task,
        unread.label("unread"),
        case((unread.is_(None), end - sign)).label("silence"),
        _rule_of(target, {**texts, "status": literal(held_as, Text)}).label("rule"),
        case((unread.is_(None), waited)).label("waited"),
        _rule_of(target, {**texts, "status": literal(waited_as, Text)}).label("waited_rule"),
        and_(unread.is_(None), beat == sign).label("beaten"),
    ).cte("finished")


def _lived_to_its_end(runs: RunsTable, has_ledger: bool) -> ColumnElement[bool]:
    """Terminal, and not by a crash: its worker brought it to its end."""
    target, status = runs.target, runs.columns.status
    own = target.crash_is_its_own_status
    kind = runs.facts["status"].type
    ended: ColumnElement[bool]
    if target.ends is not None:
        ends = [s for s in target.ends if s != target.crashed or not own]
        ended = status.in_([literal(s, kind) for s in ends])
    else:
        others = (*target.in_flight, *target.waiting, *([target.crashed] if own else []))
        ended = status.not_in([literal(s, kind) for s in others])
    if own or not has_ledger:
        return ended
    marked = exists().where(  # one failure of many: only the ledger tells a crash apart
        verdicts.c.target == target.name,
        verdicts.c.run_id == runs.run_id,
        verdicts.c.outcome == Outcome.MARKED.value,
    )
    return and_(ended, or_(~runs.is_crashed, ~marked))


def _waits_in_flight(target: Target) -> bool:
    """Whether a run that nobody has started yet is in flight."""
    return len(target.in_flight) > 1 and not target.waiting


def _statuses(target: Target) -> tuple[str, str]:
    """What a run is called while it is held, and while it waits: by name, else last and first."""
    held = "running" if "running" in target.in_flight else target.in_flight[-1]
    waits = "queued" if "queued" in target.in_flight else target.in_flight[0]
    return held, waits


def _nothing_finished() -> CTE:
    return (
        select(
            *(cast(null(), Text).label(name) for name in ("run_id", "task", "unread")),
            *(_NO_SPAN.label(name) for name in ("silence", "waited")),
            *(cast(null(), Integer).label(name) for name in ("rule", "waited_rule")),
            false().label("beaten"),
        )
        .where(false())
        .cte("finished")
    )


# What the ledger knows


def _lived(asked: _Asked) -> CTE:
    """Each run that the ledger knows to have lived, with the longest silence at which it did."""
    target = asked.target
    contested = and_(verdicts.c.outcome == Outcome.MARKED.value, contests.c.run_id.is_not(None))
    escaped = or_(
        verdicts.c.outcome == Outcome.SIGN_OF_LIFE.value,
        and_(
            verdicts.c.outcome == Outcome.FINISHED_FIRST.value,
            # Somebody ended it as crashed by hand: that proves no life.
            verdicts.c.found.op("->>", return_type=Text())("status").is_distinct_from(
                target.crashed
            ),
        ),
    )
    one = (
        select(
            verdicts.c.run_id,
            verdicts.c.task,
            verdicts.c.silence,
            contested.label("contested"),
            (contests.c.reported_at - verdicts.c.sign_of_life).label("until_report"),
            _rule_of_verdict(target).label("rule"),
        )
        .select_from(_judged())
        .where(*_of(asked), or_(contested, escaped))
        .subquery("one")
    )
    by_threshold = one.c.rule == BY_THRESHOLD
    longest = func.max(one.c.silence)
    return (
        select(
            one.c.run_id,
            func.max(one.c.task).label("task"),
            longest.filter(by_threshold).label("silence"),
            longest.filter(by_threshold, one.c.contested).label("contested"),
            longest.filter(by_threshold, ~one.c.contested).label("escaped"),
            func.max(one.c.until_report).filter(by_threshold).label("until_report"),
            *(
                longest.filter(one.c.rule == number).label(f"rule_{number}")
                for number, _ in enumerate(target.rules, 1)
            ),
        )
        .group_by(one.c.run_id)
        .cte("lived")
    )


def _nothing_lived(asked: _Asked) -> CTE:
    spans = ["silence", "contested", "escaped", "until_report"]
    spans += [f"rule_{number}" for number, _ in enumerate(asked.target.rules, 1)]
    return (
        select(
            *(cast(null(), Text).label(name) for name in ("run_id", "task")),
            *(_NO_SPAN.label(name) for name in spans),
        )
        .where(false())
        .cte("lived")
    )


def _deaths(asked: _Asked) -> Select[Any]:
    """Verdicts that stand unchallenged, and how many each threshold would have kept waiting."""
    death = and_(
        verdicts.c.outcome == Outcome.MARKED.value,
        contests.c.run_id.is_(None),
        verdicts.c.rule.like("silence >= %"),  # not by a lock that was gone, nor a worker's return
        _rule_of_verdict(asked.target) == BY_THRESHOLD,
    )
    silence = verdicts.c.silence
    return (
        select(
            func.count().label("deaths"),
            array([func.count().filter(silence < t) for t in _spans(asked)]).label("later"),
        )
        .select_from(_judged())
        .where(*_of(asked), death)
    )


def _judged() -> FromClause:
    contest = and_(
        contests.c.sweep_id == verdicts.c.sweep_id, contests.c.run_id == verdicts.c.run_id
    )
    return verdicts.join(contests, contest, isouter=True)


def _of(asked: _Asked) -> list[ColumnElement[bool]]:
    since = _NOW - literal(timedelta(days=asked.days), Span)
    return [verdicts.c.target == asked.target.name, verdicts.c.judged_at >= since]


# Both together


def _replayed(asked: _Asked, finished: CTE, lived: CTE) -> Select[Any]:
    """One row for each threshold with all counts, and one for each of its tasks with most runs.

    Served by one pass over the runs of the time asked for: counted by task and in all at once,
    then spread out by threshold; so what it keeps, and what it sends, does not grow with them.
    """
    by_threshold = case((finished.c.rule == BY_THRESHOLD, finished.c.silence))
    waited = case((finished.c.waited_rule == BY_THRESHOLD, finished.c.waited))
    held = func.greatest(by_threshold, lived.c.silence, type_=Interval())
    rules = [
        func.greatest(
            case((finished.c.rule == number, finished.c.silence)),
            case((finished.c.waited_rule == number, finished.c.waited)),
            lived.c[f"rule_{number}"],
            type_=Interval(),
        ).label(f"rule_{number}")
        for number, _ in enumerate(asked.target.rules, 1)
    ]
    run = (
        select(
            func.coalesce(finished.c.task, lived.c.task).label("task"),
            finished.c.run_id.label("finished"),
            finished.c.unread,
            finished.c.beaten,
            held.label("held"),
            func.greatest(held, waited, type_=Interval()).label("silence"),
            *(lived.c[name] for name in ("contested", "escaped", "until_report")),
            *rules,
        )
        # A run that both tell of counts once.
        .select_from(finished.join(lived, finished.c.run_id == lived.c.run_id, full=True))
        .subquery("run")
    ).c
    spans = _spans(asked)

    def at_each(*conditions: Any) -> ColumnElement[Any]:
        counts = [func.count().filter(*(of(t) for of in conditions)) for t in spans]
        return array(counts)

    counts = (
        select(
            run.task,
            (func.grouping(run.task, type_=Integer) == 1).label("whole"),
            at_each(lambda t: run.silence >= t).label("crashed"),
            at_each(
                lambda t: run.silence >= t, lambda t: or_(run.held.is_(None), run.held < t)
            ).label("waiting"),
            at_each(lambda t: run.contested >= t).label("contested"),
            at_each(lambda t: run.escaped >= t).label("escaped"),
            at_each(lambda t: run.silence < t, lambda t: run.until_report >= t).label("perhaps"),
            func.count(run.finished).label("finished"),
            *(func.count().filter(run.unread == reason).label(reason) for reason in _UNREAD),
            func.count().filter(run.beaten).label("beaten"),
            func.count(run.silence).label("replayed"),
            func.count().filter(run.finished.is_(None)).label("only_in_ledger"),
            func.max(run.silence).label("longest"),
            *_by_rule(asked.target, run),
        )
        .group_by(func.rollup(run.task))
        .subquery("counts")
    )
    spread = func.unnest(
        literal(list(asked.minutes), ARRAY(Integer)), *(counts.c[name] for name in _AT)
    ).table_valued(
        column("minutes", Integer),
        *(column(name, BigInteger) for name in _AT),
        name="at",
    )
    at = spread.render_derived().lateral()
    nth = func.row_number().over(
        partition_by=(counts.c.whole, at.c.minutes),
        order_by=(at.c.crashed.desc(), counts.c.task),
    )
    ranked = (
        select(
            *(counts.c[name] for name in ("task", "whole", *_COUNTED, "longest")),
            *(counts.c[name] for name in ("rule_runs", "rule_crashed", "rule_longest")),
            *at.c,
            nth.label("nth"),
        )
        .select_from(counts.join(at, literal(True)))
        .where(or_(counts.c.whole, at.c.crashed > 0))
        .subquery("ranked")
    )
    return (
        select(ranked, _NOW.label("as_of"))
        .where(or_(ranked.c.whole, ranked.c.nth <= MOST_TASKS))
        .order_by(ranked.c.minutes, ranked.c.nth)
    )


_AT: Final = ("crashed", "waiting", "contested", "escaped", "perhaps")
_UNREAD: Final = ("without_end", "end_ahead", "without_sign", "overwritten")
_COUNTED: Final = ("finished", *_UNREAD, "beaten", "replayed", "only_in_ledger")


def _by_rule(target: Target, run: Any) -> list[ColumnElement[Any]]:
    """For each rule: its runs, those that its own threshold would have crashed, the longest."""
    found = [(run[f"rule_{number}"], rule) for number, rule in enumerate(target.rules, 1)]
    crashed = [
        func.count().filter(false() if rule.never else silence >= _minutes(rule))
        for silence, rule in found
    ]
    return [
        _array([func.count(silence) for silence, _ in found], BigInteger()).label("rule_runs"),
        _array(crashed, BigInteger()).label("rule_crashed"),
        _array([func.max(silence) for silence, _ in found], Interval()).label("rule_longest"),
    ]


def _array(values: list[Any], kind: Any) -> ColumnElement[Any]:
    return cast(array(values), ARRAY(kind)) if values else cast(literal("{}"), ARRAY(kind))


def _minutes(rule: Rule) -> ColumnElement[timedelta]:
    return literal(timedelta(minutes=rule.threshold_minutes or 0), Span)


def _spans(asked: _Asked) -> list[ColumnElement[timedelta]]:
    return [literal(timedelta(minutes=minutes), Span) for minutes in asked.minutes]


def _rule_of_verdict(target: Target) -> ColumnElement[int]:
    texts = {role: verdicts.c[role] for role in MATCHED if role != "status"}
    return _rule_of(target, {**texts, "status": verdicts.c.status_seen})


def _rule_of(target: Target, texts: Mapping[str, ColumnElement[Any]]) -> ColumnElement[int]:
    """Which rule matches first, by what it may look at; ``BY_THRESHOLD`` for none.

    Not :func:`orphan_recovery.rules.number_of`, for that looks at the row as it stands, whose
    status tells only how the run ended.
    """
    whens = [
        (
            and_(*(_fits(texts[role], pattern) for role, pattern in rule.match.items())),
            literal(number, Integer),
        )
        for number, rule in enumerate(target.rules, 1)
    ]
    none = literal(BY_THRESHOLD, Integer)
    return case(*whens, else_=none) if whens else none


def _fits(value: ColumnElement[Any], pattern: str) -> ColumnElement[bool]:
    """As :meth:`RunsTable.matches`: ``*`` is any text, ``?`` any one character."""
    like = pattern
    for special in "\\%_":
        like = like.replace(special, f"\\{special}")
    return value.like(like.replace("*", "%").replace("?", "_"), escape="\\")
