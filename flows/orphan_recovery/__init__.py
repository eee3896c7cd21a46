"""Orphan recovery: find runs whose worker died, mark each as crashed, say why.

What it can wrongly do is call a live run dead. Everything here is arranged against that: the
verdict is one conditional statement under a row lock, in the database's own time, and it is
written together with its evidence. See :mod:`orphan_recovery.mark`.

Importing this package does not import Prefect, and does not connect to anything. Names are
loaded when first used, so that a worker's start-up pays only for what it calls. The settings
are the exception: they are read here and now, so that a bad value stops the process at its
start and not at the first sweep.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from orphan_recovery.settings import RECOVERY_ENABLED, ConfigurationError
from orphan_recovery.targets import ORPHAN_THRESHOLD_MINUTES

if TYPE_CHECKING:
    from orphan_recovery.detect import detect_orphaned_runs
    from orphan_recovery.log import logger
    from orphan_recovery.mark import mark_run_as_crashed
    from orphan_recovery.policy import FEATURE_INTENT, RETRY_POLICY, FeatureIntent, RetryPolicy
    from orphan_recovery.recover import recover_orphaned_runs, recover_target, recover_worker
    from orphan_recovery.run import Evidence, RunStatus, WorkerRun
    from orphan_recovery.summarize import get_crash_recovery_summary
    from orphan_recovery.verdict import Outcome

_HOME_OF = {
    "FEATURE_INTENT": "policy",
    "RETRY_POLICY": "policy",
    "Evidence": "run",
    "FeatureIntent": "policy",
    "Outcome": "verdict",
    "RetryPolicy": "policy",
    "RunStatus": "run",
    "WorkerRun": "run",
    "detect_orphaned_runs": "detect",
    "get_crash_recovery_summary": "summarize",
    "logger": "log",
    "mark_run_as_crashed": "mark",
    "recover_orphaned_runs": "recover",
    "recover_target": "recover",
    "recover_worker": "recover",
}

__all__ = [
    "FEATURE_INTENT",
    "ORPHAN_THRESHOLD_MINUTES",
    "RECOVERY_ENABLED",
    "RETRY_POLICY",
    "ConfigurationError",
    "Evidence",
    "FeatureIntent",
    "Outcome",
    "RetryPolicy",
    "RunStatus",
    "WorkerRun",
    "detect_orphaned_runs",
    "get_crash_recovery_summary",
    "logger",
    "mark_run_as_crashed",
    "recover_orphaned_runs",
    "recover_target",
    "recover_worker",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
