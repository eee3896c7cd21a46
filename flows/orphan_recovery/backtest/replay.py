"""Replay: the statements of a backtest, two whatever the size of the table.

The hazard is a run that is counted twice, since both the table and the ledger tell of it, or by a
rule that was not its own when it was silent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
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
)
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP, array

from orphan_recovery.database import NOW, Span
from orphan_recovery.ledger import SAME_VERDICT, contests, verdicts
from orphan_recovery.rules import BY_THRESHOLD
from orphan_recovery.runs import TIMES, RunsTable
from orphan_recovery.target import MATCHED, Rule, Target
from orphan_recovery.verdict import Outcome

MOST_TASKS: Final = 5
"""Tasks that are named for each threshold, those with most runs first."""

_AWARE = TIMESTAMP(timezone=True)
_NO_SPAN: ColumnElement[timedelta] = cast(null(), Interval)


@dataclass(frozen=True, slots=True)
class Asked:
    """Which thresholds of a target, in whole minutes, over how many days."""

    target: Target
    minutes: tuple[int, ...]
    days: int


# What the table shows


def finished_runs(runs: RunsTable, asked: Asked, has_ledger: bool) -> CTE:
    """Each finished run: its longest silences, which rules they come under, or why it has none."""
    target = asked.target
    ended_at = runs.columns.completed_at
    since = runs.stored("completed_at", NOW - literal(timedelta(days=asked.days), Span))
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
        (end > NOW, "end_ahead"),
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
        _rule_of(runs, {**texts, "status": literal(held_as, Text)}).label("rule"),
        case((unread.is_(None), waited)).label("waited"),
        _rule_of(runs, {**texts, "status": literal(waited_as, Text)}).label("waited_rule"),
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


def no_finished_runs() -> CTE:
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


def runs_that_lived(runs: RunsTable, asked: Asked) -> CTE:
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
            _rule_of_verdict(runs).label("rule"),
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


def no_runs_that_lived(asked: Asked) -> CTE:
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


def verdicts_that_stand(runs: RunsTable, asked: Asked) -> Select[Any]:
    """Verdicts that stand unchallenged, and how many each threshold would have kept waiting."""
    death = and_(
        verdicts.c.outcome == Outcome.MARKED.value,
        contests.c.run_id.is_(None),
        verdicts.c.rule.like("silence >= %"),  # not by a lock that was gone, nor a worker's return
        _rule_of_verdict(runs) == BY_THRESHOLD,
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
    return verdicts.join(contests, SAME_VERDICT, isouter=True)


def _of(asked: Asked) -> list[ColumnElement[bool]]:
    since = NOW - literal(timedelta(days=asked.days), Span)
    return [verdicts.c.target == asked.target.name, verdicts.c.judged_at >= since]


# Both together


def replayed(asked: Asked, finished: CTE, lived: CTE) -> Select[Any]:
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
        literal(list(asked.minutes), ARRAY(Integer)), *(counts.c[name] for name in AT)
    ).table_valued(
        column("minutes", Integer),
        *(column(name, BigInteger) for name in AT),
        name="at",
    )
    at = spread.render_derived().lateral()
    nth = func.row_number().over(
        partition_by=(counts.c.whole, at.c.minutes),
        order_by=(at.c.crashed.desc(), counts.c.task),
    )
    ranked = (
        select(
            *(counts.c[name] for name in ("task", "whole", *COUNTED, "longest")),
            *(counts.c[name] for name in ("rule_runs", "rule_crashed", "rule_longest")),
            *at.c,
            nth.label("nth"),
        )
        .select_from(counts.join(at, literal(True)))
        .where(or_(counts.c.whole, at.c.crashed > 0))
        .subquery("ranked")
    )
    return (
        select(ranked, NOW.label("as_of"))
        .where(or_(ranked.c.whole, ranked.c.nth <= MOST_TASKS))
        .order_by(ranked.c.minutes, ranked.c.nth)
    )


AT: Final = ("crashed", "waiting", "contested", "escaped", "perhaps")
_UNREAD: Final = ("without_end", "end_ahead", "without_sign", "overwritten")
COUNTED: Final = ("finished", *_UNREAD, "beaten", "replayed", "only_in_ledger")


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


def _spans(asked: Asked) -> list[ColumnElement[timedelta]]:
    return [literal(timedelta(minutes=minutes), Span) for minutes in asked.minutes]


def _rule_of_verdict(runs: RunsTable) -> ColumnElement[int]:
    texts = {role: verdicts.c[role] for role in MATCHED if role != "status"}
    return _rule_of(runs, {**texts, "status": verdicts.c.status_seen})


def _rule_of(runs: RunsTable, texts: Mapping[str, ColumnElement[Any]]) -> ColumnElement[int]:
    """Which rule matches first, by what it may look at; ``BY_THRESHOLD`` for none.

    Not :func:`orphan_recovery.rules.number_of`, for that looks at the row as it stands, whose
    status tells only how the run ended.
    """
    whens = [
        (
            and_(
                *(runs.matches(role, pattern, texts[role]) for role, pattern in rule.match.items())
            ),
            literal(number, Integer),
        )
        for number, rule in enumerate(runs.target.rules, 1)
    ]
    none = literal(BY_THRESHOLD, Integer)
    return case(*whens, else_=none) if whens else none
