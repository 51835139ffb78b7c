"""The example of a plugin package: its observer, its fake-quant, and installing it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nets import NETS
from places import ROOT
from runs import silent
from torch.ao.quantization import FakeQuantize, MinMaxObserver, PerChannelMinMaxObserver

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.observers.contract import contract_findings
from qrecipe.observers.qconfig import factory
from qrecipe.recipe.schema import TensorSpec
from qrecipe.registry import table as registered

EXAMPLE = ROOT / "examples" / "plugin-package"
PACKAGE = "qrecipe_example_plugin"


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """The example's modules, imported from its folder and forgotten afterwards."""
    before = registered.snapshot()
    sys.path.insert(0, str(EXAMPLE))
    try:
        import qrecipe_example_plugin.percentile
        import qrecipe_example_plugin.stochastic_rounding  # noqa: F401

        yield
    finally:
        sys.path.remove(str(EXAMPLE))
        registered.restore(before)
        for name in [name for name in sys.modules if name.partition(".")[0] in (PACKAGE, "try_it")]:
            del sys.modules[name]


def percentile(**arguments):
    from qrecipe_example_plugin.percentile import PercentileObserver

    return PercentileObserver(**arguments)


def stochastic(spec):
    return factory(
        TensorSpec.model_validate({**spec, "fake_quant": "stochastic_rounding"}), "qat"
    )()


WEIGHT = {"observer": "minmax", "dtype": "int8", "qscheme": "per_tensor_symmetric"}
CHANNELS = {
    "observer": "per_channel_minmax",
    "dtype": "int8",
    "qscheme": "per_channel_symmetric",
}
SCHEMES = [torch.per_tensor_affine, torch.per_tensor_symmetric]


# --- the observer


def test_the_observer_and_the_fake_quant_keep_the_contract():
    assert (
        contract_findings("observer", "percentile", registered.find("observer", "percentile").cls)
        == []
    )
    found = registered.find("fake_quant", "stochastic_rounding")
    assert contract_findings("fake_quant", "stochastic_rounding", found.cls) == []


def test_the_range_ends_at_the_percentiles_of_all_values():
    observer = percentile(percentile=90.0, dtype=torch.quint8)
    values = torch.arange(-100.0, 901.0)[torch.randperm(1001)]
    for batch in values.split(100):
        assert observer(batch) is batch
    # torch.quantile computes the rank in float32, and not alike in every version
    limits = (float(observer.min_val), float(observer.max_val))
    assert limits == pytest.approx((0.0, 800.0), abs=1e-5)
    scale, zero_point = observer.calculate_qparams()
    assert (float(scale), int(zero_point)) == (pytest.approx(800 / 255), 0)


def test_a_symmetric_range_ends_at_the_percentile_of_the_magnitudes():
    observer = percentile(percentile=90.0, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    observer(torch.arange(-1000.0, 1.0))
    assert (float(observer.min_val), float(observer.max_val)) == (-900.0, 900.0)


@pytest.mark.parametrize("qscheme", SCHEMES)
def test_the_hundredth_percentile_is_the_range_of_minmax(qscheme):
    spec = {"dtype": torch.qint8, "qscheme": qscheme}
    ours, torchs = percentile(percentile=100.0, **spec), MinMaxObserver(**spec)
    for batch in torch.randn(3, 500):
        ours(batch)
        torchs(batch)
    assert (
        list(map(torch.equal, ours.calculate_qparams(), torchs.calculate_qparams())) == [True] * 2
    )


def test_channels_have_ranges_of_their_own():
    spec = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}
    weight = torch.randn(6, 3, 5, 5) * torch.logspace(-3, 2, 6).reshape(6, 1, 1, 1)
    ours, torchs = percentile(percentile=100.0, **spec), PerChannelMinMaxObserver(**spec)
    ours(weight)
    torchs(weight)
    assert (
        list(map(torch.equal, ours.calculate_qparams(), torchs.calculate_qparams())) == [True] * 2
    )
    clipped = percentile(percentile=90.0, **spec)
    clipped(weight)
    assert bool((clipped.max_val < ours.max_val).all())


def test_of_many_values_an_even_sample_is_kept_that_the_same_data_give_again():
    first, second = (percentile(percentile=95.0, capacity=4096) for _ in range(2))
    for start in range(0, 400_000, 10_000):  # ascending: a sample of the first values would be low
        batch = torch.arange(float(start), start + 10_000)
        first(batch)
        second(batch)
    assert first.values.shape == (1, 4096)
    # five standard deviations of the rank: 5 * sqrt(0.95 * 0.05 / 4096) = 1.7 %
    assert float(first.max_val) / 400_000 == pytest.approx(0.95, abs=0.017)
    assert float(first.min_val) / 400_000 == pytest.approx(0.05, abs=0.017)
    assert torch.equal(first.values, second.values)


def test_a_batch_of_exactly_the_capacity_does_not_bias_the_sample():
    observer = percentile(percentile=75.0, capacity=1024)
    for start in range(0, 1024 * 50, 1024):
        observer(torch.arange(float(start), start + 1024))
    assert float(observer.max_val) / (1024 * 50) == pytest.approx(0.75, abs=0.07)


def test_observing_leaves_torchs_random_numbers_alone():
    before = torch.get_rng_state()
    percentile()(torch.ones(10))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_observer_that_saw_nothing_has_no_range_and_an_empty_batch_gives_none():
    observer = percentile()
    observer(torch.empty(0, 3))
    assert float(observer.min_val) == float("inf")
    observer(torch.tensor([-1.0, 3.0]))
    assert float(observer.max_val) == pytest.approx(2.996)
    observer.reset_min_max_vals()
    assert float(observer.max_val) == float("-inf")


def test_the_state_of_an_observer_loads_into_a_fresh_one():
    observer, fresh = percentile(), percentile()
    observer(torch.randn(1000))
    fresh.load_state_dict(observer.state_dict())
    assert torch.equal(fresh.values, observer.values)
    assert torch.equal(copy.deepcopy(observer).max_val, fresh.max_val)
    fresh(torch.full((1000,), 9.0))
    assert float(fresh.max_val) > float(observer.max_val)


# --- the fake-quant


@pytest.mark.parametrize("spec", [WEIGHT, CHANNELS])
def test_training_rounds_at_random_and_evaluation_to_the_nearest(spec):
    fake_quant = stochastic(spec)
    x = torch.randn(4, 2000)
    first, second = fake_quant(x), fake_quant(x)
    assert not torch.equal(first, second)
    scale = fake_quant.scale.reshape(-1, 1)
    assert float(((first - x).abs() / scale).max()) <= 1.001
    torch.testing.assert_close(first / scale, (first / scale).round())
    fake_quant.eval()
    reference = factory(TensorSpec.model_validate(spec), "qat")()
    assert isinstance(reference, FakeQuantize)
    assert torch.equal(fake_quant(x), reference.eval()(x))
    assert torch.equal(fake_quant(x), fake_quant(x))
    assert list(
        map(torch.equal, fake_quant.calculate_qparams(), reference.calculate_qparams())
    ) == [
        True,
        True,
    ]


def test_the_rounding_is_right_on_average():
    fake_quant = stochastic(WEIGHT)
    fake_quant(torch.tensor([-127.5, 127.5]))  # a scale of 1
    fake_quant.disable_observer()
    mean = fake_quant(torch.full((100_000,), 0.1)).mean()
    # five standard deviations of the mean: 5 * sqrt(0.1 * 0.9 / 100000) = 0.005
    assert float(mean) == pytest.approx(0.1, abs=0.005)
    assert float(fake_quant.eval()(torch.tensor([0.1]))) == 0.0


def test_the_gradient_passes_in_range_and_stops_outside():
    fake_quant = stochastic(WEIGHT)
    fake_quant(torch.tensor([-127.5, 127.5]))
    fake_quant.disable_observer()
    x = torch.tensor([-300.0, -3.3, 0.0, 99.7, 300.0], requires_grad=True)
    fake_quant(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_a_seed_repeats_the_rounding_and_a_disabled_fake_quant_gives_back_its_input():
    fake_quant, x = stochastic(WEIGHT), torch.randn(100)
    rounded = []
    for _ in range(2):
        torch.manual_seed(7)
        rounded.append(fake_quant(x))
    assert torch.equal(*rounded)
    fake_quant.disable_fake_quant()
    assert torch.equal(fake_quant(x), x)


# --- in a recipe


RECIPE = (EXAMPLE / PACKAGE / "x86-percentile.toml").read_text(encoding="utf-8")


def test_an_outlier_in_calibration_costs_minmax_its_precision_and_not_the_recipe():
    net = NETS["residual"]
    spoilt = [batch.clone() for batch in net.batches()]
    spoilt[1][0, 0, 0, 0] = 300.0
    accepted = RECIPE + '[lint]\nignore = ["QR203"]\n'  # how little minmax leaves is the point
    minmax = accepted.replace('{ name = "percentile", percentile = 99.99 }', '"minmax"')
    recipe = accepted.replace("99.99", "99.0")  # it reaches 0.4 % of what conv1 gives
    sqnr = {}
    for text in (recipe, minmax):
        converted = qrecipe.quantize(
            net.model(), qrecipe.parse_recipe(text), spoilt, progress=silent
        )
        clean = net.batches()[0]
        sqnr[text] = sqnr_db(net.model()(clean), converted(clean))
    assert sqnr[recipe] > 30
    assert sqnr[recipe] > sqnr[minmax] + 10


@pytest.mark.parametrize("name", ["decoder", "squeeze_excite"])
def test_with_nothing_clipped_weights_and_activations_are_those_of_minmax(name):
    net = NETS[name]
    activation = '{ name = "percentile", percentile = 99.99 }'
    ours = RECIPE.replace("99.99", "100") + 'observer = { name = "percentile", percentile = 100 }\n'
    outputs = []
    for text in (ours, RECIPE.replace(activation, '"minmax"')):
        recipe = qrecipe.parse_recipe(text)
        converted = qrecipe.quantize(net.model(), recipe, net.batches(), progress=silent)
        outputs.append(converted(net.batches()[0]))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_trained_with_the_recipe_the_converted_model_is_the_one_that_was_trained():
    net = NETS["residual"]
    batches = net.batches()
    recipe = qrecipe.parse_recipe(f'phase = "qat"\n{RECIPE}')
    compiled = qrecipe.compile(net.model(), recipe, batches[0])
    trained = compiled.prepare()
    assert any(type(m).__name__.startswith("StochasticRounding") for m in trained.modules())
    optimizer = torch.optim.SGD(trained.parameters(), 1e-3)
    losses = []
    for batch in (*batches, batches[0]):
        optimizer.zero_grad()
        loss = trained(batch).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    converted = compiled.convert(trained)
    assert (
        sqnr_db(trained.eval()(batches[0]), converted(batches[0])) > 27
    )  # 28.4 to 32.2 for 12 seeds


def test_installed_it_serves_the_command_line(tmp_path):
    from try_it import environment_with_plugin

    python = environment_with_plugin(tmp_path)
    qrecipe_there = (str(python), "-m", "qrecipe")

    listed = json.loads(run(*qrecipe_there, "list", "--json", cwd=tmp_path))
    (observer,) = [line for line in listed["observers"] if line["origin"] != "torch"]
    assert observer == {
        "name": "percentile",
        "origin": "qrecipe-example-plugin 1.0.0",
        "arguments": ["percentile", "capacity"],
        "target": "qrecipe_example_plugin.percentile.PercentileObserver",
        "problem": None,
    }
    (fake_quant,) = [line for line in listed["fake_quants"] if line["origin"] != "torch"]
    assert (fake_quant["name"], fake_quant["arguments"]) == ("stochastic_rounding", [])
    recipes = {line["reference"]: line["backend"] for line in listed["recipes"]}
    assert recipes["qrecipe-example-plugin:x86-percentile"] == "x86"

    digits = ROOT / "examples" / "digits" / "digits.py"
    printed = run(
        *(*qrecipe_there, "quantize", "qrecipe-example-plugin:x86-percentile", "--json"),
        *("--model", f"{digits}:factory", "--data", f"{digits}:calibration"),
        cwd=tmp_path,
    )
    result = json.loads(printed)
    stem = result["plan"]["sites"][0]
    assert stem["verdict"] == "quantized"
    assert stem["qconfig"]["activation"]["observer"]["name"] == "percentile"
    assert result["output_sqnr_db"] > 30  # 28.9 with the moving average that it replaces

    (tmp_path / "own.toml").write_text('extends = "qrecipe-example-plugin:x86-percentile"\n')
    assert run(*qrecipe_there, "check", "own.toml", cwd=tmp_path).endswith("no errors\n")


def run(*command: str, cwd: Path | None = None) -> str:
    """What a command prints."""
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
