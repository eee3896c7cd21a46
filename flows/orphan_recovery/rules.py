"""Rules: which threshold holds for which run. The first rule that matches wins.

The hazard is long-running work that one threshold for all takes for dead. A rule gives its runs
another, or none: ``never``. What a rule exempts is counted by every sweep, because an orphan among
them is nobody's to find.
"""

from datetime import timedelta

from sqlalchemy import ColumnElement, Integer, Interval, and_, case, cast, literal, null

from orphan_recovery.database import Span
from orphan_recovery.request import DEFAULT_REASON, SweepRequest
from orphan_recovery.run import Evidence
from orphan_recovery.runs import RunsTable
from orphan_recovery.target import Target

BY_THRESHOLD = 0
"""The number of no rule: the sweep's own threshold."""


def threshold_of(
    runs: RunsTable, request: SweepRequest, otherwise: ColumnElement[timedelta] | None = None
) -> ColumnElement[timedelta]:
    """Each run's threshold by the rules; NULL for a run that is never an orphan.

    Args:
        runs: the table.
        request: the sweep, whose threshold a run has that no rule matches.
        otherwise: that of each run by itself, instead.
    """
    own: ColumnElement[timedelta] = (
        literal(request.threshold, Span) if otherwise is None else otherwise
    )
    if request.returned is not None:
        return own
    if request.target.lock is None:
        return _by_rules(runs, own)
    by_time = literal(timedelta(minutes=request.minutes), Span) if otherwise is None else otherwise
    return case(
        (runs.is_held, _by_rules(runs, own, only_never=True)), else_=_by_rules(runs, by_time)
    )


def _by_rules(
    runs: RunsTable, own: ColumnElement[timedelta], *, only_never: bool = False
) -> ColumnElement[timedelta]:
    whens = [
        (
            _matches(runs, number),
            cast(null(), Interval)
            if rule.never
            else literal(timedelta(minutes=rule.threshold_minutes or 0), Span),
        )
        for number, rule in enumerate(runs.target.rules, 1)
        if rule.never or not only_never
    ]
    return case(*whens, else_=own) if whens else own


def number_of(runs: RunsTable, request: SweepRequest) -> ColumnElement[int]:
    """Which rule matched each run: 1 for the first; ``BY_THRESHOLD`` for none."""
    whens = [
        (_matches(runs, number), literal(number, Integer))
        for number, _ in enumerate(runs.target.rules, 1)
    ]
    none = literal(BY_THRESHOLD, Integer)
    if not whens or request.returned is not None:
        return none
    if request.target.lock is not None:
        whens.insert(0, (runs.is_held, none))
    return case(*whens, else_=none)


def shortest(request: SweepRequest) -> timedelta:
    """The shortest threshold that any run may have."""
    if request.returned is not None:
        return request.threshold
    rules = [rule.threshold_minutes for rule in request.target.rules if rule.threshold_minutes]
    every = (request.minutes, *rules)
    return min([request.threshold, *(timedelta(minutes=minutes) for minutes in every)])


def in_words(request: SweepRequest, number: int, evidence: Evidence) -> str:
    """What condemned a run, for the ledger."""
    if request.returned is not None:
        return "its worker is back, and has not been heard of it since"
    if evidence is Evidence.LOCK:
        return f"nobody holds the lock of its {request.target.lock}"
    if number == BY_THRESHOLD:
        return "silence >= threshold"
    return f"silence >= threshold of rule {number} ({request.target.rules[number - 1].name})"


def reason_of(target: Target, number: int) -> str | None:
    """What the rule has the error text begin with: a dead queue is not a dead run."""
    if number == BY_THRESHOLD:
        return None
    rule = target.rules[number - 1]
    if rule.reason is None and "status" in rule.match:
        return f"{DEFAULT_REASON}, while {rule.match['status']}"
    return rule.reason


def _matches(runs: RunsTable, number: int) -> ColumnElement[bool]:
    match = runs.target.rules[number - 1].match
    return and_(*(runs.matches(role, pattern) for role, pattern in match.items()))
