"""Pictures of adapters and their combinations, for reports. Needs matplotlib (the `plot` extra)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from psoft_export.errors import MissingExtraError, OutputError, UsageError
from psoft_export.inspection import AdapterSummary, LayerSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from psoft_export.evaluating import Sweep

_PANEL_INCHES = (3.4, 2.7)
_COLUMNS = 4


def plot_rotation_angles(summary: AdapterSummary, file: Path) -> None:
    """Draw the rotation-angle spectrum of every layer, one panel a module type.

    Each line is one layer's angles in descending order; its colour is the layer's number.

    Args:
        summary: what `psoft_export.inspect` returned.
        file: picture to write; its suffix chooses the format (png, svg, pdf).

    Raises:
        MissingExtraError: matplotlib is not installed.
        UsageError: the method has no rotation angles.
        OutputError: the file cannot be written, or its suffix is unknown.
    """
    drawn = [layer for layer in summary.layers if layer.angles]
    if not drawn:
        raise UsageError(f"{file}: {summary.method}: has no rotation angles to draw")
    check_picture(file)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    groups: dict[str, list[LayerSummary]] = {}
    for layer in drawn:
        groups.setdefault(layer.kind, []).append(layer)
    columns = min(_COLUMNS, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(
        figsize=(_PANEL_INCHES[0] * columns + 0.8, _PANEL_INCHES[1] * rows + 0.8),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    last = max((layer.layer or 0 for layer in drawn), default=0)
    colours = ScalarMappable(Normalize(0, max(last, 1)), "viridis")
    for panel, (kind, layers) in zip(panels.flat, groups.items(), strict=False):
        _draw_panel(panel, kind, layers, colours)
    for panel in panels.flat[len(groups) :]:
        panel.set_axis_off()
    for panel in panels.flat[max(0, len(groups) - columns) : len(groups)]:
        panel.tick_params(labelbottom=True)  # the lowest panel of its column
    panels.flat[0].set_ylim(0, 1.04 * max(layer.angles[0] for layer in drawn) or 1)
    in_subspace = summary.rank is not None
    what = "direction in the principal subspace" if in_subspace else "rotation of two inputs"
    figure.supxlabel(f"{what}, sorted by angle")
    figure.supylabel("rotation angle (degrees)")
    rank = f", r = {summary.rank}" if in_subspace else ""
    figure.suptitle(f"{summary.name}: {summary.method}{rank}")
    if last > 0:
        bar = figure.colorbar(colours, ax=panels, label="layer")
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, file)


def plot_sweep(sweep: "Sweep", file: Path) -> None:
    """Draw the losses of a sweep over the scale of the weights, one panel a text.

    Each line is a method; the level lines are the base and each adapter alone.

    Args:
        sweep: what `psoft_export.sweep` returned.
        file: picture to write; its suffix chooses the format (png, svg, pdf).

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written, or its suffix is unknown.
    """
    check_picture(file)
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts = list(sweep.table.losses)
    figure = Figure(figsize=(4.2 * len(texts) + 2.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    methods = list(dict.fromkeys(point.method for point in sweep.points))
    for panel, text in zip(panels, texts, strict=True):
        known = sweep.table.losses[text]
        for number, method in enumerate(methods):
            points = [p for p in sweep.points if p.method == method and text in p.losses]
            panel.plot(
                [p.scale for p in points],
                [p.losses[text] for p in points],
                marker=".",
                color=colormaps["tab20"](number),
                label=method,
            )
        for name, style in zip(known, ("--", "-.", ":", (0, (1, 3))) * len(known), strict=False):
            if name != "combination":
                panel.axhline(known[name], color="grey", linestyle=style, linewidth=1, label=name)
        # What goes astray would flatten all that does not.
        panel.set_ylim(0.95 * min(known.values()), 1.3 * known["base"])
        panel.set_title(text, fontsize=10)
        panel.set_xlabel("weights times")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss (nats per token)")
    panels[-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8)
    figure.suptitle(f"weights of {sweep.table.combination.rpartition(',')[0]}, times", fontsize=11)
    _save(figure, file)


def check_picture(file: Path) -> None:
    """Check, before the work, that a picture can be drawn into a file.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the file has no suffix that is known, or no folder.
    """
    with plot_extra("--plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    known = FigureCanvasAgg.get_supported_filetypes()
    if file.suffix.removeprefix(".") not in known:
        raise OutputError(f"{file}: its name needs a suffix: .png, .svg or .pdf")
    if not file.absolute().parent.is_dir():
        raise OutputError(f"{file.absolute().parent}: no such folder to put '{file.name}' in")


def _save(figure: "Figure", file: Path) -> None:
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as cause:
        raise OutputError(f"{file}: cannot be written ({cause})") from cause


@contextmanager
def plot_extra(option: str) -> Iterator[None]:
    """Within it, an import that fails becomes `MissingExtraError`, with the way out.

    Args:
        option: what the user asked for (`--plot`).
    """
    try:
        yield
    except ImportError as cause:
        package = (cause.name or "matplotlib").partition(".")[0]
        raise MissingExtraError(
            f"{option} needs {package}: pip install 'psoft-export[plot]'"
        ) from cause


def _draw_panel(panel: "Axes", kind: str, layers: list[LayerSummary], colours: object) -> None:
    for layer in layers:
        colour = colours.to_rgba(layer.layer or 0)  # type: ignore[attr-defined]
        panel.plot(range(1, len(layer.angles) + 1), layer.angles, color=colour, linewidth=1.2)
    panel.set_title(f"{kind} ({len(layers)})", fontsize=10)
    panel.grid(alpha=0.3)
