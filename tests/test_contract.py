"""The contract: names and signatures that callers rely on."""

import inspect
import os
import re
import subprocess
import sys
import typing

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

import orphan_recovery
from orphan_recovery import FeatureIntent, RetryPolicy, WorkerRun
from prefect_support import ROOT

NO_PREFECT = """
import sys
import orphan_recovery
from orphan_recovery import (
    FEATURE_INTENT, ORPHAN_THRESHOLD_MINUTES, RECOVERY_ENABLED, RETRY_POLICY, FeatureIntent,
    RetryPolicy, WorkerRun, detect_orphaned_runs, get_crash_recovery_summary, logger,
    mark_run_as_crashed, recover_orphaned_runs,
)
print([name for name in sys.modules if name.split('.')[0] in ('prefect', 'alembic', 'typer')])
"""


def python(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ORPHAN_", "DATABASE_URL"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_importing_the_package_does_not_import_prefect_and_needs_no_database() -> None:
    done = python(NO_PREFECT)
    assert done.stderr == ""
    assert done.stdout.strip() == "[]"


def test_the_signatures_are_those_of_the_contract() -> None:
    def parameters(function: object) -> list[tuple[str, object, object]]:
        assert inspect.iscoroutinefunction(function)
        hints = typing.get_type_hints(function)
        return [
            (p.name, hints[p.name], p.default)
            for p in inspect.signature(function).parameters.values()
        ]

    none = inspect.Parameter.empty
    detect = parameters(orphan_recovery.detect_orphaned_runs)
    assert detect == [("session", AsyncSession, none), ("threshold_minutes", int, 30)]
    mark = parameters(orphan_recovery.mark_run_as_crashed)
    assert mark[:2] == [("session", AsyncSession, none), ("run", WorkerRun, none)]
    assert mark[2][:2] == ("reason", str)
    assert isinstance(mark[2][2], str)
    recover = parameters(orphan_recovery.recover_orphaned_runs)
    assert recover == [("threshold_minutes", typing.Optional[int], None)]  # noqa: UP045
    assert parameters(orphan_recovery.get_crash_recovery_summary) == []


def test_the_policy_names() -> None:
    assert orphan_recovery.FEATURE_INTENT is FeatureIntent.STATE_MUTATION
    assert orphan_recovery.RETRY_POLICY is RetryPolicy.SAFE
    assert [intent.name for intent in FeatureIntent] == [
        "PURE_QUERY",
        "STATE_MUTATION",
        "EXTERNAL_SIDE_EFFECT",
        "RECOVERABLE_OPERATION",
    ]
    assert [policy.name for policy in RetryPolicy] == ["NEVER", "SAFE", "DANGEROUS"]


def test_every_public_name_is_there_and_no_other_is_invented() -> None:
    for name in orphan_recovery.__all__:
        assert getattr(orphan_recovery, name) is not None
    assert set(orphan_recovery.__all__) <= set(dir(orphan_recovery))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = orphan_recovery.nonsense


def test_the_environment_decides_threshold_and_switch() -> None:
    code = "from orphan_recovery import *; print(ORPHAN_THRESHOLD_MINUTES, RECOVERY_ENABLED)"
    assert python(code).stdout.split() == ["30", "True"]
    own = python(code, ORPHAN_THRESHOLD_MINUTES="7", ORPHAN_RECOVERY_ENABLED="no")
    assert own.stdout.split() == ["7", "False"]
    empty = python(code, ORPHAN_THRESHOLD_MINUTES="", ORPHAN_RECOVERY_ENABLED="")
    assert empty.stdout.split() == ["30", "True"]


@pytest.mark.parametrize("value", ["0", "-5", "abc", "1.5", "99999999999"])
def test_a_bad_threshold_is_refused_at_start_up_by_name(value: str) -> None:
    done = python("import orphan_recovery", ORPHAN_THRESHOLD_MINUTES=value)
    assert done.returncode == 1
    assert f"ORPHAN_THRESHOLD_MINUTES is {value!r}: set it to a whole number" in done.stderr


def test_a_bad_switch_is_refused_at_start_up_by_name() -> None:
    done = python("import orphan_recovery", ORPHAN_RECOVERY_ENABLED="perhaps")
    assert "ORPHAN_RECOVERY_ENABLED is 'perhaps': set it to true or false" in done.stderr


def test_every_log_event_is_explained_and_no_other() -> None:
    """Their names are part of the public interface."""
    code = "".join(path.read_text() for path in (ROOT / "flows").rglob("*.py"))
    by_logger = r"logger\.(?:info|warning|error)\(\s*\"(\w+)\""  # of a worker that beats
    by_sweep = r"_log\(\s*[\w.]+, \"(\w+)\""
    emitted = re.findall(by_logger, code) + re.findall(by_sweep, code)
    explained = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/events.md").read_text(), re.M)
    assert len(emitted) > 20
    assert sorted(explained) == sorted(set(emitted))
