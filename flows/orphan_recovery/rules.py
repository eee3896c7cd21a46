"""Rules: which threshold holds for which run. The first rule that matches wins.

The hazard is long-running work that one threshold for all takes for dead. A rule gives its runs
another, or none: ``never``. What a rule exempts is counted by every sweep, because an orphan among
them is nobody's to find.
"""

from datetime import timedelta

from sqlalchemy import ColumnElement, Integer, Interval, and_, case, cast, literal, null

from orphan_recovery.request import DEFAULT_REASON, SweepRequest
from orphan_recovery.runs import RunsTable
from orphan_recovery.targets import Target

BY_THRESHOLD = 0
"""The number of no rule: the sweep's own threshold."""


def threshold_of(runs: RunsTable, otherwise: ColumnElement[timedelta]) -> ColumnElement[timedelta]:
    """Each run's threshold by the rules; NULL for a run that is never an orphan.

    Args:
        runs: the table.
        otherwise: the threshold of a run that no rule matches.
    """
    whens = [
        (
            _matches(runs, number),
            cast(null(), Interval)
            if rule.never
            else literal(timedelta(minutes=rule.threshold_minutes or 0), Interval),
        )
        for number, rule in enumerate(runs.target.rules, 1)
    ]
    return case(*whens, else_=otherwise) if whens else otherwise


def number_of(runs: RunsTable) -> ColumnElement[int]:
    """Which rule matched each run: 1 for the first; ``BY_THRESHOLD`` for none."""
    whens = [
        (_matches(runs, number), literal(number, Integer))
        for number, _ in enumerate(runs.target.rules, 1)
    ]
    none = literal(BY_THRESHOLD, Integer)
    return case(*whens, else_=none) if whens else none


def shortest(request: SweepRequest) -> timedelta:
    """The shortest threshold that any run may have."""
    minutes = [rule.threshold_minutes for rule in request.target.rules if rule.threshold_minutes]
    return timedelta(minutes=min([request.minutes, *minutes]))


def in_words(target: Target, number: int) -> str:
    """What condemned a run, for the ledger."""
    if number == BY_THRESHOLD:
        return "silence >= threshold"
    return f"silence >= threshold of rule {number} ({target.rules[number - 1].name})"


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
