"""Several threads at once: one traces, converts or loads, and the others do not notice."""

from __future__ import annotations

import copy
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from nets import NETS
from plans import net_of, recipe
from torch import fx, nn
from torch.fx._symbolic_trace import is_fx_tracing

import qrecipe
from qrecipe._torch_ao import quiet
from qrecipe.process.warnings import held_back

CALL, GETATTR = nn.Module.__call__, nn.Module.__getattr__
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
WAIT = 60
"""Seconds after which a test fails rather than waits."""


@pytest.fixture(autouse=True, scope="module")
def all_is_imported():
    """What torch imports for its first failing trace changes the filters of warnings."""
    with warnings.catch_warnings(), pytest.raises(qrecipe.QRecipeError):
        qrecipe.plan(net_of(lambda self, x: x if x.sum() else -x), recipe(), ROWS)


@pytest.fixture(autouse=True)
def nothing_stays_changed():
    before = (list(warnings.filters), torch.backends.quantized.engine)
    yield
    assert (nn.Module.__call__, nn.Module.__getattr__) == (CALL, GETATTR)
    assert not is_fx_tracing()
    assert before == (list(warnings.filters), torch.backends.quantized.engine)


class Gate:
    """Where a trace waits for the test; copies of a model share it."""

    def __init__(self):
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.noted = []

    def __deepcopy__(self, memo):
        return self


class Paused(nn.Module):
    """Stays in its forward, while it is traced, until the test lets it go on."""

    def __init__(self):
        super().__init__()
        self.fc, self.gate = nn.Linear(6, 6), Gate()

    def forward(self, x):
        if isinstance(x, fx.Proxy):
            self.gate.noted.append(bool(is_fx_tracing()))
            self.gate.inside.set()
            assert self.gate.go_on.wait(WAIT)
        return self.fc(x)


def traced_meanwhile(trace, meanwhile):
    """What ``meanwhile`` gives while another thread is in the middle of a trace."""
    model = Paused().eval()
    with ThreadPoolExecutor() as pool:
        tracing = pool.submit(trace, model)
        assert model.gate.inside.wait(WAIT)
        try:
            return meanwhile(), model.gate.noted
        finally:
            model.gate.go_on.set()
            tracing.result(WAIT)


def test_in_torch_a_trace_breaks_the_models_of_other_threads():
    bystander = nn.Linear(6, 6)
    with pytest.raises(NameError, match="not installed as a submodule"):
        traced_meanwhile(fx.symbolic_trace, lambda: bystander(ROWS))


def test_while_one_thread_traces_the_models_of_others_run_undisturbed():
    bystander = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    expected = bystander(ROWS)

    def meanwhile():
        return bystander(ROWS), is_fx_tracing()

    (given, tells), noted = traced_meanwhile(
        lambda model: qrecipe.plan(model, "builtin:x86-dynamic", ROWS), meanwhile
    )
    assert torch.equal(given, expected)
    assert (bool(tells), noted) == (False, [True])


def test_two_traces_exclude_each_other():
    tracing, most = [], []

    def forward(self, x):
        if isinstance(x, fx.Proxy):
            tracing.append(x)
            time.sleep(0.02)
            most.append(len(tracing))
            tracing.pop()
        return self.fc(x)

    def plan(_):
        return qrecipe.plan(net_of(forward, fc=nn.Linear(6, 6)), "builtin:x86-static", ROWS)

    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(plan, range(4)))
    assert most == [1] * 4
    assert {str(each) for each in plans} == {str(plans[0])}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_stays_patched_when_a_trace_is_broken_off(error):
    def forward(self, x):
        if isinstance(x, fx.Proxy):
            raise error("in the middle")
        return self.fc(x)

    with pytest.raises((error, qrecipe.TraceError)):
        qrecipe.plan(net_of(forward, fc=nn.Linear(6, 6)), recipe(), ROWS)
    # the fixture looks at what is left


def test_a_served_model_answers_alike_while_others_plan_quantize_and_load(tmp_path):
    net = NETS["mlp"]
    model, batches = net.model(), net.batches()
    converted = qrecipe.quantize(model, recipe(), batches)
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    expected = model(batches[0]), converted(batches[0])
    done, served = threading.Event(), []

    def serve():
        while not done.is_set() or not served:
            given = model(batches[0]), converted(batches[0])
            served.append(all(map(torch.equal, given, expected)))

    def work(_):
        plan = qrecipe.plan(model, recipe(), batches[0])
        made = qrecipe.quantize(model, recipe(), batches)
        loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model)
        return str(plan), made(batches[0]), loaded(batches[0])

    with ThreadPoolExecutor(3) as pool:
        serving = pool.submit(serve)
        try:
            results = list(pool.map(work, range(4)))
        finally:
            done.set()
        serving.result(WAIT)
    assert all(served)
    for plan, *outputs in results:
        assert plan == results[0][0]
        assert all(torch.equal(output, expected[1]) for output in outputs)


ENGINES = [
    name for name in ("x86", "qnnpack") if name in torch.backends.quantized.supported_engines
]


def test_threads_with_different_engines_each_get_their_own():
    model, batches = NETS["mlp"].model(), NETS["mlp"].batches()
    recipes = {name: recipe(head=f'backend = "{name}"') for name in ENGINES}
    alone = {name: qrecipe.quantize(model, recipes[name], batches) for name in ENGINES}

    def work(name):
        return qrecipe.quantize(model, recipes[name], batches)

    with ThreadPoolExecutor() as pool:
        together = list(zip(ENGINES * 2, pool.map(work, ENGINES * 2), strict=True))
    for name, converted in together:
        assert torch.equal(converted(batches[0]), alone[name](batches[0]))


def test_warning_filters_come_back_however_threads_are_interleaved():
    before = list(warnings.filters)
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        stacks = {first: ExitStack(), second: ExitStack()}
        for pool in (first, second):
            pool.submit(stacks[pool].enter_context, quiet()).result(WAIT)
        for pool in (first, second):
            pool.submit(stacks[pool].close).result(WAIT)
    assert list(warnings.filters) == before


def test_warnings_are_held_back_in_one_thread_and_heard_in_another():
    def warned():
        with warnings.catch_warnings(record=True) as heard:
            warnings.warn("hush", UserWarning, stacklevel=1)
        return len(heard)

    with warnings.catch_warnings(), ThreadPoolExecutor(1) as other:
        warnings.simplefilter("always")
        with held_back([("hush", UserWarning)]):
            assert (warned(), other.submit(warned).result(WAIT)) == (0, 1)
        assert warned() == 1


def test_training_and_loading_leave_the_callers_random_numbers_alone(tmp_path):
    model, batches = NETS["residual"].model(), NETS["residual"].batches()
    before = torch.get_rng_state()
    compiled = qrecipe.compile(model, recipe(head='phase = "qat"'), batches[0])
    prepared = compiled.prepare()
    prepared(batches[0]).sum().backward()
    qrecipe.save_quantized(compiled.convert(prepared), tmp_path / "model.safetensors")
    qrecipe.load_quantized(tmp_path / "model.safetensors", model)
    assert torch.equal(before, torch.get_rng_state())


def test_programs_that_are_made_at_the_same_time_are_alike():
    """torch keeps in a global what the operators of an export are given."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    batches = [torch.randn(8, 6) for _ in range(10)]

    def quantized(_):
        copied = copy.deepcopy(model)
        return qrecipe.quantize(copied, "builtin:x86-static-minmax", batches, executor="pt2e")

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(quantized, range(8))
    for other in others:
        assert other.code == first.code
        assert torch.equal(other(batches[0]), first(batches[0]))
