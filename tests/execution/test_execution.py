"""Plan, prepare and convert agree on every toy net, and the caller keeps his model."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
from differential import Run, wrong_kernels
from nets import NETS, Net, SharedConv
from runs import STATIC, float_at, half_of, silent, tensors_of
from shares import every
from torch import nn
from torch.ao.quantization import QConfig, QConfigMapping, qconfig_equals
from torch.ao.quantization.backend_config import get_native_backend_config
from torch.ao.quantization.observer import (
    MovingAverageMinMaxObserver,
    ObserverBase,
    PerChannelMinMaxObserver,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import QRecipeError
from qrecipe.execution.engine import engine
from qrecipe.execution.fx.structure import realised_sites
from qrecipe.model.addresses import site_of
from qrecipe.model.call import Inputs
from qrecipe.observers.qconfig import qconfig

CASES = [
    pytest.param((name, seed), id=f"{name}-{seed or 'all'}", marks=marks)
    for at, name in enumerate(NETS)
    for seed, marks in (
        (None, () if at % 2 == 0 else (pytest.mark.slow,)),
        (1, () if at % 4 == 1 else (pytest.mark.slow,)),
        (2, (pytest.mark.slow,)),
    )
]


@dataclass(frozen=True)
class Executed(Run):
    net: Net


@pytest.fixture(params=CASES, scope="module")
def executed(request):
    """One net, compiled, prepared, calibrated and converted once for all tests."""
    name, seed = request.param
    net = NETS[name]
    recipe = STATIC if seed is None else half_of(net, seed)
    model, batches = net.model(), net.batches()
    with warnings.catch_warnings():
        warnings.simplefilter("error", qrecipe.QRecipeWarning)
        warnings.filterwarnings("ignore", "QR2(07|21)")  # of the halves, and of recurrent nets
        # products of random rows have extremes that a moving average of ten batches misses
        warnings.filterwarnings("ignore", "QR23[24]", qrecipe.QRecipeWarning)
        compiled = qrecipe.compile(model, recipe, batches[0])
        prepared = compiled.prepare()
        qrecipe.calibrate(prepared, batches, progress=silent)
        converted = compiled.convert(prepared)
    return Executed(model, batches, compiled, prepared, converted, frozenset(), net)


def test_fx_assigned_the_very_qconfigs_of_the_plan(executed):
    assigned = executed.prepared.meta["_observed_graph_module_attrs"].node_name_to_qconfig
    sites = {site.name: site for site in executed.compiled.plan.sites}
    seen = set()
    for node in executed.prepared.graph.nodes:
        name = node.meta.get("site")
        if name is None or node.name not in assigned:
            continue
        seen.add(name)
        spec = sites[name].qconfig
        expected = None if spec is None else qconfig(spec, "ptq")
        assert qconfig_equals(assigned[node.name], expected), name
    assert seen == set(sites)


def test_nothing_but_sites_is_given_a_qconfig(executed):
    assigned = executed.prepared.meta["_observed_graph_module_attrs"].node_name_to_qconfig
    for node in executed.prepared.graph.nodes:
        if "site" not in node.meta:
            assert assigned.get(node.name) is None, node.name


def test_the_observer_behind_each_site_is_the_one_that_the_plan_names(executed):
    """Not only the qconfig: what really stands in the graph, shared observers included."""
    sites = {site.name: site for site in executed.compiled.plan.sites}
    modules = dict(executed.prepared.named_modules(remove_duplicate=False))
    for node in executed.prepared.graph.nodes:
        observer = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(observer, ObserverBase):
            continue
        name = node.args[0].meta.get("site")
        if name is None or sites[name].mode != "static":
            continue
        expected = qconfig(sites[name].qconfig, "ptq").activation()
        observer = getattr(observer, "activation_post_process", observer)  # behind a clamp
        assert type(observer) is type(expected), name
        assert observer.dtype == expected.dtype
        assert (observer.quant_min, observer.quant_max) == (
            expected.quant_min,
            expected.quant_max,
        ), name


def test_every_site_became_what_the_plan_says(executed):
    realised = realised_sites(executed.converted)
    for site in executed.compiled.plan.sites:
        assert realised[site.name].became == (site.mode or "float"), site.name


def test_weighted_sites_have_the_class_that_their_verdict_says(executed):
    """By classes alone, without the audit's own reading of the graph."""
    sites = {site.name: site for site in executed.compiled.plan.sites}
    for node in executed.converted.graph.nodes:
        if node.op != "call_module" or site_of(node) is None:
            continue
        module = executed.converted.get_submodule(node.target)
        is_quantized = ".quantized." in type(module).__module__
        site = sites[site_of(node)]
        if site.qconfig is not None and site.qconfig.weight is not None:
            assert is_quantized, site.name
            assert module.weight().dtype == torch.qint8
        if site.verdict == "float":
            assert not is_quantized, site.name


def test_every_kernel_gives_what_its_float_operation_gives_rounded(executed):
    assert wrong_kernels(executed, executed.batches[1]) == {}


def test_the_converted_model_stays_near_the_float_one(executed):
    batch = executed.batches[0]
    with torch.no_grad():
        expected = tensors_of(Inputs.from_batch(batch).call(executed.model))
        actual = tensors_of(Inputs.from_batch(batch).call(executed.converted))
    assert len(expected) == len(actual)
    for a, b in zip(expected, actual, strict=True):
        assert a.shape == b.shape
        assert not b.is_quantized
        assert sqnr_db(a, b) > executed.net.least_db


def test_converting_keeps_the_prepared_model_usable(executed):
    again = executed.compiled.convert(executed.prepared)
    batch = executed.batches[1]
    one = tensors_of(Inputs.from_batch(batch).call(executed.converted))
    two = tensors_of(Inputs.from_batch(batch).call(again))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_converted_model_shares_no_storage_with_the_callers(executed):
    theirs = {t.data_ptr() for t in _all_tensors(executed.model) if t.numel()}
    ours = {t.data_ptr() for t in _all_tensors(executed.converted) if t.numel()}
    prepared = {t.data_ptr() for t in _all_tensors(executed.prepared) if t.numel()}
    assert ours
    assert not theirs & ours
    assert not prepared & ours


def _all_tensors(model):
    """Parameters, buffers, tensors held as attributes, and the weights of quantized modules."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))
        if ".quantized." in type(module).__module__ and callable(getattr(module, "weight", None)):
            yield module.weight().int_repr()
            if callable(getattr(module, "bias", None)) and module.bias() is not None:
                yield module.bias()


# --- the caller's model


def snapshot(model):
    """All that a caller could see of a model, with identities where they must not change."""
    return (
        {key: tensor.clone() for key, tensor in model.state_dict().items()},
        {key: id(tensor) for key, tensor in model.named_parameters(remove_duplicate=False)},
        {
            path: (
                type(module),
                module.training,
                sorted(vars(module)),
                [len(hooks) for name, hooks in vars(module).items() if name.endswith("_hooks")],
            )
            for path, module in model.named_modules(remove_duplicate=False)
        },
    )


@pytest.mark.parametrize("name", every(3, NETS))
def test_the_callers_model_is_bit_identical_afterwards(name):
    net = NETS[name]
    model, batches = net.model(), net.batches()
    handle = model.register_forward_hook(lambda module, args, output: None)
    model.tag = {"mine": [1, 2]}
    before = snapshot(model)
    untouched = copy.deepcopy(batches)
    with pytest.warns(qrecipe.QRecipeWarning, match="^QR230 the model itself has hooks"):
        qrecipe.quantize(model, STATIC, batches, progress=silent)
    after = snapshot(model)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    assert before[1:] == after[1:]
    assert model.tag == {"mine": [1, 2]}
    assert not any(hasattr(module, "qconfig") for module in model.modules())
    for given, original in zip(tensors_of(batches), tensors_of(untouched), strict=True):
        assert torch.equal(given, original)
    handle.remove()


def test_a_second_recipe_is_not_influenced_by_the_first():
    net = NETS["residual"]
    model, batches = net.model(), net.batches()
    qrecipe.quantize(model, float_at(["conv1"]), batches, progress=silent)
    one = qrecipe.quantize(model, STATIC, batches, progress=silent)
    two = qrecipe.quantize(net.model(), STATIC, batches, progress=silent)
    assert torch.equal(one(batches[0]), two(batches[0]))


def test_what_happens_to_the_model_later_does_not_reach_the_converted_one():
    net = NETS["norms"]
    model, batches = net.model(), net.batches()
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    before = converted(batches[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert torch.equal(converted(batches[0]), before)


# --- plain torch


@pytest.mark.parametrize("name", ["residual", "depthwise", "nested"])
def test_the_result_is_that_of_plain_torch_where_plain_torch_is_right(name, monkeypatch):
    # torch runs these on fbgemm where the CPU has no VNNI, and rounds some ties differently
    monkeypatch.setattr("qrecipe.planning.engines._has_few_channels", lambda shape: False)
    batches = NETS[name].batches()
    model = NETS[name].model()
    if name == "depthwise":  # torch observes before a ReLU6, which is not right
        model.stem[1] = nn.ReLU()
    ours = qrecipe.quantize(model, STATIC, batches, progress=silent)
    mapping = QConfigMapping().set_global(
        QConfig(
            weight=PerChannelMinMaxObserver.with_args(
                dtype=torch.qint8, qscheme=torch.per_channel_symmetric
            ),
            activation=MovingAverageMinMaxObserver.with_args(
                dtype=torch.quint8, qscheme=torch.per_tensor_affine, reduce_range=True
            ),
        )
    )
    native = get_native_backend_config()
    with engine("x86"):
        theirs = prepare_fx(model, mapping, (batches[0],), backend_config=native)
        for batch in batches:
            theirs(batch)
        theirs = convert_fx(theirs, qconfig_mapping=mapping, backend_config=native)
    assert torch.equal(ours(batches[3]), theirs(batches[3]))


def test_a_module_called_twice_beats_plain_torch():
    net = NETS["shared_conv"]
    batches = net.batches()
    assert isinstance(net.model(), SharedConv)
    converted = qrecipe.quantize(net.model(), STATIC, batches, progress=silent)
    assert sqnr_db(net.model()(batches[0]), converted(batches[0])) > 30


# --- provenance


def test_the_converted_model_says_where_it_comes_from():
    net = NETS["mlp"]
    converted = qrecipe.quantize(net.model(), STATIC, net.batches(), progress=silent)
    found = qrecipe.provenance(converted)
    assert found.fingerprint == STATIC.fingerprint
    assert qrecipe.parse_recipe(found.recipe).fingerprint == STATIC.fingerprint
    assert '"fc1"' in found.plan
    assert found.versions["torch"] == torch.__version__
    assert qrecipe.provenance(copy.deepcopy(converted)).fingerprint == STATIC.fingerprint
    with pytest.raises(QRecipeError) as caught:
        qrecipe.provenance(net.model())
    assert caught.value.findings[0].code == "QR501"
