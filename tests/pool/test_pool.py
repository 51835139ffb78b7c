"""Pieces on workers give what one process gives, in whatever order they come back."""

from __future__ import annotations

import gc
import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from executors import AtOnce, LastFirst
from nets import NETS
from plans import net_of
from rankings import FEW, STATIC, ranked
from runs import HEAD, silent
from shares import every
from torch import nn

import qrecipe
from qrecipe.errors.findings import (
    ExecutionError,
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


@pytest.mark.parametrize("name", every(10, sorted(NETS)))
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
        with pytest.raises(ExecutionError, match=r"QR427.*finds other content in .* than was sent"):
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
