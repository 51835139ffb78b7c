"""Our own observers: a mean of extremes, and the range of least squared error."""

import copy

import pytest
import torch
from plans import recipe

import qrecipe
from qrecipe.observers.activations import MeanMinMaxObserver, MSEObserver

SEVEN_BITS = {"dtype": torch.quint8, "quant_min": 0, "quant_max": 127}


def _batches(count=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 32, generator=generator) * (1 + index) for index in range(count)]


def _observed(observer, batches):
    for batch in batches:
        assert torch.equal(observer(batch), batch)
    return observer


def test_the_mean_of_extremes_is_that_of_all_batches_in_any_order():
    batches = _batches()
    mean = torch.stack([batch.max() for batch in batches]).mean()
    for order in (batches, batches[::-1]):
        observer = _observed(MeanMinMaxObserver(**SEVEN_BITS), order)
        assert observer.max_val == pytest.approx(float(mean), rel=1e-5)
    observer.reset_min_max_vals()
    assert _observed(observer, batches[:1]).max_val == batches[0].max()


def _error(observer, batches):
    scale, zero_point = observer.calculate_qparams()
    low, high = observer.quant_min, observer.quant_max
    return sum(
        float(
            (
                torch.fake_quantize_per_tensor_affine(
                    batch, float(scale), int(zero_point), low, high
                )
                - batch
            )
            .square()
            .sum()
        )
        for batch in batches
    )


@pytest.mark.parametrize("qscheme", [torch.per_tensor_affine, torch.per_tensor_symmetric])
def test_no_range_of_extremes_has_a_smaller_squared_error(qscheme):
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4096, generator=generator) ** 3 for _ in range(4)]
    given = {**SEVEN_BITS, "dtype": torch.qint8, "quant_min": -64, "quant_max": 63}
    given["qscheme"] = qscheme
    least = _error(_observed(MSEObserver(**given), batches), batches)
    for other in (torch.ao.quantization.MinMaxObserver, MeanMinMaxObserver):
        assert least < 0.95 * _error(_observed(other(**given), batches), batches)


def test_the_histogram_takes_constant_memory_and_any_growth():
    observer = MSEObserver(**SEVEN_BITS)
    size = sum(buffer.numel() for buffer in observer.buffers())
    for power in range(-20, 20):
        observer(torch.rand(256) * 2.0**power)
    assert sum(buffer.numel() for buffer in observer.buffers()) == size
    assert int(observer.histogram.counts.sum()) == 256 * 40
    assert float(observer.max_val) <= float(observer.histogram.limit)


def test_empty_batches_are_not_observed():
    observer = _observed(MSEObserver(**SEVEN_BITS), [torch.rand(64)])
    before = observer.calculate_qparams()
    observer(torch.empty(0))
    assert observer.calculate_qparams() == before


class _Dividing(torch.nn.Module):
    """Gives NaN for a batch of zeros."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)) / x.abs().sum())


@pytest.mark.parametrize("observer", ["minmax", "mean_minmax", "mse"])
def test_activations_that_are_not_finite_are_said(observer):
    batches = [*(torch.randn(8, 4) for _ in range(9)), torch.zeros(8, 4)]
    with pytest.raises(qrecipe.CalibrationError, match="QR404"):
        qrecipe.quantize(
            _Dividing().eval(), recipe(f'[tensor.activation]\nobserver = "{observer}"'), batches
        )


def test_the_state_of_an_observer_can_be_stored():
    observer = _observed(MSEObserver(**SEVEN_BITS), _batches())
    loaded = MSEObserver(**SEVEN_BITS)
    loaded.load_state_dict(observer.state_dict())
    assert loaded.calculate_qparams() == observer.calculate_qparams()
    assert copy.deepcopy(observer).calculate_qparams() == observer.calculate_qparams()


def test_a_range_for_each_channel_is_refused_with_the_reason():
    with pytest.raises(NotImplementedError, match="per-tensor"):
        MSEObserver(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)


@pytest.mark.parametrize("observer", ["mse", "mean_minmax"])
@pytest.mark.parametrize("phase", ["ptq", "qat"])
def test_recipes_name_them_in_every_phase(observer, phase):
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)
    ).eval()
    batches = [torch.randn(16, 8) for _ in range(10)]
    rules = f'[tensor.activation]\nobserver = "{observer}"'
    compiled = qrecipe.compile(model, recipe(rules, head=f'phase = "{phase}"'), batches[0])
    prepared = compiled.prepare()
    for batch in batches:
        prepared(batch)
    assert compiled.convert(prepared)(batches[0]).shape == (16, 4)
