"""Calibration, drift and training by two processes, each with its shard of the batches."""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from distributed_training import KINDS, trained_by
from nets import NETS
from ranks import COUNT, run_on_ranks
from routed import Routed, recipe_of_roots
from torch import nn
from torch.ao.quantization.observer import MinMaxObserver, ObserverBase
from torch.utils.data import DataLoader
from training import fake_quants, qat_recipe

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.registry.builtin import known_names

OBSERVERS = ("minmax", "histogram", "moving_average_minmax", "mean_minmax", "mse")
NET = NETS["mlp"]


def recipe(observer, more=""):
    return qrecipe.parse_recipe(
        'format = 1\nextends = "builtin:x86-static"\n[lint]\nignore = ["QR201", "QR208"]\n'
        f'[tensor.activation]\nobserver = "{observer}"\n{more}'
    )


EQUALIZED = recipe("minmax", '[transform.equalize]\nby = "activations"\n')
SMOOTHED = recipe("minmax", "[transform.smooth]\nalpha = [0.3, 0.8]\n")
DYNAMIC = qrecipe.parse_recipe('format = 1\nextends = "builtin:x86-dynamic"\n')


def batches():
    """Seven batches of different ranges, of which neither the first nor the last is widest."""
    factors = (1.0, 0.5, 1.7, 0.9, 2.3, 1.1, 0.3)
    return [batch * factor for batch, factor in zip(NET.batches(7), factors, strict=True)]


def shard(rank):
    return batches()[rank::COUNT]


def brighter(some):
    return [batch * 1.5 for batch in some]


def stored(converted):
    """All bytes of the stored model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        qrecipe.save_quantized(converted, path)
        return path.read_bytes()


def quantized(a_recipe, some, **options):
    return stored(qrecipe.quantize(NET.model(), a_recipe, some, **options))


def drifted(observer, some):
    converted = qrecipe.quantize(NET.model(), recipe(observer), some)
    return qrecipe.drift(converted, brighter(some)).to_json()


def in_training(kind, some):
    """The state of all fake-quants that calibration has started."""
    prepared = qrecipe.compile(NET.model(), qat_recipe(kind), batches()[0]).prepare()
    qrecipe.calibrate(prepared, some)
    return {
        f"{path} {name}": tensor.tolist()
        for path, module in fake_quants(prepared).items()
        for name, tensor in module.state_dict().items()
    }


def routed(some):
    torch.default_generator.manual_seed(1)
    model = Routed().eval()
    images = [torch.full((2, 3, 8, 8), float(batch.mean())) for batch in some]
    return stored(qrecipe.quantize(model, recipe_of_roots(["backbone", "head"]), images))


class Mergeable(ObserverBase):
    """The mean of the largest absolute values of all batches."""

    def __init__(self, dtype, qscheme=torch.per_tensor_affine, quant_min=0, quant_max=127, **_):
        super().__init__(dtype)
        self.qscheme, self.quant_min, self.quant_max = qscheme, quant_min, quant_max
        self.largest = []

    def forward(self, x):
        self.largest.append(float(x.abs().max()))
        return x

    def merge(self, others):
        for other in others:
            self.largest += other.largest

    def calculate_qparams(self):
        largest = sum(sorted(self.largest)) / max(1, len(self.largest))
        scale = max(2 * largest / (self.quant_max - self.quant_min), 1e-6)
        middle = (self.quant_min + self.quant_max + 1) // 2
        return torch.tensor([scale]), torch.tensor([middle], dtype=torch.int32)


class Wider(MinMaxObserver):
    """Observes as its base does."""

    def calculate_qparams(self):
        return self._calculate_qparams(self.min_val * 1.1, self.max_val * 1.1)


class Silent(MinMaxObserver):
    """Does not say how it merges."""

    def forward(self, x_orig):
        return super().forward(x_orig)


def register():
    """Also after a test that has not left the registry as it was when this file was imported."""
    for name, observer in {"mergeable": Mergeable, "wider": Wider, "silent": Silent}.items():
        if name not in known_names("observer"):
            qrecipe.register_observer(name)(observer)


register()


@pytest.fixture(autouse=True)
def _registered():
    register()


def in_two_calls(name, some):
    compiled = qrecipe.compile(NET.model(), recipe(name), batches()[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, some)
    qrecipe.calibrate(prepared, brighter(some))
    observed = {name: tensor.tolist() for name, tensor in prepared.named_buffers()}
    return observed, stored(compiled.convert(prepared))


def failing(rank):
    """The second rank's loader fails."""
    yield batches()[0]
    if rank:
        raise OSError("the disk is gone")
    yield batches()[1]


def shuffled(rank):
    loader = DataLoader(torch.cat(shard(rank)), batch_size=8, shuffle=True)
    return quantized(recipe("histogram"), loader)


def with_other_weights(rank):
    model = NET.model()
    with torch.no_grad():
        next(model.parameters()).add_(rank)
    return qrecipe.quantize(model, recipe("minmax"), shard(rank))


def with_other_model(rank):
    model = NET.model() if rank else nn.Linear(6, 3).eval()
    return qrecipe.quantize(model, recipe("minmax"), shard(rank))


def by_one_alone(rank):
    """One rank searches, and nobody waits for it."""
    if rank == 0:
        qrecipe.sensitivity(NET.model(), recipe("minmax"), batches())


def out_of_step(rank):
    converted = qrecipe.quantize(NET.model(), recipe("minmax"), shard(rank))
    if rank == 0:
        qrecipe.drift(converted, shard(rank))
    else:
        qrecipe.quantize(NET.model(), recipe("minmax"), shard(rank))


LIMITED = recipe("minmax", "[calibration]\nmax_batches = 3\n")

AS_ONE = {
    **{observer: partial(quantized, recipe(observer)) for observer in OBSERVERS},
    "drift, moving average": partial(drifted, "moving_average_minmax"),
    "drift, histogram": partial(drifted, "histogram"),
    "a method merge": partial(quantized, recipe("mergeable")),
    "two calls": partial(in_two_calls, "histogram"),
    "equalize": partial(quantized, EQUALIZED),
    "smooth": partial(quantized, SMOOTHED),
    "max_batches": partial(quantized, LIMITED),
}
"""What two ranks find with shards of the batches as one process does with all of them."""

AS_ONE_SLOW = {
    "roots": routed,
    "dynamic": partial(quantized, DYNAMIC),
    "an inherited forward": partial(quantized, recipe("wider")),
    "drift, minmax": partial(drifted, "minmax"),
    "drift, mse": partial(drifted, "mse"),
    **{f"training, {kind}": partial(in_training, kind) for kind in ("fake_quantize", "learnable")},
    **{f"{o}, pt2e": partial(quantized, recipe(o), executor="pt2e") for o in OBSERVERS},
}


def with_shards(computed):
    return lambda rank: computed(shard(rank))


def cases():
    return {
        **{name: with_shards(computed) for name, computed in AS_ONE.items()},
        "one without": lambda rank: quantized(recipe("histogram"), batches() if rank else []),
        "both without": lambda rank: quantized(recipe("minmax"), []),
        "continued": lambda rank: in_two_calls("mergeable", shard(rank)),
        "silent": lambda rank: quantized(recipe("silent"), shard(rank)),
        "another recipe": lambda rank: quantized(recipe(OBSERVERS[rank]), shard(rank)),
        "other weights": with_other_weights,
        "another model": with_other_model,
        "failing": lambda rank: quantized(recipe("minmax"), failing(rank)),
        "shuffled": shuffled,
        "out of step": out_of_step,
        "one alone": by_one_alone,
        "after all": lambda rank: quantized(recipe("minmax"), shard(rank)),
        **{f"trained, {kind}": partial(trained_by, kind) for kind in KINDS},
    }


def slow_cases():
    return {name: with_shards(computed) for name, computed in AS_ONE_SLOW.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_on_ranks(cases, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def found_slowly(tmp_path_factory):
    return run_on_ranks(slow_cases, tmp_path_factory.mktemp("slow_ranks"))


def results(each):
    return [result for result, _ in each]


def of_one(computed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return computed(batches())


@pytest.mark.parametrize("name", AS_ONE)
def test_two_ranks_find_what_one_process_finds_to_the_bit(name, found):
    one = of_one(AS_ONE[name])
    assert results(found[name]) == [one, one]


@pytest.mark.slow
@pytest.mark.parametrize("name", AS_ONE_SLOW)
def test_two_ranks_also_find_this_as_one_process_does(name, found_slowly):
    one = of_one(AS_ONE_SLOW[name])
    assert results(found_slowly[name]) == [one, one]


def test_a_rank_without_batches_gets_the_model_of_the_others(found):
    one = of_one(AS_ONE["histogram"])
    assert results(found["one without"]) == [one, one]


def test_no_batches_on_any_rank_are_an_error_on_all(found):
    assert all(text.startswith("QR401") for text in results(found["both without"]))


@pytest.mark.parametrize(
    ("name", "told"),
    {
        "another recipe": "rank 1 has another recipe than rank 0",
        "other weights": "rank 1 has other tensors than rank 0",
        "another model": "rank 1 has another model, other tensors than rank 0",
        "out of step": "the ranks do different things (rank 0: drift, rank 1: quantize)",
        "shuffled": "the batches differ when they are read again",
    }.items(),
)
def test_ranks_that_do_not_agree_are_an_error_on_all(name, told, found):
    one, other = results(found[name])
    assert one == other
    assert one.startswith("QR409")
    assert told in one


def test_an_error_of_one_rank_is_raised_there_and_told_to_the_others(found):
    first, second = results(found["failing"])
    assert second == "QR402 the loader failed at batch 1: the disk is gone"
    assert first.startswith(f"QR409 rank 1 failed: {second}")


def test_an_observer_that_does_not_say_how_it_merges_is_refused_by_name(found):
    for text in results(found["silent"]):
        assert text == (
            "QR157 the observer Silent does not say how it merges with those of other ranks\n"
            "  give it a method merge(self, others), or calibrate in one process"
        )


def test_what_has_merged_itself_does_not_go_on_from_there(found):
    for text in results(found["continued"]):
        assert text.startswith("QR157 the observer Mergeable has already been merged")


def test_moving_averages_over_ranks_are_warned_about_and_others_are_not(found):
    assert all("QR236" in codes for _, codes in found["moving_average_minmax"])
    assert not any("QR236" in codes for _, codes in [*found["minmax"], *found["histogram"]])


def test_what_searches_and_measures_works_for_each_rank_by_itself(found):
    assert results(found["one alone"]) == [None, None]


def test_the_group_goes_on_after_errors(found):
    one = of_one(AS_ONE["minmax"])
    assert results(found["after all"]) == [one, one]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_one_model_and_convert_it(kind, found):
    (one, weights), (two, others) = results(found[f"trained, {kind}"])
    start = dict(NETS["residual"].model().named_parameters())
    assert not torch.equal(weights["conv1.weight"], start["conv1.weight"])
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    for prepared, converted in (one, two):
        assert output_sqnr_db(prepared, converted) > 25
