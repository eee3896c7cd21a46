"""The commands that set a target up: init, doctor, sql, migrate, backtest. A thin face too.

They are kept apart from the sweep's because they are for a person, once, and not for a schedule.
"""

import asyncio
import json
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from orphan_recovery.cli.options import AsJson, TargetName
from orphan_recovery.settings import DATABASE_VARIABLES, ConfigurationError, load_settings
from orphan_recovery.target import Target
from orphan_recovery.targets import CONFIG_FILE, find_target, load_targets

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection


def register(app: typer.Typer) -> None:
    """Add the commands, in the order in which a new user needs them."""
    app.command(short_help="Describe a table of yours by looking at it.")(init)
    app.command(short_help="Say whether a target is fit to be swept.")(doctor)
    app.command(short_help="Print what `migrate` would do, and a role, to review.")(sql)
    app.command(short_help="Bring the schema up to date, or take it away.")(migrate)
    app.command(short_help="Replay thresholds over runs that lived.")(backtest)


def init(
    target: Annotated[
        str, typer.Option(help="What to call it: lower-case letters, digits, - and _.")
    ],
    table: Annotated[
        str | None,
        typer.Option(help="The table, as schema.table. Default: the only one that looks like it."),
    ] = None,
    database_url_env: Annotated[
        str | None,
        typer.Option(
            help="The variable that holds the address of its database. Default: "
            f"{DATABASE_VARIABLES[0]}, or {DATABASE_VARIABLES[1]} where only that one is set.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Describe a table of yours by looking at it: a draft, with a comment on each guess.

    Appends to orphan-recovery.toml (or the file that ORPHAN_RECOVERY_CONFIG names), and changes
    nothing in the database.
    """
    from orphan_recovery.database import own_variable
    from orphan_recovery.describe import describe_runs
    from orphan_recovery.guess import GUESS_AGAIN, draft_target

    if database_url_env == "":
        raise ConfigurationError(
            "--database-url-env is '': give the name of the variable that holds the address of the "
            "database, or leave the option out"
        )
    if database_url_env is None:
        database_url_env = own_variable()
    path = load_settings().config or Path(CONFIG_FILE)
    if path.exists() and target in load_targets():
        raise ConfigurationError(
            f"{path} has a target {target!r} already: choose another name, or edit it there"
        )
    try:
        probe = Target(name=target, database_url_env=database_url_env)
    except ValidationError as error:
        told = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
        raise ConfigurationError(told) from None
    unfit = None
    with _connected(probe) as connection:
        described, section = draft_target(connection, target, table, database_url_env)
        is_to_correct = f"# {GUESS_AGAIN}" in section
        try:
            describe_runs(connection, described)
        except ConfigurationError as error:
            if not is_to_correct:  # it does not even fit where it claims to
                raise
            unfit = error
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    parted = before if not before or before.endswith("\n\n") else before.rstrip("\n") + "\n\n"
    path.write_text(parted + section, encoding="utf-8")
    typer.echo(section)
    if unfit is not None:
        typer.echo(f"written to {path}, and not fit yet: {unfit}")
    if is_to_correct:
        also = "" if unfit else f"written to {path}. "
        typer.echo(f"{also}Correct the lines that say {GUESS_AGAIN} first, read each guess, then:")
    else:
        typer.echo(f"written to {path}. Read each guess, then:")
    steps = {
        "doctor": "is it fit to be swept?",
        "backtest": "is the threshold right?",
        "sql": "what `migrate` would do there",
    }
    for command, why in steps.items():
        typer.echo(f"  {f'orphan-recovery {command} --target {target}':<{len(target) + 36}}# {why}")
    typer.echo(f"  orphan-recovery sweep --target {target} --dry-run")


def doctor(target: TargetName = None, as_json: AsJson = False) -> None:
    """Say whether a target is fit to be swept, line by line, with the way out. Reads only.

    Exit code 1 if anything is a failure.
    """
    from orphan_recovery.doctor.examine import examine
    from orphan_recovery.doctor.finding import Level

    findings = asyncio.run(examine(find_target(target)))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        signs = {Level.OK: "ok      ", Level.WARNING: "warning ", Level.FAILURE: "FAILURE "}
        for finding in findings:
            typer.echo(f"{signs[finding.level]} {finding.about}: {finding.told}")
            if finding.way_out:
                typer.echo(f"          → {finding.way_out}")
        counts = Counter(finding.level for finding in findings)
        typer.echo(", ".join(f"{counts[level]} {level.value}" for level in Level))
    if any(finding.level is Level.FAILURE for finding in findings):
        raise typer.Exit(1)


def sql(
    target: TargetName = None,
    role: Annotated[
        str, typer.Option(help="The least-privilege role that sweeps.")
    ] = "orphan_recovery_sweep",
    worker_role: Annotated[
        str | None,
        typer.Option(help="The role that workers have, where they use orphan_recovery.alive."),
    ] = None,
) -> None:
    """Print all that `migrate` would do, and a role for the sweep, for a DBA to review.

    Executes nothing. What is there already is left out; run as the tables' owner, by psql, it
    comes to the same as `migrate`.
    """
    from sqlalchemy.exc import DBAPIError

    from orphan_recovery.database import describe, missing_right, named_address
    from orphan_recovery.schema.review import as_sql

    meant = find_target(target)
    try:
        with _connected(meant) as connection:
            script = as_sql(connection, meant, role, worker_role)
    except DBAPIError as error:
        told = describe(error)
        if not missing_right(told):
            raise
        raise ConfigurationError(
            f"{told}. This database role may not look at what is there: have the tables' owner run "
            f"this command, with an address of the owner's in {named_address(meant)}"
        ) from None
    typer.echo(script)


def migrate(
    target: TargetName = None,
    down: Annotated[
        bool, typer.Option("--down", help="Take the schema away again; never a row.")
    ] = False,
) -> None:
    """Bring the schema up to date: runs table, truth trigger, ledger, indexes.

    Again and again without harm. An existing worker_runs table is adopted: missing columns are
    added and nothing is rewritten. A table of yours, described in orphan-recovery.toml, gets the
    index that serves detection, an index of crashed runs if a crash has a status of its own, and
    the truth trigger if you asked for it; and keeps its columns as they are.
    """
    from orphan_recovery.database import address, shown
    from orphan_recovery.schema import migrate as schema

    meant = find_target(target)
    url = address(meant)
    did = schema.unmigrate(meant, url) if down else schema.migrate(meant, url)
    where = f"{shown(url)} (target {meant.name})"
    for what in did.done:
        typer.echo(f"{'removed' if down else 'made'}: {what}")
    if did.before != did.after:
        typer.echo(f"{where} went from revision {did.before} to {did.after}")
    elif did.done:
        typer.echo(f"{where} is at revision {did.after}, as before")
    else:
        typer.echo(f"{where} is at revision {did.after} already, with nothing to do")


def backtest(
    target: TargetName = None,
    threshold_minutes: Annotated[
        list[int] | None,
        typer.Option(
            help="A threshold to replay, in minutes; give it again for more. Default: a ladder "
            "from 1 to 240. The target's own is always added.",
            show_default=False,
        ),
    ] = None,
    days: Annotated[
        int, typer.Option(help="Only runs that ended, and verdicts given, in so many days.")
    ] = 30,
    as_json: AsJson = False,
) -> None:
    """Replay thresholds over runs that lived: which would have crashed some? Reads only."""
    from orphan_recovery.backtest.measure import backtest_target
    from orphan_recovery.backtest.report import as_dict, show
    from orphan_recovery.cli.table import console_here

    tested = asyncio.run(backtest_target(find_target(target), threshold_minutes or None, days))
    if as_json:
        typer.echo(json.dumps(as_dict(tested), indent=2))
    else:
        show(tested, console_here())


@contextmanager
def _connected(target: Target) -> "Iterator[Connection]":
    """A plain connection to a target's database, for a look."""
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    from orphan_recovery.database import CONNECT_TIMEOUT_SECONDS, address

    engine = create_engine(
        address(target),
        poolclass=NullPool,
        hide_parameters=True,
        connect_args={
            "application_name": "orphan-recovery",
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "client_encoding": "utf8",  # whatever the role's own: else texts may come as bytes
            "options": "-c default_transaction_read_only=on",
        },
    )
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()
