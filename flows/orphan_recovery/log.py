"""Structured log events: the message is the event's name, the fields travel in ``extra=``.

A worker's own logging set-up decides what becomes of them; the command line prints them with
their fields through :class:`EventFormatter`.
"""

import logging
from typing import Final

logger: Final = logging.getLogger("orphan_recovery")
"""Events: orphan_recovery_starting, orphaned_runs_detected, orphan_run_marked_crashed,
orphan_runs_marked_crashed (many), sweep_waits_for_another, sweep_gives_way,
failed_to_mark_orphan_crashed,
orphan_recovery_complete, orphan_recovery_failed, orphan_recovery_disabled,
no_orphaned_runs_found; for runs whose silence cannot be judged,
runs_without_sign_of_life and runs_ahead_of_database_clock; for doubt, sweep_looks_twice and
orphan_recovery_held; and from workers, beat_failed, beat_recovered, run_lost, verdict_contested
and contest_not_recorded."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class EventFormatter(logging.Formatter):
    """``time LEVEL event field=value …``, one line an event."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        fields = {k: v for k, v in vars(record).items() if k not in _STANDARD}
        shown = " ".join(f"{key}={value!r}" for key, value in fields.items())
        line = super().format(record)
        return f"{line} {shown}" if shown else line
