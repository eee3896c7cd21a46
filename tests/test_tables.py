"""Any runs table: hand-made schemas as real systems have them, swept by their description alone.

Nothing here is ours but the description: the keys, the words for a status, the types and the
names are another team's, and so are the rows that must stay as they are.
"""

from datetime import timedelta
from pathlib import Path
from typing import LiteralString

import pytest
from psycopg import sql
from sqlalchemy.ext.asyncio import AsyncEngine

from orphan_recovery.schema.migrate import migrate
from orphan_recovery.summarize import summarize_target
from orphan_recovery.target import Columns, Target
from support import Database
from tables_scenes import COMPOSITE, PRISMA, RAILS, SCENES
from tables_support import Scene, do, look, outcome_of, request, seen, set_for_all, sweep


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
async def test_exactly_the_dead_runs_of_a_table_are_marked_once(
    blank: Database, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = scene.make(blank, tmp_path, monkeypatch)
    assert migrate(target).done
    before, statuses = scene.rows(blank), scene.statuses(blank)

    report = await sweep(target)
    assert (report.error, report.failed) == (None, 0)
    assert (report.detected, report.recovered) == (len(scene.orphans), len(scene.orphans))
    after = scene.rows(blank)
    assert {run for run in before if after[run] != before[run]} == set(scene.orphans)
    crashed = dict.fromkeys(scene.orphans, target.crashed)
    assert scene.statuses(blank) == {**statuses, **crashed}
    evidence = [(v["outcome"], v["evidence"], v["target"]) for v in blank.verdicts()]
    assert sorted(evidence) == sorted(
        ("marked", evidence, target.name) for evidence in scene.orphans.values()
    )

    assert (await sweep(target)).detected == 0
    assert migrate(target).done == ()
    assert scene.rows(blank) == after


@pytest.mark.parametrize("setting", ["datestyle = 'SQL, DMY'", "intervalstyle = 'sql_standard'"])
@pytest.mark.parametrize("scene", [RAILS, COMPOSITE], ids=["naive", "a time in the key"])
async def test_how_a_database_writes_its_times_is_nothing_to_a_sweep(
    blank: Database,
    scene: Scene,
    setting: LiteralString,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = scene.make(blank, tmp_path, monkeypatch)
    set_for_all(blank, setting)
    migrate(target)
    statuses = scene.statuses(blank)
    report = await sweep(target)
    assert (report.error, report.recovered) == (None, len(scene.orphans))
    crashed = dict.fromkeys(scene.orphans, target.crashed)
    assert scene.statuses(blank) == {**statuses, **crashed}


async def test_a_run_has_one_id_whatever_the_time_zone_of_who_looks(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two sweeps do not know each other's verdicts, and the ledger has no history."""
    target = COMPOSITE.make(blank, tmp_path, monkeypatch)
    ids = []
    for zone in ("timezone = 'Asia/Tokyo'", "timezone = 'America/New_York'"):
        set_for_all(blank, zone)
        ids.append([run.id for run in await seen(blank, target)])
    assert ids[0] == ids[1]


async def test_the_snapshot_and_the_ledger_call_things_by_their_roles(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = PRISMA.make(blank, tmp_path, monkeypatch)
    migrate(target)
    first, second = await seen(blank, target)
    assert (first.id, second.id) == ("cl:two", 'cl%d "1"')
    assert (first.status, first.worker_id) == ("ACTIVE", "it's w:1")
    assert (first.tenant_id, first.task, first.target) == ("7", "anna", "scene")
    assert (await sweep(target, tenant="7", worker="it's w:1", limit=1)).recovered == 1
    [verdict] = blank.verdicts()
    assert (verdict["run_id"], verdict["worker_id"]) == ("cl:two", "it's w:1")
    assert (verdict["tenant_id"], verdict["task"]) == ("7", "anna")
    assert verdict["sign_of_life"] == first.sign_of_life
    [opened] = blank.sweeps()
    assert opened["table_name"] == target.table


OURS = ("seen", "locked", "marked", "own", "other", "kept", "worker_heartbeat", "verdicts")


@pytest.mark.parametrize(
    ("table", "key"),
    [*((table, "id") for table in OURS)]
    + [("runs", key) for key in ("run_id", "reason", "rule", "threshold", "id_1", "vanished")],
)
async def test_no_name_of_theirs_is_mistaken_for_one_of_ours(
    blank: Database, engine: AsyncEngine, table: str, key: str
) -> None:
    names = {"table": sql.Identifier(table), "key": sql.Identifier(key)}
    do(
        blank,
        sql.SQL(
            "CREATE TABLE {table} ({key} int PRIMARY KEY, status text, created_at timestamptz);"
            "INSERT INTO {table} VALUES (1, 'running', now() - interval '2 hours'),"
            " (2, 'running', now())"
        ).format(**names),
    )
    target = Target(name="odd", table=table, columns=Columns(id=key))
    migrate(target)
    report = await sweep(target)
    assert [verdict.error for verdict in report.verdicts if verdict.error] == []
    assert blank.outcomes() == {"1": "marked"}

    do(blank, sql.SQL("UPDATE {table} SET created_at = '2020-01-01'").format(**names))
    asked = request(target)
    [run] = await look(engine, asked)
    do(blank, sql.SQL("UPDATE {table} SET status = 'completed'").format(**names))
    assert await outcome_of(engine, asked, run) == "finished_first"


async def test_a_naive_column_is_written_in_utc_too(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = PRISMA.make(blank, tmp_path, monkeypatch)
    migrate(target)
    assert (await sweep(target)).recovered == 2
    at = blank.do(
        'SELECT now() - "finishedAt" AT TIME ZONE \'UTC\' AS ago FROM "app.""v2"" beta"."Job"'
        " WHERE \"select\" = 'Crashed!'"
    )
    assert all(timedelta(0) < row["ago"] < timedelta(minutes=1) for row in at)
    [run, _] = (await summarize_target(target))["recent_crashes"]
    assert run["crashed_at"].endswith(("Z", "+00:00"))
