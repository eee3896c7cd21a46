"""Whether and how to try again: the one place where retries come from.

The hazard is to retry what cannot get better (a missing column, a refused permission, the truth
trigger), which hides a fault behind minutes of noise, or not to retry what can (a lost
connection), which leaves an orphan for no reason. The flow's tasks and the start-up path both
take their plan and their judgement from here.
"""

import random
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import psycopg
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_base


class FeatureIntent(StrEnum):
    """What a feature does to the world."""

    PURE_QUERY = "pure_query"
    STATE_MUTATION = "state_mutation"
    EXTERNAL_SIDE_EFFECT = "external_side_effect"
    RECOVERABLE_OPERATION = "recoverable_operation"


class RetryPolicy(StrEnum):
    """What may be done when a try fails."""

    NEVER = "never"
    """No retries."""
    SAFE = "safe"
    """Idempotent: may be retried."""
    DANGEROUS = "dangerous"
    """No retries unless a person turned them on."""


FEATURE_INTENT: Final = FeatureIntent.STATE_MUTATION
RETRY_POLICY: Final = RetryPolicy.SAFE
"""Marking is idempotent: a second try of the same sweep finds its own verdict and adds nothing."""


@dataclass(frozen=True, slots=True)
class RetryPlan:
    """How often and how patiently to try again."""

    retries: int
    """Tries after the first."""
    backoff_factor: float
    """Seconds before the first retry; each later one waits twice as long."""
    jitter: float
    """Share of each delay that is left to chance, so that many retries do not come as one."""

    def delay(self, retry: int) -> float:
        """Seconds to wait before retry number ``retry`` (from 1), without the jitter."""
        return float(self.backoff_factor * 2 ** (retry - 1))


def retry_plan(policy: RetryPolicy = RETRY_POLICY, *, dangerous_allowed: bool = False) -> RetryPlan:
    """Turn a policy into numbers.

    Args:
        policy: how safe it is to try again.
        dangerous_allowed: that a person turned retries on for a DANGEROUS operation.

    Returns:
        For SAFE, and DANGEROUS if allowed, four retries after about 0.5, 1, 2 and 4 seconds: it
        outlasts a failover's first seconds and a five-second lock time-out. Otherwise none.
    """
    if policy is RetryPolicy.SAFE or (policy is RetryPolicy.DANGEROUS and dangerous_allowed):
        return RetryPlan(retries=4, backoff_factor=0.5, jitter=0.5)
    return RetryPlan(retries=0, backoff_factor=0.0, jitter=0.0)


# From Appendix A of the PostgreSQL manual, "PostgreSQL Error Codes".
_TRANSIENT_CODES: Final = frozenset(
    {
        "25P03",  # idle in transaction time-out: the session is gone
        "25P04",  # transaction time-out: likewise
        "40001",  # serialization failure
        "40P01",  # deadlock detected
        "53300",  # too many connections
        "55P03",  # lock not available: lock_timeout
        "57014",  # query canceled: statement_timeout
        "57P01",  # terminated by an administrator: a restart, or pg_terminate_backend
        "57P02",  # crash shutdown
        "57P03",  # cannot connect now: the server is starting or stopping
        "57P05",  # idle session time-out
    }
)
_CONNECTION_EXCEPTIONS: Final = "08"  # the class of that name
_OUT_OF_RESOURCES: Final = frozenset({"53000", "53100", "53200", "53300"})
"""Disk, memory, connections: of those the server has no more for anybody. Not a configured limit,
53400, which one statement may have met by itself."""
_UNIQUE_VIOLATION: Final = "23505"
_ONE_VERDICT: Final = ("orphan_recovery", "verdicts")
"""Schema and table of which a unique violation is transient: see :func:`is_transient`."""


def sqlstate(error: BaseException) -> str | None:
    """The five-character SQLSTATE that the server gave for ``error``, or None if it gave none."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(cause, "sqlstate", None)
    return code if isinstance(code, str) else None


def is_transient(error: BaseException) -> bool:
    """Whether the same statement may well succeed a little later.

    Args:
        error: what a try raised.

    Returns:
        True for a lost or refused connection, a deadlock, a serialization failure, a lock or
        statement time-out, too many connections, a server that starts or stops, and a verdict
        that an earlier try of the same sweep committed meanwhile: the next try finds it. False
        for everything else, and so for every error that is not known.
    """
    if isinstance(error, DBAPIError):
        code = sqlstate(error)
        if code is None:
            # No answer from the server at all: the connection broke, or never came about.
            return error.connection_invalidated or isinstance(
                error, (OperationalError, InterfaceError)
            )
        if code == _UNIQUE_VIOLATION and isinstance(error.orig, psycopg.Error):
            return (error.orig.diag.schema_name, error.orig.diag.table_name) == _ONE_VERDICT
        return code in _TRANSIENT_CODES or code.startswith(_CONNECTION_EXCEPTIONS)
    return isinstance(error, (PoolTimeoutError, OSError))


def is_lock_timeout(error: BaseException) -> bool:
    """Whether ``error`` is that a lock was not to be had in time."""
    return sqlstate(error) == "55P03"


def waited_too_long(error: BaseException) -> bool:
    """Whether ``error`` is that a lock, or the end of a statement, was not to be had in time."""
    return is_lock_timeout(error) or sqlstate(error) == "57014"


def retrying() -> AsyncRetrying:
    """The plan as a retry loop, for what runs outside Prefect. Raises what the last try raised."""
    plan = retry_plan()
    return AsyncRetrying(
        stop=stop_after_attempt(1 + plan.retries),
        wait=_Backoff(plan),
        retry=retry_if_exception(is_transient),
        reraise=True,
    )


class _Backoff(wait_base):
    def __init__(self, plan: RetryPlan) -> None:
        self.plan = plan

    def __call__(self, retry_state: RetryCallState) -> float:
        delay = self.plan.delay(retry_state.attempt_number)
        return delay * (1 + random.uniform(-self.plan.jitter, self.plan.jitter))  # noqa: S311


def is_outage(error: BaseException) -> bool:
    """Whether ``error`` speaks of the database as a whole, not of the row at hand.

    Such an error ends a sweep (the next one goes on); any other fails one run alone. A trigger of
    the table may raise what looks like an outage, such as of another server that it asks: where
    the connection has outlived that, it is about the row.
    """
    if isinstance(error, DBAPIError):
        code = sqlstate(error)
        if code is None:
            return is_transient(error)
        if code in _OUT_OF_RESOURCES:
            return True
        is_lost = error.connection_invalidated
        if error.statement is None and isinstance(error.orig, psycopg.Error):
            # It never came about, or broke at COMMIT; unless a deferred trigger raised it there.
            is_lost |= error.orig.diag.severity_nonlocalized != "ERROR"
        return is_lost and code.startswith((_CONNECTION_EXCEPTIONS, "57P", "53"))
    return isinstance(error, (PoolTimeoutError, OSError))
