"""Embedding tables of programs: integers, of which looked up rows become float."""

from __future__ import annotations

import pytest
import torch
from plans import net_of, recipe
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import AuditError, UnsupportedError

pytest.importorskip("torchao")

from qrecipe.execution.pt2e import part as part_module

TABLES = """
[tensor.embedding]
observer = "per_channel_minmax"
dtype = "uint8"
qscheme = "per_channel_affine_float_qparams"
[qconfig.embedding]
weight = "embedding"
[rules.module_type]
"torch.nn.Embedding" = "embedding"
"""
ALONE = recipe(base="builtin:embedding-weight-only", head='executor = "pt2e"')
STATIC = recipe(TABLES, base="builtin:x86-static-minmax", head='executor = "pt2e"')


class Words(nn.Module):
    """A table that is looked up twice and is the last layer's weight, and one of positions."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 8, padding_idx=0), nn.Embedding(7, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1])) + self.words(ids.flip(1))
        return self.head(torch.relu(x))


def words():
    torch.manual_seed(0)
    return Words().eval(), [torch.randint(0, 50, (4, 7)) for _ in range(10)]


@pytest.fixture(scope="module", params=["alone", "with static layers"])
def quantized(request):
    model, batches = words()
    chosen = ALONE if request.param == "alone" else STATIC
    return model, batches, qrecipe.quantize(model, chosen, batches), request.param == "alone"


def test_rows_are_those_of_the_kernels_of_fx():
    model, batches = words()
    outputs = [
        qrecipe.quantize(model, ALONE, batches, executor=executor)(batches[0])
        for executor in ("fx", "pt2e")
    ]
    assert output_sqnr_db(*outputs) > 120


def test_tables_are_integers_without_a_float_twin_and_stored_once(quantized):
    model, batches, converted, alone = quantized
    state = converted.state_dict()
    tables = [tensor for tensor in state.values() if tensor.dtype == torch.uint8]
    assert sorted(map(len, tables)) == [7, 50]
    wide = [t for t in state.values() if t.is_floating_point() and t.dim() > 1 and t.shape[1] > 1]
    assert len(wide) == (1 if alone else 0)  # the last layer, which a rule leaves float
    with torch.no_grad():
        assert output_sqnr_db(model(batches[0]), converted(batches[0])) > (35 if alone else 20)
        assert converted(torch.randint(0, 50, (9, 7))).shape == (9, 7, 50)


def test_they_are_stored_exported_and_compared(quantized, tmp_path):
    model, batches, converted, _ = quantized
    qrecipe.save_quantized(converted, tmp_path / "net.safetensors")
    qrecipe.export_pt2(converted, tmp_path / "net.pt2", batches[0])
    loaded = qrecipe.load_quantized(tmp_path / "net.safetensors", words()[0])
    program = torch.export.load(tmp_path / "net.pt2").module()
    with torch.no_grad():
        expected = converted(batches[0])
        assert torch.equal(loaded(batches[0]), expected)
        assert torch.equal(program(batches[0]), expected)
    assert {t.dtype for t in program.state_dict().values() if t.dim() == 2} <= {
        *(torch.uint8, torch.int8, torch.float32)
    }
    compared = {site.name: site for site in qrecipe.compare(model, converted, batches).sites}
    assert compared["words#1"].weight.sqnr_db == compared["words"].weight.sqnr_db > 35


def test_the_plan_says_what_they_save():
    model, batches = words()
    site = qrecipe.plan(model, STATIC, batches[0])["words"]
    assert site.mode == "weight_only"
    assert site.reason == "takes a quarter of the memory: the rows that are looked up become float"


def test_what_has_no_table_of_bytes_is_refused():
    model, batches = words()
    training = recipe(TABLES, base="builtin:x86-static", head='phase = "qat"\nexecutor = "pt2e"')
    with pytest.raises(UnsupportedError, match=r"QR303(?s:.)*trains no embeddings in integers"):
        qrecipe.plan(model, training, batches[0])
    half = recipe(TABLES.replace("uint8", "uint4"), base="builtin:x86-static-minmax")
    with pytest.raises(UnsupportedError, match=r"QR303(?s:.)*has no 4-bit tables"):
        qrecipe.plan(model, half, batches[0], executor="pt2e")


def refused(kind):
    """A model, and recipes for its table: of bytes or 4 bits, trained or not."""
    torch.manual_seed(0)
    table = nn.EmbeddingBag(20, 16, mode="sum") if kind == "bag" else nn.Embedding(20, 16)
    model = nn.Sequential(table, nn.Linear(16, 4)).eval()
    dtype = "uint4" if kind == "4 bits" else "uint8"
    rules = (
        TABLES.replace("uint8", dtype).replace("_type", "_name").replace("torch.nn.Embedding", "0")
    )
    phase = "qat" if kind == "training" else "ptq"
    return model, recipe(rules, base="builtin:x86-dynamic", head=f'phase = "{phase}"')


@pytest.mark.parametrize("kind", ["bag", "4 bits"])
def test_who_has_what_programs_lack_is_said_and_has_it(kind):
    model, asked = refused(kind)
    ids = torch.randint(0, 20, (4, 5))
    with pytest.raises(UnsupportedError, match=r"QR303 (?s:.)*FX graph mode and eager mode do"):
        qrecipe.plan(model, asked, ids, executor="pt2e")
    one, other = (
        qrecipe.quantize(model, asked, [ids], executor=executor) for executor in ("fx", "eager")
    )
    assert torch.equal(one(ids), other(ids))
    assert output_sqnr_db(model(ids), other(ids)) > 20
    left = recipe('[rules.module_name]\n"0" = "float"\n', base="builtin:x86-dynamic")
    assert qrecipe.plan(model, left, ids, executor="pt2e")["0"].verdict == "float"


def test_who_trains_tables_is_said_and_does():
    model, asked = refused("training")
    ids = torch.randint(0, 20, (4, 5))
    with pytest.raises(UnsupportedError, match=r"QR303 (?s:.)*FX graph mode does\n"):
        qrecipe.plan(model, asked, ids, executor="pt2e")
    assert qrecipe.plan(model, asked, ids, executor="fx")["0"].mode == "weight_only"
    with pytest.raises(UnsupportedError, match="does not train"):
        qrecipe.plan(model, asked, ids, executor="eager")


def test_a_table_that_stayed_float_is_found(monkeypatch):
    monkeypatch.setattr(part_module, "store_tables", lambda prepared, plan: None)
    model, batches = words()
    with pytest.raises(AuditError, match=r"QR410 words .*as weight_only, but its weight is float"):
        qrecipe.quantize(model, ALONE, batches)


def test_rows_of_another_scale_are_found(monkeypatch):
    honest = part_module.store_tables

    def wrong(prepared, plan):
        honest(prepared, plan)
        next(value for name, value in prepared.named_buffers() if name.endswith("_scale")).mul_(2)

    monkeypatch.setattr(part_module, "store_tables", wrong)
    model, batches = words()
    with pytest.raises(AuditError, match=r"QR411 the converted operator of words .*something else"):
        qrecipe.quantize(model, ALONE, batches)


@pytest.mark.slow
def test_executorch_looks_them_up(tmp_path):
    pytest.importorskip("executorch")
    from export_recipes import EXECUTORCH

    net = net_of(lambda self, ids: self.fc(self.words(ids)), words=nn.Embedding(50, 8))
    net.fc = nn.Linear(8, 5)
    ids = torch.randint(0, 50, (4, 7))
    made = qrecipe.quantize(
        net.eval(), qrecipe.parse_recipe(f'executor = "pt2e"{EXECUTORCH}{TABLES}'), [ids] * 10
    )
    qrecipe.export_pte(made, tmp_path / "net.pte", ids)
    assert (tmp_path / "net.pte").exists()
