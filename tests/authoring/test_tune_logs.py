"""Logs of searches: interrupted, continued, read again, and refused."""

from __future__ import annotations

import json
from itertools import repeat

import pytest
import torch
from shares import every
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tuning import base, cancelling, closeness, full_loss, in_float_time, tuned

from qrecipe.authoring.tune.trials import ModelBench
from qrecipe.errors.findings import ExecutionError, QRecipeWarning
from qrecipe.execution.batches import steady_digest
from qrecipe.model.digest import model_digest
from qrecipe.planning import target_cpu as target

pytestmark = pytest.mark.usefixtures("only_sites")


def interrupted_at(call, evaluate):
    calls = []

    def interrupted(candidate):
        calls.append(0)
        if len(calls) == call:
            raise KeyboardInterrupt
        return evaluate(candidate)

    return interrupted


# measured times are all that two runs of a search can differ in
TIMES = in_float_time(a=0.4, b=0.3, c=0.3)


@pytest.fixture(scope="module")
def whole_search():
    """A search that was not interrupted, and what it was given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qrecipe.authoring.tune.tune.levers_of", lambda *args: ())
        patch.setattr(ModelBench, "_priced", lambda *args: TIMES)
        torch.manual_seed(0)
        model, batches = cancelling()
        evaluate = closeness(model, batches)
        options = {"max_drop": full_loss(model, batches, evaluate) / 2}
        yield model, batches, evaluate, options, tuned(model, batches, evaluate, **options)


@pytest.mark.parametrize("call", every(4, [5, 3, 6, 8]))
def test_an_interrupted_search_goes_on_and_ends_as_if_nothing_had_happened(
    tmp_path, monkeypatch, whole_search, call
):
    monkeypatch.setattr(ModelBench, "_priced", lambda *args: TIMES)
    model, batches, evaluate, options, whole = whole_search
    assert len(whole.trials) == 7
    options = {**options, "resume": tmp_path / "log.json"}
    with pytest.warns(QRecipeWarning, match="QR218"):
        partial = tuned(model, batches, interrupted_at(call, evaluate), **options)
    assert partial.stopped == "interrupt"
    assert len(partial.trials) == call - 2
    calls = []
    resumed = tuned(model, batches, lambda m: calls.append(0) or evaluate(m), **options)
    assert len(calls) == len(whole.trials) - len(partial.trials)
    outcome = [(t.what, t.metric, t.kept, t.within) for t in resumed.trials]
    assert outcome == [(t.what, t.metric, t.kept, t.within) for t in whole.trials]
    assert resumed.recipe.to_toml() == whole.recipe.to_toml()


def test_a_finished_log_is_read_again_without_a_single_evaluation(tmp_path):
    model, batches = cancelling()
    evaluate = closeness(model, batches)
    log = tmp_path / "log.json"
    options = {"max_drop": full_loss(model, batches, evaluate) / 2, "resume": log}
    first = tuned(model, batches, evaluate, **options)
    text = log.read_text()
    again = tuned(model, batches, lambda model: pytest.fail("evaluated"), **options)
    assert again.recipe.to_toml() == first.recipe.to_toml()
    assert log.read_text() == text


def test_an_interrupt_before_the_first_trial_is_one():
    model, batches = cancelling()
    with pytest.raises(KeyboardInterrupt):
        tuned(model, batches, interrupted_at(1, closeness(model, batches)))


def test_the_log_holds_what_was_tried_what_it_gave_and_whether_it_was_kept(tmp_path):
    model, batches = cancelling()
    evaluate = closeness(model, batches)
    log = tmp_path / "log.json"
    result = tuned(
        model, batches, evaluate, max_drop=full_loss(model, batches, evaluate) / 2, resume=log
    )
    values = json.loads(log.read_text())
    assert values["float_metric"] == 0
    assert [(t["what"], t["metric"], t["kept"], t["within"]) for t in values["trials"]] == [
        (t.what, t.metric, t.kept, t.within) for t in result.trials
    ]
    (estimates,) = values["estimates"].values()
    costs = estimates["ranking"]
    assert {cost["name"] for cost in costs} == {"a", "b", "c"}
    assert {site["name"] for site in estimates["costs"]["sites"]} >= {"a", "b", "c"}
    assert all(0 <= cost["share"] <= 1 for cost in costs)
    assert costs[-1]["name"] == "c"
    assert list(tmp_path.iterdir()) == [log]


def test_the_log_of_another_model_or_recipe_is_refused(tmp_path):
    model, batches = cancelling()
    evaluate = closeness(model, batches)
    log = tmp_path / "log.json"
    tuned(model, batches, evaluate, max_drop=1e9, resume=log)
    with torch.no_grad():
        model.c.weight[0, 0] += 1
    with pytest.raises(ExecutionError, match=r"QR331.*another model"):
        tuned(model, batches, evaluate, resume=log)
    other = base('[tensor.activation]\nobserver = "minmax"\n')
    with pytest.raises(ExecutionError, match=r"QR331.*another recipe"):
        tuned(model, batches, evaluate, other, resume=log)


@pytest.mark.parametrize("what", ["torch", "qrecipe", "a CPU"])
def test_the_log_of_another_torch_qrecipe_or_cpu_is_refused(tmp_path, monkeypatch, what):
    model, batches = cancelling()
    evaluate = closeness(model, batches)
    log = tmp_path / "log.json"
    tuned(model, batches, evaluate, max_drop=1e9, resume=log)
    then = json.loads(log.read_text())["owner"]["settings"][what]
    now = "0"
    if what == "a CPU":
        now = "without VNNI" if target.has_vnni() else "with VNNI"
        monkeypatch.setattr(target, "has_vnni", lambda: now == "with VNNI")
    else:
        name = {"torch": "torch.__version__", "qrecipe": "qrecipe._version.__version__"}[what]
        monkeypatch.setattr(name, now)
    with pytest.raises(ExecutionError) as raised:
        tuned(model, batches, evaluate, resume=log)
    assert f"is the log of a search with {what} {then} instead of {now}\n" in str(raised.value)
    assert raised.value.findings[0].code == "QR331"


def test_a_log_keeps_what_the_best_gave_once_more(tmp_path):
    model, batches = cancelling()
    evaluate = closeness(model, batches)
    log = tmp_path / "log.json"
    loss = full_loss(model, batches, evaluate)
    first = tuned(model, batches, evaluate, max_drop=loss / 2, resume=log)
    assert first.trials[-1].is_repeated
    entries = json.loads(log.read_text())["trials"]
    assert len(entries) == len(first.trials)
    assert entries[-1]["recipe"].endswith(" again")


BUFFERS = {
    "complex": torch.polar(torch.ones(3), torch.rand(3)),
    "conjugate": torch.polar(torch.ones(3), torch.rand(3)).conj(),
    "sparse": torch.eye(3).to_sparse(),
    "rows": torch.eye(3).to_sparse_csr(),
    "columns": torch.eye(3).to_sparse_csc(),
    "float8": torch.ones(2).to(torch.float8_e4m3fn),
    "unsigned": torch.ones(2, dtype=torch.uint64),
    "scalar": torch.tensor(3.0),
    "nothing": torch.zeros(0),
    "meta": torch.zeros(2, device="meta"),
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_models_are_told_apart_whatever_their_buffers_are(kind):
    model = nn.Linear(2, 2)
    before = model_digest(model)
    model.register_buffer("extra", BUFFERS[kind])
    digest = model_digest(model)
    assert digest != before
    assert model_digest(model) == digest


@pytest.mark.parametrize("kind", ["complex", "sparse", "rows", "float8", "scalar"])
def test_another_value_in_a_buffer_is_another_model(kind):
    model = nn.Linear(2, 2)
    model.register_buffer("extra", BUFFERS[kind])
    before = model_digest(model)
    dense = BUFFERS[kind].to_dense() if "s" in kind and kind != "scalar" else BUFFERS[kind]
    double = (dense.float() if kind == "float8" else dense) * 2
    same_layout = {"sparse": "to_sparse", "rows": "to_sparse_csr"}.get(kind)
    model.extra = getattr(double, same_layout)() if same_layout else double.to(BUFFERS[kind].dtype)
    assert model_digest(model) != before


def test_the_same_numbers_in_another_order_are_another_model():
    model = nn.Linear(3, 3)
    before = model_digest(model)
    model.weight.data = model.weight.data.flip(0)
    assert model_digest(model) != before


def test_a_model_with_complex_and_sparse_buffers_is_tuned():
    model, batches = cancelling()
    evaluate = closeness(model, batches)
    model.register_buffer("rotation", BUFFERS["complex"])
    model.register_buffer("mask", BUFFERS["sparse"])
    assert tuned(model, batches, evaluate, max_drop=1e9).reached


STARTED = '{"format": 3, "owner": OWNER'
COST = '{"name": "a", "reason": "", "share": 0.1, "sqnr_db": null}'
NO_COSTS = '{"sites": [], "tensors": [], "rest": 0.0}'
TRIAL = '{"recipe": "x", "metric": 1, "error": null, "seconds": 1, "latency": null}'


def log_of(float_metric="0", cost=COST, trial=TRIAL):
    estimates = f'{{"ranking": [{cost}], "costs": {NO_COSTS}}}'
    return (
        f'{STARTED}, "float_metric": {float_metric}, "estimates": {{"y": {estimates}}}, '
        f'"trials": [{trial}]}}'
    )


DAMAGED = {
    "blank": "\n",
    "a list": "[]",
    "no keys": "{}",
    "another format": '{"format": 1}',
    "no trials": f"{STARTED}}}",
    "other types": f'{STARTED}, "float_metric": 0, "estimates": [], "trials": 3}}',
    "a trial without a result": log_of(trial=TRIAL.replace("1,", "null,", 1)),
    "a metric that is NaN": log_of(trial=TRIAL.replace("1,", "NaN,", 1)),
    "a metric that is text": log_of(trial=TRIAL.replace("1,", '"0.5",', 1)),
    "a metric that is a truth": log_of(trial=TRIAL.replace("1,", "true,", 1)),
    "a float metric that is NaN": log_of(float_metric="NaN"),
    "a share that is NaN": log_of(cost=COST.replace("0.1", "NaN")),
    "too deep": "[" * 100_000,
    "no text": "\udc80",
}


def placed(text, values):
    """The text for the search that these values are of."""
    return text.replace("OWNER", json.dumps(values["owner"]))


def test_the_log_of_other_batches_is_refused_and_an_empty_one_is_begun(tmp_path):
    model, batches = cancelling()
    evaluate = closeness(model, batches)
    log = tmp_path / "log.json"
    log.touch()
    tuned(model, batches, evaluate, max_drop=1e9, resume=log)
    tuned(model, iter(batches), evaluate, max_drop=1e9, resume=log)
    for others in (batches[:2], [2 * batch for batch in batches]):
        with pytest.raises(ExecutionError, match=r"QR331 .* a search for other batches"):
            tuned(model, others, evaluate, max_drop=1e9, resume=log)


def test_batches_that_differ_each_time_they_are_read_are_not_compared():
    images = TensorDataset(torch.arange(64.0).view(32, 2))
    shuffled, in_order = (DataLoader(images, 8, shuffle=each) for each in (True, False))
    assert steady_digest(shuffled, 100) == ""
    assert steady_digest([lambda: 0], 100) == ""  # that has no digest
    assert steady_digest(in_order, 100) == steady_digest(list(in_order), 100) != ""
    assert steady_digest(in_order, 2) == steady_digest(list(in_order)[:2], 100)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    steady_digest(shuffled, 100)
    assert torch.equal(torch.rand(1), expected)


def test_what_is_no_trial_log_is_a_finding(tmp_path):
    model, batches = cancelling()
    log = tmp_path / "log.json"
    tuned(model, batches, closeness(model, batches), max_drop=1e9, resume=log)
    values = json.loads(log.read_text())
    log.write_text(placed(log_of(), values))
    tuned(model, batches, closeness(model, batches), max_drop=1e9, resume=log)
    for text in map(placed, DAMAGED.values(), repeat(values)):
        log.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ExecutionError, match="QR332"):
            tuned(model, batches, closeness(model, batches), resume=log)


def test_a_log_that_cannot_be_written_is_a_finding(tmp_path):
    model, batches = cancelling()
    with pytest.raises(ExecutionError, match="QR332"):
        tuned(model, batches, closeness(model, batches), resume=tmp_path / "none" / "log.json")
    with pytest.raises(ExecutionError, match="QR332"):
        tuned(model, batches, closeness(model, batches), resume=tmp_path)
