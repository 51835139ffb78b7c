"""Plan, prepare and convert agree on every toy net; the audit notices where they would not."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
from nets import NETS, SharedConv
from torch import nn
from torch.ao.nn import quantized as nnq
from torch.ao.quantization import QConfig, QConfigMapping, qconfig_equals
from torch.ao.quantization.backend_config import get_native_backend_config
from torch.ao.quantization.observer import (
    MovingAverageMinMaxObserver,
    ObserverBase,
    PerChannelMinMaxObserver,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import qrecipe
from qrecipe.errors import AuditError, QRecipeError
from qrecipe.fx import execution
from qrecipe.fx.emission import site_of
from qrecipe.fx.structure import realised_sites
from qrecipe.inputs import Inputs
from qrecipe.qconfigs import qconfig
from qrecipe.sqnr import sqnr_db

HEAD = 'format = 1\nextends = "builtin:x86-static"\n'
STATIC = qrecipe.parse_recipe(HEAD)


def silent(done, total):
    """A progress callback that shows nothing."""


def float_at(names):
    rules = "".join(f'"{_selecting(name)}" = "float"\n' for name in names)
    return qrecipe.parse_recipe(f"{HEAD}[rules.module_name]\n{rules}")


def _selecting(name):
    return name if "#" in name else f"{name}#0"


def half_of(net, seed):
    """A recipe that leaves a random half of the sites float, each by its exact name."""
    names = [site.name for site in qrecipe.plan(net.model(), STATIC, net.batches(1)[0]).sites]
    return float_at(random.Random(seed).sample(names, len(names) // 2))


CASES = [(name, seed) for name in NETS for seed in (None, 1, 2)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1] or 'all'}", scope="module")
def executed(request):
    """One net, compiled, prepared, calibrated and converted once for all tests."""
    name, seed = request.param
    net = NETS[name]
    recipe = STATIC if seed is None else half_of(net, seed)
    model, batches = net.model(), net.batches()
    with warnings.catch_warnings():
        warnings.simplefilter("error", qrecipe.QRecipeWarning)
        compiled = qrecipe.compile(model, recipe, batches[0])
        prepared = compiled.prepare()
        qrecipe.calibrate(prepared, batches, progress=silent)
        converted = compiled.convert(prepared)
    return Executed(net, model, batches, compiled, prepared, converted)


class Executed:
    def __init__(self, net, model, batches, compiled, prepared, converted):
        self.net, self.model, self.batches = net, model, batches
        self.compiled, self.prepared, self.converted = compiled, prepared, converted


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


def test_the_converted_model_stays_near_the_float_one(executed):
    batch = executed.batches[0]
    with torch.no_grad():
        expected = _tensors(Inputs.from_batch(batch).call(executed.model))
        actual = _tensors(Inputs.from_batch(batch).call(executed.converted))
    assert len(expected) == len(actual)
    for a, b in zip(expected, actual, strict=True):
        assert a.shape == b.shape
        assert not b.is_quantized
        assert sqnr_db(a, b) > executed.net.least_db


def test_converting_keeps_the_prepared_model_usable(executed):
    again = executed.compiled.convert(executed.prepared)
    batch = executed.batches[1]
    one = _tensors(Inputs.from_batch(batch).call(executed.converted))
    two = _tensors(Inputs.from_batch(batch).call(again))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_converted_model_shares_no_storage_with_the_callers(executed):
    theirs = {t.data_ptr() for t in _all_tensors(executed.model) if t.numel()}
    ours = {t.data_ptr() for t in _all_tensors(executed.converted) if t.numel()}
    prepared = {t.data_ptr() for t in _all_tensors(executed.prepared) if t.numel()}
    assert ours
    assert not theirs & ours
    assert not prepared & ours


def _tensors(value):
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def _all_tensors(model):
    """Parameters, buffers, tensors held as attributes, and the weights of quantized modules."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))
        if ".quantized." in type(module).__module__ and callable(getattr(module, "weight", None)):
            yield module.weight().int_repr()
            if callable(getattr(module, "bias", None)):
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


@pytest.mark.parametrize("name", NETS)
def test_the_callers_model_is_bit_identical_afterwards(name):
    net = NETS[name]
    model, batches = net.model(), net.batches()
    handle = model.register_forward_hook(lambda module, args, output: None)
    model.tag = {"mine": [1, 2]}
    before = snapshot(model)
    untouched = copy.deepcopy(batches)
    qrecipe.quantize(model, STATIC, batches, progress=silent)
    after = snapshot(model)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    assert before[1:] == after[1:]
    assert model.tag == {"mine": [1, 2]}
    assert not any(hasattr(module, "qconfig") for module in model.modules())
    for given, original in zip(_tensors(batches), _tensors(untouched), strict=True):
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
def test_the_result_is_that_of_plain_torch_where_plain_torch_is_right(name):
    net = NETS[name]
    batches = net.batches()
    ours = qrecipe.quantize(net.model(), STATIC, batches, progress=silent)
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
    with execution.engine("x86"):
        theirs = prepare_fx(net.model(), mapping, (batches[0],), backend_config=native)
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


# --- other engines and modes


@pytest.mark.parametrize("backend", ["fbgemm", "onednn", "qnnpack"])
@pytest.mark.parametrize("name", ["residual", "decoder", "squeeze_excite", "shared_conv"])
def test_other_engines_pass_the_audit_and_leave_the_engine_as_it_was(backend, name):
    if backend not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch has no {backend}")
    net = NETS[name]
    batches = net.batches()
    recipe = qrecipe.parse_recipe(f'{HEAD}backend = "{backend}"\n')
    former = torch.backends.quantized.engine
    converted = qrecipe.quantize(net.model(), recipe, batches, progress=silent)
    assert torch.backends.quantized.engine == former
    assert sqnr_db(net.model()(batches[0]), converted(batches[0])) > 20


DYNAMIC = """
[tensor.dynamic]
dtype = "uint8"
is_dynamic = true
[tensor.half]
dtype = "float16"
[tensor.half-dynamic]
dtype = "float16"
is_dynamic = true
[tensor.embedding]
observer = "per_channel_minmax"
dtype = "uint8"
qscheme = "per_channel_affine_float_qparams"
[qconfig.dynamic]
weight = "weight"
activation = "dynamic"
[qconfig.half]
weight = "half"
activation = "half-dynamic"
[qconfig.embedding]
weight = "embedding"
[rules]
global = "float"
[rules.module_type]
"""


@pytest.mark.parametrize(
    ("name", "rule", "kind"),
    [
        ("mlp", '"torch.nn.Linear" = "dynamic"', nnq.dynamic.Linear),
        ("mlp", '"torch.nn.Linear" = "half"', nnq.dynamic.Linear),
        ("recurrent", '"torch.nn.LSTM" = "dynamic"', nnq.dynamic.LSTM),
        ("tagger", '"torch.nn.Embedding" = "embedding"', nnq.Embedding),
    ],
)
def test_dynamic_and_weight_only_sites_need_no_batches(name, rule, kind):
    net = NETS[name]
    batch = net.batches(1)[0]
    recipe = qrecipe.parse_recipe(HEAD + DYNAMIC + rule)
    converted = qrecipe.quantize(net.model(), recipe, example_inputs=batch)
    assert sum(isinstance(module, kind) for module in converted.modules()) >= 1
    expected = _tensors(net.model()(batch))[0]
    assert sqnr_db(expected, _tensors(converted(batch))[0]) > 20


def test_all_float_gives_the_float_model_back():
    net = NETS["residual"]
    recipe = qrecipe.parse_recipe(f'{HEAD}[rules]\nglobal = "float"\n')
    converted = qrecipe.quantize(net.model(), recipe, example_inputs=net.batches(1)[0])
    batch = net.batches()[1]
    torch.testing.assert_close(converted(batch), net.model()(batch))


def test_preserved_attributes_survive_prepare_and_convert():
    net = NETS["mlp"]
    model = net.model()
    model.class_names = ["cat", "dog"]
    recipe = qrecipe.parse_recipe(f'{HEAD}[fx]\npreserved_attributes = ["class_names"]\n')
    compiled = qrecipe.compile(model, recipe, net.batches(1)[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, net.batches(), progress=silent)
    assert prepared.class_names == ["cat", "dog"]
    assert compiled.convert(prepared).class_names == ["cat", "dog"]


def test_indices_as_output_are_no_reason_to_doubt_the_numbers():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x):
            return self.fc(x).argmax(1)

    batches = NETS["mlp"].batches()
    model = Classifier().eval()
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    assert converted(batches[0]).dtype == torch.int64


def test_a_conv_whose_output_is_also_read_before_the_relu_is_right():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.relu = nn.ReLU()

        def forward(self, x):
            y = self.conv(x)
            return y + self.relu(y)

    batches = NETS["residual"].batches()
    model = Branch().eval()
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    assert sqnr_db(model(batches[0]), converted(batches[0])) > 30


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


# --- the audit can fail


@pytest.fixture
def sabotaged(monkeypatch):
    """Quantize a toy net while something goes wrong in lowering; returns the audit's findings."""

    def run(name, sabotage, recipe=STATIC):
        honest = execution.lowered

        def lowered(*args, **kwargs):
            converted = honest(*args, **kwargs)
            sabotage(converted)
            return converted

        monkeypatch.setattr(execution, "lowered", lowered)
        net = NETS[name]
        with pytest.raises(AuditError) as caught:
            qrecipe.quantize(net.model(), recipe, net.batches(), progress=silent)
        return caught.value.findings

    return run


def test_an_honest_conversion_passes_the_same_road(monkeypatch):
    calls = []
    honest = execution.lowered
    monkeypatch.setattr(execution, "lowered", lambda *a, **k: calls.append(1) or honest(*a, **k))
    net = NETS["mlp"]
    qrecipe.quantize(net.model(), STATIC, net.batches(), progress=silent)
    assert calls == [1]


def test_a_float_module_in_the_place_of_a_quantized_one_is_found(sabotaged):
    findings = sabotaged("mlp", lambda model: setattr(model, "fc2", nn.Linear(16, 4)))
    assert [f.code for f in findings] == ["QR410"]
    assert "fc2" in findings[0].message
    assert findings[0].location is not None


def test_a_quantized_module_in_the_place_of_a_float_one_is_found(sabotaged):
    def sabotage(model):
        model.fc2 = nnq.Linear(16, 4)

    findings = sabotaged("mlp", sabotage, float_at(["fc2"]))
    assert "QR410" in {f.code for f in findings}
    assert any("fc2" in f.message for f in findings)


def test_a_site_that_vanished_is_found(sabotaged):
    def sabotage(model):
        for node in list(model.graph.nodes):
            if site_of(node) == "act":
                node.replace_all_uses_with(node.args[0])
                model.graph.erase_node(node)
        model.recompile()

    findings = sabotaged("squeeze_excite", sabotage)
    assert any("act" in f.message and "vanished" in f.message for f in findings)


def _requantized(module, change):
    weight, bias = module._weight_bias()
    changed = change(weight.dequantize())
    module.set_weight_bias(
        torch.quantize_per_channel(
            changed,
            weight.q_per_channel_scales(),
            weight.q_per_channel_zero_points(),
            0,
            torch.qint8,
        ),
        bias,
    )


def test_a_changed_weight_is_found_and_its_site_named(sabotaged):
    findings = sabotaged("mlp", lambda model: _requantized(model.fc1, lambda w: w.flip(0)))
    assert {f.code for f in findings} <= {"QR411", "QR412"}
    assert any("fc1" in f.message for f in findings)
    assert not any("fc2" in f.message for f in findings)


def test_a_changed_bias_is_found_and_its_site_named(sabotaged):
    def sabotage(model):
        module = model.get_submodule("layer1.0.conv2")
        weight, bias = module._weight_bias()
        module.set_weight_bias(weight, bias.detach() + 1.0)

    findings = sabotaged("residual", sabotage)
    assert any("layer1.0.conv2" in f.message for f in findings)


def test_a_changed_output_scale_is_found(sabotaged):
    def sabotage(model):
        model.fc1.scale *= 0.2

    findings = sabotaged("mlp", sabotage)
    assert any("fc1" in f.message for f in findings)


def test_weights_of_another_dtype_or_scheme_are_found(sabotaged):
    def sabotage(model):
        weight, bias = model.fc1._weight_bias()
        model.fc1.set_weight_bias(
            torch.quantize_per_tensor(weight.dequantize(), 0.01, 0, torch.qint8), bias
        )

    findings = sabotaged("mlp", sabotage)
    assert [f.code for f in findings] == ["QR410"]
    assert "fc1" in findings[0].message


def test_a_model_that_fails_when_it_runs_is_an_error_of_the_audit(sabotaged):
    findings = sabotaged("mlp", lambda model: setattr(model, "fc2", nnq.Linear(15, 4)))
    assert all(f.code.startswith("QR4") for f in findings)


class Wrong(nn.Module):
    """One operation with a kernel that is known to be wrong, between two right ones."""

    def __init__(self, layer):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.suspect = layer

    def forward(self, x):
        return self.suspect(self.first(x))


def test_a_wrong_kernel_that_nobody_refused_is_found_and_named(monkeypatch):
    monkeypatch.setattr("qrecipe.backend.refusal", lambda *args: None)
    model = Wrong(nn.ConvTranspose2d(4, 6, 2, stride=2)).eval()
    with pytest.raises(AuditError) as caught:
        qrecipe.quantize(model, STATIC, NETS["residual"].batches(), progress=silent)
    (finding,) = caught.value.findings
    assert finding.code == "QR411"
    assert "suspect" in finding.message
    assert "suspect" in finding.hint


def test_a_scheme_that_is_too_coarse_warns_and_blames_no_kernel():
    rules = """
    [tensor.coarse]
    observer = "minmax"
    dtype = "uint8"
    qscheme = "per_tensor_affine"
    quant_min = 0
    quant_max = 3
    [qconfig.coarse]
    weight = "weight"
    activation = "coarse"
    [rules]
    global = "coarse"
    """
    net = NETS["residual"]
    with pytest.warns(qrecipe.QRecipeWarning, match="QR203"):
        qrecipe.quantize(
            net.model(), qrecipe.parse_recipe(HEAD + rules), net.batches(), progress=silent
        )
