"""Query plans: what a sweep costs follows what is in flight, however large the table.

Plans are judged, not times: an index is used, no statement reads the whole table, none sorts all
that is in flight.
"""

import json
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from orphan_recovery import judge, lane
from orphan_recovery.recover import run_sweep
from orphan_recovery.request import SweepRequest
from support import Database
from tables_support import set_for_all

ROWS, IN_FLIGHT, ORPHANS = 60_000, 2_000, 50

Plan = dict[str, Any]


@pytest.fixture
def large(db: Database) -> Database:
    """A table of which most has ended long ago, in the same pages as what has not."""
    db.do(
        "INSERT INTO worker_runs (id, status, worker_id, created_at, completed_at) SELECT"
        " md5(n::text), CASE WHEN n % 30 = 0 THEN 'running' ELSE 'completed' END,"
        " 'worker-' || n % 50, CASE WHEN n % 1200 = 0 THEN now() - interval '2 hours'"
        " WHEN n % 30 = 0 THEN now() - interval '1 minute' ELSE now() - interval '9 days' END,"
        " CASE WHEN n % 30 <> 0 THEN now() END FROM generate_series(1, 60000) n"
    )
    db.do("VACUUM ANALYZE worker_runs")
    db.do("ANALYZE orphan_recovery.verdicts")
    return db


@pytest.fixture
def plans() -> Iterator[dict[str, list[Plan]]]:
    """Of each statement that is executed from now on, by its beginning: what it did."""
    found: dict[str, list[Plan]] = {}

    def explain(connection: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        if "worker_runs" not in statement or statement.startswith("EXPLAIN"):
            return
        own = connection.connection.cursor()
        own.execute("SAVEPOINT before")
        own.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", values)
        [(told,)] = own.fetchall()
        own.execute("ROLLBACK TO before")
        own.close()
        whole = told if isinstance(told, list) else json.loads(told)
        found.setdefault(statement, []).append(whole[0]["Plan"])

    event.listen(Engine, "before_cursor_execute", explain)
    yield found
    event.remove(Engine, "before_cursor_execute", explain)


def nodes(plan: Plan) -> Iterator[Plan]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


def seen(node: Plan) -> int:
    """How many rows a node looked at, whether or not it let them through."""
    dropped = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
    return int((node["Actual Rows"] + dropped) * node["Actual Loops"])


def judge_plans(plans: dict[str, list[Plan]], *, sorted_at_most: int) -> None:
    every = [node for found in plans.values() for plan in found for node in nodes(plan)]
    scans = [node for node in every if "Scan" in node["Node Type"]]
    reads = [node for node in scans if node.get("Relation Name") == "worker_runs"]
    assert reads
    assert "Seq Scan" not in {node["Node Type"] for node in reads}
    assert max(map(seen, reads)) <= IN_FLIGHT
    for node in every:
        if "Sort" in node["Node Type"]:
            [below] = [n for n in node["Plans"] if n["Parent Relationship"] == "Outer"]
            assert below["Actual Rows"] * below["Actual Loops"] <= sorted_at_most, node


async def test_an_idle_sweep_reads_what_is_in_flight_once_by_its_index(
    large: Database, plans: dict[str, list[Plan]]
) -> None:
    large.do(
        "UPDATE worker_runs SET heartbeat_at = now() WHERE status = 'running'"
        " AND created_at < now() - interval '1 hour'"
    )
    report = await run_sweep(SweepRequest(asked_by="test"))
    assert (report.error, report.detected) == (None, 0)
    assert len(plans) == 1
    judge_plans(plans, sorted_at_most=0)


@pytest.mark.parametrize("limit", [None, 10_000], ids=["slices", "page by page"])
async def test_a_sweep_reads_only_what_is_in_flight_and_sorts_only_orphans(
    large: Database, plans: dict[str, list[Plan]], limit: int | None
) -> None:
    report = await run_sweep(SweepRequest(asked_by="test", limit=limit))
    assert (report.error, report.recovered) == (None, ORPHANS)
    assert len(plans) >= 3
    judge_plans(plans, sorted_at_most=IN_FLIGHT)


async def test_no_statement_takes_more_than_one_process_of_the_server(
    large: Database, plans: dict[str, list[Plan]]
) -> None:
    """Not even where the planner holds it for free."""
    set_for_all(large, "parallel_setup_cost = 0")
    set_for_all(large, "parallel_tuple_cost = 0")
    set_for_all(large, "min_parallel_index_scan_size = 0")
    set_for_all(large, "min_parallel_table_scan_size = 0")
    report = await run_sweep(SweepRequest(asked_by="test"))
    assert (report.error, report.recovered) == (None, ORPHANS)
    every = [node for found in plans.values() for plan in found for node in nodes(plan)]
    assert not [node for node in every if "Gather" in node["Node Type"]]


@pytest.mark.parametrize("lanes", [1, 2])
async def test_slices_go_along_the_index_from_both_ends(
    large: Database, plans: dict[str, list[Plan]], monkeypatch: pytest.MonkeyPatch, lanes: int
) -> None:
    """Not from its start each time, and without a sort: what is passed once is not read again,
    neither by its lane nor by the other."""
    monkeypatch.setattr(judge, "Progress", partial(judge.Progress, size=200, show=0))
    monkeypatch.setattr(judge, "SHORT", 0.0)
    monkeypatch.setattr(judge, "LANES", lanes)
    monkeypatch.setattr(lane, "BUSY", math.inf)  # of which each EXPLAIN, in its savepoint, is one
    created_one_after_the_other(large)
    report = await run_sweep(SweepRequest(asked_by="test"))
    assert report.recovered == IN_FLIGHT
    scans = [
        node
        for found in slices_of(plans)
        for node in nodes(found)
        if node.get("Index Name") == "worker_runs_in_flight"
    ]
    assert {scan["Scan Direction"] for scan in scans} == {"Forward", "Backward"} or lanes == 1
    ends = [scan["Index Cond"] for scan in scans]
    assert any(") > ROW(" in end and ") < ROW(" in end for end in ends) or lanes == 1
    # Where the lanes meet, each may look at what the other has just locked; the other's slices are
    # twice as large.
    twice = 2 * 200 * (lanes - 1)
    assert max(map(seen, scans)) <= 200 + twice
    assert sum(map(seen, scans)) <= IN_FLIGHT + 200 * (lanes - 1) + twice
    assert not [n for found in slices_of(plans) for n in nodes(found) if "Increm" in n["Node Type"]]


async def test_slices_find_what_they_have_locked_by_its_place_and_not_by_its_key(
    large: Database, plans: dict[str, list[Plan]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "Progress", partial(judge.Progress, show=ORPHANS // 2))
    assert (await run_sweep(SweepRequest(asked_by="test"))).recovered == ORPHANS
    scans = [
        {node["Node Type"] for node in nodes(found) if "Relation Name" in node}
        for found in slices_of(plans)
    ]
    assert len(scans) >= 2
    assert all(kinds >= {"Index Scan", "Tid Scan"} for kinds in scans)
    every = [node for found in slices_of(plans) for node in nodes(found)]
    assert "worker_runs_pkey" not in {node.get("Index Name") for node in every}


async def test_slices_that_are_shown_compare_no_run_with_each(
    large: Database, plans: dict[str, list[Plan]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand in one are a million comparisons otherwise, under the rows' locks."""
    created_one_after_the_other(large)
    report = await run_sweep(SweepRequest(asked_by="test"))
    assert report.recovered == IN_FLIGHT
    every = [node for found in slices_of(plans) for node in nodes(found)]
    assert max(n["Actual Loops"] * n["Actual Rows"] for n in every) <= 1_000
    assert not [n for n in every if n.get("Rows Removed by Join Filter")]


def created_one_after_the_other(large: Database) -> None:
    """All that is in flight is an orphan, each a second younger than the one before."""
    large.do(
        "UPDATE worker_runs SET created_at = created_at - n * interval '1 second' FROM"
        " (SELECT id, 3600 + row_number() OVER (ORDER BY id) AS n FROM worker_runs) AS numbered"
        " WHERE worker_runs.id = numbered.id AND status = 'running'"
    )
    large.do("VACUUM ANALYZE worker_runs")


def slices_of(plans: dict[str, list[Plan]]) -> list[Plan]:
    return [plan for text, found in plans.items() if "recovery_taken" in text for plan in found]
