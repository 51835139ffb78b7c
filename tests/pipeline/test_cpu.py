"""What a plan needs of the CPU, and what happens where the CPU lacks it.

The tests marked ``cpu`` run twice: as the machine is, and as on a CPU without VNNI, whose kernels
really saturate (`tools/without_vnni.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from places import ROOT
from runs import silent
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import AuditError, QRecipeWarning, UnsupportedError
from qrecipe.planning.cpu import has_vnni

BATCHES = [torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i in range(12)]
SEVEN = "builtin:x86-static"
EIGHT = "builtin:x86-vnni-static"


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6)).eval()


@pytest.fixture
def no_vnni(monkeypatch):
    """The code believes that this CPU has no VNNI; what its kernels compute does not change."""
    monkeypatch.setattr("qrecipe.planning.target_cpu.has_vnni", lambda: False)
    monkeypatch.setattr("qrecipe.artifact.loading.has_vnni", lambda: False)


def test_what_depends_on_the_cpu_holds_without_vnni_too(monkeypatch):
    """The tests marked ``cpu`` once more, with the kernels of a CPU that has AVX2 alone."""
    if not has_vnni():
        pytest.skip("this CPU has none, and the tests run as they are")
    monkeypatch.syspath_prepend(ROOT / "tools")
    import without_vnni

    marked = [str(f) for f in ROOT.glob("tests/**/test_*.py") if "mark.cpu" in f.read_text()]
    given = ["-n", "0", "-p", "no:cacheprovider", "-m", "cpu and not slow", *marked]
    code = (
        "import sys, pytest\n"
        "from qrecipe.planning.cpu import cpu_name\n"
        "assert cpu_name() == 'AVX2 without VNNI', cpu_name()\n"
        "sys.exit(pytest.main(sys.argv[1:]))\n"
    )
    told = without_vnni.environment()
    command = [sys.executable, "-c", code, *given]
    result = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


# --- what a plan needs


def test_eight_bit_activations_on_x86_need_vnni_and_the_plan_says_so():
    plan = qrecipe.plan(model(), EIGHT, BATCHES[0])
    assert plan.needs_vnni
    assert plan.saturating == ("0",)
    assert "needs a CPU with VNNI" in str(plan)
    assert json.loads(plan.to_json())["needs_vnni"] is True


def test_onednn_saturates_as_well_and_qnnpack_does_not():
    for backend, needs in (("x86", True), ("fbgemm", True), ("onednn", True), ("qnnpack", False)):
        recipe = qrecipe.parse_recipe(f'format = 1\nextends = "{EIGHT}"\nbackend = "{backend}"')
        assert qrecipe.plan(model(), recipe, BATCHES[0]).needs_vnni is needs, backend


@pytest.mark.parametrize("recipe", [SEVEN, "builtin:arm-static", "builtin:x86-dynamic"])
def test_seven_bits_or_another_backend_or_mode_need_no_vnni(recipe):
    assert not qrecipe.plan(model(), recipe, BATCHES[0]).needs_vnni


class Gated(nn.Module):
    """A gate whose range is fixed at 8 bits, and what its product is read by."""

    def __init__(self, gate):
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(6, 6), gate, nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)  # a product with the gate's own input would be SiLU

    def forward(self, x):
        return self.last(self.other(x) * self.gate(self.first(x)))


@pytest.mark.parametrize("gate", [nn.Sigmoid(), nn.Tanh(), nn.Hardsigmoid(), nn.Softmax(1)])
def test_a_fixed_range_that_only_feeds_a_product_or_the_output_needs_no_vnni(gate):
    plan = qrecipe.plan(Gated(gate).eval(), SEVEN, BATCHES[0])
    assert not plan.needs_vnni
    assert {site.verdict for site in plan.sites} == {"quantized"}
    assert not qrecipe.plan(
        nn.Sequential(nn.Linear(6, 6), gate).eval(), SEVEN, BATCHES[0]
    ).needs_vnni


# --- a fixed range of 8 bits in front of a kernel that must read 7


class Functions(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(6, 6), nn.Linear(6, 6), function

    def forward(self, x):
        return F.linear(self.function(self.first(x)), self.last.weight, self.last.bias)


def before_a_kernel():
    torch.manual_seed(0)
    for name in ("Sigmoid", "Tanh", "Hardsigmoid"):
        yield f"{name}-linear", nn.Sequential(nn.Linear(6, 6), getattr(nn, name)(), nn.Linear(6, 6))
    softmax = nn.Sequential(nn.Linear(6, 6), nn.Softmax(1), nn.Linear(6, 6))
    yield "Softmax-linear", softmax
    passed = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Flatten(), nn.ReLU(), nn.Linear(6, 6))
    yield "through-passthrough", passed
    yield "torch.sigmoid", Functions(torch.sigmoid)
    yield "torch.tanh", Functions(torch.tanh)
    yield "Tensor.sigmoid", Functions(lambda x: x.sigmoid())


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore:QR232:qrecipe.QRecipeWarning")
@pytest.mark.parametrize(("name", "net"), [*before_a_kernel()])
def test_a_fixed_range_before_a_kernel_of_seven_bits_stays_float_and_nothing_saturates(name, net):
    net = net.eval()
    plan = qrecipe.plan(net, SEVEN, BATCHES[0])
    (site,) = [site for site in plan.sites if site.reason and "fixed at 8 bits" in site.reason]
    assert site.verdict == "float"
    assert not plan.needs_vnni
    converted = qrecipe.quantize(net, SEVEN, BATCHES, progress=silent)
    assert sqnr_db(net(BATCHES[0]), converted(BATCHES[0])) > 25


def test_in_training_it_stays_float_too_and_with_eight_bits_or_a_float_reader_it_does_not():
    net = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 6)).eval()
    head = f'format = 1\nextends = "{SEVEN}"\n'
    for text, verdict in (
        ('phase = "qat"', "float"),
        ("[tensor.activation]\nreduce_range = false", "quantized"),
        ('[rules.module_name]\n"2" = "float"', "quantized"),
        ('backend = "qnnpack"', "quantized"),
    ):
        plan = qrecipe.plan(net, qrecipe.parse_recipe(head + text), BATCHES[0])
        assert plan.sites[1].verdict == verdict, text


# --- a recipe for another CPU


def test_without_vnni_eight_bits_are_one_error_with_two_ways_out(no_vnni):
    for call in (
        lambda **target: qrecipe.compile(model(), EIGHT, BATCHES[0], **target),
        lambda **target: qrecipe.quantize(model(), EIGHT, BATCHES, progress=silent, **target),
        lambda **target: qrecipe.sensitivity(model(), EIGHT, BATCHES, progress=silent, **target),
        lambda **target: qrecipe.tune(
            model(), EIGHT, BATCHES, lambda m: 1.0, progress=silent, **target
        ),
    ):
        with pytest.raises(UnsupportedError) as caught:
            call()
        (finding,) = caught.value.findings
        assert finding.code == "QR318"
        assert "reduce_range = true" in finding.hint
        assert 'target_cpu="vnni"' in finding.notes[0]
        with pytest.raises(UnsupportedError, match=r'QR319.*"vnny"(?s:.)*did you mean "vnni"'):
            call(target_cpu="vnny")


@pytest.mark.filterwarnings("ignore::qrecipe.QRecipeWarning")
def test_both_ways_out_of_it_work(no_vnni):
    seven = f'format = 1\nextends = "{EIGHT}"\n[tensor.activation]\nreduce_range = true'
    qrecipe.quantize(model(), qrecipe.parse_recipe(seven), BATCHES, progress=silent)
    qrecipe.quantize(model(), EIGHT, BATCHES, progress=silent, target_cpu="vnni")


def test_a_model_for_another_cpu_says_what_was_not_judged_and_where(no_vnni, tmp_path):
    with pytest.warns(QRecipeWarning, match=r"QR226.*: 0"):
        made = qrecipe.quantize(model(), EIGHT, BATCHES, progress=silent, target_cpu="vnni")
    origin = qrecipe.provenance(made)
    assert origin.unjudged == ("0",)
    assert origin.cpu.endswith("VNNI")
    qrecipe.save_quantized(made, tmp_path / "m.safetensors")
    with pytest.warns(QRecipeWarning) as caught:
        loaded = qrecipe.load_quantized(tmp_path / "m.safetensors", model())
    assert {str(w.message).split()[0] for w in caught} == {"QR204", "QR226"}
    assert qrecipe.provenance(loaded) == origin


def test_with_vnni_the_target_changes_nothing(monkeypatch):
    monkeypatch.setattr("qrecipe.planning.target_cpu.has_vnni", lambda: True)
    compiled = qrecipe.compile(model(), EIGHT, BATCHES[0], target_cpu="vnni")
    assert compiled.unjudged == ()
    assert qrecipe.compile(model(), EIGHT, BATCHES[0]).unjudged == ()


def extremes():
    """A net and data whose 8-bit products overflow 16 bits in pairs."""
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.copy_(torch.rand(layer.weight.shape, generator=generator) + 0.5)
    return net, [torch.rand(16, 64, generator=generator) for _ in range(12)]


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore::qrecipe.QRecipeWarning")
def test_a_model_for_another_cpu_is_made_wherever_and_its_eighth_bit_runs_where_vnni_is():
    net, batches = extremes()
    made = qrecipe.quantize(net, EIGHT, batches, progress=silent, target_cpu="vnni")
    reached = sqnr_db(net(batches[0]), made(batches[0]))
    assert qrecipe.provenance(made).unjudged == (() if has_vnni() else ("0", "2"))
    assert reached > 35 if has_vnni() else reached < 25


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore::qrecipe.QRecipeWarning")
def test_sensitivity_and_tune_judge_it_as_it_computes_on_its_cpu():
    net, batches = extremes()
    ranking = qrecipe.sensitivity(net, EIGHT, batches, progress=silent, target_cpu="vnni")
    assert min(site.sqnr_db for site in ranking.sites) > 35

    def evaluate(candidate):
        return min(sqnr_db(net(batches[0]), candidate(batches[0])), 100.0)

    result = qrecipe.tune(
        net, EIGHT, batches, evaluate, max_drop=65, progress=silent, target_cpu="vnni"
    )
    assert result.reached


# --- causes


@pytest.mark.cpu
def test_a_first_batch_beyond_the_ranges_is_told_as_that_and_the_cure_works():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()).eval()
    with torch.no_grad():
        for conv in (net[0], net[2]):
            conv.weight.abs_()
    batches = [10 * torch.rand(4, 3, 8, 8), *(torch.rand(4, 3, 8, 8) for _ in range(99))]
    text = f"""
        format = 1
        extends = "{SEVEN}"
        [lint]
        ignore = ["QR203", "QR232"]
        [tensor.activation]
        observer = {{ name = "moving_average_minmax", averaging_constant = 0.2 }}
    """
    recipe = qrecipe.parse_recipe(text)
    if has_vnni():
        qrecipe.quantize(net, recipe, batches, progress=silent)
    else:
        with pytest.raises(AuditError) as caught:
            qrecipe.quantize(net, recipe, batches, progress=silent)
        (finding,) = caught.value.findings
        assert finding.code == "QR416"
        assert "beyond the calibrated range" in finding.message
        assert '"minmax"' in finding.hint
        assert '"float"' not in str(finding)
    wide = qrecipe.parse_recipe(
        text.replace("moving_average_minmax", "minmax").replace(", averaging_constant = 0.2", "")
    )
    qrecipe.quantize(net, wide, batches, progress=silent)


@pytest.mark.cpu
def test_a_right_kernel_after_a_wrong_one_is_not_accused(monkeypatch):
    honest = qrecipe.execution.fx.convert.lowered

    def sabotaged(*args, **kwargs):
        converted = honest(*args, **kwargs)
        weight, bias = converted.get_submodule("0")._weight_bias()
        converted.get_submodule("0").set_weight_bias(weight, bias.detach() + 30.0)
        return converted

    monkeypatch.setattr("qrecipe.execution.fx.convert.lowered", sabotaged)
    net, batches = extremes()
    with pytest.raises(AuditError) as caught:
        qrecipe.quantize(net, SEVEN, batches, progress=silent)
    assert [finding.code for finding in caught.value.findings] == ["QR411"]
    assert "kernel of 0 " in caught.value.findings[0].message


def of_nonnegative_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).eval()
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.abs_()
    return net


def test_low_accuracy_beyond_the_ranges_is_told_as_that_and_minmax_cures_it():
    net, batches = of_nonnegative_weights(), [10 * BATCHES[0], *BATCHES[1:]]
    # qnnpack: its kernels saturate nowhere, so that the scheme alone is judged
    head = f'format = 1\nextends = "{SEVEN}"\nbackend = "qnnpack"\n'
    fast = '{ name = "moving_average_minmax", averaging_constant = 0.5 }'
    tight = f"[tensor.activation]\nobserver = {fast}\n"
    with pytest.warns(QRecipeWarning) as caught:
        qrecipe.quantize(net, qrecipe.parse_recipe(head + tight), batches, progress=silent)
    (told,) = [str(w.message) for w in caught if str(w.message).startswith("QR203")]
    assert "beyond the calibrated range of the input of 0" in told
    assert '"minmax"' in told
    assert "more batches that are as wide" in told
    assert "float" not in told.splitlines()[-1]
    cured = head + '[tensor.activation]\nobserver = "minmax"\n'
    as_wide = [10 * batch for batch in BATCHES]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="QR203")
        qrecipe.quantize(net, qrecipe.parse_recipe(cured), batches, progress=silent)
        qrecipe.quantize(net, qrecipe.parse_recipe(head + tight), as_wide, progress=silent)


def test_a_scheme_of_few_codes_is_not_taken_for_ranges_that_clip():
    four = "[tensor.activation]\nquant_min = 0\nquant_max = 3\nreduce_range = false"
    recipe = qrecipe.parse_recipe(f'format = 1\nextends = "{SEVEN}"\n{four}')
    with pytest.warns(QRecipeWarning, match="QR203.*the scheme is too coarse"):
        qrecipe.quantize(of_nonnegative_weights(), recipe, BATCHES, progress=silent)
