"""Row security: what it may hide from the role that sweeps is refused, or said."""

from collections.abc import Iterator
from pathlib import Path
from typing import LiteralString

import pytest
from psycopg import sql
from sqlalchemy import make_url

from orphan_recovery import ConfigurationError
from orphan_recovery.doctor.examine import examine
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Target
from support import Database
from tables_support import configure, do, sweep

JOBS = """
[targets.jobs]
table = "jobs"
[targets.jobs.worker_heartbeat]
table = "workers"
key = "id"
run_key = "worker_id"
last_seen = "seen"
"""
OF_A_TENANT: LiteralString = "USING (tenant = current_setting('app.tenant', true))"
OF_ALL: LiteralString = "USING (true)"


@pytest.fixture
def target(blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """A run whose worker has just beaten, and one whose worker is dead; swept by another role."""
    blank.do("CREATE TABLE workers (id text PRIMARY KEY, tenant text, seen timestamptz)")
    blank.do(
        "CREATE TABLE jobs (id text PRIMARY KEY, status text NOT NULL, worker_id text, tenant text,"
        " created_at timestamptz)"
    )
    blank.do(
        "INSERT INTO workers VALUES ('w', 'acme', now()), ('dead', 'acme', now() - interval '1 h')"
    )
    blank.do(
        "INSERT INTO jobs VALUES ('live', 'running', 'w', 'acme', now() - interval '2 hours'),"
        " ('orphan', 'running', 'dead', 'acme', now() - interval '2 hours')"
    )
    described = configure(tmp_path, monkeypatch, JOBS, "jobs")
    migrate(described)
    name, password = f"sweeper-{make_url(blank.url).database}", "its-own"
    who = sql.Identifier(name)
    do(blank, sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(who, password))
    for schema in ("public", "orphan_recovery"):
        grant = "GRANT USAGE ON SCHEMA {0} TO {1}; GRANT ALL ON ALL TABLES IN SCHEMA {0} TO {1}"
        do(blank, sql.SQL(grant).format(sql.Identifier(schema), who))
    url = make_url(blank.url).set(username=name, password=password)
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", url.render_as_string(hide_password=False))
    yield described
    do(blank, sql.SQL("DROP OWNED BY {}").format(who))
    do(blank, sql.SQL("DROP ROLE {}").format(who))


def secure(db: Database, table: LiteralString, *policies: LiteralString) -> None:
    db.do("ALTER TABLE " + table + " ENABLE ROW LEVEL SECURITY")
    for number, policy in enumerate(policies):
        create = sql.SQL("CREATE POLICY {} ON " + table + " " + policy)
        do(db, create.format(sql.Identifier(f"policy {number}")))


def statuses(db: Database) -> dict[str, str]:
    return {row["id"]: row["status"] for row in db.do("SELECT id, status FROM jobs")}


@pytest.mark.parametrize(
    "policies",
    [
        (OF_A_TENANT,),
        ("FOR UPDATE " + OF_ALL,),
        (OF_ALL, "AS RESTRICTIVE " + OF_A_TENANT),
        ("TO CURRENT_USER " + OF_ALL,),
        (),
    ],
    ids=["of a tenant", "of updates", "restricted", "of another role", "none"],
)
async def test_signs_of_life_that_may_be_hidden_are_no_evidence(
    blank: Database, target: Target, policies: tuple[LiteralString, ...]
) -> None:
    """A worker that beats would look silent: nothing is judged."""
    secure(blank, "workers", *policies)
    with pytest.raises(ConfigurationError) as refused:
        await sweep(target)
    told = "targets.jobs.worker_heartbeat.table is 'workers', of which row security may hide rows"
    assert told in str(refused.value)
    [line] = [f for f in await examine(target) if f.about == "privileges" and f.level != "ok"]
    assert line.told.startswith("row security may hide rows of workers from this role")
    assert statuses(blank) == {"live": "running", "orphan": "running"}


@pytest.mark.parametrize(
    "policies", [(OF_ALL,), ("FOR SELECT " + OF_ALL, OF_A_TENANT)], ids=["all", "one of two"]
)
async def test_a_policy_that_shows_every_row_is_no_doubt(
    blank: Database, target: Target, policies: tuple[LiteralString, ...]
) -> None:
    secure(blank, "workers", *policies)
    secure(blank, "jobs", OF_ALL)
    report = await sweep(target)
    assert (report.error, report.recovered) == (None, 1)
    assert "row security" not in report.headline()
    assert statuses(blank) == {"live": "running", "orphan": "crashed"}
    assert blank.one("SELECT question IS NOT NULL FROM orphan_recovery.sweeps")


VIEWS: dict[str, tuple[LiteralString, ...]] = {
    "of whoever reads": ("CREATE VIEW seen_by WITH (security_invoker = on) AS SELECT * FROM base",),
    "of whoever reads, by another": (
        "CREATE VIEW within WITH (security_invoker) AS SELECT * FROM base",
        "CREATE VIEW seen_by AS SELECT * FROM within",
    ),
    "of an owner that is shown as little": (
        "CREATE VIEW seen_by AS SELECT * FROM base",
        "ALTER TABLE base FORCE ROW LEVEL SECURITY",
        "ALTER VIEW seen_by OWNER TO {who}",
    ),
}


@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
async def test_what_is_hidden_below_a_view_is_hidden(
    blank: Database, target: Target, views: tuple[LiteralString, ...]
) -> None:
    through_a_view(blank, *views)
    with pytest.raises(ConfigurationError, match="of which row security may hide rows"):
        await sweep(target)
    [line] = [f for f in await examine(target) if f.about == "privileges" and f.level != "ok"]
    assert "row security may hide rows of workers" in line.told
    assert statuses(blank) == {"live": "running", "orphan": "running"}


async def test_a_view_whose_owner_sees_every_row_shows_every_row(
    blank: Database, target: Target
) -> None:
    through_a_view(blank, "CREATE VIEW seen_by AS SELECT * FROM base")
    assert (await sweep(target)).recovered == 1
    assert statuses(blank) == {"live": "running", "orphan": "crashed"}


def through_a_view(db: Database, *views: LiteralString) -> None:
    """From now on the workers' beats are read through a view of their table."""
    who = sql.Identifier(f"sweeper-{make_url(db.url).database}")
    db.do("ALTER TABLE workers RENAME TO base")
    secure(db, "base", OF_A_TENANT)
    for view in views:
        do(db, sql.SQL(view).format(who=who))
    db.do("ALTER VIEW seen_by RENAME TO workers")
    do(db, sql.SQL("GRANT SELECT ON ALL TABLES IN SCHEMA public TO {}").format(who))


async def test_runs_that_may_be_hidden_are_told_of(blank: Database, target: Target) -> None:
    secure(blank, "jobs", OF_A_TENANT)
    report = await sweep(target)
    assert (report.error, report.recovered) == (None, 0)
    assert "row security" in report.headline()
    unanswered = blank.one("SELECT question IS NULL FROM orphan_recovery.sweeps")
    assert unanswered, "who may see more is not told that there was nothing"
