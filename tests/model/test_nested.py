"""Batches and outputs in containers of any kind: every verb sees the tensors in them."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from containers import CONTAINERS, MAPPINGS, Dict, Encoding, Frozen, Plain, Stored, packed
from differential import snapshot
from plans import net_of, recipe
from runs import STATIC, silent
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import CalibrationError
from qrecipe.model.call import Inputs
from qrecipe.model.nested import cloned, leaves, map_tensors, tensors_in


def rows(count=10):
    return [torch.rand(4, 6) for _ in range(count)]


# --- one walker


@pytest.mark.parametrize("kind", [*CONTAINERS, "packed_sequence"])
def test_a_container_is_rebuilt_with_its_class_around_other_tensors(kind):
    given = {**CONTAINERS, "packed_sequence": packed}[kind](torch.ones(3, 2))
    before = [tensor.clone() for tensor in tensors_in(given)]
    made = map_tensors(lambda tensor: tensor + 1, given)
    assert type(made) is type(given)
    assert all(torch.equal(a, b + 1) for a, b in zip(tensors_in(made), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(given), before, strict=True))
    assert getattr(made, "note", "kept") == "kept"
    others = [[x for x in leaves(v) if not torch.is_tensor(x)] for v in (made, given)]
    assert others[0] == others[1]


def test_what_torch_returns_and_what_is_registered_with_it_are_containers():
    class Registered:
        def __init__(self, y):
            self.y = y

    torch.utils._pytree.register_pytree_node(
        Registered, lambda value: ([value.y], None), lambda parts, _: Registered(*parts)
    )
    try:
        assert cloned(Registered(torch.ones(2))).y.tolist() == [1, 1]
        assert len(list(tensors_in(Registered([torch.ones(2)])))) == 1
    finally:
        torch.utils._pytree._deregister_pytree_node(Registered)
    most = cloned(torch.eye(2).max(dim=0))
    assert type(most) is torch.return_types.max
    assert most.indices.tolist() == [0, 1]
    assert cloned(torch.Size([2, 3])) == torch.Size([2, 3])


def test_a_container_that_holds_itself_is_walked_once():
    ring = [torch.ones(1)]
    ring.append(ring)
    assert len(list(tensors_in([ring, ring]))) == 2


def test_a_module_is_no_container_whatever_its_class_says():
    model = net_of(lambda self, x: x, fc=nn.Linear(2, 2))
    assert list(leaves([model])) == [model]


# --- every verb


def every_verb(model, batches, path):
    """Quantize and measure the model; the converted one and the one that comes from its file."""
    before = snapshot(model)
    plan = qrecipe.plan(model, STATIC, batches[0])
    assert sum(site.verdict == "quantized" for site in plan.sites) == 2
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    assert qrecipe.compare(model, converted, batches[:2], progress=silent).output.sqnr_db > 25
    for method in ("exact", "estimate"):
        ranking = qrecipe.sensitivity(model, STATIC, batches, method=method, progress=silent)
        assert all(25 < site.sqnr_db < 100 for site in ranking.sites)
    assert len(qrecipe.drift(converted, batches, progress=silent).sites) == 3
    qrecipe.save_quantized(converted, path)
    assert snapshot(model) == before
    return converted, qrecipe.load_quantized(path, model)


def two_layers(pack=lambda y: y, unpack=lambda x: x):
    def forward(self, x):
        return pack(self.b(torch.relu(self.a(unpack(x)))))

    return net_of(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 6))


def test_every_verb_sees_an_output_that_is_a_dataclass(tmp_path):
    every_verb(two_layers(Frozen), rows(), tmp_path / "m.safetensors")


def test_every_verb_sees_outputs_in_containers_of_all_kinds(tmp_path):
    def pack(y):
        return {kind: pack(y) for kind, pack in CONTAINERS.items()}

    model, batches = two_layers(pack), rows()
    converted, loaded = every_verb(model, batches, tmp_path / "m.safetensors")
    expected, actual, again = (m(batches[0]) for m in (model, converted, loaded))
    for kind in CONTAINERS:
        assert type(actual[kind]) is type(again[kind]) is type(expected[kind])
        assert getattr(actual[kind], "note", "kept") == "kept"
        assert output_sqnr_db(expected[kind], actual[kind]) > 25
        assert output_sqnr_db(actual[kind], again[kind]) == float("inf")
        assert not any(tensor.is_quantized for tensor in tensors_in(actual[kind]))


@pytest.mark.parametrize("kind", MAPPINGS)
def test_a_batch_that_is_any_mapping_is_keyword_inputs(kind):
    y = torch.ones(1)
    assert Inputs.from_batch(MAPPINGS[kind](y)).kwargs["y"] is y
    with pytest.raises(CalibrationError, match=r"QR401 batches is a \w+, not an iterable"):
        qrecipe.quantize(two_layers(), STATIC, MAPPINGS[kind](y))


@pytest.mark.parametrize("kind", ["batch_encoding", "mapping"])
def test_every_verb_takes_a_batch_that_is_a_mapping_and_no_dict(kind, tmp_path):
    def forward(self, y):
        return self.b(torch.relu(self.a(y)))

    model = net_of(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    every_verb(model, [MAPPINGS[kind](y) for y in rows()], tmp_path / "m.safetensors")


def test_every_verb_takes_a_batch_that_is_a_dataclass(tmp_path):
    model = two_layers(unpack=lambda x: x.y)
    every_verb(model, [Frozen(y) for y in rows()], tmp_path / "m.safetensors")


_WITH_ATTRIBUTES = (
    *("dataclass", "named_tuple", "batch_encoding"),
    *("dict_with_attributes", "dict_with_any_attribute"),
)


def test_every_verb_takes_containers_of_all_kinds_among_the_inputs(tmp_path):
    """Each taken apart as its class allows: by key, by attribute or by position."""

    def forward(self, x):
        parts = [x[kind]["y"] for kind in MAPPINGS]
        parts += [x[kind].y for kind in _WITH_ATTRIBUTES]
        parts += [x[kind][0] for kind in ("tuple", "list", "deque", "list_subclass")]
        parts.append(x["nested"]["a"][0].y["y"][0].y)
        return self.b(torch.relu(self.a(torch.cat(parts, 1))))

    model = net_of(
        forward, a=nn.Linear(6 * (len(MAPPINGS) + len(_WITH_ATTRIBUTES) + 5), 6), b=nn.Linear(6, 6)
    )
    batches = [({kind: pack(y) for kind, pack in CONTAINERS.items()},) for y in rows()]
    every_verb(model, batches, tmp_path / "m.safetensors")


def test_a_packed_sequence_is_one_input_and_is_returned_as_one(tmp_path):
    def forward(self, x):
        y = self.lstm(x)[0]
        return PackedSequence(self.fc(y.data), y.batch_sizes)

    model = net_of(forward, lstm=nn.LSTM(6, 6), fc=nn.Linear(6, 6))
    batches = [packed(y) for y in rows(3)]
    converted = qrecipe.quantize(model, "builtin:x86-dynamic", batches, progress=silent)
    assert qrecipe.compare(model, converted, batches, progress=silent).output.sqnr_db > 25
    ranking = qrecipe.sensitivity(model, "builtin:x86-dynamic", batches, progress=silent)
    assert all(site.sqnr_db > 25 for site in ranking.sites)


def test_roots_and_models_without_a_graph_take_and_give_containers(tmp_path):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = two_layers(CONTAINERS["dataclass_that_computes"], lambda x: x.y)

        def forward(self, x):
            given = self.inner(Frozen(x["y"]))
            return Encoding(given=given, n=3) if given.y.sum() < 1e9 else None

    model = Outer().eval()
    batches = [(UserDict(y=y),) for y in rows()]
    rooted = recipe('[fx]\nroots = ["inner"]')
    for wanted in (rooted, "builtin:x86-dynamic"):
        converted = qrecipe.quantize(model, wanted, batches, progress=silent)
        assert type(converted(*batches[0]).given) is type(model(*batches[0]).given)
        assert qrecipe.compare(model, converted, batches, progress=silent).output.sqnr_db > 25
        for method in ("exact", "estimate"):
            ranking = qrecipe.sensitivity(model, wanted, batches, method=method, progress=silent)
            assert all(site.sqnr_db > 25 for site in ranking.sites)


def test_training_takes_and_gives_containers():
    model = two_layers(CONTAINERS["dataclass_that_computes"], lambda x: x.y)
    batches = [Frozen(y) for y in rows(3)]
    compiled = qrecipe.compile(model, recipe(head='phase = "qat"'), batches[0])
    prepared = compiled.prepare()
    for batch in batches:
        prepared(batch).twice.sum().backward()
    converted = compiled.convert(prepared)
    assert output_sqnr_db(model(batches[0]), converted(batches[0])) > 25


def test_tune_searches_with_containers():
    model = two_layers(CONTAINERS["model_output"])
    batches = [Dict(x=y) for y in rows()]

    def evaluate(candidate):
        return min(99.0, output_sqnr_db(model(**batches[0]), candidate(**batches[0])))

    result = qrecipe.tune(
        model, STATIC, batches, evaluate, max_drop=1e3, max_trials=2, progress=silent
    )
    assert result.reached


TAKEN_WHOLE = {
    "mapping_in_a_tuple": (lambda y: (Stored(y=y),), lambda x: x["y"]),
    "dataclass_in_a_dict": (lambda y: {"x": [Plain(Dict(y=y))]}, lambda x: x[0].y["y"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TAKEN_WHOLE)
def test_an_onnx_file_takes_and_gives_the_tensors_in_containers(kind, tmp_path):
    import onnxruntime

    pack, unpack = TAKEN_WHOLE[kind]
    model = two_layers(CONTAINERS["nested"], unpack)
    batches = [pack(y) for y in rows()]
    compiled = qrecipe.compile(model, STATIC, batches[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches, progress=silent)
    path, size = tmp_path / "m.onnx", torch.export.Dim("size")
    qrecipe.export_onnx(compiled, prepared, path, dynamic_shapes=({0: size},))
    session = onnxruntime.InferenceSession(path)
    given = pack(torch.rand(7, 6))
    (tensor,) = tensors_in(given)
    (actual,) = session.run(None, {session.get_inputs()[0].name: tensor.numpy()})
    expected = compiled.convert(prepared)(**given) if isinstance(given, dict) else model(*given)
    assert output_sqnr_db(list(tensors_in(expected)), [torch.from_numpy(actual)]) > 25


def test_a_clone_shares_what_is_no_tensor_and_no_tensor():
    given = Stored(y=torch.ones(2), note=object())
    other = cloned(given)
    other["y"].zero_()
    assert other["note"] is given["note"]
    assert given["y"].tolist() == [1, 1]
