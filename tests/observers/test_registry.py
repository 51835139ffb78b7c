"""Registration: names, signatures, and the contract that is tried out on small tensors."""

from __future__ import annotations

import pytest
import torch
from pydantic import BaseModel, Field
from torch.ao.quantization import (
    FakeQuantize,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    ObserverBase,
    PerChannelMinMaxObserver,
)
from torch.ao.quantization.fake_quantize import FakeQuantizeBase

from qrecipe.errors.findings import PluginError, UnknownNameError
from qrecipe.observers.contract import contract_findings
from qrecipe.observers.registration import (
    class_of,
    constructor_arguments,
    register_observer,
)
from qrecipe.registry import table as registered
from qrecipe.registry.builtin import FAKE_QUANTS, OBSERVERS, check_arguments


@pytest.fixture(autouse=True)
def _nothing_stays_registered():
    yield
    for kind in ("observer", "fake_quant"):
        for name in registered.names(kind):
            registered.remove(kind, name)


def percentile_class():
    class Percentile(MinMaxObserver):
        def __init__(self, percentile: float = 99.9, symmetric: bool = False, **kwargs):
            super().__init__(**kwargs)
            self.percentile = percentile

    return Percentile


def codes(error):
    return [finding.code for finding in error.value.findings]


def messages(kind, cls):
    return [finding.message for finding in contract_findings(kind, "mine", cls)]


def test_registered_observer_is_found_and_its_arguments_are_checked_by_name_and_type():
    cls = register_observer("percentile")(percentile_class())
    assert class_of("observer", "percentile") is cls
    problems = check_arguments("observer", "percentile", {"percentil": 1, "symmetric": 3})
    assert [(p.code, p.argument) for p in problems] == [
        ("QR105", "percentil"),
        ("QR106", "symmetric"),
    ]
    assert check_arguments("observer", "percentile", {"percentile": 99}) == []


def test_arguments_of_base_classes_count_where_they_are_passed_on():
    class Slow(MovingAverageMinMaxObserver):
        def __init__(self, patience=3, **kwargs):
            super().__init__(**kwargs)

    register_observer("slow")(Slow)
    assert check_arguments("observer", "slow", {"patience": 2, "averaging_constant": 0.1}) == []


def test_options_model_validates_the_arguments():
    class Options(BaseModel, extra="forbid"):
        percentile: float = Field(default=99.9, gt=50, le=100)

    register_observer("percentile", options=Options)(percentile_class())
    (problem,) = check_arguments("observer", "percentile", {"percentile": 20.0})
    assert (problem.code, problem.argument) == ("QR106", "percentile")
    assert "greater than 50" in problem.message
    assert constructor_arguments("observer", "percentile", {}) == {"percentile": 99.9}


def test_same_qualified_name_replaces_and_another_object_is_refused():
    register_observer("percentile")(percentile_class())
    newer = register_observer("percentile")(percentile_class())
    assert class_of("observer", "percentile") is newer

    class Other(MinMaxObserver):
        pass

    with pytest.raises(PluginError) as error:
        register_observer("percentile")(Other)
    assert codes(error) == ["QR151"]
    assert "percentile_class.<locals>.Percentile" in str(error.value)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("histogram", "QR151"),
        ("Mine", "QR150"),
        ("a-b", "QR150"),
        ("", "QR150"),
        ("9a", "QR150"),
        ("a\nb", "QR150"),
        (None, "QR150"),
    ],
)
def test_reserved_and_odd_names_are_refused(name, code):
    with pytest.raises(PluginError) as error:
        register_observer(name)(percentile_class())
    assert codes(error) == [code]
    assert "\n" not in error.value.findings[0].message


def test_unknown_name_is_answered_with_the_nearest_registered_one():
    register_observer("percentile")(percentile_class())
    with pytest.raises(UnknownNameError, match=r'QR104.*\n.*did you mean "percentile"'):
        class_of("observer", "percentil")


@pytest.mark.parametrize("name", sorted(set(OBSERVERS) - {"fixed_qparams", "placeholder"}))
def test_observers_of_torch_keep_the_contract(name):
    assert contract_findings("observer", name, class_of("observer", name)) == []


@pytest.mark.parametrize("name", sorted(set(FAKE_QUANTS) - {"fixed_qparams", "learnable"}))
def test_fake_quants_of_torch_keep_the_contract(name):
    assert contract_findings("fake_quant", name, class_of("fake_quant", name)) == []


def test_class_that_is_no_observer_is_refused_with_the_base_to_derive_from():
    for impostor in (torch.nn.Identity, FakeQuantize, lambda: None):
        (finding,) = contract_findings("observer", "mine", impostor)
        assert finding.code == "QR150"
        assert "torch.ao.quantization.observer.ObserverBase" in finding.hint


def test_every_breach_of_the_contract_is_reported_at_once():
    class Careless(ObserverBase):
        def __init__(self, dtype=torch.quint8, **kwargs):
            super().__init__(dtype)
            self.quant_min, self.quant_max = 0, 255
            self.largest = torch.tensor(0.0)

        def forward(self, x):
            self.largest = x.abs().max()
            return x * 1.5

        def calculate_qparams(self):
            return self.largest / 127, torch.tensor(300)

    found = messages("observer", Careless)
    for breach in (
        "does not keep the qscheme",
        "does not keep the quant_max",
        "changes the tensor that it observes",
        "not finite and positive after a batch of zeros",
        "zero point outside quant_min..quant_max after a random batch",
    ):
        assert any(breach in message for message in found), breach
    assert len(found) == len(set(found))


def test_observer_that_takes_no_spec_arguments_is_told_what_to_accept():
    class Closed(PerChannelMinMaxObserver):
        def __init__(self):
            super().__init__()

    (finding,) = contract_findings("observer", "mine", Closed)
    assert "TypeError" in finding.message
    assert "super().__init__" in finding.hint


def test_observer_that_raises_is_a_finding_and_no_crash():
    class Broken(MinMaxObserver):
        def calculate_qparams(self):
            raise RuntimeError("no range yet")

    assert any("RuntimeError: no range yet" in message for message in messages("observer", Broken))


class OfNumbers(MinMaxObserver):
    def calculate_qparams(self):
        return 0.1, 0


class OfSeveral(MinMaxObserver):
    def calculate_qparams(self):
        return tuple(each.expand(3) for each in super().calculate_qparams())


class Uncopyable(MinMaxObserver):
    def __deepcopy__(self, memo):
        raise TypeError("it holds a file")


@pytest.mark.parametrize(
    ("kind", "breach"),
    [
        (OfNumbers, "gives numbers that are not in tensors"),
        (OfSeveral, "gives 3 scales for a whole tensor after a random batch"),
        (Uncopyable, "cannot be copied: TypeError: it holds a file"),
    ],
)
def test_what_would_fail_in_the_middle_is_refused_at_registration(kind, breach):
    assert f'observer "mine" {breach}' in messages("observer", kind)


def test_fake_quant_without_observer_or_gradient_is_refused():
    class Hard(FakeQuantizeBase):
        def __init__(self, observer, quant_min=0, quant_max=255):
            super().__init__()
            self.hidden = observer()

        def forward(self, x):
            return self.hidden(x).detach().round()

        def calculate_qparams(self):
            return self.hidden.calculate_qparams()

    found = messages("fake_quant", Hard)
    assert any("no observer in activation_post_process" in message for message in found)
    assert any("blocks the gradient" in message for message in found)


def test_fake_quant_that_changes_the_shape_is_refused():
    class Flat(FakeQuantize):
        def forward(self, x):
            return super().forward(x).flatten()

    assert messages("fake_quant", Flat) == [
        'fake-quant "mine" changes the shape or dtype of its input'
    ]


def test_contract_check_leaves_the_random_numbers_alone():
    class Random(FakeQuantize):
        def forward(self, x):
            torch.rand(())
            return super().forward(x)

    before = torch.get_rng_state()
    assert messages("fake_quant", Random) == []
    assert torch.equal(torch.get_rng_state(), before)
