"""What is particular to a page: its conclusion, its bars, and the plan as a graph."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from email.message import Message

import pytest
from nets import NETS
from plans import named, plan_of
from report_pages import ABOUT, PAGES, measured, pages
from runs import STATIC

import qrecipe
from qrecipe.measure.drift.report import DEFAULT_MAX_CLIPPED, DEFAULT_THRESHOLD
from qrecipe.measure.pages import charts, conclusions, sections
from qrecipe.measure.pages.flow import PlanGraph
from qrecipe.measure.pages.page import page_html
from qrecipe.measure.pages.reports import ranking_page
from qrecipe.measure.pages.sections import Bar, Bars
from qrecipe.measure.sensitivity.ranking import RankedSite, Ranking
from qrecipe.planning.plan import Plan

# --- conclusions


def ranking(*values, whole=None, **changes):
    sites = tuple(
        RankedSite(
            f"s{place}", "Linear", None if whole else value, value if whole else None, batches=1
        )
        for place, value in enumerate(values)
    )
    given = {"method": "exact", "partial": False, "float_value": whole, **changes}
    return Ranking(sites, {}, batches=1, recipe=STATIC, members=frozenset(), **given)


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (ranking(20.0, 40.0, 40.0), "s0 alone costs 17 dB; leave it float."),
        (ranking(20.0, 20.0, 40.0), "s0 and s1 together cost 23 dB; leave them float."),
        (
            ranking(30.0, 30.5, 31.0, 31.5),
            "No site stands out: with s0, the worst, quantized alone, the output has 30.0 dB.",
        ),
        (ranking(20.0, 40.0, method="estimate"), "s0 alone costs about 20 dB; leave it float."),
        (ranking(20.0, math.inf), "s0 alone costs over 100 dB; leave it float."),
        (ranking(math.nan, 3.0), "Quantizing s0 alone leaves no finite output: leave it float."),
        (ranking(math.inf), "No site has an effect on the output: all are exact."),
        (ranking(), "No site has an error of its own."),
        (ranking(0.5, 0.89, whole=0.9), "s0 alone costs 0.4 of 0.9; leave it float."),
        (ranking(0.9, 0.9, whole=0.9), "No site alone costs anything of 0.9."),
        (
            ranking(*[0.8] * 8, whole=0.9),
            "No site stands out: s0 alone, the worst, costs 0.1 of 0.9.",
        ),
    ],
)
def test_the_conclusion_of_a_ranking_names_the_few_sites_that_stand_out(of, said):
    assert conclusions.of_ranking(of) == said


def test_the_cost_that_a_conclusion_names_is_what_the_output_gains_without_the_site():
    """On a network whose one layer has weights that eight bits cannot hold."""
    net = NETS["mlp"]
    model, batches = net.model(), net.batches(10)
    model.fc2.weight.data[:, 0] *= 300
    ranked = qrecipe.sensitivity(model, STATIC, batches, progress=False)
    said = conclusions.of_ranking(ranked)
    worst = ranked.sites[0].name
    assert said.startswith(f"{worst} alone costs ")
    float_there = ranked.to_recipe(keep_float=1)
    outputs = [
        qrecipe.compare(
            model, qrecipe.quantize(model, recipe, batches, progress=False), batches, progress=False
        ).output.sqnr_db
        for recipe in (STATIC, float_there)
    ]
    assert int(re.search(r"\d+", said.split("costs")[1])[0]) == pytest.approx(
        outputs[1] - outputs[0], abs=3
    )


def test_the_conclusion_of_a_comparison_has_the_output_and_its_farthest_activation():
    report = measured()["comparison"]
    said = conclusions.of_comparison(report)
    assert said.startswith(f"The output has {report.output.sqnr_db:.1f} dB; the activation of ")
    assert report.sites[0].name in said
    assert "no floating-point output" in conclusions.of_comparison(replace(report, output=None))


def test_the_conclusion_of_drift_says_whether_to_calibrate_again():
    thresholds = DEFAULT_THRESHOLD, DEFAULT_MAX_CLIPPED
    moved = conclusions.of_drift(measured()["drift"], *thresholds)
    assert moved.startswith("8 of 9 stored ranges no longer fit: that of conv1 (output) would move")
    assert moved.endswith("Calibrate again.")
    assert "still fit the data" in conclusions.of_drift(measured()["same"], *thresholds)


@pytest.fixture(scope="module")
def undrawn_pages():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "_svg", lambda figure: b"<svg/>")
        return pages.__wrapped__()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_names_model_data_and_file_and_begins_with_its_conclusion(name, undrawn_pages):
    page = undrawn_pages[name]
    html = page_html(page)
    assert page.conclusion.endswith(".")
    named = [f"<dd>{value}</dd>" for value in ABOUT.values()]
    places = [html.index(text) for text in (page.conclusion, *named, "<nav>", "<h2>")]
    assert places == sorted(places)


# --- bars


def test_the_worst_site_has_the_longest_bar_as_on_a_terminal():
    of = measured()
    page = ranking_page(of["ranking"], "none", of["origin"], ABOUT)
    bars = next(section for section in page.sections if isinstance(section, Bars))
    assert [bar.name for bar in bars.bars] == [site.name for site in of["ranking"].sites]
    lengths = [bar.lengths[0] for bar in bars.bars]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 0
    drawn = [row[3].count("█") for row in next(iter(of["ranking"]._sections())).rows]
    assert drawn == sorted(drawn, reverse=True)


def test_bars_are_shares_of_the_longest_and_a_value_that_is_not_finite_has_none():
    values = (2.0, 1.0, math.nan, math.inf, -1.0)
    bars = Bars("t", [Bar(str(value), "", (value,)) for value in values], "label")
    widths = [float(width) for width in re.findall(r"width: ([\d.]+)%", bars.html())]
    assert widths == [100.0, 50.0, 0.0, 0.0, 0.0]


def test_more_bars_than_fit_are_said_to_be_missing():
    bars = Bars("t", [Bar(str(n), "", (1.0,)) for n in range(7)], "label", most=5)
    assert "The first 5 of 7." in bars.html()
    assert bars.html().count("<li>") == 5


# --- drawings


def test_every_colour_of_a_drawing_has_one_for_a_dark_page():
    drawn = charts.along(["a", "b"], {"x": [1.0, 2.0], "y": [2.0, 1.0]}, "dB").decode()
    body = drawn[drawn.index("</style>") :]
    assert "var(--c4c78a8)" in body
    assert not re.search(r"(fill|stroke): #", body)
    assert "prefers-color-scheme: dark" in drawn


# --- the plan as a graph


def marks(plan):
    html = PlanGraph(plan).html()
    return html.count('<g class="mark">')


@pytest.mark.parametrize("net", ["residual", "binary", "decoder", "recurrent", "cnn_lstm", "norms"])
def test_the_graph_marks_each_tensor_that_is_quantized_or_dequantized(net):
    plan = plan_of(net, "builtin:x86-static")
    assert marks(plan) == plan.boundaries > 0


def test_a_site_that_is_left_float_adds_its_marks():
    plan = plan_of("residual", named(layer1__0__conv2="float"))
    assert marks(plan) == plan.boundaries == 4


def test_the_graph_shows_every_site_once_in_its_order_and_tells_float_from_int8():
    plan = plan_of("residual", named(fc="float"))
    html = PlanGraph(plan).html()
    rows = re.findall(r'<g class="row (\w+)">(.*?)</g>', html, re.DOTALL)
    names = [re.search(r"<text[^>]*>([^<]*)", row)[1] for _, row in rows]
    assert names == ["input &quot;x&quot;", *(site.name for site in plan), "output"]
    colours = {name: colour for name, (colour, _) in zip(names, rows, strict=True)}
    assert colours["fc"] == "float"
    assert colours["conv1"] == colours["pool"] == "int8"


def test_no_two_tensors_that_live_at_once_share_a_lane():
    from qrecipe.measure.pages import flow

    for net in ("residual", "binary", "functional", "attention", "decoder"):
        rows = flow._rows(plan_of(net, "builtin:x86-static"))
        lines = [line for line in flow._lines(rows).values() if line.readers]
        for place in range(len(rows)):
            alive = [line.lane for line in lines if line.start < place < line.readers[-1]]
            assert len(alive) == len(set(alive))


def test_a_plan_read_back_has_the_same_graph_and_an_older_one_has_no_lines():
    plan = plan_of("residual", "builtin:x86-static")
    again = Plan.from_json(plan.to_json())
    assert PlanGraph(again).html() == PlanGraph(plan).html()
    values = plan.to_dict()
    for site in values["sites"]:
        del site["reads"], site["is_output"]
    older = Plan.from_dict(values)
    assert "<path" not in PlanGraph(older).html()
    assert len(older) == len(plan)


def test_a_plan_whose_sites_read_what_comes_later_is_drawn_without_those_lines():
    plan = plan_of("residual", "builtin:x86-static")
    first, *others = plan.sites
    odd = replace(plan, sites=(replace(first, reads=(others[-1].name, first.name, "no")), *others))
    assert len(PlanGraph(odd).html()) > 0


# --- where to read more


@pytest.mark.parametrize("kind", sections._KINDS)
def test_a_page_says_where_to_read_more(kind, monkeypatch):
    section = sections.Reading(kind)
    monkeypatch.setattr(sections, "metadata", lambda _: Message())
    assert f"docs/{kind}.md in the repository" in section.html()
    published = Message()
    published["Project-URL"] = "Documentation, https://docs.example/q/"
    monkeypatch.setattr(sections, "metadata", lambda _: published)
    assert f'<a href="https://docs.example/q/{kind}.html">' in section.html()


@pytest.mark.parametrize("name", [*sections._KINDS, "reports", "glossary"])
def test_the_pages_to_read_exist(name):
    from places import ROOT

    assert (ROOT / "docs" / f"{name}.md").is_file()
