"""The truth trigger on another team's table."""

from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

from orphan_recovery import ConfigurationError
from orphan_recovery.schema.migrate import migrate, unmigrate
from orphan_recovery.target import Columns, Target
from support import Database
from tables_support import do, sweep

ODD: LiteralString = """
CREATE SCHEMA "a.b";
CREATE TABLE "a.b"."Läufe %s" (
    "Mandant" uuid DEFAULT '00000000-0000-0000-0000-00000000000a',
    "n'r" int,
    "slot" date DEFAULT '2024-01-02',
    "st\\at""us" text NOT NULL,
    "wer:" text,
    "why {}" text,
    note text,
    "time" timestamptz DEFAULT now() - interval '2 hours',
    PRIMARY KEY ("Mandant", "n'r", "slot")
)
"""
ODD_TARGET = Target(
    name="odd",
    table='"a.b"."Läufe %s"',
    in_flight=("läuft",),
    waiting=("it's waiting",),
    terminal=("fertig\\", 'it\'s "lost"'),
    crashed='it\'s "lost"',
    truth_trigger=True,
    columns=Columns(
        id=("Mandant", "n'r", "slot"),
        status='st\\at"us',
        worker_id="wer:",
        error="why {}",
        created_at="time",
    ),
)


def odd(blank: Database) -> None:
    blank.do(ODD)
    blank.do(
        'INSERT INTO "a.b"."Läufe %s" ("n\'r", "st\\at""us") VALUES'
        " (1, 'läuft'), (2, 'it''s waiting'), (3, 'fertig\\'), (4, 'it''s \"lost\"')"
    )


@pytest.mark.parametrize("number", [1, 3, 4], ids=["marked", "finished", "lost"])
@pytest.mark.parametrize(
    "late",
    [
        'UPDATE "a.b"."Läufe %s" SET "st\\at""us" = \'läuft\'',
        'UPDATE "a.b"."Läufe %s" SET "wer:" = \'late\'',
        'UPDATE "a.b"."Läufe %s" SET "why {}" = \'late\'',
        'UPDATE "a.b"."Läufe %s" SET "n\'r" = 99',
        'UPDATE "a.b"."Läufe %s" SET "slot" = \'2025-01-01\'',
        'DELETE FROM "a.b"."Läufe %s"',
    ],
)
async def test_a_terminal_row_of_any_table_never_changes_again(
    blank: Database, late: LiteralString, number: int
) -> None:
    odd(blank)
    migrate(ODD_TARGET)
    assert (await sweep(ODD_TARGET)).recovered == 1
    before = blank.do('SELECT xmin::text, * FROM "a.b"."Läufe %s"')
    with pytest.raises(psycopg.errors.RaiseException) as refused:
        do(blank, sql.SQL('{} WHERE "n\'r" = {}').format(sql.SQL(late), number))
    assert refused.value.sqlstate == "P0001"
    key = f"00000000-0000-0000-0000-00000000000a, {number}, 2024-01-02"
    assert str(refused.value).startswith(f"TRUTH_VIOLATION: run {key} is ")
    assert blank.do('SELECT xmin::text, * FROM "a.b"."Läufe %s"') == before


def test_the_truth_trigger_lets_through_what_is_none_of_its_business(blank: Database) -> None:
    odd(blank)
    migrate(ODD_TARGET)
    blank.do('UPDATE "a.b"."Läufe %s" SET note = \'read\' WHERE "n\'r" = 3')
    blank.do('UPDATE "a.b"."Läufe %s" SET "st\\at""us" = \'läuft\' WHERE "n\'r" = 2')
    blank.do('UPDATE "a.b"."Läufe %s" SET "st\\at""us" = \'fertig\\\' WHERE "n\'r" = 1')
    blank.do('DELETE FROM "a.b"."Läufe %s" WHERE "n\'r" = 2')
    assert blank.one('SELECT count(*) FROM "a.b"."Läufe %s"') == 3


def test_the_truth_trigger_comes_once_follows_the_description_and_goes(blank: Database) -> None:
    odd(blank)
    without = ODD_TARGET.model_copy(update={"truth_trigger": False})
    migrate(without)
    assert triggers(blank) == []
    assert migrate(ODD_TARGET).done == ("the truth trigger: a terminal row never changes again",)
    assert migrate(ODD_TARGET).done == ()
    more = ODD_TARGET.model_copy(update={"terminal": (*(ODD_TARGET.terminal or ()), "zurück")})
    assert migrate(more).done == ("the truth trigger: a terminal row never changes again",)
    [definition] = triggers(blank)
    assert "zurück" in definition
    assert unmigrate(more).after == "none"
    assert triggers(blank) == []
    assert blank.one('SELECT count(*) FROM "a.b"."Läufe %s"') == 4


def triggers(blank: Database) -> list[str]:
    rows = blank.do(
        "SELECT pg_get_triggerdef(t.oid) AS told FROM pg_trigger t"
        " JOIN pg_class c ON c.oid = t.tgrelid WHERE NOT tgisinternal AND relname LIKE 'L%'"
    )
    return [row["told"] for row in rows]


@pytest.mark.parametrize(
    ("kind", "running", "done", "crashed", "late"),
    [
        ("numeric(4, 1)", "1", "2", "3", "1.0"),
        ("boolean", "f", "t", "t", "false"),
    ],
)
def test_the_truth_trigger_compares_as_the_column_does(
    blank: Database,
    kind: LiteralString,
    running: str,
    done: str,
    crashed: str,
    late: LiteralString,
) -> None:
    """``2`` is ``2.0`` there, and ``t`` is ``true``."""
    blank.do(
        "CREATE TABLE jobs (id text PRIMARY KEY, status " + kind + " NOT NULL,"
        " created_at timestamptz)"
    )
    target = Target(
        name="jobs",
        table="jobs",
        in_flight=(running,),
        terminal=tuple(dict.fromkeys((done, crashed))),
        crashed=crashed,
        truth_trigger=True,
    )
    migrate(target)
    do(blank, sql.SQL("INSERT INTO jobs VALUES ('run', {}, now())").format(done))
    with pytest.raises(psycopg.errors.RaiseException, match="TRUTH_VIOLATION: run run is"):
        blank.do("UPDATE jobs SET status = " + late)


def test_a_truth_trigger_that_fires_on_a_replica_alone_is_none(blank: Database) -> None:
    odd(blank)
    migrate(ODD_TARGET)
    blank.do('ALTER TABLE "a.b"."Läufe %s" ENABLE REPLICA TRIGGER prevent_worker_run_mutation')
    assert migrate(ODD_TARGET).done == ("the truth trigger: a terminal row never changes again",)
    with pytest.raises(psycopg.errors.RaiseException, match="TRUTH_VIOLATION"):
        blank.do('DELETE FROM "a.b"."Läufe %s" WHERE "n\'r" = 3')


def test_a_truth_trigger_that_is_switched_off_goes_with_the_rest(blank: Database) -> None:
    odd(blank)
    migrate(ODD_TARGET)
    blank.do('ALTER TABLE "a.b"."Läufe %s" DISABLE TRIGGER prevent_worker_run_mutation')
    assert unmigrate(ODD_TARGET).after == "none"
    assert triggers(blank) == []


def test_a_trigger_that_fires_later_cannot_reopen_a_terminal_row(blank: Database) -> None:
    """The truth trigger judges what is stored, not what the statement asked for."""
    odd(blank)
    migrate(ODD_TARGET)
    blank.do(
        "CREATE FUNCTION reopen() RETURNS trigger LANGUAGE plpgsql AS"
        """ $$ BEGIN NEW."st\\at""us" := 'läuft'; RETURN NEW; END $$"""
    )
    blank.do(
        'CREATE TRIGGER zz_last BEFORE UPDATE ON "a.b"."Läufe %s"'
        " FOR EACH ROW EXECUTE FUNCTION reopen()"
    )
    with pytest.raises(psycopg.errors.RaiseException, match=r"TRUTH_VIOLATION: run .* is fertig"):
        blank.do('UPDATE "a.b"."Läufe %s" SET note = \'read\' WHERE "n\'r" = 3')
    assert blank.one('SELECT "st\\at""us" FROM "a.b"."Läufe %s" WHERE "n\'r" = 3') == "fertig\\"


def test_a_terminal_row_whose_key_is_generated_may_be_annotated(blank: Database) -> None:
    blank.do(
        "CREATE TABLE jobs (number int, id text GENERATED ALWAYS AS ('job-' || number) STORED"
        " PRIMARY KEY, status text NOT NULL, created_at timestamptz, note text)"
    )
    target = Target(name="jobs", table="jobs", terminal=("completed", "crashed"))
    migrate(target.model_copy(update={"truth_trigger": True}))
    blank.do("INSERT INTO jobs VALUES (1, DEFAULT, 'completed', now())")
    blank.do("UPDATE jobs SET note = 'read'")
    with pytest.raises(psycopg.errors.RaiseException, match="TRUTH_VIOLATION: run job-1 is"):
        blank.do("UPDATE jobs SET number = 2")


def test_a_trigger_of_that_name_that_is_anothers_is_not_replaced(blank: Database) -> None:
    odd(blank)
    blank.do(
        "CREATE FUNCTION theirs() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$"
    )
    blank.do(
        'CREATE TRIGGER prevent_worker_run_mutation BEFORE UPDATE ON "a.b"."Läufe %s"'
        " FOR EACH ROW EXECUTE FUNCTION theirs()"
    )
    before = triggers(blank)
    with pytest.raises(ConfigurationError, match=r"of its own, which calls theirs\(\)"):
        migrate(ODD_TARGET)
    assert triggers(blank) == before
