"""Rankings of the sites of programs."""

from __future__ import annotations

import pytest
import torch
from nets import NETS
from plans import net_of, recipe
from torch import nn

import qrecipe
from qrecipe.errors.findings import TraceError, UnsupportedError

pytest.importorskip("torchao")

MINMAX = "builtin:x86-static-minmax"
PROGRAM = recipe(base=MINMAX, head='executor = "pt2e"')


def test_a_ranking_is_that_of_graph_mode():
    net = NETS["mlp"]
    batches = net.batches(10)
    ranking = qrecipe.sensitivity(net.model(), PROGRAM, batches)
    expected = qrecipe.sensitivity(net.model(), MINMAX, batches)
    assert [site.name for site in ranking.sites] == [site.name for site in expected.sites]
    for site, other in zip(ranking.sites, expected.sites, strict=True):
        assert site.sqnr_db == pytest.approx(other.sqnr_db, abs=0.2)


class Steps(nn.Module):
    """Steps that no trace can count."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(sum(self.embed(x[:, t]) for t in range(x.shape[1])))


def test_a_model_that_cannot_be_traced_is_ranked():
    torch.manual_seed(0)
    model, batches = Steps().eval(), [torch.randn(4, 2, 6) for _ in range(10)]
    with pytest.raises(TraceError):
        qrecipe.sensitivity(model, recipe(base=MINMAX, head='executor = "fx"'), batches)
    ranking = qrecipe.sensitivity(model, PROGRAM, batches)
    assert {"embed", "head"} <= {site.name for site in ranking.sites}
    assert all(20 < site.sqnr_db < 80 for site in ranking.sites)
    plan = qrecipe.plan(model, ranking.to_recipe(keep_float=1), batches[0])
    assert plan[ranking.sites[0].name].verdict == "float"


def test_a_ranking_by_accuracy_quantizes_one_site_at_a_time():
    net = NETS["mlp"]
    batches = net.batches(10)
    with torch.no_grad():
        expected = net.model()(batches[0])

    def accuracy(model):
        return -float((model(batches[0]) - expected).abs().max())

    ranking = qrecipe.sensitivity(net.model(), PROGRAM, batches, evaluate=accuracy)
    assert ranking.float_value == pytest.approx(0, abs=1e-5)
    assert len(ranking.sites) == 2
    assert all(site.value < ranking.float_value for site in ranking.sites)


def test_what_is_not_ranked_is_said():
    net = NETS["mlp"]
    with pytest.raises(UnsupportedError, match=r'QR316 .*does not estimate(?s:.)*method="exact"'):
        qrecipe.sensitivity(net.model(), PROGRAM, net.batches(10), method="estimate")
    model = net_of(lambda self, x: self.body(x), body=nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    roots = recipe('[fx]\nroots = ["body"]\n', base=MINMAX, head='executor = "pt2e"')
    with pytest.raises(UnsupportedError, match="QR316 roots are not ranked"):
        qrecipe.sensitivity(model, roots, [torch.randn(4, 6) for _ in range(10)])
