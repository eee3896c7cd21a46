"""Structured log events: the message is the event's name, the fields travel in ``extra=``.

A worker's own logging set-up decides what becomes of them; the command line prints them with
their fields through :class:`EventFormatter`, or says no more than why it waits.
"""

import logging
import sys
import traceback
from contextlib import suppress
from typing import Any, Final


class _Unfailing(logging.Logger):
    """A logger whose caller goes on, whatever a host's logging makes of an event.

    Its own factory of records may have a field of a name that an event has, which the standard
    library refuses; its filters and handlers may raise. A sweep, or a beat, is worth more.
    """

    def makeRecord(  # noqa: N802 - the standard library's own name
        self,
        name: Any,
        level: Any,
        fn: Any,
        lno: Any,
        msg: Any,
        args: Any,
        exc_info: Any,
        func: Any = None,
        extra: Any = None,
        sinfo: Any = None,
    ) -> logging.LogRecord:
        record = super().makeRecord(name, level, fn, lno, msg, args, exc_info, func, None, sinfo)
        vars(record).update(extra or {})
        return record

    def handle(self, record: logging.LogRecord) -> None:
        try:
            super().handle(record)
        except Exception:  # told as logging tells what goes wrong in a handler
            if logging.raiseExceptions:
                with suppress(Exception):
                    traceback.print_exc(file=sys.stderr)


def _unfailing(found: logging.Logger) -> logging.Logger:
    """The same logger, of whatever class the host has given it, and unfailing."""
    found.__class__ = type(_Unfailing.__name__, (_Unfailing, type(found)), {})
    return found


logger: Final = _unfailing(logging.getLogger("orphan_recovery"))
"""Emits the events that ``docs/events.md`` explains, one by one."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class EventFormatter(logging.Formatter):
    """``time LEVEL event field=value …``, one line an event."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return _with_fields(super().format(record), record)


class FieldsAfter(logging.Formatter):
    """Another formatter's line; of an event, and of nothing else, with the fields after it."""

    def __init__(self, plain: logging.Formatter) -> None:
        super().__init__()
        self.plain = plain

    def format(self, record: logging.LogRecord) -> str:
        line = self.plain.format(record)
        return _with_fields(line, record) if record.name == logger.name else line


def _with_fields(line: str, record: logging.LogRecord) -> str:
    fields = {k: v for k, v in vars(record).items() if k not in _STANDARD}
    shown = " ".join(f"{key}={value!r}" for key, value in fields.items())
    return f"{line} {shown}" if shown else line


_WAITS: Final = {
    "sweep_looks_twice": "The sweep looks again in {wait_seconds:.0f} s, because {reasons}.",
    "sweep_waits_for_another": (
        "Another sweep of this table is at work: this one waits for it, ten seconds at most."
    ),
    "sweep_gives_way": (
        "Others write to this server: the sweep marks in small slices, with pauses, for five "
        "minutes at most."
    ),
}


class WaitFormatter(logging.Formatter):
    """One plain sentence for who wonders why a sweep takes its time."""

    def format(self, record: logging.LogRecord) -> str:
        return _WAITS[str(record.msg)].format_map(vars(record))


def say_why_it_waits(longest_seconds: float) -> None:
    """Print on standard error what a sweep waits for, and no other event.

    Nothing where each event is shown already; and nothing of what the sweep would have to wait for
    longer than ``longest_seconds``: that is left to the next one, as its headline says.
    """
    if logger.isEnabledFor(logging.INFO):
        return
    handler = logging.StreamHandler()
    handler.setFormatter(WaitFormatter())
    handler.addFilter(
        lambda record: (
            record.msg in _WAITS and vars(record).get("wait_seconds", 0) <= longest_seconds
        )
    )
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
