"""The decibel bounds of the numeric audit, with values just above and just below each of them."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import fx

from qrecipe._torch_ao import quiet
from qrecipe.audit.sample import Sample
from qrecipe.errors.findings import Location
from qrecipe.execution.fx.judgement import judge_sites, wrong_kernel_findings
from qrecipe.execution.fx.numerics import Proof, _agree, numeric_findings
from qrecipe.model.call import Inputs

X = torch.ones(8)
HERE = Location("r.toml", 3, 1, 5)


def site(name="fc", *, mode="static", verdict="quantized", op="Linear"):
    rule = SimpleNamespace(location=HERE)
    return SimpleNamespace(
        name=name, mode=mode, verdict=verdict, op=op, rule=rule, qconfig=None, engine=None
    )


def plan(*sites):
    return SimpleNamespace(phase="ptq", sites=sites or (site(),), backend="x86", saturating=())


def noisy(db):
    """What lies ``db`` from X."""
    return X * (1 + 10 ** (-db / 20))


def quantized(value, scale=0.5):
    steps = torch.full((8,), value, dtype=torch.uint8)
    with quiet():
        return torch._make_per_tensor_quantized_tensor(steps, scale, 0)


def graph_of(*steps, output):
    """A graph of the functions in ``steps``, each with the name of its site or None."""
    graph = fx.Graph()
    last = graph.placeholder("x")
    for function, name in steps:
        last = graph.call_function(function, (last,))
        if name is not None:
            last.meta["site"] = name
    graph.output(graph.call_function(output, (last,)))
    return fx.GraphModule(torch.nn.Module(), graph)


def model(*, kernel=None, output=X, name="fc"):
    """A converted model: one site that gives ``kernel``, and what the whole gives."""
    given = X if kernel is None else quantized(kernel)
    return graph_of((lambda x: given, name), output=lambda x: output)


def reference(value, *, scale=0.5, name="fc"):
    """A reference conversion, whose site gives the float of ``value`` steps and is quantized."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(lambda x: torch.full((8,), value * scale), (x,))
    node.meta["site"] = name
    args = (node, scale, 0, torch.quint8)
    graph.output(graph.call_function(torch.quantize_per_tensor, args))
    return fx.GraphModule(torch.nn.Module(), graph)


def reference_without_floats(value):
    """A reference whose output says nothing about the converted model's."""
    graph_module = reference(value)
    (output,) = [node for node in graph_module.graph.nodes if node.op == "output"]
    with graph_module.graph.inserting_before(output):
        output.args = (graph_module.graph.call_method("int_repr", output.args),)
    graph_module.recompile()
    return graph_module


def findings(converted, reference_db, *, sites=(), expected=100, **options):
    sample = Sample(Inputs((X,)), options.get("float_output", X))
    proof = Proof(sample, reference_db, options.get("error"))
    judge = partial(reference_without_floats, expected)
    return list(numeric_findings(plan(*sites), converted, proof, judge, ()))


def codes(*args, **options):
    return [finding.code for finding in findings(*args, **options)]


# --- whether the outputs agree


@pytest.mark.parametrize(
    ("reference_db", "lowered_db", "agree"),
    [
        (40.0, 39.01, True),
        (40.0, 38.99, False),
        (20.0, 60.0, True),
        (15.01, 15.01, True),
        (14.99, 14.99, False),
        (15.01, 14.5, True),
        (14.5, 15.01, True),
        (10.0, 12.0, False),
        (math.nan, 40.0, False),
        (40.0, math.nan, False),
        (None, 40.0, False),
        (40.0, None, False),
        (None, None, False),
        (math.inf, math.inf, True),
        (71.0, 63.0, True),
        (71.0, 48.17, True),
        (71.0, 48.16, False),
    ],
)
def test_outputs_within_a_decibel_and_of_some_quality_prove_the_kernels(
    reference_db, lowered_db, agree
):
    assert _agree(plan(), reference_db, lowered_db) is agree


@pytest.mark.parametrize(("lowered_db", "agree"), [(32.99, True), (32.97, False)])
def test_a_dynamic_site_may_cost_one_bit_more(lowered_db, agree):
    dynamic = plan(site("a"), site("b", mode="dynamic"))
    assert _agree(dynamic, 40.0, lowered_db) is agree
    assert not _agree(plan(site("a"), site("b")), 40.0, lowered_db)


# --- single sites on equal input


def judged(kernel, expected, *, sites=(), **options):
    converted = model(kernel=kernel)
    return judge_sites(plan(*sites), converted, reference(expected, **options), Inputs((X,)))


def test_a_kernel_thirty_decibels_from_its_reference_is_right_and_further_is_wrong():
    # 4 steps of 127 are 30.03 dB, 4 of 126 are 29.97
    assert not judged(131, 127).wrong
    (finding,) = wrong_kernel_findings(plan(), judged(130, 126))
    assert finding.code == "QR411"
    assert "fc (Linear)" in finding.message
    assert "30.0 dB" in finding.message
    assert '"fc" = "float"' in finding.hint
    assert finding.location == HERE


def test_a_step_on_one_grid_is_a_tie_and_two_steps_or_another_grid_are_not():
    assert judged(11, 10).wrong == {}
    assert judged(9, 10).wrong == {}
    assert len(judged(12, 10).wrong) == 1
    assert len(judged(8, 10).wrong) == 1
    # one step of each grid, and more than half the value between them
    assert len(judged(11, 10, scale=0.25).wrong) == 1


def test_only_quantized_sites_of_the_plan_are_blamed():
    assert judged(200, 100, sites=[site(mode=None)]).wrong == {}
    assert judged(200, 100, sites=[site("other")]).wrong == {}


@pytest.mark.parametrize("op", ["mul", "mean"])
def test_what_follows_is_judged_on_the_grid_of_its_kernel(op):
    # the kernel gives 1.0 in steps of 0.5; the reference gives 1.0, and rounds it to steps of 4
    follower, quantizing = site(op=op, verdict="passthrough"), site(op=op)
    assert judged(2, 0.25, scale=4.0, sites=[follower]).wrong == {}
    assert len(judged(2, 0.25, scale=4.0, sites=[quantizing]).wrong) == 1
    assert len(judged(200, 100, sites=[follower]).wrong) == 1


def test_a_judgement_is_complete_when_every_kernel_could_be_compared():
    assert judged(100, 100).complete
    assert not judged(None, 100).complete
    assert not judged(100, 100, sites=[site(), site("unseen")]).complete
    passing = site("unseen", verdict="passthrough")
    assert judged(100, 100, sites=[site(), passing]).complete
    assert not judged(100, 100, sites=[site(), site("unseen", mode="dynamic")]).complete
    assert judged(100, 100, sites=[site(), site("unseen", mode=None)]).complete


def test_the_reference_goes_on_from_what_the_kernel_gave():
    seen = []

    def second(x):
        seen.append(x.dequantize()[0].item())
        return x

    graph = reference(100).graph
    (output,) = [node for node in graph.nodes if node.op == "output"]
    with graph.inserting_before(output):
        graph.call_function(second, output.args)
    chained = fx.GraphModule(torch.nn.Module(), graph)
    judge_sites(plan(), model(kernel=101), chained, Inputs((X,)))
    assert seen == [50.5]


# --- what follows from it


def test_outputs_that_agree_are_enough_and_no_site_is_judged():
    wrong = model(kernel=200, output=noisy(39.5))
    assert codes(wrong, 40.0) == []
    assert codes(model(kernel=200, output=noisy(38.5)), 40.0) == ["QR411"]


def test_a_wrong_kernel_is_all_that_is_said():
    assert codes(model(kernel=200, output=noisy(3)), 40.0) == ["QR411"]


def test_a_worse_model_is_an_error_only_if_a_kernel_could_not_be_compared():
    (finding,) = findings(model(output=noisy(20)), 30.0)
    assert finding.code == "QR412"
    assert "20.0 dB" in finding.message
    assert "30.0 dB" in finding.message
    assert codes(model(kernel=100, output=noisy(20)), 30.0) == []


def test_fifteen_decibels_of_the_reference_make_the_comparison_worth_something():
    assert codes(model(output=noisy(10)), 15.01) == ["QR412"]
    assert codes(model(output=noisy(10)), 14.99) == ["QR203"]


def test_below_fifteen_decibels_right_kernels_mean_a_coarse_scheme():
    (finding,) = findings(model(kernel=100, output=noisy(14.99)), 20.0)
    assert finding.code == "QR203"
    assert finding.severity == "warning"
    assert "15.0 dB" in finding.message
    assert codes(model(kernel=100, output=noisy(15.01)), 20.0) == []


def test_not_a_number_is_worse_whatever_the_kernels_say():
    assert codes(model(kernel=100, output=X * math.nan), 40.0) == ["QR412"]
    assert codes(model(kernel=100, output=X * math.nan), 3.0) == ["QR412"]


def test_an_output_of_another_shape_is_worse_too():
    assert codes(model(kernel=100, output=X[:4]), 40.0) == ["QR412"]


def test_outputs_without_floats_leave_the_judgement_to_the_sites():
    whole = torch.ones(8, dtype=torch.int64)
    for kernel, expected in ((100, []), (200, ["QR411"])):
        converted = model(kernel=kernel, output=whole)
        assert codes(converted, None, float_output=whole) == expected


def test_what_does_not_run_is_named():
    def fail(x):
        raise RuntimeError("no such kernel\nand a traceback")

    broken = graph_of((fail, "fc"), output=lambda x: x)
    (finding,) = findings(broken, 40.0)
    assert finding.code == "QR413"
    assert "converted model" in finding.message
    assert finding.message.endswith("no such kernel")
    (finding,) = findings(model(), None, error="no such operation")
    assert finding.code == "QR413"
    assert "reference" in finding.message
    assert "no such operation" in finding.message


def test_a_plan_that_quantizes_nothing_is_not_compared():
    assert codes(model(output=X * math.nan), None, sites=[site(mode=None)]) == []
