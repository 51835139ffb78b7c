"""The ranking of sites, against the loop that quantizes one after the other."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from nets import NETS, UNTRACEABLE
from plain_torch import engine, mapping
from plans import net_of
from rankings import FEW, STATIC, as_dict, float_rules, ranked, ranking_of, sqnr_db
from routed import Routed
from runs import HEAD, exactly, silent
from shares import every
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import qrecipe
from qrecipe.errors.findings import (
    AuditError,
    ExecutionError,
    QRecipeWarning,
)
from qrecipe.execution.fx.isolated import wrap
from qrecipe.execution.isolated import Kernel
from qrecipe.measure.sensitivity.exact import Replay
from qrecipe.model.call import Inputs
from qrecipe.observers.qconfig import qconfig
from qrecipe.planning.inventory import inventory_of

DYNAMIC = (
    '[qconfig.dynamic]\nweight = "weight"\nactivation = "dynamic"\n'
    '[tensor.dynamic]\ndtype = "uint8"\nis_dynamic = true\n[tensor.weight]\n'
    'observer = "minmax"\nqscheme = "per_tensor_symmetric"\n'
)
EXACT_DB = 1e-4
LITTLE = 3 * 4 * 8 * 64 * 4
"""Three of the largest activations of the net "residual", in bytes."""


def near(expected):
    """Within 1e-4 dB up to 50 dB; above, float rounding is a larger part of the error."""
    return {
        name: pytest.approx(value, abs=EXACT_DB * max(1.0, 10 ** ((value - 50) / 20)))
        for name, value in expected.items()
    }


def alone(plan, name, qconfig, head=""):
    """The recipe of the loop for one site: an exact rule for each, float but for this one."""
    rules = "".join(
        f'"{exactly(site.name)}" = "{qconfig if site.name == name else "float"}"\n'
        for site in plan.sites
        if site.name == name or site.verdict == "passthrough"
    )
    return qrecipe.parse_recipe(
        f'{HEAD}{FEW}{head}[rules]\nglobal = "float"\n[rules.module_name]\n{rules}'
    )


def call(net, batch):
    return (
        net(**batch)
        if isinstance(batch, dict)
        else net(*batch)
        if isinstance(batch, tuple)
        else net(batch)
    )


@pytest.mark.parametrize("name", every(10, sorted(NETS)))
def test_exact_is_what_the_loop_over_recipes_gives(name):
    net = NETS[name]
    model, batches = net.model(), net.batches(3)
    plan = qrecipe.plan(model, STATIC, batches[0])
    found = as_dict(ranking_of(name))
    expected = {
        site: sqnr_db(
            model,
            qrecipe.quantize(model, alone(plan, site, "int8"), batches, progress=silent),
            batches,
            call,
        )
        for site in found
    }
    assert found == near(expected)
    assert list(found.values()) == sorted(found.values())


@pytest.mark.parametrize("name", ["residual", "nested"])
def test_exact_is_what_plain_torch_gives_one_module_at_a_time(name):
    net = NETS[name]
    model, batches = net.model(), net.batches(3)
    spec = STATIC.qconfigs["int8"]
    found = as_dict(ranking_of(name))
    expected = {}
    with engine("x86"), torch.no_grad():
        for site in found:
            if ":" in site or "#" in site:
                continue
            rules = mapping().set_module_name(site, qconfig(spec, "ptq"))
            prepared = prepare_fx(copy.deepcopy(model), rules, (batches[0],))
            for batch in batches:
                prepared(batch)
            expected[site] = sqnr_db(model, convert_fx(prepared), batches)
    assert expected
    assert {site: found[site] for site in expected} == near(expected)


def test_dynamic_and_weight_only_sites_are_ranked_as_the_loop_does():
    net = NETS["recurrent"]
    model, batches = net.model(), net.batches(3)
    head = DYNAMIC
    recipe = qrecipe.parse_recipe(f'{HEAD}{FEW}{head}[rules]\nglobal = "dynamic"\n')
    found = as_dict(ranked(model, batches, recipe))
    plan = qrecipe.plan(model, recipe, batches[0])
    assert found.keys() == {"lstm", "fc"}
    for site, value in found.items():
        converted = qrecipe.quantize(
            model, alone(plan, site, "dynamic", head), batches, progress=silent
        )
        assert value == pytest.approx(sqnr_db(model, converted, batches), abs=EXACT_DB)


def test_a_model_that_cannot_be_traced_is_ranked_module_by_module():
    model, batches = UNTRACEABLE.model(), UNTRACEABLE.batches(3)
    head = f'format = 1\nextends = "builtin:x86-dynamic"\n{FEW}'
    recipe = qrecipe.parse_recipe(head)
    found = as_dict(ranked(model, batches, recipe))
    assert found.keys() == {"attention.qkv", "attention.out", "head"}
    for site, value in found.items():
        others = "".join(f'"{other}" = "float"\n' for other in found if other != site)
        alone = qrecipe.parse_recipe(f"{head}[rules.module_name]\n{others}")
        converted = qrecipe.quantize(model, alone, batches, progress=silent)
        assert value == pytest.approx(sqnr_db(model, converted, batches), abs=EXACT_DB)
    estimate = ranked(model, batches, recipe, method="estimate", probes=30)
    assert as_dict(estimate) == pytest.approx(found, abs=3)
    by_value = ranked(model, batches, recipe, evaluate=lambda net: float(net(batches[0]).sum()))
    assert len({site.value for site in by_value.sites}) == 3


def test_an_evaluated_model_keeps_preserved_attributes():
    net = NETS["mlp"]
    model = net.model()
    model.classes = ["a", "b"]
    recipe = qrecipe.parse_recipe(f'{HEAD}{FEW}[fx]\npreserved_attributes = ["classes"]\n')
    seen = []
    ranked(model, net.batches(2), recipe, evaluate=lambda m: seen.append(m.classes) or 1.0)
    assert seen == [["a", "b"]] * 3


def test_a_recipe_for_training_is_ranked_as_it_is_without_training():
    net = NETS["mlp"]
    recipe = qrecipe.parse_recipe(f'{HEAD}phase = "qat"\n{FEW}')
    found = ranked(net.model(), net.batches(3), recipe)
    assert as_dict(found) == as_dict(ranking_of("mlp"))
    assert found.to_recipe(keep_float=1).phase == "qat"


def test_sites_without_an_error_of_their_own_are_named_with_the_reason():
    ranking = ranking_of("squeeze_excite")
    plan = qrecipe.plan(
        NETS["squeeze_excite"].model(), STATIC, NETS["squeeze_excite"].batches(1)[0]
    )
    names = {site.name for site in ranking.sites}
    assert names | ranking.unranked.keys() == {site.name for site in plan.sites}
    assert not names & ranking.unranked.keys()
    assert any("range is fixed" in reason for reason in ranking.unranked.values())
    assert any("follows" in reason for reason in ranking.unranked.values())


def test_roots_are_ranked_by_the_output_of_the_whole_model():
    torch.manual_seed(0)
    model = Routed().eval()
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    fx = '[fx]\nroots = ["backbone", "head"]\n'
    recipe = qrecipe.parse_recipe(HEAD + FEW + fx)
    found = as_dict(ranked(model, batches, recipe))
    plan = qrecipe.plan(model, recipe, batches[0])
    assert found.keys() == {"backbone.conv", "head.fc1", "head.fc2"}
    for site, value in found.items():
        converted = qrecipe.quantize(model, alone(plan, site, "int8", fx), batches, progress=silent)
        assert value == pytest.approx(sqnr_db(model, converted, batches), abs=EXACT_DB)
    estimate = ranked(model, batches, recipe, method="estimate", probes=20)
    assert as_dict(estimate) == pytest.approx(found, abs=3)


def test_forward_and_batches_that_come_once_give_the_same():
    net = NETS["mlp"]
    model, batches = net.model(), net.batches(3)
    labelled = ((batch, torch.zeros(8)) for batch in batches)
    found = ranked(model, labelled, forward=lambda net, batch: net(batch[0]))
    assert as_dict(found) == as_dict(ranking_of("mlp"))


def test_groups_within_the_memory_limit_give_the_same():
    net = NETS["residual"]
    model, batches = net.model(), net.batches(3)
    whole = as_dict(ranking_of("residual"))
    with pytest.raises(ExecutionError, match="QR424") as caught:
        ranked(model, batches, memory_limit=1000)
    assert "1,000" in str(caught.value)
    few = as_dict(ranked(model, batches, memory_limit=LITTLE))
    assert few == pytest.approx(whole, abs=1e-9)


def test_memory_kept_is_within_the_limit():
    net = NETS["residual"]
    inputs = Inputs.from_batch(net.batches(1)[0])
    inventory = inventory_of(net.model(), STATIC, inputs)
    plan = qrecipe.plan(net.model(), STATIC, net.batches(1)[0])
    sites = [site for site in plan.sites if site.verdict == "quantized"]
    part = wrap(inventory.parts[0], inventory, sites)
    groups = Replay(part, {}, LITTLE)._groups_for(inputs)
    assert 1 < len(groups) < len(sites)
    assert [name for group in groups for name in group] == list(part.nodes)


def test_estimates_come_near_and_say_that_they_are():
    net = NETS["residual"]
    found = ranked(net.model(), net.batches(3), method="estimate", probes=30)
    assert as_dict(found) == pytest.approx(as_dict(ranking_of("residual")), abs=1.5)
    assert "estimate" in str(found)
    assert "~" in str(found)
    document = json.loads(found.to_json())
    assert document["is_estimate"]
    assert all(site["is_estimate"] for site in document["sites"])
    overlay = found.to_recipe(keep_float=1)
    assert "(estimate)" in float_rules(overlay)[0].reason


def test_an_estimate_of_a_linear_rest_is_unbiased():
    torch.manual_seed(0)
    model = net_of(
        lambda self, x: self.c(self.b(self.a(x))),
        a=nn.Linear(6, 6),
        b=nn.Linear(6, 6),
        c=nn.Linear(6, 4),
    )
    batches = [torch.randn(64, 6) for _ in range(2)]
    exact = as_dict(ranked(model, batches))
    means = [
        as_dict(ranked(model, batches, method="estimate", probes=100, seed=seed))
        for seed in range(2)
    ]
    for site, value in exact.items():
        energy = sum(10 ** (-found[site] / 10) for found in means) / len(means)
        assert -10 * math.log10(energy) == pytest.approx(value, abs=0.3)


def test_the_callers_evaluation_ranks_by_what_it_gives():
    net = NETS["residual"]
    model, batches = net.model(), net.batches(3)
    seen = []

    def evaluate(candidate):
        with torch.no_grad():
            seen.append(sqnr_db(model, candidate, batches))
        return min(seen[-1], 100.0)

    found = ranked(model, batches, evaluate=evaluate)
    assert len(seen) == len(found.sites) + 1
    assert found.float_value == 100.0
    assert all(site.sqnr_db is None for site in found.sites)
    expected = as_dict(ranking_of("residual"))
    assert {site.name: site.value for site in found.sites} == near(expected)
    overlay = found.to_recipe(keep_float=1)
    assert any("instead of 100" in (rule.reason or "") for rule in overlay.rules)
    with pytest.raises(ExecutionError, match="QR425"):
        found.to_recipe(min_sqnr_db=20)


def test_the_callers_metric_ranks_by_its_mean_over_batches():
    net = NETS["residual"]

    def agreement(outputs, reference):
        return (outputs.argmax(1) == reference.argmax(1)).float().mean()

    found = ranked(net.model(), net.batches(3), metric=agreement)
    assert found.float_value == 1.0
    values = [site.value for site in found.sites]
    assert values == sorted(values)
    assert all(0 <= value <= 1 for value in values)
    assert "measure alone" in str(found)


def test_an_interrupt_leaves_what_was_measured():
    net = NETS["residual"]
    calls = []

    def interrupting(outputs, reference):
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return -float((outputs - reference).square().mean())

    with pytest.warns(QRecipeWarning, match="QR212"):
        found = ranked(net.model(), net.batches(3), metric=interrupting)
    assert found.partial
    assert found.sites
    assert json.loads(found.to_json())["partial"]
    assert "Interrupted" in str(found)

    def at_once(outputs, reference):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ranked(net.model(), net.batches(3), metric=at_once)


def test_a_kernel_that_fails_is_a_finding_that_names_the_site():
    def failing(x):
        raise RuntimeError("no such kernel\nat all")

    broken = nn.Module()
    broken.forward = failing
    with pytest.raises(AuditError, match=r"QR413 .* kernel of layer\.fc fails: no such"):
        Kernel("layer.fc", broken)(torch.ones(1))


def test_a_kernel_answers_in_the_memory_format_of_what_it_is_given():
    last = torch.channels_last
    kernel = Kernel("conv", nn.Identity())
    kernel.converted.forward = lambda x: x.contiguous(memory_format=last)
    given = torch.ones(2, 3, 4, 4)
    assert kernel(given).is_contiguous()
    assert kernel(given.contiguous(memory_format=last)).is_contiguous(memory_format=last)


def test_progress_counts_each_site_on_each_batch():
    net = NETS["mlp"]
    steps = []
    qrecipe.sensitivity(
        net.model(),
        STATIC,
        net.batches(3),
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(1, 3), (2, 3), (3, 3), *((done, 6) for done in range(1, 7))]


def test_the_model_stays_as_it_was():
    net = NETS["in_place"]
    model, batches = net.model(), net.batches(3)
    state, attributes = copy.deepcopy(model.state_dict()), set(vars(model))
    ranked(model, batches)
    ranked(model, batches, method="estimate")
    assert set(vars(model)) == attributes
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"method": "guess"}, "QR425"),
        ({"evaluate": len, "metric": max}, "QR425"),
        ({"method": "estimate", "metric": max}, "QR425"),
        ({"memory_limit": 0}, "QR425"),
        ({"probes": 0}, "QR425"),
        ({"probes": "2"}, "QR425"),
        ({"probes": 1.5}, "QR425"),
        ({"seed": None}, "QR425"),
        ({"seed": 2**70}, "QR425"),
        ({"memory_limit": "2 GiB"}, "QR425"),
        ({"memory_limit": math.nan}, "QR425"),
        ({"evaluate": 3}, "QR425"),
        ({"metric": "accuracy"}, "QR425"),
        ({"forward": 3}, "QR425"),
        ({"metric": lambda outputs, reference: "good"}, "QR423"),
        ({"evaluate": lambda model: 1 / 0}, "QR423"),
    ],
)
def test_arguments_that_make_no_sense_are_findings(options, code):
    net = NETS["mlp"]
    with pytest.raises(ExecutionError, match=code):
        ranked(net.model(), net.batches(2), **options)


def test_nothing_to_rank_is_a_finding():
    net = NETS["mlp"]
    nothing = qrecipe.parse_recipe(f'{HEAD}{FEW}[rules]\nglobal = "float"\n')
    with pytest.raises(ExecutionError, match="QR422"):
        ranked(net.model(), net.batches(2), nothing)
    integers = net_of(lambda self, x: self.fc(x).argmax(1), fc=nn.Linear(6, 3))
    with pytest.raises(ExecutionError, match="QR422"):
        ranked(integers, net.batches(2))
    with pytest.raises(ExecutionError, match="QR422"):
        ranked(integers, net.batches(2), method="estimate")


def test_progress_that_cannot_be_called_is_a_finding_before_anything_runs():
    net = NETS["mlp"]
    with pytest.raises(ExecutionError, match="QR425 progress"):
        qrecipe.sensitivity(net.model(), STATIC, net.batches(2), progress=3)


def test_a_loader_that_can_be_read_but_once_is_held():
    class Once:
        def __init__(self, batches):
            self._batches = iter(batches)

        def __iter__(self):
            return self._batches

    net = NETS["mlp"]
    batches = net.batches(3)
    held = ranked(net.model(), Once(batches), qrecipe.parse_recipe(f"{HEAD}{FEW}"))
    plain = ranked(net.model(), batches, qrecipe.parse_recipe(f"{HEAD}{FEW}"))
    assert [(s.name, s.sqnr_db) for s in held.sites] == [(s.name, s.sqnr_db) for s in plain.sites]
    assert held.batches == 3


def test_progress_counts_no_more_batches_than_the_recipe_takes():
    seen = []
    net = NETS["mlp"]
    text = f"{HEAD}{FEW}[calibration]\nmax_batches = 2\n"
    qrecipe.sensitivity(
        net.model(),
        qrecipe.parse_recipe(text),
        net.batches(6),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (4, 4)


def test_a_measure_that_gives_nan_is_refused():
    net = NETS["mlp"]
    with pytest.raises(ExecutionError, match="returns NaN"):
        qrecipe.sensitivity(
            net.model(),
            qrecipe.parse_recipe(f"{HEAD}{FEW}"),
            net.batches(3),
            evaluate=lambda model: float("nan"),
            progress=lambda done, total: None,
        )
