"""Seen: what detection saw of each run, as a table that a statement can join."""

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Text, bindparam, column, func
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP
from sqlalchemy.sql.selectable import TableValuedAlias

from orphan_recovery.database import Span
from orphan_recovery.request import SweepRequest
from orphan_recovery.run import WorkerRun

_AWARE = TIMESTAMP(timezone=True)

_SNAPSHOT: Final[dict[str, Any]] = {
    **dict.fromkeys(("run_id", "status", "worker_id", "evidence", "rule", "reason"), Text()),
    **dict.fromkeys(("sign_of_life", "seen_at"), _AWARE),
    "threshold": Span(),
}


def snapshots() -> TableValuedAlias:
    """The snapshots as a table, one array a column: one plan for one run or a thousand."""
    arrays = [bindparam(f"seen_{name}", type_=ARRAY(kind)) for name, kind in _SNAPSHOT.items()]
    names = [column(name, kind) for name, kind in _SNAPSHOT.items()]
    return func.unnest(*arrays).table_valued(*names, name="orphan_recovery_seen").render_derived()


def as_seen(request: SweepRequest, runs: Sequence[WorkerRun]) -> dict[str, list[Any]]:
    """The values that :func:`snapshots` takes."""
    assert {run.sweep_id for run in runs} == {request.sweep_id}  # noqa: S101 - its own, only
    columns: dict[str, list[Any]] = {
        name: [getattr(run, name) for run in runs]
        for name in ("status", "worker_id", "sign_of_life", "seen_at", "threshold", "rule")
    }
    columns["run_id"] = [run.id for run in runs]
    columns["evidence"] = [run.evidence.value for run in runs]
    columns["reason"] = [request.reason_for(run) for run in runs]
    return {f"seen_{name}": values for name, values in columns.items()}
