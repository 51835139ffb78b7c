"""Dynamic linear layers that are too small to pay: said without timing anything."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from plans import net_of
from shares import every
from torch import nn

import qrecipe
from qrecipe.errors.findings import QRecipeWarning
from qrecipe.planning.small_layers import _products, saved

DYNAMIC = "builtin:x86-dynamic"


def rows_of(*widths):
    return nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(widths))).eval()


def slower(plan):
    return [warning for warning in plan.warnings if warning.code == "QR207"]


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(520, 64, 64), (256, 128, 128), (8, 256, 256), (1, 128, 512), (1, 768, 10)],
)
def test_layers_that_were_measured_to_be_slower_are_called_so(rows, inputs, outputs):
    assert saved(rows, inputs, outputs) < 0


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(32, 256, 256), (32, 128, 512), (65, 192, 576), (8, 384, 384), (1, 512, 512)],
)
def test_layers_that_were_measured_to_be_faster_are_not(rows, inputs, outputs):
    assert saved(rows, inputs, outputs) > 0


def test_plan_names_how_many_sites_are_slower_and_the_first_of_them():
    (warning,) = slower(qrecipe.plan(rows_of(*[64] * 7), DYNAMIC, torch.randn(2, 16, 64)))
    assert "int8 is slower than float at 6 sites" in warning.message
    assert "0, 1, 2, 3 and 2 more" in warning.message
    assert "qrecipe fastest" in warning.hint
    assert warning.location is not None


def test_the_rows_are_those_of_the_whole_example_and_not_of_the_samples_that_are_run():
    model = rows_of(256, 256)
    assert slower(qrecipe.plan(model, DYNAMIC, torch.randn(4, 2, 256)))
    assert not slower(qrecipe.plan(model, DYNAMIC, torch.randn(64, 2, 256)))


def test_a_small_layer_among_large_ones_does_not_matter():
    model = rows_of(768, 768, 10)
    assert not slower(qrecipe.plan(model, DYNAMIC, torch.randn(8, 768)))
    assert slower(qrecipe.plan(model[1:].eval(), DYNAMIC, torch.randn(8, 768)))


RECURRENT = {
    "an LSTM": lambda size: nn.LSTM(32, size, batch_first=True),
    "both ways": lambda size: nn.LSTM(32, size, 2, batch_first=True, bidirectional=True),
}


def reading(layer, size):
    """The layer, and a small linear one for its last state."""
    sides = 2 if layer.bidirectional else 1
    parts = {"r": layer, "o": nn.Linear(sides * size, 5)}
    return net_of(lambda self, x: self.o(self.r(x)[0][:, -1]), **parts)


@pytest.mark.parametrize("made", RECURRENT)
def test_a_small_recurrent_layer_is_named_and_a_large_one_is_not(made):
    x = torch.randn(2, 20, 32)
    (warning,) = slower(qrecipe.plan(reading(RECURRENT[made](64), 64), DYNAMIC, x))
    assert "at 2 sites, layers that are small for the example's size: r, o" in warning.message
    assert not slower(qrecipe.plan(reading(RECURRENT[made](512), 512), DYNAMIC, x))


def test_a_small_gru_is_as_fast_as_in_float_and_so_is_what_reads_it():
    model = reading(nn.GRU(32, 64, batch_first=True), 64)
    assert not slower(qrecipe.plan(model, DYNAMIC, torch.randn(2, 20, 32)))


CELLS = {"LSTMCell": nn.LSTMCell, "GRUCell": nn.GRUCell, "RNNCell": nn.RNNCell}


@pytest.mark.parametrize("kind", every(1, CELLS))
def test_a_small_cell_is_named_and_a_large_one_is_not(kind):
    def first(self, x):
        state = self.cell(x)
        return state[0] if kind == "LSTMCell" else state

    for size, names in ((64, ["cell"]), (512, [])):
        plan = qrecipe.plan(
            net_of(first, cell=CELLS[kind](size, size)), DYNAMIC, torch.randn(8, size)
        )
        assert [each.message.rpartition(": ")[2] for each in slower(plan)] == names


@pytest.mark.parametrize(
    ("shape", "batch_first"),
    [((8, 50, 256), True), ((50, 8, 256), False), ((400, 256), True), ((1, 2, 256), True)],
)
def test_the_hidden_state_is_multiplied_in_each_step(shape, batch_first):
    layer = nn.LSTM(256, 256, batch_first=batch_first)
    steps = 400 if len(shape) == 2 else shape[int(batch_first)]
    rows = shape[0] * shape[1] if len(shape) == 3 else 400
    assert list(_products(layer, shape)) == [
        (1, rows, layer.weight_ih_l0),
        (steps, rows // steps, layer.weight_hh_l0),
    ]
    model = net_of(lambda self, x: self.r(x)[0], r=layer)
    inventory = qrecipe.compile(model, DYNAMIC, torch.randn(shape))._parts[0].task.inventory
    assert inventory.matches["r"].shape == shape


def test_a_layer_that_is_left_float_does_not_count():
    text = f'format = 1\nextends = "{DYNAMIC}"\n[rules.module_name]\n"0" = "float"\n'
    recipe = qrecipe.parse_recipe(text)
    (warning,) = slower(qrecipe.plan(rows_of(64, 64, 64), recipe, torch.randn(2, 64)))
    assert "at 1 site, " in warning.message


def test_it_is_said_of_a_model_that_cannot_be_traced_too():
    def forward(self, x):
        return self.b(self.a(x) if x.sum() > 0 else self.a(x * 2))

    model = net_of(forward, a=nn.Linear(64, 64), b=nn.Linear(64, 64))
    plan = qrecipe.plan(model, DYNAMIC, torch.randn(2, 64))
    assert plan.executor == "eager"
    assert "2 sites" in slower(plan)[0].message


VERBS = {
    "plan": lambda model, x: qrecipe.plan(model, DYNAMIC, x),
    "compile": lambda model, x: qrecipe.compile(model, DYNAMIC, x),
    "quantize": lambda model, x: qrecipe.quantize(model, DYNAMIC, example_inputs=x),
    "suggest": qrecipe.suggest,
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_chooses_int8_warns(verb):
    with pytest.warns(QRecipeWarning, match="QR207 int8 is slower than float at 2 sites"):
        VERBS[verb](rows_of(64, 64, 64), torch.randn(2, 64))
