"""The command line: a thin face over the same verbs, with an exit code that a script can trust.

What a command needs is imported by it, so that `--help` and a mistake are answered at once.

Exit codes: 0 well; 1 a run could not be marked, the sweep did not come to its end, the database
could not be asked, or the doctor found a failure; 2 bad usage or configuration; 3 held: too much
of the fleet looked dead, and a person is asked.
"""

import asyncio
import getpass
import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import wraps
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from orphan_recovery.cli import setup
from orphan_recovery.cli.options import (
    AllTargets,
    AsJson,
    DryRun,
    Limit,
    Reason,
    TargetName,
    Tenant,
    Threshold,
    Worker,
)
from orphan_recovery.log import EventFormatter, logger, say_why_it_waits
from orphan_recovery.request import DEFAULT_REASON, SweepRequest
from orphan_recovery.settings import APPROVED_MINUTES, MAX_APPROVED_MINUTES, ConfigurationError
from orphan_recovery.target import Target
from orphan_recovery.targets import find_target, load_targets

if TYPE_CHECKING:
    from orphan_recovery.approve import Approved
    from orphan_recovery.report import SweepReport

# A short_help fits into the list of commands, which is cut off at 80 columns.
app = typer.Typer(
    name="orphan-recovery",
    help="Find runs whose worker died, mark each as crashed, and say why.",
    no_args_is_help=True,
    rich_markup_mode=None,  # else each line of a docstring is one of the help, however wide it is
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"orphan-recovery {version('orphan-recovery')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show each event on standard error.")
    ] = False,
) -> None:
    logger.propagate = False
    logger.setLevel(logging.INFO if verbose else logging.CRITICAL)
    if verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(EventFormatter())
        logger.addHandler(handler)


@app.command(short_help="Run one whole sweep here, without Prefect.")
def sweep(
    target: TargetName = None,
    all_targets: AllTargets = False,
    threshold_minutes: Threshold = None,
    dry_run: DryRun = False,
    tenant: Tenant = None,
    worker: Worker = None,
    limit: Limit = None,
    reason: Reason = DEFAULT_REASON,
    as_json: AsJson = False,
) -> None:
    """Run one whole sweep in this process, without Prefect."""
    from orphan_recovery.doubt import LONGEST_WAIT
    from orphan_recovery.recover import run_sweep
    from orphan_recovery.report import SweepReport
    from orphan_recovery.sweep import whoami

    if not as_json:
        say_why_it_waits(LONGEST_WAIT.total_seconds())
    if target is not None and all_targets:
        raise ConfigurationError("--target and --all-targets are both given: give one of them")
    swept = list(load_targets().values()) if all_targets else [find_target(target)]
    requests = [
        SweepRequest(
            asked_by=whoami("orphan-recovery sweep"),
            target=one,
            threshold_minutes=threshold_minutes,
            tenant=tenant,
            worker=worker,
            limit=limit,
            reason=reason,
            dry_run=dry_run,
        )
        for one in swept
    ]
    reports = []
    for request in requests:
        try:
            report = asyncio.run(run_sweep(request))
        except ConfigurationError as error:
            if not all_targets:
                raise
            report = SweepReport(request, error=str(error))  # one bad target stops no other
        reports.append(report)
        if not as_json:
            _print_report(report, name=all_targets)
    if as_json:
        told = [report.as_dict() for report in reports]
        typer.echo(json.dumps(told if all_targets else told[0], indent=2))
    raise typer.Exit(_exit_code(reports))


def _exit_code(reports: "list[SweepReport]") -> int:
    """A run that could not be marked comes before one that was not dared."""
    if all(report.ended_well for report in reports):
        return 0
    amiss = [report for report in reports if not report.ended_well]
    return 3 if all(report.is_held for report in amiss) else 1


@app.command(short_help="Release one hold, once its workers are known dead.")
def approve(
    hold: Annotated[
        str,
        typer.Argument(
            help="The hold's id, or the beginning of it. Without it, those that stand are named.",
            show_default=False,
        ),
    ] = "",
    target: Annotated[
        str | None,
        typer.Option(help="Whose hold it is. Default: all targets' ledgers are asked for it."),
    ] = None,
    minutes: Annotated[
        int, typer.Option(help="How long the approval holds.", min=1, max=MAX_APPROVED_MINUTES)
    ] = APPROVED_MINUTES,
    note: Annotated[str | None, typer.Option(help="Why, for the ledger.")] = None,
) -> None:
    """Release one hold: the next sweep marks the runs that it names, and no others.

    For when you have seen that the workers it speaks of are dead.
    """
    from orphan_recovery.release import NotAsked, find_hold, release

    targets = list(load_targets().values()) if target is None else [find_target(target)]
    try:
        found = asyncio.run(find_hold(targets, hold))
    except NotAsked as error:
        _fail(str(error), code=1)
    for not_asked in found.not_asked:
        typer.echo(f"orphan-recovery: {not_asked}", err=True)
    lasting = timedelta(minutes=minutes)
    with _naming(found.hold.target):
        done = asyncio.run(release(found, by=_person(), lasting=lasting, note=note))
    whose = f" of target {found.hold.target!r}" if len(targets) > 1 else ""
    typer.echo(f"hold {found.hold.hold_id}{whose} {_told_of(*done)}")


def _told_of(approved: "Approved", in_flight: int | None) -> str:
    """What an approval came to, and what comes of it."""
    from orphan_recovery.words import iso

    _, until, was_until = approved
    told = f"is released until {iso(until)}"
    if was_until is not None and until > was_until:
        told = f"was released already, until {iso(was_until)}, and now {told}"
    elif was_until is not None:
        told = f"stays released until {iso(until)}: an approval is never made shorter"
    if in_flight == 0:
        return f"{told}; none of its runs is in flight any more: nothing is left to mark"
    return f"{told}; the next sweep marks those of its runs that are silent still"


def _person() -> str:
    try:
        return f"{getpass.getuser()} on {socket.gethostname()}"
    except (OSError, KeyError, ImportError):  # a user without a name, as in some containers
        return f"user {os.getuid()} on {socket.gethostname()}"


@app.command(short_help="Show what stands crashed, and contested verdicts.")
def summary(target: TargetName = None, as_json: AsJson = False) -> None:
    """Show how many runs stand crashed, the newest ten, and how many verdicts were contested."""
    from orphan_recovery.summarize import summarize_target

    summed = asyncio.run(summarize_target(find_target(target)))
    if as_json:
        typer.echo(json.dumps(summed, indent=2))
        return
    for crash in summed["recent_crashes"]:
        whose = (("worker", crash["worker_id"]), ("tenant", crash["tenant_id"]))
        told = ", ".join(f"{what} {who}" if who else f"no {what}" for what, who in whose)
        typer.echo(f"{crash['crashed_at'] or '(no time)'}  {crash['run_id']}  ({told})")
        typer.echo(f"    {crash['error'] or '(no error text)'}")
    more = ", the newest ten above" if summed["total_crashed"] > 10 else ""
    typer.echo(f"{summed['total_crashed']} crashed in all{more}")
    if (contests := summed["contests"]) and contests["contested"]:
        share = f"{contests['contested']} of {contests['verdicts']} ({contests['rate']:.1%})"
        typer.echo(f"{share} verdicts of the last 30 days were contested by a worker that lived")
        for side in ("task", "worker"):
            for row in contests[f"by_{side}"]:
                name = row["task" if side == "task" else "worker_id"] or "(none)"
                typer.echo(f"    {side} {name}: {row['contested']} of {row['verdicts']}")


@app.command(short_help="Serve the schedules and deployments of all targets.")
def serve() -> None:
    """Serve a schedule for each target, on-demand and all-targets, without a work pool."""
    from orphan_recovery.database import address

    for target in load_targets().values():
        if target.database_url_secret is None:
            address(target)  # to be told now, not by the first flow run
    from orphan_recovery.deploy import serve_deployments

    asyncio.run(serve_deployments(tell=typer.echo))


@app.command(short_help="Start a sweep in Prefect, for a deploy pipeline.")
def trigger(
    target: TargetName = None,
    all_targets: AllTargets = False,
    threshold_minutes: Threshold = None,
    dry_run: DryRun = False,
    tenant: Tenant = None,
    worker: Worker = None,
    limit: Limit = None,
    reason: Reason = DEFAULT_REASON,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until the sweep has ended.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait at most.", min=1)] = 900,
) -> None:
    """Start the deployment on-demand, or all-targets, for a deploy pipeline.

    Prints the flow run's address. With --wait, exits 0 only when the sweep ended well.
    """
    from orphan_recovery.deploy import releases, trigger_sweep, where_summary_is
    from orphan_recovery.flow_hold import HELD
    from orphan_recovery.words import span

    asked: dict[str, Any] = {
        "target": target,
        "threshold_minutes": threshold_minutes,
        "dry_run": dry_run or None,
        "tenant": tenant,
        "worker": worker,
        "limit": limit,
        "reason": reason if reason != DEFAULT_REASON else None,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    # Refused here rather than by a flow run, but for the target's name: the file that knows it is
    # where sweeps run, and need not be here.
    checked = {name: value for name, value in given.items() if name != "target"}
    SweepRequest(asked_by="trigger", target=Target(), **checked)
    if all_targets and target is not None:
        raise ConfigurationError("--target and --all-targets are both given: give one of them")
    if all_targets and (narrowing := given.keys() - {"dry_run", "reason"}):
        raise ConfigurationError(
            f"--all-targets sweeps each target by its own description: leave out "
            f"{', '.join(sorted(narrowing))}, or name one --target"
        )
    run = asyncio.run(
        trigger_sweep(
            given, every_target=all_targets, wait=wait, timeout_seconds=timeout, tell=typer.echo
        )
    )
    if not wait or (run.state and run.state.is_completed()):
        return
    message = (run.state and run.state.message) or ""
    if run.state and run.state.name == HELD:
        typer.echo(
            "orphan-recovery: the sweep is held, and waits for a person: see whether the workers "
            "that its message tells of live; if they are dead, release their runs:",
            err=True,
        )
        for command in releases(message):
            typer.echo(command, err=True)
        raise typer.Exit(3)
    if run.state and run.state.is_final():
        told = f"the sweep ended {run.state_name}" + (f": {message}" if message else "")
        if (where := asyncio.run(where_summary_is(run))) is not None:
            told += f"; what is to be done next is in its summary: {where}"
        _fail(told, code=1)
    goes_on = "stays scheduled" if run.state and run.state.is_scheduled() else "goes on"
    _fail(
        f"the flow run is still {run.state_name} after {span(timedelta(seconds=timeout))}, and "
        f"{goes_on}: see whether a worker or `orphan-recovery serve` is up to run it",
        code=1,
    )


setup.register(app)


@app.command(short_help="Kill real workers, and recover what they left.")
def demo(
    ui: Annotated[
        bool, typer.Option("--ui", help="Leave Prefect's UI and fresh orphans up to click on.")
    ] = False,
) -> None:
    """Kill real workers in mid-run before your eyes, and recover what they left."""
    from orphan_recovery.demo.story import tell_story

    raise typer.Exit(tell_story(leave_ui_up=ui))


def main() -> None:
    """Run the command line; every error that is not a bug is one line on standard error."""
    for command in app.registered_commands:
        assert command.callback is not None  # noqa: S101 - each is a function's
        command.callback = _naming_its_target(command.callback)
    try:
        app()
    except ConfigurationError as error:
        _fail(str(error), code=2)
    except BrokenPipeError:  # `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _naming_its_target(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but that an error of a target's database is a line that names the target."""

    @wraps(command)
    def named(**given: Any) -> Any:
        with _naming(given.get("target")):
            return command(**given)

    return named


@contextmanager
def _naming(target: str | None) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        from psycopg import Error
        from sqlalchemy.exc import DBAPIError

        if not isinstance(error, DBAPIError | Error | OSError):
            raise
        _fail(_explained(error, target), code=1)


def _explained(error: Exception, asked: str | None) -> str:
    """What went wrong, and what to see to, in a line."""
    from orphan_recovery.database import describe, is_unreachable, missing_right, where_address_is

    told, meant = describe(error), None
    with suppress(ConfigurationError):  # of `init` it is none yet; of several, none may be meant
        meant = find_target(asked)
    hint = missing_right(told, meant.name if meant else None)
    if meant and is_unreachable(told):
        hint = where_address_is(meant, told)
    return f"{told}{'' if told.endswith(('.', '?')) else '.'} {hint}" if hint else told


def _fail(message: str, *, code: int) -> NoReturn:
    typer.echo(f"orphan-recovery: {message}", err=True)
    sys.exit(code)


def _print_report(report: "SweepReport", *, name: bool) -> None:
    from orphan_recovery.cli.table import print_table
    from orphan_recovery.report import SHOWN
    from orphan_recovery.report_pages import as_table

    shown = as_table(report)
    print_table(shown)
    headline, named = report.headline(), f"{report.request.target.name}: "
    typer.echo(named + headline.removeprefix(named) if name else headline)
    if len(shown) < report.detected:
        where = f"the ledger has all, of sweep {report.request.sweep_id}"
        if report.request.dry_run:
            where = f"--json lists up to {SHOWN:,}"
        typer.echo(f"{len(shown)} of {report.detected} are shown: {where}")
    for step in report.next_steps():
        typer.echo(f"next: {step}", err=True)
