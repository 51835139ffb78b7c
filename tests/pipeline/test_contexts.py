"""Modes and defaults of the caller change nothing of what is computed, and stay as they are."""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from nets import NETS
from plans import net_of, recipe
from shares import every
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import qrecipe
from qrecipe.audit.sqnr import sqnr_db


@contextmanager
def setting(set_to, value, former):
    set_to(value)
    try:
        yield
    finally:
        set_to(former)


@contextmanager
def warnings_as_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", qrecipe.QRecipeWarning)
        yield


CONTEXTS = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default float16": lambda: setting(torch.set_default_dtype, torch.float16, torch.float32),
    "device meta": lambda: torch.device("meta"),
    "default device meta": lambda: setting(torch.set_default_device, "meta", None),
    "deterministic": lambda: setting(torch.set_deterministic_debug_mode, 2, 0),
    "warnings as errors": warnings_as_errors,
    "a dispatch mode": lambda: FlopCounterMode(display=False),
}


def state():
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.get_deterministic_debug_mode(),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "filters": list(warnings.filters),
    }


class Steps:
    """Every step of the way on one net, and what each gave."""

    def __init__(self, name, a_recipe, folder):
        self.net, self.recipe, self.file = NETS[name], a_recipe, folder / "model.safetensors"
        self.model, self.batches = self.net.model(), self.net.batches()
        self.first = self.batches[0]

    def plan(self):
        return qrecipe.plan(self.model, self.recipe, self.first).to_json()

    def quantize(self):
        self.compiled = qrecipe.compile(self.model, self.recipe, self.first)
        self.prepared = self.compiled.prepare()
        qrecipe.calibrate(self.prepared, self.batches)
        self.converted = self.compiled.convert(self.prepared)

    def save(self):
        qrecipe.save_quantized(self.converted, self.file)

    def load(self):
        self.loaded = qrecipe.load_quantized(self.file, self.model)

    def compare(self):
        report = qrecipe.compare(self.model, self.converted, self.batches[:2])
        return [(site.name, site.weight, site.activation) for site in report.sites]

    def drift(self):
        return str(qrecipe.drift(self.converted, self.batches[:2]))

    def rank(self):
        ranking = qrecipe.sensitivity(self.model, replaced(self.recipe), self.batches[:2])
        return [(site.name, site.sqnr_db) for site in ranking.sites]

    def suggest(self):
        return qrecipe.suggest(self.model, self.first).to_toml()


def replaced(a_recipe):
    return a_recipe if a_recipe.phase == "ptq" else recipe()


STEPS = ("plan", "quantize", "save", "load", "compare", "drift", "rank", "suggest")
SUBJECTS = {
    "static": ("mlp", recipe()),
    "with batch norm": ("residual", recipe()),
    "training": ("residual", recipe(head='phase = "qat"')),
    "static and recurrent": ("cnn_lstm", recipe(base="builtin:cnn-lstm")),
}


def gone_through(subject, context, folder):
    """What each step gave inside the context, and what the models give outside of it."""
    steps = Steps(*SUBJECTS[subject], folder)
    given = {}
    for name in STEPS:
        with context():
            before = state()
            given[name] = getattr(steps, name)()
            assert state() == before
    outputs = steps.converted(steps.first), steps.loaded(steps.first)
    return given, steps.file.read_bytes(), [tensor.clone() for tensor in outputs]


@functools.cache
def as_usual(subject, folder):
    return gone_through(subject, nullcontext, folder)


ALIKE = ("default float16", "default device meta")
"""Other values of what a mode before them sets."""


def _slow_if(condition, value):
    return pytest.param(value, marks=pytest.mark.slow) if condition else value


@pytest.mark.filterwarnings("ignore::qrecipe.QRecipeWarning")
@pytest.mark.parametrize("context", [_slow_if(name in ALIKE, name) for name in CONTEXTS])
@pytest.mark.parametrize("subject", [_slow_if(name != "static", name) for name in SUBJECTS])
def test_every_step_gives_the_same_in_every_mode_of_the_caller(subject, context, tmp_path_factory):
    expected = as_usual(subject, tmp_path_factory.getbasetemp())
    given = gone_through(subject, CONTEXTS[context], tmp_path_factory.mktemp("context"))
    assert given[:2] == expected[:2]
    for one, other in zip(given[2], expected[2], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("base", ["builtin:x86-static", "builtin:x86-dynamic"])
@pytest.mark.parametrize("name", every(2, ["residual", "mlp", "tagger"]))
def test_a_model_and_batches_made_in_inference_mode_are_quantized_like_others(name, base):
    with torch.inference_mode():
        model, batches = NETS[name].model(), NETS[name].batches()
    assert next(model.parameters()).is_inference()
    converted = qrecipe.quantize(model, base, batches)
    expected = qrecipe.quantize(NETS[name].model(), base, NETS[name].batches())
    for batch in NETS[name].batches(2):
        assert torch.equal(converted(batch), expected(batch))
    assert next(model.parameters()).is_inference()


def test_what_the_caller_passes_to_be_called_sees_neutral_modes():
    seen = []

    def evaluate(model):
        seen.append((torch.get_default_dtype(), torch.is_autocast_enabled("cpu")))
        seen.append((torch.zeros(1).device.type, torch.is_grad_enabled()))
        return 1.0

    model, batches = NETS["mlp"].model(), NETS["mlp"].batches()
    with torch.no_grad(), torch.device("meta"), torch.autocast("cpu"):
        qrecipe.tune(model, "builtin:x86-static", batches, evaluate)
    assert set(seen) == {(torch.float32, False), ("cpu", False)}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("context", CONTEXTS)
def test_modes_and_defaults_are_as_before_after_an_error(context, error):
    def batches():
        yield NETS["mlp"].batches()[0]
        raise error("the loader")

    model = NETS["mlp"].model()
    with CONTEXTS[context]():
        before = state()
        with pytest.raises((error, qrecipe.QRecipeError)):
            qrecipe.quantize(model, "builtin:x86-static", batches())
        assert state() == before


class Mixed(nn.Module):
    def __init__(self, autocast):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.autocast = autocast

    def forward(self, x):
        if not self.autocast:
            return self.body(x)
        with torch.autocast("cpu", torch.bfloat16):
            return self.body(x).float()


BATCHES = [torch.randn(16, 6, generator=torch.Generator().manual_seed(n)) for n in range(10)]


def test_autocast_in_the_models_own_code_is_named_with_its_line():
    with pytest.raises(qrecipe.TraceError) as caught:
        qrecipe.quantize(Mixed(True).eval(), "builtin:x86-static", BATCHES)
    text = str(caught.value)
    assert 'QR305 submodule "body.0" (Linear) is called under torch.autocast at' in text
    assert "return self.body(x).float()" in text
    assert "remove torch.autocast from the model's code" in text
    model = Mixed(False).eval()
    converted = qrecipe.quantize(model, "builtin:x86-static", BATCHES)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(BATCHES[0]).dtype == torch.bfloat16
    assert sqnr_db(model(BATCHES[0]), converted(BATCHES[0])) > 20


def test_autocast_around_a_dynamic_kernel_is_named_where_it_fails():
    float_first = recipe('[rules.module_name]\n"body.0" = "float"\n', base="builtin:x86-dynamic")
    with pytest.raises(qrecipe.AuditError, match=r"QR413 body\.2 gets bfloat16") as caught:
        qrecipe.quantize(Mixed(True).eval(), float_first, BATCHES)
    assert "torch.autocast" in str(caught.value)


FIRST_IMPORT = """
import torch
from torch import nn
with torch.device("meta"):
    import qrecipe
    from torch.ao.quantization import MinMaxObserver
    qrecipe.register_observer("own")(type("Own", (MinMaxObserver,), {}))
    with torch.device("cpu"):
        model = nn.Sequential(nn.Linear(6, 6)).eval()
        batches = [torch.randn(4, 6) for _ in range(10)]
    converted = qrecipe.quantize(model, "builtin:x86-static", batches)
print(converted(batches[0]).device)
"""


@pytest.mark.slow
def test_modules_that_are_first_imported_in_some_mode_keep_nothing_of_it():
    run = subprocess.run([sys.executable, "-c", FIRST_IMPORT], capture_output=True, text=True)
    assert (run.stdout.strip(), run.returncode) == ("cpu", 0), run.stderr


def test_inference_mode_in_the_models_own_code_is_no_obstacle():
    forward = torch.inference_mode()(lambda self, x: self.fc(x))
    model = net_of(forward, fc=nn.Linear(6, 6))
    converted = qrecipe.quantize(model, "builtin:x86-static", BATCHES)
    assert sqnr_db(model(BATCHES[0]), converted(BATCHES[0])) > 20
