"""Pieces on workers give what one process gives, in whatever order they come back."""

from __future__ import annotations

import gc
import pickle
import tempfile
import threading
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from executors import AtOnce, Dying, LastFirst
from nets import NETS
from plans import net_of
from rankings import FEW, STATIC, ranked
from runs import HEAD, silent
from shares import every
from torch import nn

import qrecipe
from qrecipe.errors.findings import (
    CalibrationError,
    ExecutionError,
    QRecipeError,
    QRecipeWarning,
)
from qrecipe.measure.sensitivity import steps
from qrecipe.pool import worker
from qrecipe.process.threads import TorchSettings
from qrecipe.registry import table as registered


def without_times(comparison):
    sites = [(site.name, site.weight, site.activation) for site in comparison.sites]
    return sites, comparison.output, comparison.batches


def worst_difference(output, reference):
    return -float((output - reference).abs().max())


@pytest.mark.parametrize("name", every(5, sorted(NETS)))
def test_a_ranking_in_pieces_is_that_of_one_process_to_the_bit(monkeypatch, name):
    monkeypatch.setattr(steps, "_AT_ONCE", 2)
    net = NETS[name]
    model, batches = net.model(), net.batches(3)
    assert ranked(model, iter(batches), pool=LastFirst()) == ranked(model, batches)


@pytest.mark.parametrize("name", every(10, sorted(NETS)))
def test_a_comparison_in_pieces_is_that_of_one_process_but_for_the_times(name):
    net = NETS[name]
    model, batches = net.model(), net.batches(3)
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    alone = qrecipe.compare(model, converted, batches, progress=silent)
    together = qrecipe.compare(model, converted, iter(batches), progress=silent, pool=LastFirst())
    assert without_times(together) == without_times(alone)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('executor = "pt2e"\n', marks=pytest.mark.slow),
        '[fx]\nroots = ["b1"]\n',
        '[transform.equalize]\nby = "activations"\n',
    ],
)
def test_parts_programs_and_transformed_models_go_to_workers(text):
    model = net_of(
        lambda self, x: self.last(self.b1(x)),
        b1=nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)),
        last=nn.Conv2d(8, 4, 1),
    )
    batches = [torch.randn(2, 3, 8, 8) for _ in range(3)]
    recipe = qrecipe.parse_recipe(f"{HEAD}{text}{FEW}")
    options = {"progress": silent}
    assert ranked(model, batches, recipe, pool=AtOnce()) == ranked(model, batches, recipe)
    converted = qrecipe.quantize(model, recipe, batches, **options)
    together = qrecipe.compare(model, converted, batches, pool=AtOnce(), **options)
    alone = qrecipe.compare(model, converted, batches, **options)
    assert without_times(together) == without_times(alone)


@pytest.mark.parametrize("measure", ["metric", "evaluate", "forward", "memory_limit"])
def test_the_callers_measures_run_in_the_workers(measure):
    net = NETS["residual" if measure == "memory_limit" else "mlp"]
    model, batches = net.model(), net.batches(3)
    options = {
        "metric": {"metric": worst_difference},
        "evaluate": {"evaluate": lambda model: -float(model(batches[0]).square().mean())},
        "forward": {"forward": lambda model, batch: (model(batch), model(-batch))},
        "memory_limit": {"memory_limit": 3 * 4 * 8 * 64 * 4},
    }[measure]
    assert ranked(model, batches, pool=LastFirst(), **options) == ranked(model, batches, **options)


def test_a_large_model_is_cut_into_several_pieces_for_each_batch(monkeypatch):
    monkeypatch.setattr(steps, "_AT_ONCE", 2)
    net = NETS["residual"]
    executor = AtOnce()
    ranking = ranked(net.model(), net.batches(2), pool=executor)
    names = [name for index, some in executor.pieces for name in some if index == 1]
    assert sorted(names) == sorted(site.name for site in ranking.sites)
    assert {len(some) for _, some in executor.pieces} <= {1, 2}


def test_a_piece_is_small_and_made_of_plain_values():
    net = NETS["residual"]
    executor = AtOnce()
    ranked(net.model(), net.batches(2), pool=executor)
    assert max(map(len, executor.sent)) < 1000
    for index, names in executor.pieces:
        assert type(index) is int
        assert {type(name) for name in names} == {str}


def test_progress_counts_as_in_one_process():
    net = NETS["residual"]
    model, batches = net.model(), net.batches(2)
    alone, together = [], []
    qrecipe.sensitivity(model, STATIC, batches, progress=lambda *seen: alone.append(seen))
    qrecipe.sensitivity(
        model, STATIC, batches, progress=lambda *seen: together.append(seen), pool=AtOnce()
    )
    measured = [seen for seen in alone if seen[1] == alone[-1][1]]
    assert together == measured


def test_warnings_of_workers_are_given_once():
    recipe = qrecipe.parse_recipe(HEAD)
    net = NETS["residual"]
    model, batches = net.model(), net.batches(3)
    with pytest.warns(QRecipeWarning) as alone:
        ranked(model, batches, recipe)
    with pytest.warns(QRecipeWarning) as together:
        ranked(model, batches, recipe, pool=AtOnce())
    texts = [str(warning.message) for warning in together]
    assert sorted(texts) == sorted({str(warning.message) for warning in alone})
    assert any(text.startswith("QR201") for text in texts)


def test_an_interrupt_keeps_the_pieces_that_have_come():
    net = NETS["residual"]
    model, batches = net.model(), net.batches(3)
    seen = []

    def interrupt(done, total):
        seen.append(done)
        if done == total // 3 + 1:
            raise KeyboardInterrupt

    with pytest.warns(QRecipeWarning, match="QR212"):
        partial = qrecipe.sensitivity(
            model, STATIC, batches, progress=interrupt, pool=ThreadPoolExecutor(1)
        )
    assert partial.partial
    assert {site.batches for site in partial.sites} == {2}
    two = ranked(model, batches, recipe=STATIC)
    assert {site.name for site in partial.sites} == {site.name for site in two.sites}


def errors_of(call):
    with pytest.raises(QRecipeError) as raised:
        call()
    return (
        type(raised.value),
        [finding.code for finding in raised.value.findings],
        str(raised.value),
    )


def broken_metric(output, reference):
    raise ValueError("no luck")


@pytest.mark.parametrize("fault", ["batch", "metric", "integers", "memory"])
def test_errors_in_workers_are_those_of_one_process(fault):
    net = NETS["residual" if fault == "integers" else "mlp"]
    model, batches, options = net.model(), net.batches(3), {}
    if fault == "batch":
        batches[2] = torch.randn(3, 7)
    elif fault == "metric":
        options = {"metric": broken_metric}
    elif fault == "integers":
        model = net_of(lambda self, x: self.conv(x).argmax(1), conv=nn.Conv2d(3, 4, 1))
    else:
        options = {"memory_limit": 10}
    alone = errors_of(lambda: ranked(model, batches, **options))
    assert errors_of(lambda: ranked(model, batches, pool=AtOnce(), **options)) == alone


def test_an_error_that_is_not_ours_has_the_workers_traceback(monkeypatch):
    def fail(*args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(steps.Scorer, "parts", fail)
    net = NETS["mlp"]
    with pytest.raises(ZeroDivisionError) as raised:
        ranked(net.model(), net.batches(2), pool=AtOnce())
    assert "in fail" in str(raised.value.__cause__)


def test_workers_that_die_are_an_error_that_says_so_once():
    net = NETS["residual"]
    with pytest.raises(ExecutionError) as raised:
        ranked(net.model(), net.batches(3), pool=Dying(2))
    assert str(raised.value) == (
        "QR428 the workers failed after 2 pieces: BrokenProcessPool: "
        "a process was terminated abruptly\n"
        "  a worker that dies has often run out of memory: try fewer workers at once; "
        "with resume (--log), finished pieces are kept"
    )


def test_workers_that_can_be_made_anew_go_on_with_what_is_left():
    net = NETS["residual"]
    model, batches = net.model(), net.batches(3)
    made = []

    def make():
        made.append(Dying(len(made)))  # the second one does one piece, the third two
        return made[-1]

    assert ranked(model, batches, pool=qrecipe.Pool(make)) == ranked(model, batches)
    assert [len(each.sent) for each in made] == [0, 1, 2]


def test_workers_that_die_again_without_any_piece_are_given_up():
    made = []

    def make():
        made.append(0)
        return Dying(0)

    net = NETS["residual"]
    with pytest.raises(ExecutionError, match=r"QR428 the workers failed after 0 pieces"):
        ranked(net.model(), net.batches(3), pool=qrecipe.Pool(make))
    assert len(made) == 2


def test_an_executor_that_is_shut_down_is_an_error_of_ours():
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    net = NETS["mlp"]
    with pytest.raises(ExecutionError, match=r"QR428.*cannot schedule new futures"):
        ranked(net.model(), net.batches(2), pool=executor)


class Handle:
    """Can be copied, and not be pickled."""

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        raise TypeError("a handle of this process")


class Handled(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.linear = nn.Linear(6, width)
        self.handle = Handle()

    def forward(self, x):
        return self.linear(x)


def test_a_model_that_cannot_be_pickled_is_made_by_its_factory():
    model = Handled().eval()
    batches = [torch.randn(4, 6) for _ in range(2)]
    with pytest.raises(ExecutionError) as raised:
        ranked(model, batches, pool=AtOnce())
    assert str(raised.value) == (
        "QR426 model cannot be pickled for the workers: TypeError: a handle of "
        "this process\n"
        "  pass what makes it in each worker: pool=qrecipe.Pool(executor, factory=...)"
    )
    pool = qrecipe.Pool(AtOnce(), factory=Handled)
    assert ranked(model, batches, pool=pool) == ranked(model, batches)


class Chain(Handled):
    def __init__(self):
        super().__init__()
        self.second = nn.Linear(6, 6)

    def forward(self, x):
        return self.second(torch.relu(self.linear(x)))


def test_a_model_of_a_factory_is_not_transformed_twice():
    model, batches = Chain().eval(), [torch.randn(4, 6) for _ in range(2)]
    recipe = qrecipe.parse_recipe(f'{HEAD}[transform.equalize]\nby = "weights"\n{FEW}')
    pool = qrecipe.Pool(AtOnce(), factory=Chain)
    alone = ranked(model, batches, recipe)
    assert ranked(model, batches, recipe, pool=pool) == alone
    result = qrecipe.tune(
        model, recipe, batches, spread, max_drop=0.0, max_trials=2, progress=silent, pool=pool
    )
    plain = qrecipe.tune(
        model, recipe, batches, spread, max_drop=0.0, max_trials=2, progress=silent
    )
    metrics = [[trial.metric for trial in each.trials] for each in (result, plain)]
    assert metrics[0] == metrics[1]


def spread(model):
    with torch.no_grad():
        return -float(model(torch.linspace(-2, 2, 24).reshape(4, 6)).std())


def test_a_factory_that_makes_another_model_is_refused():
    pool = qrecipe.Pool(AtOnce(), factory=lambda: Handled(7))
    with pytest.raises(
        ExecutionError, match=r'QR427.*another model from factory.*"linear\.weight"'
    ):
        ranked(Handled().eval(), [torch.randn(4, 6)], pool=pool)


def test_a_factory_that_makes_no_model_is_refused():
    pool = qrecipe.Pool(AtOnce(), factory=lambda: (Handled(), torch.randn(4, 6)))
    with pytest.raises(ExecutionError, match=r"QR427.*a tuple from factory(?s:.)*the model alone"):
        ranked(Handled().eval(), [torch.randn(4, 6)], pool=pool)


class Forgetful(AtOnce):
    """Gives something else back than what a piece has returned."""

    def submit(self, function, /, *args):
        future = Future()
        future.set_result(None)
        return future


def test_an_executor_that_loses_results_has_failed():
    net = NETS["mlp"]
    with pytest.raises(ExecutionError, match=r"QR428 .*returns a NoneType for a piece"):
        ranked(net.model(), net.batches(2), pool=Forgetful())


@pytest.mark.parametrize("name", ["metric", "batch 1"])
def test_what_else_cannot_be_pickled_is_named(name):
    net = NETS["mlp"]
    lock, batches = threading.Lock(), net.batches(2)
    options = {"metric": lambda output, reference: lock.acquire()} if name == "metric" else {}
    if name != "metric":
        batches[1] = {"x": batches[1], "lock": lock}
        options = {"forward": lambda model, batch: model(batch)}
    with pytest.raises(ExecutionError, match=f"QR426 {name} cannot be pickled.*_thread.lock"):
        ranked(net.model(), batches, pool=AtOnce(), **options)


def test_a_worker_with_another_torch_is_refused_by_name(monkeypatch):
    own = worker.environment()
    monkeypatch.setattr(worker, "environment", lambda: {**own, "torch": "1.0"})
    net = NETS["mlp"]
    with pytest.raises(ExecutionError, match=r"QR427 the worker .* has torch 1\.0 instead of 2"):
        ranked(net.model(), net.batches(2), pool=AtOnce())


class Tampering(AtOnce):
    """Changes the files of a parcel before a worker reads them."""

    def __init__(self, change):
        super().__init__()
        self._change = change

    def submit(self, function, /, *args):
        self._change(Path(args[0].file))
        return super().submit(function, *args)


def test_a_worker_opens_nothing_else_than_what_was_sent(tmp_path):
    opened = tmp_path / "opened"

    class Hostile:
        def __reduce__(self):
            return opened.write_text, ("by a worker",)

    def swap_work(file):
        file.write_bytes(pickle.dumps(Hostile()))

    def swap_batches(file):
        data = bytearray(file.with_name("batches").read_bytes())
        data[100] ^= 1
        file.with_name("batches").write_bytes(data)

    net = NETS["mlp"]
    for swap in (swap_work, swap_batches):
        with pytest.raises(
            ExecutionError, match=r"QR427.*finds something else in .* than was sent"
        ):
            ranked(net.model(), net.batches(2), pool=Tampering(swap))
    assert not opened.exists()
    with pytest.raises(ExecutionError, match=r"QR427.*no such file.*\n.*set TMPDIR"):
        ranked(
            net.model(), net.batches(2), pool=Tampering(lambda file: file.unlink(missing_ok=True))
        )


def test_only_this_user_may_read_what_is_sent_and_nothing_of_it_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    modes = []
    net = NETS["mlp"]
    executor = Tampering(lambda file: modes.append(file.parent.stat().st_mode & 0o777))
    ranked(net.model(), net.batches(2), pool=executor)
    assert set(modes) == {0o700}
    assert list(tmp_path.iterdir()) == []


def test_a_worker_without_a_plugin_is_refused_by_name(monkeypatch):
    from torch.ao.quantization import MinMaxObserver

    class Plain(MinMaxObserver):
        pass

    table = registered.snapshot()
    try:
        qrecipe.register_observer("plain")(Plain)
        recipe = qrecipe.parse_recipe(
            f'{HEAD}{FEW}[tensor.activation]\nobserver = "plain"\nreduce_range = true\n'
        )
        net = NETS["mlp"]
        model, batches = net.model(), net.batches(2)
        assert ranked(model, batches, recipe, pool=AtOnce()) == ranked(model, batches, recipe)
        bare = SimpleNamespace(find=lambda kind, name: None, import_module=lambda name: None)
        monkeypatch.setattr(worker, "registered", bare)
        monkeypatch.setattr(worker, "importlib", bare)
        with pytest.raises(ExecutionError, match=r'QR427.*has no observer "plain", which'):
            ranked(model, batches, recipe, pool=AtOnce())
    finally:
        registered.restore(table)


def test_batches_that_are_views_are_sent_without_what_they_are_views_of(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sizes = []
    executor = Tampering(lambda file: sizes.append(file.with_name("batches").stat().st_size))
    net = NETS["mlp"]
    whole = torch.randn(100_000, 6)
    ranked(net.model(), [whole[:8], whole[8:16].t().contiguous().t()], pool=executor)
    assert max(sizes) < 10_000


def test_workers_compute_with_the_settings_of_the_caller_and_keep_their_own(monkeypatch):
    seen, after = [], []
    parts = steps.Scorer.parts

    def noting(self, *args):
        seen.append(TorchSettings.here())
        return parts(self, *args)

    monkeypatch.setattr(steps.Scorer, "parts", noting)
    net, of_workers = NETS["mlp"], TorchSettings(2, True, "highest")
    of_caller = TorchSettings(1, False, "medium")

    class Fresh(AtOnce):
        def submit(self, function, /, *args):
            with of_workers.used():
                future = super().submit(function, *args)
                after.append(TorchSettings.here())
            return future

    with of_caller.used():
        ranked(net.model(), net.batches(2), pool=Fresh())
    assert set(seen) == {of_caller}
    assert set(after) == {of_workers}


def forking():
    return ProcessPoolExecutor(1, mp_context=get_context("fork"))


@pytest.mark.parametrize(
    ("pool", "text"),
    [
        (3, "pool is a int, and no executor"),
        (ThreadPoolExecutor, "pool is a [A-Za-z]+, and no executor\n.*qrecipe.Pool.function"),
        (qrecipe.Pool(3), "executor is neither"),
        (qrecipe.Pool(dict), "the function of the pool returns a dict"),
        (qrecipe.Pool(AtOnce, workers=0), "workers is 0"),
        (qrecipe.Pool(forking, factory=3), "factory must be a function"),
        (qrecipe.Pool(forking), "the processes of this pool are forked"),
    ],
)
def test_a_pool_that_cannot_work_is_refused(pool, text):
    net = NETS["mlp"]
    with pytest.raises(ExecutionError, match=f"QR425 {text}"):
        ranked(net.model(), net.batches(2), pool=pool)


def test_an_estimate_is_not_cut_into_pieces():
    net = NETS["mlp"]
    with pytest.raises(ExecutionError, match="QR425 an estimate is a single pass"):
        ranked(net.model(), net.batches(2), method="estimate", pool=AtOnce())


def test_threads_are_workers_too():
    net = NETS["residual"]
    model, batches = net.model(), net.batches(3)
    with ThreadPoolExecutor(2) as pool:
        assert ranked(model, batches, pool=pool) == ranked(model, batches)


def test_a_worker_keeps_no_more_than_two_models():
    net = NETS["mlp"]
    executor = AtOnce()
    for _ in range(3):
        ranked(net.model(), net.batches(2), pool=executor)

    gc.collect()
    assert len(worker._BEGUN) == 2


def test_a_bad_batch_is_found_while_batches_are_sent():
    def batches():
        yield torch.randn(8, 6)
        raise OSError("disk gone")

    class Loader:
        def __iter__(self):
            return batches()

    with pytest.raises(CalibrationError, match="QR402 the loader failed at batch 1"):
        ranked(NETS["mlp"].model(), Loader(), pool=AtOnce())
