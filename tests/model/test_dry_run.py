"""The one run that proves a trace: nothing of the caller's changes, nothing that is lost passes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass, fields

import pytest
import torch
from plans import net_of, recipe, sites
from runs import STATIC, silent
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import PlanError
from qrecipe.model.call import Inputs
from qrecipe.model.dry_run import first_change, state_of


def rows(count=10):
    return [torch.randn(4, 6) for _ in range(count)]


def fc(inputs=6, outputs=6):
    return nn.Linear(inputs, outputs)


# --- what forward keeps


def keeps_a_cache(self, x):
    y = self.fc(x + self.cache)
    self.cache.copy_(x)
    return y


def keeps_its_last_output(self, x):
    y = self.fc(x)
    if self.last is not None:
        y = y + self.last
    self.last = y
    return y


def counts_its_calls(self, x):
    self.steps += 1
    return self.fc(x) * self.steps


def counts_in_a_dict(self, x):
    self.seen["calls"] = self.seen.get("calls", 0) + 1
    return self.fc(x)


def writes_its_result(self, x):
    self.cache.copy_(self.fc(x))
    return x.mean()


KEEPERS = {
    keeps_a_cache: "cache",
    keeps_its_last_output: "last",
    counts_its_calls: "steps",
    counts_in_a_dict: "seen.calls",
    writes_its_result: "cache",
}


def keeper(forward):
    model = net_of(forward, fc=fc())
    model.register_buffer("cache", torch.zeros(4, 6))
    model.last, model.steps, model.seen = None, 0, {}
    return model


@pytest.mark.parametrize("forward", KEEPERS)
def test_a_forward_that_keeps_something_for_later_is_refused_with_its_name(forward):
    model = keeper(forward)
    with pytest.raises(PlanError, match=f"QR306 .*forward writes to {KEEPERS[forward]},"):
        qrecipe.plan(model, STATIC, rows(1)[0])
    assert (model.last, model.steps, model.seen) == (None, 0, {})
    assert not model.cache.any()


def test_a_module_that_is_not_traced_may_keep_nothing_either():
    inner = keeper(keeps_its_last_output)
    model = net_of(lambda self, x: self.fc(self.inner(x)), inner=inner, fc=fc())
    kept = recipe(head='[fx]\nnon_traceable_module_name = ["inner"]')
    with pytest.raises(PlanError, match=r"writes to inner\.last"):
        qrecipe.plan(model, kept, rows(1)[0])


def test_what_lies_around_the_roots_may_keep_what_it_likes_and_starts_as_the_caller_left_it():
    body = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model = keeper(counts_its_calls)
    model.fc = body
    converted = qrecipe.quantize(
        model, recipe(head='[fx]\nroots = ["fc"]'), rows(), progress=silent
    )
    x = rows(1)[0]
    expected = [model(x) for _ in range(3)]
    assert all(sqnr_db(y, converted(x)) > 25 for y in expected)


def test_a_cache_is_no_reason_to_refuse_whether_a_run_has_filled_it_or_not():
    def forward(self, x):
        if self.table is None:
            self.table = torch.arange(6.0)
        return self.fc(x + self.table)

    model = net_of(forward, fc=fc())
    model.table = None
    assert sites(qrecipe.plan(model, STATIC, rows(1)[0]))["fc"].verdict == "quantized"
    assert model.table is None
    model(rows(1)[0])
    assert sites(qrecipe.plan(model, STATIC, rows(1)[0]))["fc"].verdict == "quantized"


def test_an_attribute_set_to_the_same_number_again_is_no_change():
    model = net_of(lambda self, x: x)
    model.width = 10_000
    before = state_of(model)
    model.width = int("10000")
    assert first_change(before, state_of(model)) is None
    model.width = 10_001
    assert first_change(before, state_of(model)) == "width"


# --- what the caller owns


def test_a_forward_that_writes_to_a_parameter_is_refused_before_it_has_written():
    def forward(self, x):
        self.fc.weight.data.clamp_(-0.01, 0.01)
        return self.fc(x)

    model = net_of(forward, fc=fc())
    before = model.fc.weight.clone()
    for run in (
        lambda: qrecipe.plan(model, STATIC, rows(1)[0]),
        lambda: qrecipe.quantize(model, STATIC, rows(), progress=silent),
    ):
        with pytest.raises(PlanError, match=r"QR306 forward writes to the parameter fc\.weight"):
            run()
        assert torch.equal(model.fc.weight, before)


@pytest.mark.parametrize("roots", ["", '[fx]\nroots = ["body"]'])
def test_an_embedding_that_renormalises_its_rows_does_so_on_a_copy(roots):
    body = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    embedding = nn.Embedding(20, 16, max_norm=1.0)
    model = net_of(lambda self, i: self.body(self.e(i)), e=embedding, body=body)
    before = embedding.weight.clone()
    batches = [torch.randint(0, 20, (4, 6)) for _ in range(10)]
    qrecipe.plan(model, recipe(head=roots), batches[0])
    converted = qrecipe.quantize(model, recipe(head=roots), batches, progress=silent)
    assert torch.equal(embedding.weight, before)
    expected = copy.deepcopy(model)(batches[0])
    assert sqnr_db(expected, converted(batches[0])) > 25


def test_a_forward_that_changes_its_input_is_refused_with_its_name_and_the_input_stays():
    model = net_of(lambda self, x: self.fc(x.sub_(0.5)), fc=fc())
    x = rows(1)[0]
    before = x.clone()
    with pytest.raises(PlanError, match=r'QR306 .*changes its input "x" in place'):
        qrecipe.plan(model, STATIC, x)
    assert torch.equal(x, before)


# --- what is compared


def changed_in_place(self, x):
    y = self.fc(x)
    torch.mul(y[:, :3], 5, out=y[:, :3])
    return y


@dataclass
class Plain:
    logits: object = None


class Dict(dict):
    pass


LOST = {
    "within_a_dataclass": lambda self, x: Plain(changed_in_place(self, x)),
    "within_a_dict_of_its_own": lambda self, x: Dict(logits=changed_in_place(self, x)),
}


@pytest.mark.parametrize("kind", LOST)
def test_a_lost_change_is_seen_in_any_container(kind):
    with pytest.raises(PlanError, match="computes something other than the model"):
        qrecipe.plan(net_of(LOST[kind], fc=fc()), STATIC, rows(1)[0])


def test_a_lost_change_to_the_second_sample_alone_is_seen():
    def forward(self, x):
        y = self.fc(x)
        torch.mul(y[1:], 5, out=y[1:])
        return y

    with pytest.raises(PlanError, match="computes something other than the model"):
        qrecipe.plan(net_of(forward, fc=fc()), STATIC, rows(1)[0])


# --- what is returned


class ModelOutput(OrderedDict):
    """As the outputs of Hugging Face models: a mapping, a dataclass and indexable by position."""

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) is not None:
                super().__setitem__(field.name, getattr(self, field.name))

    def __getitem__(self, key):
        return dict(self.items())[key] if isinstance(key, str) else tuple(self.values())[key]


@dataclass
class Output(ModelOutput):
    last_hidden_state: object = None
    pooled: object = None


CONTAINERS = {
    "model_output": (lambda y: Output(last_hidden_state=y), Output, lambda o: o[0]),
    "ordered_dict": (lambda y: OrderedDict(out=y), OrderedDict, lambda o: o["out"]),
    "dict_of_its_own": (lambda y: Dict(out=y), Dict, lambda o: o["out"]),
    "dataclass": (lambda y: Plain(y), Plain, lambda o: o.logits),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_what_is_returned_keeps_its_class(kind):
    pack, cls, unpack = CONTAINERS[kind]
    model = net_of(lambda self, x: pack(self.b(torch.relu(self.a(x)))), a=fc(), b=fc())
    plan = qrecipe.plan(model, STATIC, rows(1)[0])
    assert [site.name for site in plan.sites] == ["a", "b"]
    batches = rows()
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    assert type(converted(batches[0])) is cls
    assert sqnr_db(unpack(model(batches[0])), unpack(converted(batches[0]))) > 25


class Sealed(dict):
    def __deepcopy__(self, memo):
        raise TypeError("it is sealed")


def test_a_container_that_cannot_be_copied_is_refused_with_the_reason():
    model = net_of(lambda self, x: Sealed(out=self.fc(x)), fc=fc())
    with pytest.raises(PlanError, match=r"QR305 .*: a Sealed cannot be copied: it is sealed"):
        qrecipe.plan(model, STATIC, rows(1)[0])
    taking = net_of(lambda self, x: self.fc(x["x"]), fc=fc())
    with pytest.raises(PlanError, match="QR307 among the example inputs a Sealed cannot be copied"):
        qrecipe.plan(taking, STATIC, (Sealed(x=rows(1)[0]),))


@pytest.mark.parametrize("value", [3, 1.5, True, "name", torch.float32, slice(0, 1), (1, "a")])
def test_constants_are_returned_beside_tensors(value):
    model = net_of(lambda self, x: {"y": self.fc(x), "c": value}, fc=fc())
    batches = rows()
    compiled = qrecipe.compile(model, STATIC, batches[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches, progress=silent)
    for made in (prepared, compiled.convert(prepared)):
        given = made(batches[0])
        assert list(given) == ["y", "c"]
        assert given["c"] == value


def test_an_argument_that_is_no_tensor_is_returned_too():
    model = net_of(lambda self, x, tag: (self.fc(x), tag), fc=fc())
    batches = [(x, "t") for x in rows()]
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    assert converted(*batches[0])[1] == "t"


def test_the_inputs_of_a_trial_are_clones():
    inputs = Inputs((torch.ones(2),), {"y": [torch.ones(2)]})
    other = inputs.cloned()
    other.args[0].zero_()
    other.kwargs["y"][0].zero_()
    assert inputs.args[0].all()
    assert inputs.kwargs["y"][0].all()
