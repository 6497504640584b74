"""A picture of what `recover` reaches, from the results of `recovery.py`."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.recovery import (
    ARITHMETIC,
    CORPORA,
    QUARTER,
    STEPS,
    STUDIED_STEPS,
    VARIANTS,
    Case,
    Result,
)

PANEL_INCHES = (3.7, 2.9)
COLOURS = dict(zip(CORPORA, ("tab:blue", "tab:orange", "tab:green"), strict=True))
Measure = Callable[[Result], float]
# What is drawn upwards, with what is aimed at.
MEASURES: tuple[tuple[str, Measure, float], ...] = (
    ("right signs, %", lambda r: 100 * r.right, 99.5),
    ("held-out loss above that\nof the true signs, %", lambda r: 100 * r.above_true, 0.5),
)
# What the panels of a column vary: the field of a case, its name, and the measure of it.
VARIED: tuple[tuple[str, str, Measure], ...] = (
    ("kilobytes", "text, KB", lambda r: r.case.kilobytes),
    ("steps", "gradient steps", lambda r: r.steps),
    ("adapter", "rank", lambda r: r.rank),
    ("adapter", "median angle, degrees", lambda r: r.angle),
)


def draw(results: Sequence[Result], file: Path) -> None:
    """Draw the share of right signs, and the held-out loss, against what the study varied.

    A line is one adapter from one kind of signs; a cross marks what is not `recovered`, a dotted
    line what is aimed at. What no two results differ in is left out. Below 1 % the scale of the
    loss is linear, above it logarithmic.

    Args:
        results: of the study, or of a part of it.
        file: picture to write.
    """
    width, height = PANEL_INCHES
    columns = ((*what, list(_lines(results, *what[:2]))) for what in VARIED)
    drawn = [column for column in columns if column[-1]]
    figure = Figure(figsize=(width * len(drawn), height * len(MEASURES)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(MEASURES), len(drawn), squeeze=False)
    for column, (varied, name, along, found) in enumerate(drawn):
        for row, (label, measure, aim) in enumerate(MEASURES):
            panel = axes[row][column]
            if row:
                panel.set_yscale("symlog", linthresh=1)
                panel.yaxis.set_major_formatter("{x:g}")
            for line in found:
                _draw_line(panel, sorted(line, key=along), along, measure)
            if varied != "steps":
                panel.set_xscale("log", base=2)
                panel.xaxis.set_major_formatter("{x:g}")
            panel.set_xlabel(name)
            panel.axhline(aim, color="black", linestyle=":", linewidth=1)
            if row:
                bottom, top = panel.get_ylim()
                panel.set_ylim(min(bottom, -0.5), max(top, 1))
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(label)
    axes[0][0].legend(fontsize=7)
    figure.savefig(file, dpi=110)


def _lines(results: Sequence[Result], varied: str, name: str) -> Iterator[list[Result]]:
    """Two results or more that differ in nothing but what is varied, line by line."""
    if varied == "adapter":
        angles = {ARITHMETIC, *(v for v in VARIANTS if v.startswith(ARITHMETIC))}
        ranks = {ARITHMETIC, *VARIANTS.keys() - angles}
        among = ranks if name == "rank" else angles
        line = [r for r in results if r.case.adapter in among and _is_plain(r.case, "random", "")]
        if len(line) > 1:
            yield line
        return
    for adapter in CORPORA:
        for start in ("random", "numpy"):
            line = [
                r for r in results if r.case.adapter == adapter and _is_plain(r.case, start, varied)
            ]
            if len(line) > 1:
                yield line


def _is_plain(case: Case, start: str, varied: str) -> bool:
    """Whether a case is of one kind of signs, and else as usual but for one field."""
    usual: dict[str, tuple[object, ...]] = {
        "kilobytes": (16,),
        "steps": (STEPS, STUDIED_STEPS) if start == "random" else (QUARTER,),
        "seed": (0,),
        "text": ("",),
    }
    return case.start == start and all(
        getattr(case, field) in values for field, values in usual.items() if field != varied
    )


def _draw_line(panel: Axes, line: Sequence[Result], along: Measure, measure: Measure) -> None:
    case = line[0].case
    panel.plot(
        [along(r) for r in line],
        [measure(r) for r in line],
        color=COLOURS[case.corpus],
        linestyle="-" if case.start == "random" else "--",
        marker="o" if case.start == "random" else "s",
        markersize=4,
        label=f"{case.corpus}, {case.start}",
    )
    failed = [r for r in line if r.verdict != "recovered"]
    panel.plot([along(r) for r in failed], [measure(r) for r in failed], "kx", markersize=9)
