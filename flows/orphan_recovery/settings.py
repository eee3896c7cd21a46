"""What the environment decides: the threshold, the switch, the database, which target.

The hazard is a bad value that is read as a good one: a threshold of 0 would call every run in
flight an orphan. So a value that is not understood is refused by the name of its variable, with
the way out, and nothing is guessed.
"""

import os
from functools import lru_cache
from pathlib import Path

from pydantic import AliasChoices, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

DEFAULT_THRESHOLD_MINUTES = 30
MAX_THRESHOLD_MINUTES = 5_256_000
"""Ten years. A larger number is a slip of the finger, and would overflow an interval."""

APPROVED_MINUTES = 60
"""How long an approval of a hold lasts, unless the person says otherwise."""
MAX_APPROVED_MINUTES = 10_080
"""A week: what is released for longer is forgotten, and then marks what nobody looked at."""

THRESHOLD_VARIABLE = "ORPHAN_THRESHOLD_MINUTES"
ENABLED_VARIABLE = "ORPHAN_RECOVERY_ENABLED"
DATABASE_VARIABLES = ("ORPHAN_RECOVERY_DATABASE_URL", "DATABASE_URL")
TARGET_VARIABLE = "ORPHAN_RECOVERY_TARGET"
CONFIG_VARIABLE = "ORPHAN_RECOVERY_CONFIG"

_WAY_OUT = {
    THRESHOLD_VARIABLE: (
        f"set it to a whole number of minutes from 1 to {MAX_THRESHOLD_MINUTES}, "
        f"or unset it for the default of {DEFAULT_THRESHOLD_MINUTES}"
    ),
    ENABLED_VARIABLE: "set it to true or false, or unset it for the default of true",
}


class ConfigurationError(ValueError):
    """Something a person must set right; its message names the thing, the value and the way out.

    Never retried: the same configuration gives the same error.
    """


class Settings(BaseSettings):
    """The environment as it was read, checked and typed. An empty variable counts as unset."""

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, extra="ignore")

    threshold_minutes: int = Field(
        DEFAULT_THRESHOLD_MINUTES,
        ge=1,
        le=MAX_THRESHOLD_MINUTES,
        validation_alias=THRESHOLD_VARIABLE,
    )
    recovery_enabled: bool = Field(True, validation_alias=ENABLED_VARIABLE)
    database_url: SecretStr | None = Field(None, validation_alias=AliasChoices(*DATABASE_VARIABLES))
    target: str | None = Field(None, validation_alias=TARGET_VARIABLE)
    """Which target is meant where none is named: see :mod:`orphan_recovery.targets`."""
    config: Path | None = Field(None, validation_alias=CONFIG_VARIABLE)
    """Where the targets are described; see :mod:`orphan_recovery.targets`."""


def own_environment() -> tuple[tuple[str, str], ...]:
    """The variables that may be about recovery: while they stay the same, so does what they say."""
    ours = ("ORPHAN_", *DATABASE_VARIABLES)
    return tuple(pair for pair in os.environ.items() if pair[0].upper().startswith(ours))


def load_settings() -> Settings:
    """What the environment says now.

    Returns:
        The checked settings.

    Raises:
        ConfigurationError: a variable holds a value that cannot be used. The message names the
            variable, the value (never that of a database address) and what would be accepted.
    """
    return _settings(own_environment())


@lru_cache(maxsize=1)
def _settings(_environment: tuple[tuple[str, str], ...]) -> Settings:
    try:
        return Settings()
    except ValidationError as error:
        problems = [_explain(str(e["loc"][0]), e["input"], e["msg"]) for e in error.errors()]
        raise ConfigurationError("; ".join(problems)) from None


def check_threshold(minutes: object) -> int:
    """Accept a threshold given as an argument, or refuse it by name.

    Args:
        minutes: the silence that makes an orphan, in whole minutes.

    Returns:
        The same number, now known to be usable.

    Raises:
        ConfigurationError: not a whole number from 1 to ``MAX_THRESHOLD_MINUTES``.
    """
    whole = isinstance(minutes, int) and not isinstance(minutes, bool)
    if not whole or not 1 <= minutes <= MAX_THRESHOLD_MINUTES:  # type: ignore[operator]
        raise ConfigurationError(
            f"threshold_minutes is {minutes!r}: give a whole number of minutes "
            f"from 1 to {MAX_THRESHOLD_MINUTES}"
        )
    return minutes  # type: ignore[return-value]


def _explain(variable: str, value: object, problem: str) -> str:
    way_out = _WAY_OUT.get(variable)
    if way_out is None:  # an address: its value may hold a password
        return f"{variable} cannot be used: {problem}"
    return f"{variable} is {value!r}: {way_out}"


RECOVERY_ENABLED: bool = load_settings().recovery_enabled
"""Whether recovery may mark runs, as the process found it when it started; environment variable
ORPHAN_RECOVERY_ENABLED, default true."""
