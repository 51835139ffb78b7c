"""Reports of a small net as pages, and a page of everything that is hard to show."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

from nets import NETS
from runs import STATIC, silent

import qrecipe
from qrecipe.authoring.tune.levers import Candidate
from qrecipe.authoring.tune.page import tune_page
from qrecipe.authoring.tune.result import front_of
from qrecipe.authoring.tune.search import Trial
from qrecipe.execution.provenance import provenance
from qrecipe.measure.drift.report import Drift
from qrecipe.measure.pages.reports import comparison_page, drift_page, ranking_page

HOSTILE = '<script>alert("x")</script>&$x^{2}$\u202e'
LONG = "a_very_long_name_of_a_module." * 12


ABOUT = {"recipe": "cnn.toml", "model": "model.py:factory", "data": "model.py:batches"}


@functools.cache
def measured():
    """A model with everything that its pages show."""
    net = NETS["residual"]
    model, batches = net.model(), net.batches(10)
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    shifted = [batch * 2 + 1 for batch in batches]
    return {
        "origin": provenance(converted),
        "drift": qrecipe.drift(converted, shifted, progress=silent),
        "same": qrecipe.drift(converted, batches, progress=silent),
        "comparison": qrecipe.compare(model, converted, batches[:2], progress=silent),
        "ranking": qrecipe.sensitivity(model, STATIC, batches, progress=silent),
    }


TRIALS = [
    ("all sites int8", 0.71, True, 0.6),
    ("fc float", 0.708, False, 0.8),
    ("a range per channel for weights", math.nan, False),
    ("conv1 float", 0.742, True),
    ("layer1.0.conv2 float", 0.751, True),
]


def trial(what, metric, kept, latency=None):
    """A trial without a metric failed."""
    found, error = (None, "QR310") if math.isnan(metric) else (metric, None)
    return Trial(what, Candidate(), found, False, kept, 1.0, error, latency=latency)


def tuned(trials=TRIALS, **changes):
    tried = [trial(*each) for each in trials]
    outcome = "Reached: 0.751 with 2 sites left float."
    result = SimpleNamespace(
        trials=tried,
        front=front_of(tried),
        float_metric=0.76,
        max_drop=0.01,
        notes=("The float model has 0.76.", outcome),
        outcome=outcome,
    )
    given = {
        "ranking": [("fc", 12.5, "12.5 dB when quantized alone"), ("conv1", 30.1, "30.1 dB")],
        "activations": measured()["same"],
        "origin": measured()["origin"],
        "about": ABOUT,
        "metric": "accuracy",
        **changes,
    }
    return tune_page(result, **given)


def left_float(name):
    """The origin of the measured model, had its recipe left one site float."""
    origin = measured()["origin"]
    plan = json.loads(origin.plan)
    (site,) = [site for site in plan["sites"] if site["name"] == name]
    site.update(verdict="float", mode=None)
    return replace(origin, plan=json.dumps(plan))


PAGES = ("drift", "comparison", "sensitivity", "tuning")


@functools.cache
def pages():
    """All of them, drawn, which takes seconds."""
    of = measured()
    return {
        "drift": drift_page(of["drift"], of["origin"], ABOUT),
        "comparison": comparison_page(of["comparison"], of["same"], of["origin"], ABOUT),
        "sensitivity": ranking_page(of["ranking"], of["same"], of["origin"], ABOUT),
        "tuning": tuned(),
    }


@functools.cache
def hostile_page():
    """Many sites, long names, and names that are markup."""
    of = measured()
    site = of["drift"].sites[0]
    names = [HOSTILE, LONG, *(f"layers.{n}.attention.query" for n in range(45))]
    sites = tuple(replace(site, name=name) for name in names)
    plan = json.loads(of["origin"].plan)
    entry = plan["sites"][0]
    plan |= {"recipe": HOSTILE, "sites": [{**entry, "name": name} for name in names]}
    origin = replace(
        of["origin"],
        plan=json.dumps(plan),
        recipe=f"# {HOSTILE}\n# {LONG * 3}\n",
        versions={HOSTILE: HOSTILE},
    )
    return drift_page(Drift(sites, 3), origin, {"model": LONG, "data": HOSTILE})
