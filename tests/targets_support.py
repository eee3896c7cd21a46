"""Targets of the tests: what describes them, and databases that have their tables."""

from collections.abc import Iterator

import pytest

from orphan_recovery.database import database_url
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.targets import find_target
from support import Database, database_of_its_own

# Three tables that have nothing in common but that workers hold their rows: words, numbers for
# words, and the project's own under another name.
BILLING = """
[targets.billing]
database_url_env = "BILLING_DATABASE_URL"
table = "invoice_jobs"
in_flight = ["working"]
waiting = ["new"]
terminal = ["done", "broken", "lost"]
crashed = "lost"
threshold_minutes = 20
heartbeat_seconds = 1

[targets.billing.columns]
id = "job_no"
status = "state"
worker_id = "held_by"
created_at = "made_at"
heartbeat_at = "seen_at"
completed_at = "ended_at"
error = "trouble"
"""
REPORTS = """
[targets.reports]
database_url_env = "REPORTS_DATABASE_URL"
table = "report_jobs"
in_flight = [1]
terminal = [2, 3, 4]
crashed = 4
threshold_minutes = 60

[targets.reports.columns]
created_at = "begun"
"""
FLEET = """
[targets.fleet]
database_url_env = "FLEET_DATABASE_URL"
"""


class Jobs(Database):
    """A database that has all three tables; a target looks at one of them."""

    def add_invoice(
        self, number: int, *, state: str = "working", made: str = "2 hours", seen: str | None = None
    ) -> int:
        """An invoice's job, made so long ago, whose worker was last seen so long ago, if ever."""
        self.do(
            "INSERT INTO invoice_jobs (job_no, state, held_by, made_at, seen_at)"
            " VALUES (%s, %s, 'press-1', now() - %s::interval, now() - %s::interval)",
            *(number, state, made, seen),
        )
        return number

    def add_report(self, number: int, *, begun: str = "2 hours") -> int:
        self.do(
            "INSERT INTO report_jobs (id, status, begun) VALUES (%s, 1, now() - %s::interval)",
            *(number, begun),
        )
        return number

    def invoices(self) -> dict[int, str]:
        return {r["job_no"]: r["state"] for r in self.do("SELECT job_no, state FROM invoice_jobs")}

    def reports(self) -> dict[int, int]:
        return {r["id"]: r["status"] for r in self.do("SELECT id, status FROM report_jobs")}

    def verdicts_of(self, target: str) -> dict[str, str]:
        """The outcomes that the ledger has for a target, by run; none twice."""
        told = [v for v in self.verdicts() if v["target"] == target]
        outcomes = {v["run_id"]: v["outcome"] for v in told}
        assert len(outcomes) == len(told), told
        return outcomes


@pytest.fixture(scope="module")
def jobs(server: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a database with the tables and the ledger, from which others are copied."""
    file = tmp_path_factory.mktemp("jobs") / "targets.toml"
    file.write_text(BILLING + REPORTS)
    with database_of_its_own(server, template) as url:
        with Database(url) as database:
            database.do(
                "CREATE TABLE invoice_jobs (job_no bigint PRIMARY KEY, state text NOT NULL,"
                " held_by text, made_at timestamptz NOT NULL, seen_at timestamptz,"
                " ended_at timestamptz, trouble varchar(200))"
            )
            database.do(
                "CREATE TABLE report_jobs (id integer PRIMARY KEY, status smallint NOT NULL,"
                " begun timestamp NOT NULL)"
            )
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("ORPHAN_RECOVERY_CONFIG", str(file))
            for name in ("billing", "reports"):
                migrate(find_target(name), database_url(url))
        yield database_url(url).database or ""
