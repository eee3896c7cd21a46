"""Any runs table: rules, which give some runs another threshold or none."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from orphan_recovery import ConfigurationError
from orphan_recovery.request import DEFAULT_REASON
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Rule, Target
from support import Database
from tables_support import add, fleet, look, outcome_of, request, seen, simple, sweep


def ruled(blank: Database, *rules: Rule, **described: Any) -> Target:
    return simple(blank, "error text", "tenant_id text", rules=rules, **described)


async def test_the_first_rule_that_matches_decides(blank: Database) -> None:
    target = ruled(
        blank,
        Rule(match={"task": "nightly-*"}, never=True),
        Rule(match={"task": "*-report"}, threshold_minutes=300),
        Rule(match={"task": "quick"}, threshold_minutes=5),
    )
    add(blank, "never", task="nightly-report", age="9 days")
    add(blank, "long and young", task="weekly-report", age="4 hours")
    add(blank, "long and old", task="weekly-report", age="6 hours")
    add(blank, "quick and young", task="quick", age="4 minutes")
    add(blank, "quick and old", task="quick", age="6 minutes")
    add(blank, "no task", age="20 minutes")
    assert (await fleet(blank, target)).exempt == 1
    report = await sweep(target)
    assert report.as_dict()["exempt"] == 1
    assert "1 exempt by a rule" in report.headline()
    rules = {v["run_id"]: (v["rule"], v["threshold"]) for v in blank.verdicts()}
    assert rules == {
        "run": ("silence >= threshold", timedelta(minutes=30)),
        "long and old": (
            "silence >= threshold of rule 2 (task = *-report)",
            timedelta(minutes=300),
        ),
        "quick and old": ("silence >= threshold of rule 3 (task = quick)", timedelta(minutes=5)),
    }
    assert blank.sweeps()[0]["exempt"] == 1


@pytest.mark.parametrize(
    ("pattern", "fit", "misfit"),
    [
        ("*", ["", "a", "a\nb"], [None]),
        ("a*", ["a", "ab", "a*"], ["ba", "A", ""]),
        ("*a", ["a", "ba"], ["ab"]),
        ("a?c", ["abc", "a?c", "a\nc"], ["ac", "abbc"]),
        ("100%", ["100%"], ["100", "100 per cent"]),
        ("100%*", ["100%", "100% wool"], ["100 wool"]),
        ("a_c*", ["a_c"], ["abc"]),
        ("a\\b?", ["a\\bc"], ["abc", "a\\b"]),
        ("\\*", ["\\", "\\x"], ["*", "x"]),
        ("*\\", ["\\", "x\\"], ["x"]),
        ("'; --*", ["'; --", "'; -- x"], ["x"]),
        ("%s :x {y}*", ["%s :x {y}!"], ["x"]),
    ],
)
async def test_only_stars_and_question_marks_are_wild(
    blank: Database, pattern: str, fit: list[str], misfit: list[str | None]
) -> None:
    target = ruled(blank, Rule(match={"task": pattern}, never=True))
    blank.do("DELETE FROM jobs")
    for number, task in enumerate([*fit, *misfit]):
        add(blank, str(number), task=task)
    found = {int(run.id) for run in await seen(blank, target)}
    assert found == set(range(len(fit), len(fit) + len(misfit)))


async def test_a_rule_may_look_at_all_it_names_at_once(blank: Database) -> None:
    match = {"task": "t", "tenant_id": "a*", "worker_id": "worker-?", "status": "running"}
    target = ruled(blank, Rule(match=match, never=True))
    add(blank, "all", task="t")
    add(blank, "other task", task="u")
    add(blank, "other worker", task="t", worker="worker-10")
    add(blank, "other status", "queued", task="t")
    blank.do("UPDATE jobs SET tenant_id = 'acme'")
    add(blank, "no tenant", task="t")
    found = {run.id for run in await seen(blank, target)}
    assert found == {"run", "other task", "other worker", "other status", "no tenant"}


async def test_each_status_may_have_a_threshold_and_a_reason_and_who_asks_comes_first(
    blank: Database,
) -> None:
    target = ruled(
        blank,
        Rule(match={"status": "queued"}, threshold_minutes=60, reason="nobody took it"),
        Rule(match={"status": "claimed"}, threshold_minutes=60),
        in_flight=("queued", "claimed", "running"),
    )
    add(blank, "queued", "queued")
    add(blank, "queued lately", "queued", age="45 minutes")
    add(blank, "claimed", "claimed")
    assert (await sweep(target)).recovered == 3
    reasons = {v["run_id"]: v["reason"] for v in blank.verdicts()}
    assert reasons == {
        "run": DEFAULT_REASON,
        "queued": "nobody took it",
        "claimed": f"{DEFAULT_REASON}, while claimed",
    }
    for row in blank.do("SELECT id, error FROM jobs WHERE status = 'crashed'"):
        assert row["error"].startswith(f"{reasons[row['id']]}; last sign of life ")

    blank.do("UPDATE jobs SET status = 'queued'")
    blank.do("DELETE FROM jobs WHERE id <> 'queued'")
    assert (await sweep(target, reason="deploy 42")).recovered == 1
    assert blank.one("SELECT error FROM jobs").startswith("deploy 42; ")
    assert blank.verdicts()[-1]["reason"] == "deploy 42"


@pytest.mark.parametrize("now", ["never", "patient"])
async def test_a_run_that_comes_under_a_gentler_rule_since_it_was_seen_is_left_alone(
    blank: Database, engine: AsyncEngine, now: str
) -> None:
    target = ruled(
        blank,
        Rule(match={"task": "never"}, never=True),
        Rule(match={"task": "patient"}, threshold_minutes=600),
    )
    asked = request(target)
    [run] = await look(engine, asked)
    blank.do("UPDATE jobs SET task = %s", now)
    before = blank.do("SELECT xmin::text, * FROM jobs")
    assert await outcome_of(engine, asked, run) == "sign_of_life"
    assert blank.do("SELECT xmin::text, * FROM jobs") == before
    assert blank.outcomes() == {"run": "sign_of_life"}


async def test_a_run_that_came_under_a_stricter_rule_is_marked_as_it_was_seen(
    blank: Database, engine: AsyncEngine
) -> None:
    target = ruled(blank, Rule(match={"task": "strict"}, threshold_minutes=1))
    asked = request(target)
    [run] = await look(engine, asked)
    blank.do("UPDATE jobs SET task = 'strict'")
    assert await outcome_of(engine, asked, run) == "marked"
    assert blank.verdicts()[0]["rule"] == "silence >= threshold"


async def test_a_rule_that_looks_at_a_column_that_is_not_there_is_refused(
    blank: Database,
) -> None:
    blank.do("CREATE TABLE t (id int PRIMARY KEY, status text, created_at timestamptz)")
    rules = (Rule(match={"task": "x"}, never=True),)
    with pytest.raises(ConfigurationError, match=r"rules\.0\.match looks at 'task'"):
        migrate(Target(name="t", table="t", rules=rules))
