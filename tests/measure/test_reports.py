"""Reports as pages: whole, self-contained, and with what a reader looks for."""

from __future__ import annotations

import builtins
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from report_pages import (
    ABOUT,
    HOSTILE,
    LONG,
    hostile_page,
    left_float,
    measured,
    pages,
    tuned,
)

from qrecipe.errors.findings import QRecipeError
from qrecipe.execution.provenance import Provenance
from qrecipe.measure.drift.distribution import Histogram
from qrecipe.measure.drift.report import Drift, SiteDrift
from qrecipe.measure.drift.stored_ranges import QRange
from qrecipe.measure.pages import charts
from qrecipe.measure.pages.page import Page, check_writable, page_html, save_page
from qrecipe.measure.pages.reports import drift_page, ranking_page
from qrecipe.measure.pages.sections import Bar, Bars, Drawing, Figure
from qrecipe.terminal.report import Listing, Table, Text


class Checked(HTMLParser):
    """Notes tags that do not match and everything that would leave the page."""

    WITHIN = ("data:image/svg+xml;base64,", "#")
    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self):
        super().__init__()
        self.open, self.problems, self.seen, self.words = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        for name, value in attrs:
            if name in ("src", "href") and not value.startswith(self.WITHIN):
                self.problems.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.problems.append(f"{tag} {name}")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}>")

    def handle_data(self, data):
        self.words.append(data)


def checked(html):
    parser = Checked()
    parser.feed(html)
    parser.close()
    assert parser.problems == []
    assert parser.open == []
    return parser


@pytest.mark.parametrize("name", ["drift", "comparison", "sensitivity", "tuning", "hostile"])
def test_pages_are_well_formed_and_need_nothing_from_elsewhere(name):
    html = page_html(hostile_page() if name == "hostile" else pages()[name])
    assert html.startswith("<!DOCTYPE html>\n")
    seen = checked(html).seen
    assert seen.count("head") == seen.count("h1") == 1
    assert not {"script", "link", "iframe", "object"} & set(seen)
    assert "@import" not in html
    assert "url(" not in html
    assert "\u202e" not in html


@pytest.mark.parametrize("name", ["drift", "comparison", "sensitivity", "tuning"])
def test_pages_hold_ranking_depth_histograms_plan_recipe_and_versions(name):
    page = pages()[name]
    titles = [section.title for section in page.sections]
    assert sum(isinstance(section, Figure) for section in page.sections) >= 2
    assert any(isinstance(section, Bars) for section in page.sections)
    assert any("depth of the network" in title for title in titles)
    assert any("worst activations" in title for title in titles)
    assert titles[-5:-1] == ["The plan as a graph", "Plan", "Recipe", "Versions"]
    plan, recipe, versions = page.sections[-4:-1]
    assert "conv1" in {row[0] for row in plan.rows}
    assert recipe.text() == measured()["origin"].recipe
    assert {"qrecipe", "torch"} <= {row[0] for row in versions.rows}


@pytest.mark.parametrize("name", ["drift", "comparison", "sensitivity", "tuning"])
def test_drawings_are_whole_svg_documents_of_their_own(name):
    for section in pages()[name].sections:
        for drawing in section.drawings if isinstance(section, Figure) else ():
            root = ElementTree.fromstring(drawing.svg)
            assert root.tag.endswith("svg")
            assert drawing.alt


def test_names_are_shown_as_they_are_and_never_as_markup():
    html = page_html(hostile_page())
    assert "<script>" not in html
    words = "".join(checked(html).words)
    assert '<script>alert("x")</script>&$x^{2}$\ufffd' in words
    assert LONG in words


def test_every_kind_of_section_is_escaped():
    page = Page(
        HOSTILE,
        HOSTILE,
        {HOSTILE: HOSTILE},
        [
            Text(HOSTILE, (HOSTILE,)),
            Listing(HOSTILE, HOSTILE),
            Table(HOSTILE, (HOSTILE,), [(HOSTILE,)], HOSTILE),
            Figure(HOSTILE, [Drawing(b"<svg/>", HOSTILE)], HOSTILE),
            Bars(HOSTILE, [Bar(HOSTILE, HOSTILE, (1.0, math.nan))], HOSTILE, (HOSTILE,)),
        ],
    )
    assert "script" not in checked(page_html(page)).seen


def test_equal_reports_give_equal_pages():
    of = measured()
    report = Drift(of["drift"].sites[:1], 3)
    one, other = (page_html(drift_page(report, of["origin"], ABOUT)) for _ in range(2))
    assert one == other


def is_whole(figure):
    """Whether everything that is drawn lies within the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = figure.get_tightbbox(canvas.get_renderer())  # in inches
    width, height = figure.get_size_inches()
    return drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height


def spread_of(low, high, stored, now=None):
    counts = tuple(range(1, 97)) if low != high else (7,)
    return charts.spread(HOSTILE, Histogram(low, high, counts), stored, now)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: charts.along([LONG + str(n) for n in range(90)], {"s": [1.0] * 90}, "word " * 30),
        lambda: charts.along(["a"], {LONG[:40]: [2.0], "other": [math.nan]}, "dB"),
        lambda: spread_of(-1, 2, (-0.5, 1), (-1, 2)),
        lambda: spread_of(3, 3, (0, 1e-9)),
        lambda: spread_of(-1e30, 1e30, (-1, 1)),
        lambda: charts.trials([(0.5, True), (math.nan, False)], 0.7, LONG),
    ],
)
def test_nothing_of_a_drawing_is_cut_off(draw, monkeypatch):
    figures = []
    original = charts._svg

    def kept(figure):
        figures.append(figure)
        return original(figure)

    monkeypatch.setattr(charts, "_svg", kept)
    assert ElementTree.fromstring(draw()) is not None
    assert is_whole(figures[0])


def test_where_nothing_is_finite_words_stand_in_for_the_drawing(undrawn):
    of = measured()
    ranking = of["ranking"]
    exact = replace(ranking, sites=tuple(replace(site, sqnr_db=math.inf) for site in ranking.sites))
    page = ranking_page(exact, "the model is dynamic", of["origin"], ABOUT)
    assert not any(isinstance(section, Figure) for section in page.sections)
    words = "".join(checked(page_html(page)).words)
    assert "no finite values to draw" in words
    assert "Not available: the model is dynamic" in words


def test_a_page_of_tuning_tells_what_was_found_and_what_was_kept(undrawn):
    page = tuned()
    assert page.title == "Tuning: cnn.toml"
    tables = {
        section.title: section.rows for section in page.sections if isinstance(section, Table)
    }
    assert tables["Trials in order"][1:4] == [
        ("2", "fc float", "0.708", "not kept"),
        ("3", "a range per channel for weights: QR310", "none", "failed"),
        ("4", "conv1 float", "0.742", "kept"),
    ]
    assert tables["Ranking"] == [
        ("1", "fc", "12.5 dB when quantized alone", "quantized"),
        ("2", "conv1", "30.1 dB", "quantized"),
    ]
    words = "".join(checked(page_html(page)).words)
    assert "Reached: 0.751 with 2 sites left float." in words
    assert "Trials: 5, of which the search kept 3." in words


def test_a_page_of_tuning_without_a_ranking_says_why_and_shows_the_rest(undrawn):
    page = tuned([("all", math.nan, True)], ranking="the search was interrupted")
    titles = [section.title for section in page.sections if isinstance(section, Figure)]
    assert titles == ["The worst activations and their quantization ranges"]
    words = "".join(checked(page_html(page)).words)
    assert "Not available: the search was interrupted" in words
    assert "Trials: 1, of which the search kept 1." in words


def test_sites_that_the_tuned_recipe_leaves_float_are_said_to_have_no_histogram(undrawn):
    name = json.loads(measured()["origin"].plan)["sites"][0]["name"]
    ranking = [(name, 12.5, "12.5 dB when quantized alone")]
    words = "".join(checked(page_html(tuned(ranking=ranking))).words)
    assert "without a range" not in words
    words = "".join(checked(page_html(tuned(ranking=ranking, origin=left_float(name)))).words)
    assert f"Float, so without a range: {name}." in words


def test_a_failed_trial_has_a_mark_of_its_own():
    points = [(0.5, True), (math.nan, False)]
    assert b"#b03030" in charts.trials(points, 0.7, "accuracy")
    assert b"#b03030" not in charts.trials(points[:1], 0.7, "accuracy")


@pytest.mark.parametrize(
    ("content", "is_replaced"),
    [
        (b"", True),
        (b"\n<!doctype HTML>\n<html>", True),
        (b"\xef\xbb\xbf<html>", True),
        (b"\x10\0\0\0\0\0\0\0{}", False),
        (b"format = 1\n", False),
        (b'{"format": 1}', False),
    ],
)
def test_a_page_takes_the_place_of_no_file_that_is_none(tmp_path, content, is_replaced):
    path = tmp_path / "report.html"
    path.write_bytes(content)
    if is_replaced:
        check_writable(path)
        return
    with pytest.raises(QRecipeError, match=r"QR431.*the file exists and is not an HTML page"):
        check_writable(path)


def test_a_ranking_by_the_evaluation_is_shown_in_words(undrawn):
    page = tuned(ranking=[("fc", math.nan, "0.5 instead of 0.76 when quantized alone")])
    words = "".join(checked(page_html(page)).words)
    assert "0.5 instead of 0.76 when quantized alone" in words
    assert "no finite values to draw" in words


def test_without_matplotlib_the_page_is_a_finding(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    of = measured()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(QRecipeError, match="QR602"):
        drift_page(of["drift"], of["origin"], ABOUT)


@pytest.mark.parametrize("path", ["missing/report.html", ".", "a\0b"])
def test_a_page_that_cannot_be_written_is_a_finding(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (lambda: save_page(Page("", "", {}, []), path), lambda: check_writable(path)):
        with pytest.raises(QRecipeError, match="QR431"):
            write()
    assert list(tmp_path.iterdir()) == []


def test_values_of_a_site_are_plain():
    site = SiteDrift(
        *("a", "Linear", "output", "uint8", QRange(0.1, 0, 0.0, 25.5)),
        now=None,
        values=None,
        is_finite=False,
        clipped=0,
        clipped_after=0,
        outside=0,
        is_bound=False,
        sqnr_db=None,
        sqnr_after_db=None,
    )
    assert site.moved == math.inf
    origin = Provenance("", "f" * 64, measured()["origin"].plan, {})
    page = drift_page(Drift((site,), 1), origin, ABOUT)
    words = "".join(checked(page_html(page)).words)
    assert "The output of a would move furthest: >1000%" in words
    assert "Tensors with values that are not finite: a (output)." in words
