"""Structured log events: the message is the event's name, the fields travel in ``extra=``.

A worker's own logging set-up decides what becomes of them; the command line prints them with
their fields through :class:`EventFormatter`.
"""

import logging
from typing import Final

logger: Final = logging.getLogger("orphan_recovery")
"""Emits the events that ``docs/events.md`` explains, one by one."""

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
