"""Words: times, lengths of time and numbers as people read them."""

from datetime import UTC, datetime, timedelta


def iso(instant: datetime) -> str:
    """An aware time as text, in UTC and to the second."""
    return instant.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def span(length: timedelta) -> str:
    """A length of time for people: ``30 min``, ``1 h 5 min``, ``4 s``."""
    seconds = max(1, round(length.total_seconds()))
    parts = [("d", seconds // 86_400), ("h", seconds // 3_600 % 24), ("min", seconds // 60 % 60)]
    told = [f"{number} {unit}" for unit, number in (*parts, ("s", seconds % 60)) if number]
    return " ".join(told[:2])


def some_of(names: list[str], count: int) -> str:
    """Some of ``count`` by name, and how many more there are, in brackets; or nothing."""
    if not names:
        return ""
    more = count - len(names)
    return f" ({', '.join(names)}{f' and {more} more' if more > 0 else ''})"


def counted(number: int, what: str) -> str:
    """So many of them: ``1 run``, ``2 runs``."""
    return f"{number} {what}{'' if number == 1 else 's'}"
