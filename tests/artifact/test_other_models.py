"""Files for another model than the one that is given, honest and forged."""

from __future__ import annotations

from typing import ClassVar

import pytest
from artifacts import (
    assert_same_outputs,
    recipe,
    refused,
    stored,
)
from forgery import change_architecture, model
from nets import NETS, Mlp
from torch import nn

import qrecipe
from qrecipe.errors.findings import ArtifactError


def test_a_file_of_another_model_names_the_first_differences(tmp_path):
    path = stored(tmp_path, "residual")
    text = refused(path, model(), "QR507")
    assert "another architecture" in text
    assert "conv1: Conv2d(" in text
    assert "nothing in the model" in text
    assert "more" in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda net: setattr(net.conv1, "stride", (2, 2)), "stride=(2, 2)"),
        (lambda net: setattr(net.conv1, "padding", (0, 0)), "padding=(0, 0)"),
        (lambda net: setattr(net, "pool", nn.MaxPool2d(3)), "kernel_size=3"),
        (lambda net: setattr(net, "pool", nn.AvgPool2d(2)), "AvgPool2d"),
        (lambda net: setattr(net.bn1, "eps", 0.1), "eps=0.1"),
        (lambda net: setattr(net, "relu", nn.ReLU6()), "ReLU6"),
        (lambda net: setattr(net, "fc", nn.Linear(8, 6)), "out_features=6"),
        (lambda net: setattr(net, "more", nn.Linear(8, 6)), "more: nothing in the file"),
        (lambda net: net.layer1.append(nn.Identity()), "layer1.2: nothing in the file"),
    ],
)
def test_settings_that_weights_do_not_tell_are_compared(tmp_path, change, text):
    path = stored(tmp_path, "residual")
    net = NETS["residual"].model()
    change(net)
    assert text in refused(path, net, "QR507")


class Scaled(Mlp):
    """The same modules, and another number in forward."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return super().forward(x * self.factor)


def test_another_forward_is_refused_and_shown(tmp_path):
    path = tmp_path / "model.safetensors"
    batches = NETS["mlp"].batches()
    converted = qrecipe.quantize(Scaled(0.5).eval(), recipe(), batches, progress=lambda *_: None)
    qrecipe.save_quantized(converted, path)
    assert qrecipe.load_quantized(path, Scaled(0.5).eval())
    text = refused(path, Scaled(0.25).eval(), "QR507")
    assert "0.5) in the file" in text
    assert "0.25) in the model" in text


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.fc2(x) if x.sum() > 0 else self.fc1(x)


class Uncopyable(Mlp):
    def __deepcopy__(self, memo):
        raise RuntimeError("no copies")


class Broken(Mlp):
    def forward(self, x):
        raise KeyError("broken")


@pytest.mark.parametrize(
    "other",
    [Untraceable(), Uncopyable(), Broken(), nn.Module(), nn.Sequential(), "model", None, Mlp],
    ids=["untraceable", "uncopyable", "broken", "module", "empty", "text", "none", "class"],
)
def test_what_is_no_such_model_is_our_error(file, other):
    refused(file, other, "QR507")


# --- forged


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda found: found["parts"].clear(), "QR505"),
        (lambda found: found["parts"].append(found["parts"][0]), "QR505"),
        (lambda found: found["parts"][0].update(path="fc1"), "QR505"),
        (lambda found: found["parts"][0].update(path="nowhere"), "QR505"),
        (lambda found: found["parts"][0].update(constants={"x": 1}), "QR507"),
        (lambda found: found["parts"][0]["nodes"].pop(), "QR507"),
        (lambda found: found["parts"][0]["nodes"][1].update(value="other"), "QR507"),
        (lambda found: found["parts"][0]["nodes"][1].update(value="maybe"), "QR505"),
        (lambda found: found["parts"][0]["nodes"][1].update(call="x"), "QR507"),
        (lambda found: found["modules"].pop("fc1"), "QR507"),
        (lambda found: found["modules"].update(fc9="Linear()"), "QR507"),
        (lambda found: found["graphs"].clear(), "QR507"),
        (lambda found: found.update(more=1), "QR505"),
    ],
)
def test_a_forged_architecture_is_refused(file, change, code):
    change_architecture(file, change)
    refused(file, model(), code)


class Steered(Mlp):
    """Its arguments choose how often it loops, and whether it writes."""

    written: ClassVar = []

    def forward(self, x, times: int = 1, note: str | None = None):
        for _ in range(times):
            x = super().forward(x)[..., [0, 1, 2, 3, 0, 1]]
        if note is not None:
            self.written.append(note)
        return x


def store_steered(path, **given):
    batches = [{"x": batch, **given} for batch in NETS["mlp"].batches(1)]
    converted = qrecipe.quantize(Steered().eval(), "builtin:x86-dynamic", example_inputs=batches[0])
    qrecipe.save_quantized(converted, path)
    return converted, batches[0]


@pytest.mark.parametrize(
    "constants",
    [
        *({"times": 10**12}, {"times": 1, "note": "evil"}, {"times": 1.0}, {"times": True}),
        *({"times": None}, {"note": None}, {"times": 1, "note": None, "self": 1}),
    ],
)
def test_a_file_does_not_steer_forward(constants, tmp_path):
    path = tmp_path / "steered.safetensors"
    store_steered(path)
    change_architecture(path, lambda found: found["parts"][0].update(constants=constants))
    refused(path, Steered().eval(), "QR507")
    assert Steered.written == []


def test_other_constants_than_the_defaults_are_loaded_with_consent(tmp_path):
    path = tmp_path / "steered.safetensors"
    converted, batch = store_steered(path, times=2)
    text = refused(path, Steered().eval(), "QR507")
    assert '"times" is 2 in the file, 1 here' in text
    assert "constants={'times': 2}" in text
    loaded = qrecipe.load_quantized(path, Steered().eval(), constants={"times": 2})
    assert_same_outputs(loaded, converted, batch)
    others = {"3 here": {"times": 3}, 'did you mean "times"': {"time": 2}, "mapping": ["times"]}
    for said, other in others.items():
        with pytest.raises(ArtifactError, match="QR507") as caught:
            qrecipe.load_quantized(path, Steered().eval(), constants=other)
        assert said in str(caught.value)
