"""The options that several commands have, in the same words."""

from typing import Annotated

import typer

from orphan_recovery.settings import DEFAULT_THRESHOLD_MINUTES, THRESHOLD_VARIABLE

TargetName = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="Which table, by its name in orphan-recovery.toml. Default: the one that "
        "ORPHAN_RECOVERY_TARGET names, else `default`, else the only one.",
        show_default=False,
    ),
]
AllTargets = Annotated[bool, typer.Option("--all-targets", help="Every target in the file.")]
Threshold = Annotated[
    int | None,
    typer.Option(
        help="Minutes of silence that make a run an orphan. Default: what the target's description "
        f"says, else {THRESHOLD_VARIABLE}, else {DEFAULT_THRESHOLD_MINUTES}.",
        show_default=False,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only look; write nothing at all.")]
Tenant = Annotated[str | None, typer.Option(help="Only runs of this tenant.")]
Worker = Annotated[str | None, typer.Option(help="Only runs held by this worker.")]
Limit = Annotated[
    int | None, typer.Option(help="Judge at most so many runs, longest silence first.")
]
Reason = Annotated[str, typer.Option(help="What the error text of each marked run begins with.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for a script to read.")]
