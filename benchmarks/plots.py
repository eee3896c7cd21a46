"""Plots: the series of a result file, drawn for the documentation. Needs the extra ``bench``.

python -m benchmarks.plots
"""

import json
from pathlib import Path
from typing import Any, Final

from rich.console import Console

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = Path(__file__).with_name("results.json")
STYLES: Final = ("o-", "s--", "^:")


def draw(series: dict[str, list[dict[str, float]]], folder: Path) -> list[Path]:
    """Write what there are series for; nothing without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return []
    mpl.use("Agg")
    drawn = []
    if "rates" in series:
        path = folder / "benchmark-rates.png"
        _draw(
            [("orphans", series["rates"], ("start-up path", "bare statement", "loop"))],
            "orphans marked a second",
            path,
        )
        drawn.append(path)
    if "detection by rows" in series:
        path = folder / "benchmark-detection.png"
        both = ("detection", "bare query")
        _draw(
            [
                ("rows", series["detection by rows"], both),
                ("in flight", series["detection by in flight"], both),
            ],
            "milliseconds a look",
            path,
        )
        drawn.append(path)
    return drawn


def _draw(
    panels: list[tuple[str, list[dict[str, float]], tuple[str, ...]]], unit: str, path: Path
) -> None:
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure, all_axes = pyplot.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 3.6), sharey=True, squeeze=False
    )
    drawn = [point[line] for _, points, lines in panels for point in points for line in lines]
    for axes, (over, points, lines) in zip(all_axes[0], panels, strict=True):
        for line, style in zip(lines, STYLES, strict=False):
            axes.plot(
                [point[over] for point in points], [point[line] for point in points], style,
                label=line,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(_in_short)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(over)
        axes.set_ylim(min(drawn) / 1.5, max(drawn) * 1.5)
        axes.grid(visible=True, alpha=0.3)
    all_axes[0][0].set_ylabel(unit)
    all_axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _in_short(value: float, _: object) -> str:
    return f"{value / 1_000:g}k" if value >= 1_000 else f"{value:g}"


if __name__ == "__main__":
    told: dict[str, Any] = json.loads(RESULTS.read_text())
    paths = [str(path) for path in draw(told["series"], ROOT / "docs")]
    Console().print(*paths or ["matplotlib is not there: pip install 'orphan-recovery[bench]'"])
