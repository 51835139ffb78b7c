"""A search whose candidates are tried on workers, some of them ahead of need."""

from __future__ import annotations

import json

import pytest
import torch
from executors import AtOnce, Dying, LastFirst
from runs import silent
from shares import every
from tuning import base, cancelling, closeness, full_loss, in_float_time, tuned

import qrecipe
from qrecipe.authoring.tune.ahead import upcoming
from qrecipe.authoring.tune.levers import Candidate
from qrecipe.authoring.tune.search import Measured, Search
from qrecipe.authoring.tune.trials import ModelBench
from qrecipe.errors.findings import ExecutionError, QRecipeWarning

TIMES = in_float_time(a=0.4, b=0.3, c=0.3)


@pytest.fixture(autouse=True)
def _equal_times(monkeypatch):
    """Measured times are all that two runs of a search can differ in."""
    monkeypatch.setattr(ModelBench, "_priced", lambda *args: TIMES)


@pytest.fixture(scope="module")
def job():
    torch.manual_seed(0)
    model, batches = cancelling()
    evaluate = closeness(model, batches)
    return model, batches, evaluate, {"max_drop": full_loss(model, batches, evaluate) / 2}


@pytest.fixture(scope="module")
def whole(job):
    model, batches, evaluate, options = job
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelBench, "_priced", lambda *args: TIMES)
        return tuned(model, batches, evaluate, **options)


def outcome(result):
    trials = [(t.what, t.candidate, t.metric, t.kept, t.within) for t in result.trials]
    return trials, result.recipe.to_toml(), result.ranking


@pytest.mark.parametrize("workers", every(3, [2, 1, 4]))
def test_a_search_on_workers_makes_the_same_trials(tmp_path, job, whole, workers):
    model, batches, evaluate, options = job
    log = tmp_path / "log.json"
    pool = qrecipe.Pool(LastFirst(), workers=workers)
    result = tuned(model, iter(batches), evaluate, pool=pool, resume=log, **options)
    assert outcome(result) == outcome(whole)
    logged = json.loads(log.read_text())
    early = [trial for trial in logged["trials"] if trial["ahead"]]
    assert len(logged["trials"]) == len(whole.trials)
    assert all(each["ahead"] for each in logged["ahead"])
    if workers == 1:
        assert early == logged["ahead"] == []
    else:
        assert early


def test_what_was_tried_ahead_is_not_tried_again_when_a_search_goes_on(tmp_path, job, whole):
    model, batches, evaluate, options = job
    log = tmp_path / "log.json"
    with pytest.warns(QRecipeWarning, match="QR219"):
        tuned(model, batches, evaluate, pool=LastFirst(), resume=log, max_trials=2, max_drop=0.0)
    logged = json.loads(log.read_text())
    logged["ahead"] = [  # as if the search had been ended after it
        {**trial, "ahead": True} for trial in logged["trials"][1:]
    ]
    logged["trials"] = logged["trials"][:1]
    log.write_text(json.dumps(logged))
    calls = []
    result = tuned(
        model, batches, lambda net: calls.append(0) or evaluate(net), resume=log, **options
    )
    assert outcome(result) == outcome(whole)
    assert len(calls) == len(whole.trials) - 2


def test_a_search_whose_workers_die_keeps_its_trials_and_goes_on(tmp_path, job, whole):
    model, batches, evaluate, options = job
    log = tmp_path / "log.json"
    with pytest.raises(ExecutionError, match=r"QR428 the workers failed.*BrokenProcessPool"):
        tuned(model, batches, evaluate, pool=Dying(3), resume=log, **options)
    kept = json.loads(log.read_text())
    assert len(kept["trials"]) + len(kept["ahead"]) == 3
    result = tuned(model, batches, evaluate, pool=AtOnce(), resume=log, **options)
    assert outcome(result) == outcome(whole)


def test_workers_that_can_be_made_anew_end_the_search(job, whole):
    model, batches, evaluate, options = job
    made = []

    def make():
        made.append(Dying(2))
        made[-1]._max_workers = 2
        return made[-1]

    result = tuned(model, batches, evaluate, pool=qrecipe.Pool(make), **options)
    assert outcome(result) == outcome(whole)
    assert len(made) >= 2


def test_an_interrupt_gives_the_best_so_far(job):
    model, batches, evaluate, options = job

    def interrupt(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.warns(QRecipeWarning, match="QR218"):
        result = qrecipe.tune(
            model, base(), batches, evaluate, progress=interrupt, pool=LastFirst(), **options
        )
    assert result.stopped == "interrupt"
    assert len(result.trials) == 2


def test_limits_count_what_the_search_asks_for(tmp_path, job):
    model, batches, evaluate, _ = job
    log = tmp_path / "log.json"
    with pytest.warns(QRecipeWarning, match="QR219"):
        result = tuned(
            model, batches, evaluate, max_trials=3, resume=log, pool=LastFirst(8), max_drop=0.0
        )
    assert len(result.trials) == 3
    assert result.stopped == "trials"
    logged = json.loads(log.read_text())
    assert len(logged["trials"]) == 3
    assert logged["ahead"]  # workers without anything else to do are not counted


def test_the_first_trial_has_its_warnings_and_errors(job):
    model, batches, evaluate, _ = job
    recipe = qrecipe.parse_recipe('format = 1\nextends = "builtin:x86-static"\n')
    with pytest.warns(QRecipeWarning) as alone:
        qrecipe.tune(model, recipe, batches, evaluate, max_drop=1e9, progress=silent)
    with pytest.warns(QRecipeWarning) as together:
        qrecipe.tune(model, recipe, batches, evaluate, max_drop=1e9, progress=silent, pool=AtOnce())
    assert {str(each.message) for each in together} == {str(each.message) for each in alone}
    with pytest.raises(ExecutionError, match=r"QR423.*out of luck"):
        tuned(model, batches, failing_when_quantized(), max_drop=0.1, pool=AtOnce())


def failing_when_quantized():
    """Fails for quantized models."""

    def evaluate(net):
        if any("quantized" in type(module).__module__ for module in net.modules()):
            raise ValueError("out of luck")
        return 1.0

    return evaluate


class Remembering:
    """A memory of some candidates, by the number of their float sites."""

    def __init__(self, metrics):
        self.metrics = metrics

    def known(self, candidate, is_again):
        metric = self.metrics.get((len(candidate.levers), len(candidate.floats), is_again))
        return None if metric is None else Measured(metric, 0.0)

    def known_estimates(self, levers):
        return None


def test_the_next_candidate_comes_first_and_then_what_its_results_may_lead_to():
    from qrecipe.authoring.tune.levers import Lever
    from qrecipe.recipe.frozen import FrozenMapping

    levers = tuple(
        Lever(name, FrozenMapping({name: FrozenMapping({"observer": name})})) for name in "ab"
    )

    def begin(bench):
        return Search(bench, levers, 0.5, lambda trial: None)

    found = list(upcoming(begin, Remembering({(0, 0, False): 0.1})))
    assert found[0] == (Candidate(levers[:1]), False)
    assert found[1] == (Candidate(levers[1:]), False)  # if the first lever gains nothing
    assert (Candidate(levers), False) in found  # if it gains something
    assert (Candidate(levers[:1]), True) in found  # if it is enough, it is measured again
    assert len(found) == len(set(found))
