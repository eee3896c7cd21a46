"""The events of a sweep: each can be told to be of which sweep, by fields that are no texts of
other things."""

import json
import logging
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from orphan_recovery import events
from orphan_recovery.detect import Fleet
from orphan_recovery.doubt import Doubt
from orphan_recovery.report import Held, SweepReport
from orphan_recovery.request import SweepRequest
from orphan_recovery.run import Evidence, WorkerRun
from orphan_recovery.target import Target
from orphan_recovery.verdict import Outcome, Verdict

EVENTS_MD = Path(__file__).parent.parent / "docs/events.md"
NOW = datetime.now(UTC)
REQUEST = SweepRequest(asked_by="test", target=Target(name="billing"))
FLEET = Fleet(
    in_flight=9,
    orphans=1,
    beating=1,
    undatable=2,
    ahead=3,
    ahead_workers=["press-1"],
    exempt=0,
    seen_at=NOW,
)
HELD = Held(uuid4(), NOW, {"silent_workers": 8, "some_silent_workers": []}, runs=11, is_new=True)
RUN = WorkerRun(
    target="billing",
    id="run-1",
    status="running",
    worker_id="press-1",
    tenant_id=None,
    task=None,
    attempt=None,
    is_retry=None,
    parent_run_id=None,
    created_at=NOW,
    started_at=None,
    heartbeat_at=None,
    worker_seen_at=None,
    sign_of_life=NOW,
    evidence=Evidence.AGE,
    seen_at=NOW,
    threshold=timedelta(minutes=30),
    rule="silence >= 30 min",
    sweep_id=REQUEST.sweep_id,
)


def emit_all() -> None:
    """Every event that a sweep may emit."""
    events.log_start(REQUEST)
    events.log_wait(REQUEST)
    events.log_sight(REQUEST, FLEET, hides_rows=True)
    events.log_doubt(REQUEST, Doubt(("it was asleep",), timedelta(seconds=3)))
    events.log_held(REQUEST, HELD)
    events.log_gives_way(REQUEST, 120)
    events.log_detected(REQUEST, [RUN])
    marked = Verdict(run=RUN, outcome=Outcome.MARKED, silence=timedelta(hours=1))
    events.log_verdict(REQUEST, marked)
    events.log_verdict(REQUEST, Verdict(run=RUN, outcome=Outcome.FAILED, error="no such column"))
    events.log_marked(REQUEST, 5_000)
    events.log_end(SweepReport(REQUEST))
    events.log_end(SweepReport(REQUEST, error="no such table"))
    events.log_end(SweepReport(REQUEST, enabled=False))


@pytest.fixture
def emitted(caplog: pytest.LogCaptureFixture) -> dict[str, dict[str, Any]]:
    """Its own fields of each event, by the event's name."""
    caplog.set_level(logging.INFO)
    emit_all()
    common = vars(logging.makeLogRecord({})).keys() | {"message", "asctime"}
    return {
        record.message: {k: v for k, v in vars(record).items() if k not in common}
        for record in caplog.records
    }


def test_every_event_of_a_sweep_carries_its_target_and_its_id(
    emitted: dict[str, dict[str, Any]],
) -> None:
    """All of those that the page explains to operators, and no others."""
    of_a_sweep = EVENTS_MD.read_text().partition("## Of a sweep")[2].partition("\n## ")[0]
    assert sorted(emitted) == sorted(re.findall(r"^\| `(\w+)` \|", of_a_sweep, re.M))
    for name, fields in emitted.items():
        assert fields["target"] == "billing", name
        assert fields["sweep_id"] == str(REQUEST.sweep_id), name


def test_a_field_is_what_it_is_and_ready_for_json(emitted: dict[str, dict[str, Any]]) -> None:
    assert json.loads(json.dumps(emitted)) == emitted
    held = emitted["orphan_recovery_held"]
    assert held["hold_id"] == str(HELD.hold_id)
    assert held["runs"] == 11
    assert held["is_new"] is True


def test_a_sweep_that_leaves_runs_to_the_next_does_not_say_that_there_were_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    events.log_end(SweepReport(REQUEST, postponed="the server was started a moment ago"))
    assert caplog.messages == ["orphan_recovery_complete"]
    assert vars(caplog.records[0])["postponed"] == "the server was started a moment ago"
