"""Verifications for people: the page and the summary say what the figures say, and no more."""

import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from markdown_it import MarkdownIt

from psoft_export import inspect
from psoft_export.errors import MissingExtraError, OutputError
from psoft_export.reports import charts, wording
from psoft_export.reports.page import check_page, render_page, write_page
from psoft_export.reports.summary import summary, write_summary
from psoft_export.verification.figures import (
    Generation,
    GeometryFigures,
    GeometryLevel,
    OutputDistance,
    OutputsLevel,
    VerificationReport,
    WeightFigures,
    WeightsLevel,
)
from tests.conftest import BUNDLED, EXAMPLES

VOID = {"meta", "wbr", "br", "img", "link", "input", "hr"}
RECORD = {"kind": "signs", "sha256": "ab" * 32, "svd": "full SVD, cpu, 2 threads, torch 2.13.0"}
RECORDED = {"record": RECORD, "solver": "block-lanczos/1", "dtype": "float64", "device": "cpu"}
UNRECORDED = {"record": None, "solver": "full", "dtype": "float32", "device": "cpu", "threads": 2}
HOSTILE = '<script>alert("1")</script> & $x$ `|` [a](http://b) \udcff'


class Page(HTMLParser):
    """A page taken apart; checks on the way that every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.titles: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "title":
            self.titles.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data
        if self.open[-1:] == ["title"]:
            self.titles[-1] += data

    def elements(self, name: str) -> list[dict[str, str | None]]:
        """Attributes of the elements with this class."""
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]


def source(name: str, *files: str) -> dict[str, Any]:
    return {
        "kind": "local",
        "name": name,
        "revision": None,
        "sha256": dict.fromkeys(files, "5" * 64),
    }


@pytest.fixture(scope="session")
def report() -> VerificationReport:
    """Nothing wrong; the rotations are those of a bundled adapter."""
    adapter = inspect(EXAMPLES / "adapters" / BUNDLED[1])
    geometry = [
        GeometryFigures(
            module=layer.module,
            strict=True,
            orthogonality_error=layer.orthogonality_error,
            norm_change=2e-15,
            angle_change=4e-7,
            energy_change=3e-15,
            basis_residual=1e-13,
            largest_angle=layer.angles[0],
            median_angle=layer.angles[len(layer.angles) // 2],
        )
        for layer in adapter.layers
    ]
    weights = [
        WeightFigures(
            module=layer.module,
            tensor=f"{layer.module}.weight",
            shape=(256, 768),
            dtype="BF16",
            largest_error_ulp=0.5,
            not_nearest=0,
            relative_error=0.0017,
            relative_delta=0.1 + place / 100,
            applied=1.0,
        )
        for place, layer in enumerate(adapter.layers)
    ]
    return VerificationReport(
        base=source("base", "config.json", "model.safetensors"),
        adapter=source(adapter.name, "adapter_model.safetensors", "psoft_basis.safetensors"),
        merged=source("merged", "model.safetensors"),
        method=adapter.method,
        basis=RECORDED,
        weights=WeightsLevel(tuple(weights), copied=11, saved=0, problems=()),
        geometry=GeometryLevel(tuple(geometry), problems=()),
        outputs=OutputsLevel(
            inputs="4 texts of 192 bytes",
            output="logits",
            dtype="BF16",
            truth="F32",
            positions=768,
            merged=OutputDistance(0.03, 0.41, 0.022, 2e-5, 0.997),
            unmerged=OutputDistance(0.04, 0.44, 0.024, 3e-5, 0.996),
            factor=1.5,
            generation=Generation(128, 1.0, 0.9921875),
            losses={"truth": 1.1397, "unmerged": 1.1399, "merged": 1.1398},
            skipped=None,
            problems=(),
        ),
        warnings=(),
    )


def with_faults(report: VerificationReport) -> VerificationReport:
    """Module 5 forgotten, module 9 a little off, module 12 not a number."""
    assert report.weights is not None
    modules = list(report.weights.modules)
    for place, error, wrong, applied in (
        (5, 3e4, 99, 0.0),
        (9, 2.6, 7, 1.0),
        (12, math.nan, 1, None),
    ):
        modules[place] = replace(
            modules[place], largest_error_ulp=error, not_nearest=wrong, applied=applied
        )
    problems = tuple(f"{modules[i].tensor}: is wrong" for i in (5, 9, 12))
    level = replace(report.weights, modules=tuple(modules), problems=problems)
    return replace(report, weights=level)


def renamed(report: VerificationReport, names: list[str]) -> VerificationReport:
    """The first modules under other names, and no others."""
    assert report.weights is not None and report.geometry is not None
    weights = [replace(m, module=n) for m, n in zip(report.weights.modules, names, strict=False)]
    geometry = [replace(m, module=n) for m, n in zip(report.geometry.modules, names, strict=False)]
    return replace(
        report,
        weights=replace(report.weights, modules=tuple(weights)),
        geometry=replace(report.geometry, modules=tuple(geometry)),
    )


def test_page_holds_everything_itself(report: VerificationReport) -> None:
    for html in (render_page(report), render_page(with_faults(report))):
        page = Page(html)
        ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        for tag, attrs in page.tags:
            assert tag not in ("script", "link", "img", "iframe", "object", "base")
            assert "src" not in attrs
            if "href" in attrs:
                assert (attrs["href"] or "").removeprefix("#") in ids
            assert not [name for name in attrs if name.startswith("on")]
        assert set(re.findall(r"url\((.)", html)) <= {"#"}
        assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)
        assert "@import" not in html and "http:" not in html and "https:" not in html
        assert "default-src 'none'" in html


def test_same_report_gives_the_same_bytes(
    report: VerificationReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_page(report, tmp_path / "a.html")
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20.0)
    write_page(report, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_verdict_is_the_head_of_page_and_summary(report: VerificationReport) -> None:
    unchecked = replace(report, weights=None, geometry=None, outputs=None)
    for case, title, sentence in (
        (report, "EQUIVALENT", "Checked: weights, geometry and outputs."),
        (with_faults(report), "NOT EQUIVALENT", "3 problems found"),
        (unchecked, "NOT CHECKED", "no verdict"),
    ):
        html = render_page(case)
        assert f"<h1>{title}</h1>" in html and sentence in html
        assert f"<title>{title}: merged</title>" in html
        head = summary(case).splitlines()
        assert head[0].split(" ", 2)[2] == title and sentence in head[2]


def test_a_basis_without_record_is_part_of_the_verdict(report: VerificationReport) -> None:
    unrecorded = replace(report, basis=UNRECORDED, warnings=("nobody knows the signs",))
    for text in (Page(render_page(unrecorded)).text, summary(unrecorded)):
        assert "EQUIVALENT" in text and "The basis was not recorded" in text
        assert "not recorded" in text and "nobody knows the signs" in text
    for text in (Page(render_page(report)).text, summary(report)):
        assert "recorded (signs; full SVD, cpu, 2 threads" in text and "not recorded" not in text


def test_every_module_has_its_row_and_faults_come_first(report: VerificationReport) -> None:
    assert report.weights is not None
    modules = [m.module for m in report.weights.modules]
    rows = [row for row in Page(render_page(report)).rows if row[0] in modules]
    assert [row[0] for row in rows] == modules * 2
    page = Page(render_page(with_faults(report)))
    rows = [row for row in page.rows if row[0][2:] in modules]
    assert [row[0] for row in rows] == [f"✕ {modules[i]}" for i in (12, 5, 9)]
    assert [row[3] for row in rows] == ["not a number", "30,000", "2.6"]
    # Error, entries, ‖ΔW‖ / ‖W‖, times applied; two angles, the orthogonality error.
    assert len(page.elements("worst")) == 4 + 3


def test_every_chart_holds_one_mark_a_module(report: VerificationReport) -> None:
    assert report.weights is not None
    modules = [m.module for m in report.weights.modules]
    for case in (report, with_faults(report)):
        page = Page(render_page(case))
        assert len(page.elements("mark")) == 3 * len(modules)
        assert len(page.elements("second")) == len(modules) + 1  # and one in the key
        for module in modules:
            told = [title for title in page.titles if title.startswith(f"{module}: ")]
            assert len(told) == 3
            assert any(re.search(r"\d ulp$|not a number$", title) for title in told)
            assert any("‖ΔW‖ / ‖W‖ 0." in title for title in told)
            assert any("largest angle" in title and "median" in title for title in told)


def test_faults_are_numbered_in_the_chart_and_named_below(report: VerificationReport) -> None:
    html = render_page(with_faults(report))
    labels = re.findall(r'<text style="[^"]*--chart-fault[^"]*"[^>]*>(\d)</text>', html)
    assert sorted(labels) == ["1", "2", "3"]
    assert "30,000 ulp" in html and "2.6 ulp" in html
    assert "perfect: 0.5 or less" in html and ">100,000</text>" in html
    assert ">10</text>" not in render_page(report)


def test_names_are_text_and_nothing_else(report: VerificationReport, tmp_path: Path) -> None:
    assert report.outputs is not None
    hostile = replace(
        renamed(report, [f"model.layers.0.{HOSTILE}", "model.layers.1.q_proj"]),
        base=source(HOSTILE, f"{HOSTILE}.safetensors"),
        method=HOSTILE,
        warnings=(HOSTILE,),
        outputs=replace(report.outputs, problems=(HOSTILE,)),
    )
    write_page(hostile, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_bytes().decode("utf-8")
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag in ("script", "a")]
    assert page.text.count(HOSTILE.replace("\udcff", "\\udcff")) >= 8
    write_summary(hostile, tmp_path / "summary.md")
    text = (tmp_path / "summary.md").read_text("utf-8")
    rendered = MarkdownIt("gfm-like", {"linkify": False}).render(text)
    assert "<script" not in rendered and "<a " not in rendered
    assert all(len(row) == 3 for row in Page(rendered).rows)
    assert Page(rendered).text.count(HOSTILE.replace("\udcff", "\\udcff")) >= 3


def test_levels_that_were_not_run_say_so(report: VerificationReport) -> None:
    assert report.outputs is not None
    skipped = replace(
        report.outputs,
        merged=None,
        unmerged=None,
        generation=None,
        losses=None,
        positions=0,
        skipped="the model needs 16.1 GB, more than there is",
    )
    case = replace(report, weights=None, outputs=skipped)
    page = Page(render_page(case))
    assert "Checked: geometry." in page.text and "It was not asked for." in page.text
    assert "the model needs 16.1 GB" in page.text and page.text.count("not run") == 2
    assert len(page.elements("mark")) == 28 and "ulp" not in page.text
    rows = Page(MarkdownIt("gfm-like", {"linkify": False}).render(summary(case))).rows
    assert [row[1:] for row in rows if row[0] in ("weights", "outputs")] == [
        ["⚪ not run", "It was not asked for."],
        ["⚪ not run", "the model needs 16.1 GB, more than there is"],
    ]
    only_weights = Page(render_page(replace(report, geometry=None, outputs=None)))
    assert len(only_weights.elements("mark")) == 56


def test_hidden_states_have_no_top_token(report: VerificationReport) -> None:
    assert report.outputs is not None
    distance = OutputDistance(0.03, 0.4, 0.02, None, None)
    outputs = replace(
        report.outputs,
        output="last_hidden_state",
        merged=distance,
        unmerged=distance,
        generation=None,
        losses=None,
    )
    page = Page(render_page(replace(report, outputs=outputs)))
    assert "last_hidden_state" in page.text and "RMS difference" in page.text
    assert "Same top token" not in page.text and "Task loss" not in page.text


def test_modules_stand_by_layer_and_those_without_a_number_last() -> None:
    names = ["lm_head", "layers.20.q", "layers.3.q", "layers.3.v"]
    axis = charts.layer_axis(names)
    assert axis.slots == ("3", "20", "other")
    assert axis.positions == pytest.approx((2, 1, -0.2, 0.2))
    assert not axis.is_sequence
    assert charts.layer_axis(["layers.3.q", "layers.20.q"], slots_of=names).is_sequence
    assert charts.layer_axis(["lm_head"]).slots == ("other",)
    assert charts.layer_axis([f"layers.{'9' * 5000}.q"]).slots == ("other",)


@pytest.mark.parametrize(
    ("modules", "types"),
    [
        (
            ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"],
            ["up_proj", "lm_head"],
        ),
        (
            ["layer.0.attention.output.dense", "layer.0.output.dense", "layer.0.query"],
            ["attention.output.dense", "*.output.dense", "query"],
        ),
        (["encoder.0.q", "decoder.0.q"], ["encoder.*.q", "decoder.*.q"]),
        ([f"layers.0.{part}.{name}" for part in "abcdefg" for name in "qk"], ["q", "k"]),
        (["blocks.0", "blocks.1"], ["*"]),
    ],
)
def test_a_type_is_named_as_short_as_tells_it_apart(modules: list[str], types: list[str]) -> None:
    found = charts.module_types(modules)
    assert list(found) == types
    assert sorted(i for members in found.values() for i in members) == list(range(len(modules)))


def test_hundreds_of_modules_of_one_layer_fit(report: VerificationReport) -> None:
    assert report.weights is not None
    many = [replace(report.weights.modules[0], module=f"m{i}.proj") for i in range(300)]
    assert charts.error_chart(many).count('class="mark"') == 300
    (panel,) = charts.delta_panels(many)
    assert panel.name == "proj" and panel.count == 300 == panel.svg.count('class="mark"')


def test_what_is_not_finite_is_drawn_and_named(report: VerificationReport) -> None:
    assert report.geometry is not None
    broken = replace(report.geometry.modules[0], largest_angle=math.inf, median_angle=math.nan)
    panels = charts.angle_panels([broken])
    assert "largest angle infinite°, median not a number°" in panels[0].svg
    level = replace(report.geometry, modules=(broken, *report.geometry.modules[1:]))
    assert "infinite" in Page(render_page(replace(report, geometry=level))).text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.5, "0.5"),
        (0.4999997, "0.5"),
        (0.5 + 1e-9, "0.5"),
        (0.50001, "0.50001"),
        (30211.4, "30,211"),
        (1.25e-15, "1.25e-15"),
        (4.2e9, "4.2e+09"),
        (math.nan, "not a number"),
    ],
)
def test_an_error_above_perfect_never_reads_as_perfect(value: float, text: str) -> None:
    assert wording.ulp(value) == text


def test_only_all_of_it_is_a_hundred_percent() -> None:
    assert [wording.share(s) for s in (1.0, 0.99999, 0.5)] == ["100 %", "99.99 %", "50.00 %"]


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_the_extra_the_way_out_is_named(
    package: str, report: VerificationReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page.html"
    path.write_text("as it was")
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "psoft_export.reports.charts")
    monkeypatch.setitem(sys.modules, package, None)
    says = rf"--report needs {package}: pip install 'psoft-export\[plot\]'"
    with pytest.raises(MissingExtraError, match=says):
        write_page(report, path)
    with pytest.raises(MissingExtraError, match=says):
        check_page(path)
    assert path.read_text() == "as it was"
    assert summary(report).startswith("## ✅ EQUIVALENT")


@pytest.mark.parametrize("name", ["none/page.html", ".", "n" * 250, "n" * 300])
def test_a_file_that_cannot_be_written_is_an_output_error(
    name: str, report: VerificationReport, tmp_path: Path
) -> None:
    for write in (write_page, write_summary):
        with pytest.raises(OutputError):
            write(report, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_problems_are_listed_all_on_the_page_and_ten_in_the_summary(
    report: VerificationReport,
) -> None:
    assert report.weights is not None
    problems = tuple(f"tensor {i}: is wrong" for i in range(37))
    case = replace(report, weights=replace(report.weights, problems=problems))
    page = Page(render_page(case))
    assert all(problem in page.text for problem in problems) and "and 27 more" in page.text
    lines = summary(case).splitlines()
    assert [line for line in lines if line.startswith("- ")] == [
        *(f"- {problem}" for problem in problems[:10]),
        "- and 27 more",
    ]


def test_summary_is_short_and_its_tables_are_tables(report: VerificationReport) -> None:
    text = summary(replace(report, base=source("base", *(f"{i}.safetensors" for i in range(30)))))
    rows = Page(MarkdownIt("gfm-like", {"linkify": False}).render(text)).rows
    assert [row[0] for row in rows] == [
        *("level", "weights", "geometry", "outputs"),
        *("compared", "base", "adapter", "merged"),
    ]
    assert all(len(row) == 3 for row in rows)
    assert rows[1][1] == "✅ equivalent" and "largest error 0.5 ulp" in rows[1][2]
    assert rows[3][2].startswith("RMS difference 0.03 (not merged: 0.04)")
    assert rows[5][2].endswith("and 27 more") and "555555555555" in rows[5][2]
    assert len(text) < 2500
