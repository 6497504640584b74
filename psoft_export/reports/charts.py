"""The pictures of a verification as inline SVG. Needs matplotlib (the `plot` extra).

They hold no text from files but the tooltips of marks, take their colours from the page
(`--chart-…`), so that they follow light and dark, and share a page without sharing ids.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from psoft_export.module_paths import layer_number, module_kind, without_numbers
from psoft_export.reports.wording import PERFECT_ULP, faults, in_ulp, number
from psoft_export.verification.figures import GeometryFigures, WeightFigures

_MOST_PANELS = 12
LABELLED = 5  # faults that `error_chart` numbers 1, 2, …
_WIDE = (1000, 220)  # pixels
_PANEL = (260, 160)
_NO_LAYER = "other"

# Colours that stand for the page's own.
_COLOURS = {
    "#000001": "ink",
    "#000002": "grid",
    "#000003": "mark",
    "#000004": "second",
    "#000005": "fault",
    "#000006": "zone",
}
_INK, _GRID, _MARK, _SECOND, _FAULT, _ZONE = _COLOURS
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "psoft-export",
    "font.size": 10,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


@dataclass(frozen=True)
class LayerAxis:
    """Where modules stand on an axis of layers.

    Attributes:
        slots: the layers' numbers in order, `other` last for modules without one; slot i is
            centred on x = i.
        positions: x of each module: beside each other where a slot holds several.
    """

    slots: tuple[str, ...]
    positions: tuple[float, ...]

    @property
    def is_sequence(self) -> bool:
        """Whether the modules follow each other layer by layer, so that a line can join them."""
        numbered = len(self.slots) - (_NO_LAYER in self.slots)
        in_order = list(self.positions) == sorted(set(self.positions))
        return in_order and all(x == int(x) and x < numbered for x in self.positions)


@dataclass(frozen=True)
class Panel:
    """A picture of the modules of one type: its name, how many, and the SVG."""

    name: str
    count: int
    svg: str


def layer_axis(modules: Sequence[str], slots_of: Sequence[str] | None = None) -> LayerAxis:
    """Place modules by layer.

    Args:
        modules: module paths.
        slots_of: the modules whose layers make the slots, where panels share an axis; default:
            `modules`.
    """
    numbers = [layer_number(module) for module in modules if slots_of is None]
    numbers += [layer_number(module) for module in slots_of or ()]
    layers = sorted({n for n in numbers if n is not None})
    slot = {n: i for i, n in enumerate(layers)} | {None: len(layers)}
    members: dict[int, list[int]] = {}
    for i, module in enumerate(modules):
        members.setdefault(slot[layer_number(module)], []).append(i)
    positions = [0.0] * len(modules)
    for centre, standing in members.items():
        for place, i in enumerate(standing):
            positions[i] = centre + 0.8 * ((place + 0.5) / len(standing) - 0.5)
    names = [str(n) for n in layers] + ([_NO_LAYER] if None in numbers else [])
    return LayerAxis(tuple(names), tuple(positions))


def module_types(modules: Sequence[str]) -> dict[str, list[int]]:
    """Modules by type, in the order of their first: name of the type → indices.

    Modules are of one type when their paths differ in numbers only; its name is the end of that
    path, as short as tells it from the others. Where that makes too many for a page, modules
    with the same last name are of one type.
    """
    patterns = list(dict.fromkeys(without_numbers(module) for module in modules))
    if len(patterns) <= _MOST_PANELS:
        names = {pattern: _short_name(pattern, patterns) for pattern in patterns}
    else:
        names = {pattern: module_kind(pattern) for pattern in patterns}
    types: dict[str, list[int]] = {}
    for i, module in enumerate(modules):
        types.setdefault(names[without_numbers(module)], []).append(i)
    return types


def _short_name(pattern: str, patterns: Sequence[str]) -> str:
    parts = pattern.split(".")
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        if sum(f".{other}".endswith(f".{end}") for other in patterns) == 1:
            return end
    return pattern


def error_chart(modules: Sequence[WeightFigures]) -> str:
    """The largest error of every module in ulp, by layer; modules with faults stand out."""
    axis = layer_axis([m.module for m in modules])
    wrong = faults(modules)
    numbers = {i: place for place, i in enumerate(wrong[:LABELLED], 1)}
    top = _top_of_errors(modules)
    with matplotlib.style.context(["default", _STYLE]):
        figure, panel = _figure(_WIDE, left=62, right=18, top=14, bottom=38)
        panel.set_yscale("symlog", linthresh=1, linscale=1)
        panel.set_ylim(0, top)
        panel.set_yticks(*_error_ticks(top))
        panel.minorticks_off()
        panel.axhspan(0, PERFECT_ULP, color=_ZONE, linewidth=0)
        panel.axhline(PERFECT_ULP, color=_INK, linewidth=1, dashes=(4, 3))
        panel.text(
            0.005,
            0,
            "perfect: 0.5 or less",
            transform=panel.get_yaxis_transform(),
            va="bottom",
            size=9,
        )
        for edge in range(1, len(axis.slots)):
            panel.axvline(edge - 0.5, color=_GRID, linewidth=0.4)
        titles = {}
        for i, (module, x) in enumerate(zip(modules, axis.positions, strict=True)):
            name, error = f"mark-{i}", module.largest_error_ulp
            _draw_mark(panel, x, error, top, name, faulty=i in wrong)
            titles[name] = f"{module.module}: {in_ulp(error)}"
            if i in numbers:
                height = min(error, top) if math.isfinite(error) else top
                panel.annotate(
                    str(numbers[i]),
                    (x, height),
                    xytext=(6, -4),
                    textcoords="offset points",
                    color=_FAULT,
                    weight="bold",
                    annotation_clip=False,
                )
        _set_layers(panel, axis, 24)
        panel.set_xlabel("layer")
        panel.set_ylabel("largest error (ulp)")
        label = f"Largest error of {len(modules)} modules in ulp, by layer"
        return _inline(figure, "errors", label, titles)


def delta_panels(modules: Sequence[WeightFigures]) -> list[Panel]:
    """‖ΔW‖ / ‖W‖ of every module, one panel a type, by layer."""
    values = [[m.relative_delta] for m in modules]
    return _panels("deltas", [m.module for m in modules], values, ["‖ΔW‖ / ‖W‖"], "")


def angle_panels(modules: Sequence[GeometryFigures]) -> list[Panel]:
    """The largest and the median rotation angle of every module, one panel a type, by layer."""
    values = [[m.largest_angle, m.median_angle] for m in modules]
    return _panels("angles", [m.module for m in modules], values, ["largest angle", "median"], "°")


def _panels(
    chart: str,
    modules: Sequence[str],
    values: Sequence[Sequence[float]],
    names: Sequence[str],
    unit: str,
) -> list[Panel]:
    """One panel a type, all to one scale; the first value of a module is its mark."""
    finite = [value for of_module in values for value in of_module if math.isfinite(value)]
    top = 1.08 * max(finite, default=0) or 1
    panels: list[Panel] = []
    for kind, members in module_types(modules).items():
        axis = layer_axis([modules[i] for i in members], slots_of=modules)
        with matplotlib.style.context(["default", _STYLE]):
            figure, panel = _figure(_PANEL, left=40, right=15, top=8, bottom=22)
            panel.set_ylim(0, top)
            ticks = [t for t in MaxNLocator(4).tick_values(0, top) if t <= top]
            panel.set_yticks(ticks, [number(t) + unit for t in ticks])
            panel.grid(axis="y")
            if axis.is_sequence:
                for colour, of_member in zip(
                    (_MARK, _SECOND), zip(*(values[i] for i in members), strict=True), strict=False
                ):
                    panel.plot(axis.positions, of_member, color=colour, linewidth=0.8)
            titles = {}
            for i, x in zip(members, axis.positions, strict=True):
                for name, value in list(zip(("mark", "second"), values[i], strict=False))[::-1]:
                    _draw_mark(panel, x, value, top, f"{name}-{i}", faulty=False)
                pairs = zip(names, values[i], strict=True)
                text = ", ".join(f"{name} {number(value)}{unit}" for name, value in pairs)
                titles[f"mark-{i}"] = f"{modules[i]}: {text}"
            _set_layers(panel, axis, 6)
            label = f"{names[0]} of {len(members)} modules, by layer"
            svg = _inline(figure, f"{chart}-{len(panels)}", label, titles)
            panels.append(Panel(kind, len(members), svg))
    return panels


def _figure(
    size: tuple[int, int], *, left: int, right: int, top: int, bottom: int
) -> tuple[Figure, Axes]:
    """A figure of one pixel a point, with margins in pixels."""
    width, height = size
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")
    FigureCanvasSVG(figure)
    room = (
        left / width,
        bottom / height,
        (width - left - right) / width,
        (height - top - bottom) / height,
    )
    return figure, figure.add_axes(room, facecolor="none")


def _draw_mark(panel: Axes, x: float, y: float, top: float, name: str, *, faulty: bool) -> None:
    """One module. What is not finite stands at the upper edge, as a cross."""
    finite = math.isfinite(y)
    hollow = name.startswith("second")
    colour = _FAULT if faulty or not finite else _SECOND if hollow else _MARK
    panel.plot(
        [x],
        [y if finite else top],
        linestyle="none",
        marker=("D" if faulty else "o") if finite else "X",
        markersize=6 if faulty or not finite else 4.5,
        markerfacecolor="none" if hollow else colour,
        markeredgecolor=colour,
        markeredgewidth=0.9 if hollow else 0.4,
        clip_on=False,
        gid=name,
    )


def _set_layers(panel: Axes, axis: LayerAxis, most: int) -> None:
    count = len(axis.slots)
    panel.set_xlim(-0.6, count - 0.4)
    last = count - 1
    ticks = [int(t) for t in MaxNLocator(most, integer=True).tick_values(0, last) if 0 <= t <= last]
    if _NO_LAYER in axis.slots:
        ticks = [t for t in ticks if last - t > 0.12 * count] + [last]
    panel.set_xticks(ticks, [axis.slots[t] for t in ticks])


def _top_of_errors(modules: Sequence[WeightFigures]) -> float:
    finite = [m.largest_error_ulp for m in modules if math.isfinite(m.largest_error_ulp)]
    largest = max(finite, default=0)
    return 1.0 if largest <= 1 else 10.0 ** math.ceil(math.log10(largest) + 0.1)


def _error_ticks(top: float) -> tuple[list[float], list[str]]:
    decades = round(math.log10(top))
    step = 1 + decades // 8
    ticks = [0, PERFECT_ULP, 1, *(10.0**n for n in range(step, decades + 1, step))]
    return ticks, [number(tick) for tick in ticks]


def _inline(figure: Figure, chart: str, label: str, titles: Mapping[str, str]) -> str:
    """The figure as an `svg` element for HTML.

    Args:
        figure: the figure.
        chart: its name, no other's on the page: every id starts with it.
        label: what it shows, for those who cannot see it.
        titles: tooltips of artists, by gid.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = ElementTree.fromstring(buffer.getvalue())
    for element in list(svg):
        if element.tag.endswith("metadata") or element.find("{*}style") is not None:
            svg.remove(element)
    for element in svg.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in [key for key in element.attrib if "}" in key]:
            element.set(key.rpartition("}")[2], element.attrib.pop(key))
        for key, value in element.items():
            element.set(key, _page_style(value))
        name = element.get("id", "")
        if name.startswith(("mark-", "second-")):
            element.set("class", name.partition("-")[0])
            if name in titles:
                title = ElementTree.Element("title")
                title.text = titles[name]
                element.insert(0, title)
    svg.attrib = {
        "class": "chart",
        "viewBox": svg.attrib["viewBox"],
        "role": "img",
        "aria-label": label,
    }
    _make_ids_unique(svg, chart)
    return ElementTree.tostring(svg, encoding="unicode").strip()


def _page_style(text: str) -> str:
    """An attribute with the page's colours and font."""
    text = re.sub(r"font-family: [^;]*;? ?", "", text)
    for colour, name in _COLOURS.items():
        text = text.replace(colour, f"var(--chart-{name})")
    return text


def _make_ids_unique(svg: ElementTree.Element, chart: str) -> None:
    """Put the chart's name before every id that is used; drop the others."""
    used = set()
    for element in svg.iter():
        for key, value in element.items():
            if key == "href" or value.startswith("url(#"):
                used.add(value.partition("#")[2].rstrip(")"))
                element.set(key, value.replace("#", f"#{chart}-"))
    for element in svg.iter():
        name = element.attrib.pop("id", None)
        if name in used:
            element.set("id", f"{chart}-{name}")
