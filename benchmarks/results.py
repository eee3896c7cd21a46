"""Results: figures of two sides that were measured in turn, and how they stand to a goal."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure is to be."""

    limit: float
    at_least: bool = False

    def is_met(self, figure: float) -> bool:
        return figure >= self.limit if self.at_least else figure <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Side:
    """The rounds of one side, all in one unit."""

    name: str
    values: Sequence[float]
    unit: str

    def __str__(self) -> str:
        return f"{self.name}: {number(median(self.values))} {self.unit}"


@dataclass(frozen=True, slots=True)
class Result:
    """One figure: a ratio unless ``unit`` says otherwise, one value a round."""

    name: str
    values: Sequence[float]
    goal: Goal | None = None
    """None: for information."""
    unit: str = ""
    sides: Sequence[Side] = ()
    notes: Sequence[str] = ()
    is_judged: bool = True

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def verdict(self) -> str:
        if self.goal is None or not self.is_judged:
            return ""
        return "ok" if self.goal.is_met(self.median) else "missed"

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        goal = f" (goal {self.goal}{unit}: {self.verdict})" if self.verdict else ""
        sides = f"; {'; '.join(map(str, self.sides))}" if self.sides else ""
        return f"{self.name}: {number(self.median)}{unit}{goal}{sides}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "goal": self.goal and str(self.goal),
            "verdict": self.verdict,
            "unit": self.unit or "ratio",
            "median": self.median,
            "values": list(self.values),
            "sides": [
                {
                    "name": side.name,
                    "unit": side.unit,
                    "median": median(side.values),
                    "values": list(side.values),
                }
                for side in self.sides
            ],
            "notes": list(self.notes),
        }


Point = dict[str, float]


@dataclass(slots=True)
class Measured:
    """What one subject found: results, and series to be drawn."""

    results: list[Result] = field(default_factory=list)
    series: dict[str, list[Point]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured. ``FULL`` is what the goals are about; ``QUICK`` is a smoke test."""

    rounds: int = 5
    rows: int = 1_000_000
    orphans: int = 100_000
    loop: int = 10_000
    """Of the orphans, those that the usual loop marks in a round: its rate is the same for all."""
    memory: tuple[int, int] = (10_000, 1_000_000)
    scaling: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    in_flight: int = 50_000
    found: int = 100
    """Orphans that detection finds."""
    tables: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    in_flights: tuple[int, ...] = (1_000, 10_000, 100_000)
    looks: int = 30
    """Detections of one round."""
    tasks: int = 1_000
    task_each_up_to: int = 1_000
    flow_rounds: int = 5
    starts: int = 15
    load_rounds: int = 3
    """Minutes each, of which a sweep that gives way takes most."""
    alone_seconds: float = 60.0
    """Of workers by themselves, before a sweep that gives way and after it."""
    load_seconds: float = 8.0
    """The same of what takes seconds."""
    peers: int = 10_000
    all_in_flight: int = 10_000_000
    """Runs in flight in one table, all of them."""
    targets: int = 1_000
    flow_targets: int = 50
    """Of those, the ones that the flow of all targets sweeps."""


FULL: Final = Size()
QUICK: Final = Size(
    rounds=1,
    rows=4_000,
    orphans=1_000,
    loop=200,
    memory=(200, 1_000),
    scaling=(200, 1_000),
    in_flight=1_000,
    found=10,
    tables=(2_000, 8_000),
    in_flights=(100, 1_000),
    looks=3,
    tasks=10,
    task_each_up_to=100,
    flow_rounds=1,
    starts=1,
    load_rounds=1,
    alone_seconds=0.5,
    load_seconds=0.5,
    peers=200,
    all_in_flight=20_000,
    targets=5,
    flow_targets=3,
)


def number(value: float) -> str:
    """As few digits as tell it."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def as_table(results: Sequence[Result]) -> Table:
    """Every figure with its goal, for people."""
    table = Table(title="Figures, each the median of its rounds", title_justify="left")
    for column in ("name", "goal", "median (min .. max)", "sides", ""):
        table.add_column(column, overflow="fold")
    for result in results:
        unit = f" {result.unit}" if result.unit else ""
        spread = f"{number(min(result.values))} .. {number(max(result.values))}"
        colour = {"ok": "green", "missed": "red"}.get(result.verdict, "")
        table.add_row(
            result.name,
            f"{result.goal}{unit}" if result.goal else "",
            f"{number(result.median)}{unit} ({spread})",
            "\n".join([*map(str, result.sides), *result.notes]),
            f"[{colour}]{result.verdict}[/]" if colour else "",
        )
    return table
