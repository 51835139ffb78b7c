"""Programs of torch.export that torchao's PT2E quantizes by the plan, and their audit."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from differential import snapshot
from export_recipes import EXECUTORCH
from nets import NETS
from plans import net_of, recipe
from programs import of_site, tamper_with_conversion
from shares import every
from torch import nn
from torch.ao.quantization import MinMaxObserver

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.authoring.lock.check import check_lock
from qrecipe.authoring.lock.file import write_lock
from qrecipe.errors.findings import ArtifactError, AuditError, UnsupportedError
from qrecipe.registry import table as registered

pytest.importorskip("torchao")

from qrecipe.execution.pt2e import part as part_module
from qrecipe.execution.pt2e.adapters import Adapter
from qrecipe.execution.pt2e.structure import is_quantize

MINMAX = "builtin:x86-static-minmax"


class Joined(nn.Module):
    """Two branches of different ranges, joined, pooled and read again."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 4)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            self.two.weight.mul_(5)

    def forward(self, x):
        return self.head(self.norm(torch.cat([self.one(x), self.two(x)], 1)))


def joined():
    torch.manual_seed(0)
    return Joined().eval(), [torch.randn(4, 6) for _ in range(10)]


def quantized(model, batches, a_recipe=MINMAX):
    return qrecipe.quantize(model, a_recipe, batches, executor="pt2e")


@pytest.fixture(scope="module")
def calibrated():
    model, batches = joined()
    compiled = qrecipe.compile(model, MINMAX, batches[0], executor="pt2e")
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches)
    return compiled, prepared


@pytest.fixture(scope="module")
def program(calibrated):
    compiled, prepared = calibrated
    return compiled.convert(prepared)


def test_the_random_numbers_of_the_caller_stay_as_they_are():
    model, batches = joined()
    before = torch.get_rng_state()
    quantized(model, batches)
    assert torch.equal(torch.get_rng_state(), before)


def test_containers_are_returned_as_the_model_returns_them():
    model = net_of(
        lambda self, x: {"a": [self.one(x), (x.argmax(1), None)], "b": {"c": "text"}},
        one=nn.Linear(6, 4),
    )
    batch = torch.randn(4, 6)
    found = quantized(model, [batch] * 10)(batch)
    assert type(found) is dict
    assert type(found["a"]) is list
    assert type(found["a"][1]) is tuple
    assert found["b"] == {"c": "text"}


@pytest.mark.parametrize(
    "name", every(5, ["depthwise", "attention", "residual", "decoder", "shared_conv_two_norms"])
)
def test_the_program_computes_what_fx_computes_by_the_same_plan(name):
    net = NETS[name]
    model, batches = net.model(), net.batches(10)
    inputs = qrecipe.Inputs.from_batch(batches[0])
    outputs, plans = [], []
    for executor in ("fx", "pt2e"):
        compiled = qrecipe.compile(model, MINMAX, batches[0], executor=executor)
        prepared = compiled.prepare()
        qrecipe.calibrate(prepared, batches)
        with torch.no_grad():
            outputs.append(inputs.call(compiled._reference(prepared)))
            if executor == "pt2e":
                assert torch.equal(inputs.call(compiled.convert(prepared)), outputs[-1])
        plans.append(compiled.plan)
    assert torch.equal(*outputs)
    assert [replace(site, engine=None) for site in plans[0]] == [
        replace(site, reason=old.reason) for site, old in zip(plans[1], plans[0], strict=True)
    ]


def test_it_is_a_good_citizen():
    model, batches = joined()
    before = snapshot(model)
    converted = quantized(model, batches)
    assert snapshot(model) == before
    x = batches[0]
    with torch.no_grad():
        expected = converted.eval()(x)
        assert torch.equal(copy.deepcopy(converted)(x), expected)
        assert converted(torch.randn(7, 6)).shape == (7, 3)
        found = []
        thread = threading.Thread(target=lambda: found.append(converted(x=x)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)
    assert not converted.training
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    state = converted.state_dict()
    assert own.isdisjoint(tensor.data_ptr() for tensor in state.values())
    assert sum(t.numel() for t in state.values() if t.dtype == torch.int8) == 72
    floating = {name for name, tensor in state.items() if tensor.is_floating_point()}
    assert not floating & {"one.weight", "two.weight", "head.weight"}
    read = {str(node.target) for node in converted.graph.find_nodes(op="get_attr")}
    assert set(state) <= read
    assert '"executor": "pt2e"' in qrecipe.provenance(converted).plan


@pytest.mark.parametrize("prepares", [False, True], ids=["converted", "prepared"])
def test_pickling_a_program_says_how_to_store_it(calibrated, prepares, tmp_path):
    compiled, prepared = calibrated
    program = prepared if prepares else compiled.convert(prepared)
    around = nn.Sequential(program, nn.ReLU())  # as around a root
    for store in (pickle.dumps, lambda value: torch.save(value, tmp_path / "whole.pt")):
        for value in (program, around):
            with pytest.raises(ArtifactError, match=r"QR511 a program .*\n.*save_quantized"):
                store(value)
    x = joined()[1][0]
    if prepares:
        again = compiled.prepare()
        again.load_state_dict(pickle.loads(pickle.dumps(program.state_dict())))
        program, again = compiled.convert(program), compiled.convert(again)
    else:
        qrecipe.save_quantized(program, tmp_path / "net.safetensors")
        again = qrecipe.load_quantized(tmp_path / "net.safetensors", joined()[0])
    assert torch.equal(again(x), program(x))


@pytest.mark.parametrize("base", [MINMAX, "builtin:x86-dynamic"])
def test_only_what_stays_float_needs_gradients_as_under_fx(base, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm(4)).eval()
    batches = [torch.randn(4, 6) for _ in range(10)]
    mixed = recipe('[rules.module_name]\n"2" = "float"\n"3" = "float"\n', base=base)
    converted = quantized(model, batches, mixed)
    qrecipe.save_quantized(converted, tmp_path / "net.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "net.safetensors", model)
    traced = qrecipe.quantize(model, mixed, batches, executor="fx")
    for program in (converted, loaded):
        assert with_gradients(program) == with_gradients(traced)
    assert with_gradients(traced) == {"2.weight", "2.bias", "3.weight", "3.bias"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def with_gradients(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_bias_that_a_float_layer_adds_too_keeps_its_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).eval()
    model[2].bias = model[0].bias
    half = recipe('[rules.module_name]\n"2" = "float"\n', base=MINMAX)
    converted = quantized(model, [torch.randn(4, 6) for _ in range(10)], half)
    assert len({id(each) for each in converted.parameters()}) == 2
    assert all(each.requires_grad for each in converted.parameters())
    assert not quantized(model, [torch.randn(4, 6)] * 10)(torch.randn(4, 6)).requires_grad


def test_the_prepared_model_stays_usable_and_shares_nothing(calibrated):
    compiled, prepared = calibrated
    model, batches = joined()
    own = {tensor.data_ptr() for tensor in compiled._model.parameters()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in prepared.parameters())
    with torch.no_grad():
        assert torch.equal(prepared(batches[0]), model(batches[0]))
        first, second = (compiled.convert(prepared)(batches[0]) for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(prepared(batches[0]), model(batches[0]))


def test_what_the_plan_leaves_float_stays_float():
    model, batches = joined()
    rules = '[rules.module_name]\n"one" = "float"\n"norm" = "float"\n'
    mixed = recipe(rules, base=MINMAX)
    converted = quantized(model, batches, mixed)
    assert torch.equal(converted.state_dict()["one.weight"], model.one.weight)
    floats = [node for node in converted.graph.nodes if node.meta.get("site") in ("one", "norm")]
    assert len(floats) == 2
    assert not any(is_quantize(user) for node in floats[:1] for user in node.users)
    traced = qrecipe.quantize(model, mixed, batches)
    with torch.no_grad():
        assert output_sqnr_db(traced(batches[0]), converted(batches[0])) > 60


def test_containers_of_inputs_and_outputs_and_preserved_attributes():
    model = net_of(
        lambda self, pair, scale=None: {"a": self.one(pair["x"]), "b": (pair["x"] * 2, scale)},
        one=nn.Linear(6, 4),
    )
    model.names = ["x"]
    kept = recipe('[fx]\npreserved_attributes = ["names"]', base=MINMAX)
    batches = [({"x": torch.randn(3, 6)},) for _ in range(10)]
    converted = quantized(model, batches, kept)
    with torch.no_grad():
        output = converted(*batches[0])
    assert list(output) == ["a", "b"]
    assert output["b"][1] is None
    assert output_sqnr_db(model(*batches[0]), output) > 25
    assert converted.names == ["x"]


def test_a_model_without_tensors_of_its_own_takes_several_inputs():
    model = net_of(lambda self, x, y, z: (x + y) * z)
    batches = [tuple(torch.randn(3, 6) for _ in range(3)) for _ in range(10)]
    converted = quantized(model, batches)
    with torch.no_grad():
        assert output_sqnr_db(model(*batches[0]), converted(*batches[0])) > 25


def test_a_model_that_is_fixed_to_its_batch_size_is_audited_on_it():
    model = net_of(lambda self, x: self.fc(x).view(8, 2, 2).sum(1), fc=nn.Linear(6, 4))
    batches = [torch.randn(8, 6) for _ in range(10)]
    with torch.no_grad():
        reached = output_sqnr_db(model(batches[0]), quantized(model, batches)(batches[0]))
    assert reached is not None
    assert reached > 20


def test_batch_norms_before_convolutions_are_quantized_without_exporting_again(monkeypatch):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    batches = [torch.randn(2, 3, 4, 4) for _ in range(10)]
    compiled = qrecipe.compile(model, MINMAX, batches[0], executor="pt2e")
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches)
    monkeypatch.setattr(torch.export, "export", None)
    converted = compiled.convert(prepared)
    with torch.no_grad():
        assert output_sqnr_db(model(batches[0]), converted(batches[0])) > 20
    assert "aten.batch_norm" in converted.code


def test_a_norm_behind_a_layer_stays_float_where_the_backend_has_no_kernel():
    """torchao would fold it into the linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval()
    model[1].running_var.uniform_(0.5, 2)
    batches = [torch.randn(8, 6) for _ in range(10)]
    converted = quantized(model, batches, qrecipe.parse_recipe(EXECUTORCH))
    with torch.no_grad():
        assert output_sqnr_db(model(batches[0]), converted(batches[0])) > 30
    assert "aten.batch_norm" in converted.code


def test_a_number_of_results_that_depends_on_values_may_change_by_rounding():
    model = net_of(lambda self, x: (y := self.fc(x))[y.sum(1) > 0], fc=nn.Linear(6, 6))
    batches = [torch.randn(512, 6) for _ in range(10)]
    converted = quantized(model, batches)
    with torch.no_grad():
        assert any(len(model(x)) != len(converted(x)) for x in batches)


def test_roots_are_programs_of_their_own(program):
    model, batches = joined()
    outer = nn.Sequential(model, nn.ReLU()).eval()
    rooted = recipe('[fx]\nroots = ["0"]', base=MINMAX)
    converted = quantized(outer, batches, rooted)
    assert type(converted) is nn.Sequential
    with torch.no_grad():
        assert torch.equal(converted[0](batches[0]), program(batches[0]))


class Counting(MinMaxObserver):
    """An observer of a plugin, which nothing of torchao knows."""

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


@pytest.fixture
def counting():
    before = registered.snapshot()
    qrecipe.register_observer("counting")(Counting)
    yield
    registered.restore(before)


def test_observers_of_plugins_work_unchanged(counting, program):
    model, batches = joined()
    text = '[tensor.activation]\nobserver = "counting"\n'
    compiled = qrecipe.compile(model, recipe(text, base=MINMAX), batches[0], executor="pt2e")
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches)
    calls = [each.calls for each in prepared.modules() if isinstance(each, Counting)]
    # the input, the join as each of its branches, the norm, the head
    assert sorted(calls) == [10, 10, 10, 20]
    with torch.no_grad():
        assert torch.equal(compiled.convert(prepared)(batches[0]), program(batches[0]))


def _read_twice(self, x):
    x = self.conv(x)
    return self.norm(x), self.other(x)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_norm_whose_convolution_has_another_reader_is_not_folded(kind):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    norm.running_var.uniform_(0.1, 4)
    layers = {"conv": kind(4, 4, 3), "norm": norm, "other": nn.Conv2d(4, 4, 1)}
    model = net_of(_read_twice, **layers)
    batches = [torch.randn(2, 4, 8, 8)] * 10
    made = quantized(model, batches)
    parameters = of_site(made, "norm").args[1:5]
    assert [each.op for each in parameters] == ["get_attr"] * 4
    with torch.no_grad():
        assert output_sqnr_db(model(batches[0]), made(batches[0])) > 25


def test_a_lock_of_fx_holds_under_it(tmp_path):
    net = NETS["depthwise"]  # with another engine in FX
    path = tmp_path / "net.lock.toml"
    write_lock(qrecipe.plan(net.model(), MINMAX, net.batches(1)[0]), path)
    plan = qrecipe.plan(net.model(), MINMAX, net.batches(1)[0], executor="pt2e")
    assert "executed by PT2E, as asked" in str(plan)
    (cause,) = check_lock(plan, path).causes
    assert str(cause) == "the plan: executor fx -> pt2e"


def test_without_torchao_the_error_says_what_to_install(monkeypatch):
    model, batches = joined()
    monkeypatch.setattr("qrecipe.execution.pt2e.executor.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"QR317(?s:.)*pip install 'qrecipe\[pt2e\]'"):
        qrecipe.compile(model, MINMAX, batches[0], executor="pt2e")


# --- the audit finds what is wrong


@pytest.fixture
def tampered(calibrated, monkeypatch):
    """Convert with a tampered step; the findings of the audit."""

    def findings(tamper):
        tamper_with_conversion(monkeypatch, tamper)
        compiled, prepared = calibrated
        with pytest.raises(AuditError) as raised:
            compiled.convert(prepared)
        return raised.value.findings

    return findings


def test_a_wrong_scale_is_found(tampered):
    def tamper(made):
        (quantize,) = (user for user in of_site(made, "norm").users if is_quantize(user))
        (dequantize,) = (user for user in quantize.users if ".dequantize_per_" in str(user.target))
        for node in (quantize, dequantize):
            node.update_arg(1, node.args[1] * 1.01)

    (finding,) = tampered(tamper)
    assert finding.code == "QR410"
    assert "the scale is not what was calibrated" in finding.message
    assert "head reads norm" in finding.message


def test_a_tensor_left_float_is_found(tampered):
    def tamper(made):
        node = of_site(made, "head")
        node.update_arg(0, node.args[0].args[0].args[0])

    found = tampered(tamper)
    assert [finding.message.partition(", but ")[2] for finding in found[:2]] == [
        "its result is read as float",
        "reads layer_norm, which is float",
    ]
    assert {finding.code for finding in found} == {"QR410"}


def test_a_parameter_that_is_rounded_is_found(tampered):
    def tamper(made):
        norm = of_site(made, "norm")
        (weight, bias), given = norm.args[2:4], norm.args[0].args
        assert weight.op == bias.op == "get_attr"
        with made.graph.inserting_before(norm):
            rounded = made.graph.call_function(norm.args[0].target, (weight, *given[1:]))
        norm.update_arg(2, rounded)

    found = tampered(tamper)
    assert any("a parameter that stays float, is quantized" in each.message for each in found)


def test_an_observer_that_was_left_in_is_found(calibrated, monkeypatch):
    honest = part_module.convert_pt2e

    def wrong(prepared):
        for name, module in list(prepared.named_modules()):
            if isinstance(module, Adapter) and name == "activation_post_process_0":
                prepared.set_submodule(name, module.observer)  # of torch.ao
        return honest(prepared)

    monkeypatch.setattr(part_module, "convert_pt2e", wrong)
    compiled, prepared = calibrated
    with pytest.raises(AuditError, match=r"QR410 one .* reads activation_post_process_0"):
        compiled.convert(prepared)


def test_a_missing_annotation_is_found(monkeypatch):
    class Forgetful(part_module.PlanQuantizer):
        def annotate(self, model):
            super().annotate(model)
            del of_site(model, "head").meta["quantization_annotation"]

    monkeypatch.setattr(part_module, "PlanQuantizer", Forgetful)
    model, batches = joined()
    with pytest.raises(
        AuditError, match=r"head \(Linear\) is planned as static, but its weight is float"
    ):
        quantized(model, batches)


def test_branches_of_a_join_with_scales_of_their_own_are_found(monkeypatch):
    class Untied(part_module.PlanQuantizer):
        def annotate(self, model):
            super().annotate(model)
            join = of_site(model, ":cat")
            annotation = join.meta["quantization_annotation"]
            join.meta["quantization_annotation"] = replace(
                annotation,
                input_qspec_map={
                    source: type(spec)(source)
                    for source, spec in annotation.input_qspec_map.items()
                },
            )

    monkeypatch.setattr(part_module, "PlanQuantizer", Untied)
    model, batches = joined()
    with pytest.raises(AuditError, match="that share a scale have several"):
        quantized(model, batches)


def test_a_site_that_the_program_does_not_know_is_found(monkeypatch):
    honest = part_module.program_of

    def forgetful(*given):
        made = honest(*given)
        del of_site(made, "head").meta["site"]
        return made

    monkeypatch.setattr(part_module, "program_of", forgetful)
    model, batches = joined()
    with pytest.raises(AuditError, match=r"QR410 head \(Linear\) is planned as static, but vanish"):
        quantized(model, batches)


def test_a_weight_without_integers_is_found(tampered):
    def tamper(made):
        node = of_site(made, "head")
        made.head_weight = nn.Parameter(torch.zeros(3, 8))
        with made.graph.inserting_before(node):
            node.update_arg(1, made.graph.get_attr("head_weight"))

    found = tampered(tamper)
    assert found[0].message == "head (Linear) is planned as static, but its weight is float"


def test_an_operator_that_computes_something_else_is_found(tampered):
    def tamper(made):
        node = of_site(made, "norm")
        node.target = torch.ops.aten.layer_norm.default
        node.args = (*node.args[:4], 10.0)  # eps, which not every export writes down

    (finding,) = tampered(tamper)
    assert finding.code == "QR411"
    assert "the converted operator of norm (LayerNorm) computes something else" in finding.message


# --- measuring


def test_comparisons_and_drift_say_of_it_what_they_say_of_fx(program):
    model, batches = joined()
    compared, drifted = [], []
    for converted in (qrecipe.quantize(model, MINMAX, batches), program):
        found = qrecipe.compare(model, converted, batches).sites
        compared.append({site.name: (site.weight, site.activation) for site in found})
        ranges = qrecipe.drift(converted, batches).sites
        drifted.append(
            {
                (site.name if site.tensor == "output" else "x", round(site.stored.scale, 6))
                for site in ranges
            }
        )
    assert compared[0] == compared[1]
    assert None not in compared[1]["head"]
    assert drifted[0] == drifted[1]
    assert len(drifted[0]) == 5
