"""What is asked of one sweep. The same for the flow, the command line and a worker's start-up.

The hazard is a scope that is wider than it was meant: an empty tenant, from a variable that was
never set, must not become "all tenants". Every value is checked here, before anything runs.
"""

from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from typing import Any, Final
from uuid import UUID, uuid4

from orphan_recovery.run import WorkerRun
from orphan_recovery.settings import ConfigurationError, check_threshold
from orphan_recovery.target import Target
from orphan_recovery.targets import find_target

DEFAULT_REASON: Final = "orphaned: no sign of life from its worker"
MAX_REASON_LENGTH: Final = 1_000
MOST_RUNS: Final = 2**31 - 1
"""What a limit may be at most: it is bound as an integer of four bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRequest:
    """One sweep: which runs, by which threshold, on whose word.

    Raises:
        ConfigurationError: a value cannot be used; named with the way out.
    """

    asked_by: str
    """Who or what asked, for the ledger."""
    target: Target = field(default_factory=find_target)
    """Which table; without it, the target that is meant by default."""
    threshold_minutes: int | None = None
    """The silence that makes an orphan, in whole minutes; None for the target's own. The
    target's rules come before it either way."""
    returned: timedelta | None = None
    """For a worker that is back from the dead: whatever it held and has not been heard of for so
    long is dead, whatever the threshold and the rules say. Only with ``worker``."""
    tenant: str | None = None
    """Only runs of this tenant."""
    worker: str | None = None
    """Only runs held by this worker."""
    limit: int | None = None
    """Judge at most so many runs, longest silence first."""
    reason: str = DEFAULT_REASON
    """What the error text of each marked run begins with."""
    dry_run: bool = False
    """Look, and write nothing at all, not even to the ledger."""
    sweep_id: UUID = field(default_factory=uuid4)

    def __post_init__(self) -> None:
        check_threshold(self.minutes)
        check_reason(self.reason)
        for name in ("tenant", "worker", "asked_by"):
            value = getattr(self, name)
            if value is not None and (not value.strip() or "\x00" in value):
                raise ConfigurationError(f"{name} is {value!r}: give a name, or leave it out")
        if self.returned is not None and self.worker is None:
            raise ConfigurationError("returned is given without a worker: name the worker")
        limit = self.limit
        if limit is not None and (isinstance(limit, bool) or not 1 <= limit <= MOST_RUNS):
            raise ConfigurationError(
                f"limit is {limit!r}: give a number of runs from 1 to {MOST_RUNS}, or leave it out"
            )

    @property
    def minutes(self) -> int:
        """The threshold of a run that no rule matches, in whole minutes."""
        if self.threshold_minutes is None:
            return self.target.threshold_minutes
        return self.threshold_minutes

    @property
    def threshold(self) -> timedelta:
        """The same as a span; another where a lock, or a worker's return, is the evidence."""
        if self.returned is not None:
            return self.returned
        if self.target.lock is not None:
            return self.target.beat
        return timedelta(minutes=self.minutes)

    @property
    def question(self) -> str | None:
        """What it looks for, as a hash: alike where two sweeps would find, and judge, the same
        runs. None where a limit leaves some of them unjudged."""
        if self.limit is not None:
            return None
        whose, by = (self.tenant, self.worker), (self.minutes, self.returned)
        asked = repr((own_version(), self.target.model_dump_json(), *whose, *by))
        return sha256(asked.encode()).hexdigest()

    @property
    def is_whole(self) -> bool:
        """Whether it looks at all that its target has by the target's own threshold, or more."""
        narrowed = self.tenant or self.worker or self.returned
        return not narrowed and self.minutes <= self.target.threshold_minutes

    @property
    def by_rules(self) -> bool:
        """Whether the thresholds of the target's rules hold: where time is the evidence."""
        return self.returned is None and self.target.lock is None

    def reason_for(self, run: WorkerRun) -> str:
        """What the error text of ``run`` begins with: who asked comes before the run's rule."""
        return self.reason_by(run.rule_reason)

    def reason_by(self, rule_reason: str | None) -> str:
        """The same, for a run whose rule has that reason."""
        if self.reason == DEFAULT_REASON and rule_reason:
            return rule_reason
        return self.reason

    @property
    def scope(self) -> dict[str, Any]:
        """The part of the table that was looked at, for the ledger."""
        parts = {"tenant": self.tenant, "worker": self.worker, "limit": self.limit}
        return {name: value for name, value in parts.items() if value is not None}


@cache
def own_version() -> str:
    """Of this package, as it is installed."""
    return version("orphan-recovery")


def check_reason(reason: str) -> str:
    """Accept a reason for marking, or refuse it by name."""
    is_text = "\x00" not in reason and reason.encode(errors="ignore").decode() == reason
    if not reason.strip() or not is_text or len(reason) > MAX_REASON_LENGTH:
        raise ConfigurationError(
            f"reason is {reason[:40]!r}: give 1 to {MAX_REASON_LENGTH} characters of text that "
            "tell a person why"
        )
    return reason
