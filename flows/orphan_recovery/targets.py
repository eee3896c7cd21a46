"""Targets: which tables are swept, as ``orphan-recovery.toml`` and the environment describe them.

The hazard is a misspelt column that is quietly left out, a rule that matches nothing, a sweep of
another table than was meant. So every key is known or refused, by its file or variable, its name
and the way out; and nothing connects anywhere before the whole file is understood.

Without a file there is one target, ``default``: the table ``worker_runs``.
"""

import difflib
import os
import re
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from orphan_recovery.redact import redact
from orphan_recovery.settings import (
    CONFIG_VARIABLE,
    TARGET_VARIABLE,
    ConfigurationError,
    load_settings,
    own_environment,
)
from orphan_recovery.target import DEFAULT_TARGET, Columns, Elsewhere, Rule, Target

CONFIG_FILE: Final = "orphan-recovery.toml"
TARGETS_PREFIX: Final = "ORPHAN_RECOVERY_TARGETS"


class _Targets(BaseSettings):
    """The whole file; each value also by ``ORPHAN_RECOVERY_TARGETS__<TARGET>__<KEY>``."""

    model_config = SettingsConfigDict(
        env_prefix="ORPHAN_RECOVERY_", env_nested_delimiter="__", extra="forbid", frozen=True
    )

    targets: dict[str, Target] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: dict[str, Any]) -> dict[str, Any]:
        targets = data.get("targets")
        if not isinstance(targets, dict):
            return data
        named = {}
        for name, described in targets.items():
            if isinstance(described, dict):
                if "name" in described:
                    raise ValueError(f"targets.{name} has a key 'name': its heading is its name")
                described = {**described, "name": name}
            named[name] = described
        return {**data, "targets": named}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings  # the environment comes before the file


def load_targets() -> dict[str, Target]:
    """All targets, by name, in the order of the file, as it and the environment are now.

    Raises:
        ConfigurationError: the file cannot be read, or something in it cannot be used. Names the
            file or variable, the key, the value and the way out. All that is wrong at once.
    """
    return dict(_targets(*_read_file(), own_environment()))


@lru_cache(maxsize=1)
def _targets(path: Path, text: str, _environment: tuple[tuple[str, str], ...]) -> dict[str, Target]:
    """To read them takes a millisecond; a sweep that finds nothing takes few."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from None
    try:
        targets = _Targets(**data).targets
    except ValidationError as error:
        problems = [_explain(path, problem) for problem in error.errors()]
        raise ConfigurationError("; ".join(problems)) from None
    except ValueError as error:  # a variable that is no JSON where a list is wanted
        raise ConfigurationError(
            f"a variable {TARGETS_PREFIX}__… cannot be read: {error}; lists and tables are "
            "given as JSON there"
        ) from None
    _refuse_strangers(path, data, targets)
    _refuse_idle_rules(path, targets)
    alike: dict[str, str] = {}
    for name in targets:
        other = alike.setdefault(name.replace("_", "-"), name)
        if other != name:
            raise ConfigurationError(
                f"{path}: targets {other!r} and {name!r} differ only in - and _, so that what is "
                "named after them in Prefect would be the same: rename one"
            )
    return targets or {DEFAULT_TARGET: Target()}


def _refuse_strangers(path: Path, data: dict[str, Any], targets: dict[str, Target]) -> None:
    """A misspelt variable must not become a target of its own, on the default table."""
    described = data.get("targets", {})
    for name, target in targets.items():
        if name in described or name == DEFAULT_TARGET or "table" in target.model_fields_set:
            continue
        close = difflib.get_close_matches(name, [*described, DEFAULT_TARGET], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigurationError(
            f"a variable {TARGETS_PREFIX}__{name.upper()}__… is about a target {name!r}, which "
            f"{path} does not have: {hint}a target of the environment alone needs at least "
            f"{TARGETS_PREFIX}__{name.upper()}__TABLE"
        )


def _refuse_idle_rules(path: Path, targets: dict[str, Target]) -> None:
    """A rule for a status that is not in flight matches no run: by a ``never`` that is misspelt
    nothing would be protected."""
    idle = [
        f"{_place(path, ['targets', name, 'rules', str(number), 'match', 'status'])} is "
        f"{rule.match['status']!r}, which is none of in_flight "
        f"({', '.join(map(repr, target.in_flight))}): the rule would match no run; name one of "
        "these, or leave the rule out"
        for name, target in targets.items()
        for number, rule in enumerate(target.rules)
        if not rule.may_match_status(target.in_flight)
    ]
    if idle:
        raise ConfigurationError("; ".join(idle))


def find_target(name: str | None = None) -> Target:
    """The target of that name; without one, the target that is meant by default.

    That is the one that ``ORPHAN_RECOVERY_TARGET`` names, else ``default``, else the only one.

    Raises:
        ConfigurationError: there is no such target, or several and none of them is meant.
    """
    targets, asked = load_targets(), ""
    if name is None:
        name, asked = load_settings().target, f", which {TARGET_VARIABLE} names"
    if name is not None:
        if name not in targets:
            raise ConfigurationError(
                f"there is no target {name!r}{asked}; there is {', '.join(map(repr, targets))}"
                + ("" if _config_path() else f", and no file {CONFIG_FILE} in {Path.cwd()}: ")
                + ("" if _config_path() else f"name it by {CONFIG_VARIABLE}, with its whole path")
            )
        return targets[name]
    if DEFAULT_TARGET in targets:
        return targets[DEFAULT_TARGET]
    if len(targets) == 1:
        return next(iter(targets.values()))
    raise ConfigurationError(
        f"which target? There is {', '.join(map(repr, targets))}: name one, by --target or "
        f"{TARGET_VARIABLE}, or call one {DEFAULT_TARGET!r}"
    )


def default_threshold() -> int:
    """The threshold in minutes of the target that is meant by default.

    Where several are configured and none is meant, that of the environment.

    Raises:
        ConfigurationError: the file, or a variable, cannot be used.
    """
    targets, settings = load_targets(), load_settings()
    if settings.target is None and DEFAULT_TARGET not in targets and len(targets) > 1:
        return settings.threshold_minutes
    return find_target().threshold_minutes


def where(target: Target, *keys: str) -> str:
    """Where a value was given, for an error: its variable, or its place in the file."""
    path = _config_path() or Path(CONFIG_FILE)
    return _place(path, ["targets", target.name, *keys])


def _place(path: Path, keys: list[str]) -> str:
    given_by = {name.upper() for name in os.environ}
    for length in range(len(keys), 0, -1):  # a variable may hold a whole table, as JSON
        variable = "__".join([TARGETS_PREFIX, *keys[1:length]]).upper()
        if variable in given_by:
            inside = ".".join(keys[length:])
            return f"{variable}: {inside}" if inside else variable
    return f"{path}: {'.'.join(keys)}"


def no_file_told() -> str:
    """For an error that the file would have spared: that none was found, and where; or nothing."""
    if _config_path():
        return ""
    return f"; there is no {CONFIG_FILE} in {Path.cwd()}, and {CONFIG_VARIABLE} names none"


def _config_path() -> Path | None:
    """The file to read, or None where there is none and none was named."""
    named = load_settings().config
    if named is not None:
        return named
    path = Path(CONFIG_FILE)
    return path if path.exists() else None


def _read_file() -> tuple[Path, str]:
    path = _config_path()
    if path is None:
        return Path(CONFIG_FILE), ""
    try:
        return path, path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"{CONFIG_VARIABLE} names {str(path)!r}, which cannot be read from {Path.cwd()} "
            f"({error.strerror}): "
            "name the file that describes the targets, or unset it; for `init` to write to it, "
            "make an empty one first"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from None


_PLAINLY: Final = {
    "Input should be a valid integer": "Give a whole number",
    "Input should be a valid number": "Give a number",
    "Input should be a valid string": "Give a text",
    "Input should be a valid boolean": "Give true or false",
    "Input should be greater than or equal to": "Give at least",
    "Input should be less than or equal to": "Give at most",
    "Input should be greater than": "Give more than",
    "Input should be": "Give",
}
"""How pydantic says it, and how people do."""
_WHY_NONE: Final = re.compile(r", (unable to|got a number with) .*")
"""What it adds, and nobody needs who sees the value."""


def _explain(path: Path, problem: Any) -> str:
    keys = [str(part) for part in problem["loc"]]
    place = _place(path, keys)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(keys)
        close = difflib.get_close_matches(keys[-1], known, n=1)
        if close == known:
            return f"{place} is no key: did you mean {close[0]!r}?"
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"{place} is no key: {hint}known are {', '.join(known)}"
    message = problem["msg"].removeprefix("Value error, ")
    for told, meant in _PLAINLY.items():
        message = message.replace(told, meant)
    message = _WHY_NONE.sub("", message)
    value = problem["input"]
    if keys[-1:] in (["database_url_env"], ["database_url_secret"]) or problem["type"] == "missing":
        return f"{place}: {message[0].lower()}{message[1:]}"
    if isinstance(value, dict | list | tuple | BaseModel):
        return f"{place}: {message[0].lower()}{message[1:]}" if keys else f"{path}: {message}"
    return f"{place} is {redact(repr(value))}: {message[0].lower()}{message[1:]}"


def _known_keys(keys: list[str]) -> list[str]:
    """The keys that may stand where the last of ``keys`` does."""
    models: dict[str, type[BaseModel]] = {
        "columns": Columns,
        "worker_heartbeat": Elsewhere,
        "run_events": Elsewhere,
        "rules": Rule,
    }
    if len(keys) == 1:
        return ["targets"]
    model = models.get(keys[2], Target) if len(keys) > 3 else Target
    return [name for name in model.model_fields if (model, name) != (Target, "name")]


ORPHAN_THRESHOLD_MINUTES: int = default_threshold()
"""Minutes of silence that make an orphan; environment variable of the same name, default 30. A
target that is meant by default and has a threshold of its own comes before it."""
