"""Results that only clamps read have the range of what the clamps give."""

import copy
import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import trained
from plans import net_of, recipe
from torch import nn

import qrecipe
from qrecipe.audit.rounding import rounded_db
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.execution.clamped import Clamped, clamp_findings, commutes
from qrecipe.execution.prepared import prepared_state
from qrecipe.planning import decide

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
BATCHES = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(10)]


def _net():
    torch.manual_seed(0)

    def forward(self, x):
        x = F.relu6(self.first(x))
        return self.last(F.max_pool2d(self.second(x), 2).clamp(-1, 1).flatten(1))

    net = net_of(
        forward, first=nn.Conv2d(3, 8, 3), second=nn.Conv2d(8, 8, 3), last=nn.Linear(32, 5)
    )
    with torch.no_grad():
        net.first.weight.mul_(12)
        net.second.weight.mul_(12)
    return net


@pytest.fixture(params=["fx", "pt2e"])
def executor(request):
    return request.param


@pytest.fixture
def unaware(monkeypatch):
    """Plan as if no clamp was known."""
    return lambda: monkeypatch.setattr(decide, "clamps", lambda *_: {})


def _recipe(executor, phase="ptq"):
    base = "builtin:x86-static-minmax"
    return recipe(base=base, head=f'executor = "{executor}"\nphase = "{phase}"')


def _reached(executor, net=None):
    net = net or _net()
    converted = qrecipe.quantize(net, _recipe(executor), BATCHES)
    return qrecipe.compare(net, converted, BATCHES)


def test_the_output_gains_and_the_graph_stays(executor, unaware):
    aware = _reached(executor)
    unaware()
    before = _reached(executor)
    assert aware.output.sqnr_db > before.output.sqnr_db + 5
    assert {site.name for site in aware.sites} == {site.name for site in before.sites}


def test_activations_are_compared_as_far_as_they_are_read(executor):
    reached = {site.name: site.activation.sqnr_db for site in _reached(executor).sites}
    assert min(reached.values()) > 10


def test_the_float_function_stays(executor):
    net = _net()
    prepared = qrecipe.compile(net, _recipe(executor), BATCHES[0]).prepare()
    with torch.no_grad():
        assert torch.equal(prepared(BATCHES[0]), net(BATCHES[0]))


def test_training_rounds_between_the_limits_and_learns(executor):
    net = _net()
    compiled = qrecipe.compile(net, _recipe(executor, "qat"), BATCHES[0])
    prepared = compiled.prepare()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-4)
    for batch in BATCHES[:3]:
        optimizer.zero_grad()
        loss = (prepared(batch) - net(batch).detach()).square().mean()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prepared.parameters())
    converted = compiled.convert(prepared)
    expected = copy.deepcopy(prepared).eval()(BATCHES[0])
    assert (
        torch.nn.functional.cosine_similarity(
            converted(BATCHES[0]).flatten(), expected.flatten(), 0
        )
        > 0.99
    )


def test_the_fake_quant_of_what_is_clamped_is_named_if_it_diverges(executor):
    compiled = qrecipe.compile(_net(), _recipe(executor, "qat"), BATCHES[0])
    prepared = compiled.prepare()
    prepared(BATCHES[0])
    clamped = next(each for each in prepared.modules() if isinstance(each, Clamped))
    with torch.no_grad():
        clamped.activation_post_process.activation_post_process.max_val.fill_(float("nan"))
    with pytest.raises(qrecipe.CalibrationError, match=r"QR404 .* of (first|second|`?last) "):
        compiled.convert(prepared)


def test_what_is_clamped_is_rounded_where_the_cost_of_ranges_is_told(executor):
    prepared = qrecipe.compile(_net(), _recipe(executor), BATCHES[0]).prepare()
    qrecipe.calibrate(prepared, BATCHES, progress=False)
    clamped = next(each for each in prepared.modules() if isinstance(each, Clamped))
    alone = {clamped.activation_post_process: clamped.activation_post_process}
    assert rounded_db(prepared, alone, prepared_state(prepared).samples[""]) < 100


def test_data_beyond_a_clamp_is_no_drift(executor):
    converted = qrecipe.quantize(_net(), _recipe(executor), BATCHES)
    louder = [batch * 1.05 for batch in BATCHES]
    found = qrecipe.drift(converted, louder)
    assert {site.name for site in found.drifted()} <= {"last"}


def test_a_site_alone_is_ranked_with_the_range_that_it_will_have(unaware):
    aware = qrecipe.sensitivity(_net(), _recipe("fx"), BATCHES)
    unaware()
    before = qrecipe.sensitivity(_net(), _recipe("fx"), BATCHES)
    gained = {site.name: site.sqnr_db for site in aware.sites}
    for site in before.sites:
        if site.name in ("first", "second"):
            assert gained[site.name] > site.sqnr_db + 2


def test_a_stored_model_computes_the_same_and_needs_no_clamps(tmp_path, executor):
    net = _net()
    converted = qrecipe.quantize(net, _recipe(executor), BATCHES)
    qrecipe.save_quantized(converted, tmp_path / "net.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "net.safetensors", _net())
    assert torch.equal(loaded(BATCHES[0]), converted(BATCHES[0]))


@pytest.mark.slow
def test_a_trained_mobilenet_gains_three_decibels(unaware, monkeypatch):
    monkeypatch.syspath_prepend(str(DIGITS))
    digits = importlib.import_module("digits")
    net, held_out = trained.mobilenet(digits), digits.held_out_digits().images[:500]
    found = []
    for _ in range(2):
        converted = qrecipe.quantize(net, recipe(), digits.calibration())
        with torch.no_grad():
            found.append(sqnr_db(net(held_out), converted(held_out)))
        unaware()
    aware, before = found
    assert aware >= before + 3


# --- the integers


def test_torchs_kernel_clamps_integers_as_it_rounds_what_is_clamped():
    """Plain torch, on a grid that goes far beyond what 8 bits can hold."""
    grid = torch.linspace(-40, 40, 200_001)
    for high in (6.0, 5.3, 6.0 * (1 - 2**-23), 1.0):
        for steps in (127, 255):
            scale = high / steps
            before = torch.quantize_per_tensor(grid, scale, 0, torch.quint8)
            after = torch.quantize_per_tensor(F.relu6(grid), scale, 0, torch.quint8)
            assert torch.equal(F.hardtanh(before, 0.0, 6.0).int_repr(), after.int_repr())


@pytest.mark.parametrize("dtype", [torch.quint8, torch.qint8])
@pytest.mark.parametrize("limits", [(0.0, 6.0), (-1.0, 1.0), (None, 3.3), (0.5, None)])
def test_rounding_and_clamping_commute_on_a_grid(dtype, limits):
    for scale in (0.047, 6 / 127, 1e-3, 2.0):
        for zero_point in (0, 3, 100):
            assert commutes(scale, zero_point, dtype, limits)


def test_integers_that_depend_on_the_order_are_found(monkeypatch):
    prepared = qrecipe.compile(_net(), _recipe("fx"), BATCHES[0]).prepare()
    qrecipe.calibrate(prepared, BATCHES)
    assert not list(clamp_findings(prepared))
    rounded = torch.fake_quantize_per_tensor_affine

    def stumbling(x, *grid):
        return rounded(x + 0.4 * x.round() * grid[0], *grid)

    monkeypatch.setattr(torch, "fake_quantize_per_tensor_affine", stumbling)
    assert {finding.code for finding in clamp_findings(prepared)} == {"QR412"}
