"""[transform.equalize]: channels of similar range, and a float function that stays to the bit."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from plans import net_of, recipe
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.transforms import equalize, transform

IMAGES = [torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(i)) for i in range(10)]
ROWS = [torch.randn(16, 12, generator=torch.Generator().manual_seed(i)) for i in range(10)]


def _equalize(by="activations", chains='"auto"', base="builtin:x86-static-minmax", head=""):
    table = f'[transform.equalize]\nby = "{by}"\nchains = {chains}'
    return recipe(table, base=base, head=head)


def _warm(net, batches):
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    net.train()
    with torch.no_grad():
        for batch in batches:
            net(batch)
    return net.eval()


def _spread(layer, seed=0, size=5):
    """Scale what a layer gives by random factors, so that its channels differ."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.exp2((torch.rand(len(layer.weight), generator=generator) * 2 - 1) * size)
    with torch.no_grad():
        layer.weight.mul_(factors.view(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias.mul_(factors)
    return factors


def _depthwise():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    )
    return _warm(net, IMAGES)


def _pooled():
    def forward(self, x):
        x = F.max_pool2d(F.leaky_relu(self.first(x)), 2)
        return self.last(torch.flatten(F.relu(self.grouped(x)), 1))

    torch.manual_seed(0)
    return net_of(
        forward,
        first=nn.Conv2d(3, 8, 3),
        grouped=nn.Conv2d(8, 8, 3, groups=4),
        last=nn.Linear(72, 5),
    )


def _linear():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.LeakyReLU(0.1), nn.Linear(8, 4))
    ).eval()


NETS = {
    "depthwise": (_depthwise, IMAGES, [("0", "3", "6", "11")]),
    "pooled": (_pooled, IMAGES, [("first", "grouped", "last")]),
    "linear": (_linear, ROWS, [("0", "2", "4")]),
}


@pytest.fixture(params=NETS)
def case(request):
    make, batches, chains = NETS[request.param]
    return make(), batches, chains


def test_the_plan_lists_the_chains_and_what_ends_them(case):
    net, batches, chains = case
    plan = qrecipe.plan(net, _equalize(), batches[0])
    assert [chain.sites for chain in plan.chains] == chains
    assert not any(chain.exponents for chain in plan.chains)
    assert " > ".join(chains[0]) in str(plan)
    assert "the model returns the result" in str(plan)
    assert qrecipe.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("by", ["activations", "weights"])
def test_the_float_function_stays_to_the_bit_and_the_model_as_it_was(case, by):
    net, batches, _ = case
    before = copy.deepcopy(net.state_dict())
    changed = qrecipe.transform(net, _equalize(by), batches)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
    with torch.no_grad():
        for batch in batches:
            assert torch.equal(changed(batch), net(batch))
    exponents = [e for chain in qrecipe.transformation(changed).chains for e in chain.exponents]
    assert any(any(each) for each in exponents)
    assert not {id(p) for p in changed.parameters()} & {id(p) for p in net.parameters()}


@pytest.mark.parametrize(
    ("by", "executor"),
    [
        ("activations", "fx"),
        ("weights", "pt2e"),
        pytest.param("weights", "fx", marks=pytest.mark.slow),
        pytest.param("activations", "pt2e", marks=pytest.mark.slow),
    ],
)
def test_channels_of_different_range_are_quantized_as_if_they_had_one(by, executor):
    net = _linear()
    factors = _spread(net[0])
    with torch.no_grad():
        net[2].weight.div_(factors)
    head = f'executor = "{executor}"'
    with pytest.warns(qrecipe.QRecipeWarning):
        plain = qrecipe.quantize(net, recipe(base="builtin:x86-static-minmax", head=head), ROWS)
    converted = qrecipe.quantize(net, _equalize(by, head=head), ROWS)
    held_out = torch.randn(256, 12)
    with torch.no_grad():
        expected = net(held_out)
        assert sqnr_db(expected, converted(held_out)) > sqnr_db(expected, plain(held_out)) + 10


def test_training_starts_from_the_transformed_model():
    net = _depthwise()
    settings = _equalize(head='phase = "qat"')
    compiled = qrecipe.compile(net, settings, IMAGES[0], batches=IMAGES)
    assert any(chain.exponents for chain in compiled.plan.chains)
    prepared = compiled.prepare()
    prepared(IMAGES[0]).square().mean().backward()
    converted = compiled.convert(prepared)
    found = qrecipe.Plan.from_json(qrecipe.provenance(converted).plan)
    assert found.chains == compiled.plan.chains


def test_a_model_is_transformed_once(monkeypatch):
    net, settings = _depthwise(), _equalize()
    changed = qrecipe.transform(net, settings, IMAGES)
    monkeypatch.setattr(transform, "transform", None)
    compiled = qrecipe.compile(changed, settings, IMAGES[0])
    assert compiled.plan.chains == qrecipe.transformation(changed).chains
    qrecipe.quantize(changed, settings, IMAGES)
    qrecipe.sensitivity(changed, settings, IMAGES)


def test_other_settings_start_from_the_model_as_it_was():
    net = _depthwise()
    first = qrecipe.transform(net, _equalize(), IMAGES)
    second = qrecipe.transform(first, _equalize("weights"), IMAGES)
    expected = qrecipe.transform(net, _equalize("weights"), IMAGES)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert qrecipe.transformation(second) == qrecipe.transformation(expected)
    assert qrecipe.transformation(first).table.equalize.by == "activations"
    none = qrecipe.transform(first, recipe(base="builtin:x86-static-minmax"), IMAGES)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, none.state_dict()[name])


@pytest.mark.parametrize("given", ["itself", "transformed", "transformed otherwise"])
def test_any_form_of_the_float_model_compares_with_the_quantized_one(given):
    net = _depthwise()
    converted = qrecipe.quantize(net, _equalize("weights"), IMAGES)
    forms = {"transformed": _equalize("weights"), "transformed otherwise": _equalize()}
    reference = qrecipe.transform(net, forms[given], IMAGES) if given in forms else net
    compared = qrecipe.compare(reference, converted, IMAGES[:1])
    assert min(site.weight.sqnr_db for site in compared.sites if site.weight) > 30


def test_batches_that_come_once_are_used_twice():
    assert qrecipe.quantize(_depthwise(), _equalize(), iter(IMAGES)) is not None


def test_a_stored_model_needs_no_batches_and_compares_with_the_original(tmp_path):
    net = _depthwise()
    converted = qrecipe.quantize(net, _equalize(), IMAGES)
    qrecipe.save_quantized(converted, tmp_path / "net.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "net.safetensors", net)
    assert torch.equal(loaded(IMAGES[0]), converted(IMAGES[0]))
    changed = qrecipe.transform(net, _equalize(), IMAGES)
    for reference in (net, changed):
        compared = qrecipe.compare(reference, loaded, IMAGES[:1])
        assert min(site.weight.sqnr_db for site in compared.sites if site.weight) > 30
        assert min(site.activation.sqnr_db for site in compared.sites if site.activation) > 15


def test_sensitivity_and_tune_rank_the_transformed_model():
    net, settings = _depthwise(), _equalize()
    changed = qrecipe.transform(net, settings, IMAGES)
    first, second = (qrecipe.sensitivity(each, settings, IMAGES) for each in (net, changed))
    assert first.sites == second.sites
    result = qrecipe.tune(net, settings, IMAGES, lambda model: 1.0)
    assert result.reached


def test_layers_may_be_called_by_keyword():
    first, last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
    net = net_of(
        lambda self, x: self.last(input=F.relu(self.first(input=x))), first=first, last=last
    ).eval()
    with torch.no_grad():
        first.weight[0] *= 64
    (chain,) = qrecipe.transformation(qrecipe.transform(net, _equalize(), IMAGES)).chains
    assert any(chain.exponents[0])


def test_dead_channels_stay():
    net = _linear()
    with torch.no_grad():
        net[0].weight[3] = 0
        net[0].bias[3] = 0
        net[2].weight[:, 5] = 0
    for by in ("activations", "weights"):
        changed = qrecipe.transform(net, _equalize(by), ROWS)
        exponents = qrecipe.transformation(changed).chains[0].exponents[0]
        assert exponents[3] == exponents[5] == 0
        assert all(torch.isfinite(p).all() for p in changed.parameters())


# --- what ends a chain


def _ended(net, batch=IMAGES[0]):
    return {chain.sites: chain.end for chain in qrecipe.plan(net, _equalize(), batch).chains}


ENDS = {
    "relu6": (lambda self, x: self.b(F.relu6(self.a(x)))),
    "gelu": (lambda self, x: self.b(F.gelu(self.a(x)))),
    "another reader": (lambda self, x: self.b(y := F.relu(self.a(x))) + y),
    "an addition": (lambda self, x: self.b(F.relu(self.a(x)) + 1)),
    "called twice": (lambda self, x: self.b(F.relu(self.b(F.relu(self.a(x)))))),
    "weight read elsewhere": (lambda self, x: self.b(F.relu(self.a(x))) * self.b.weight.sum()),
    "width as features": (lambda self, x: self.c(F.relu(self.a(x)))),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.filterwarnings("ignore::qrecipe.QRecipeWarning")
def test_whatever_does_not_scale_with_its_input_ends_a_chain(name):
    torch.manual_seed(0)
    modules = {
        "a": nn.Conv2d(3, 12, 3, padding=1),
        "b": nn.Conv2d(12, 12, 1),
        "c": nn.Linear(12, 12),
    }
    net = net_of(ENDS[name], **modules)
    assert _ended(net) == {}


UNLIKE_IMAGES = {
    "features, then dimension 1": (
        nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Conv1d(4, 4, 1)),
        torch.randn(2, 4, 8),
    ),
    "images without a batch": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(1), nn.Linear(36, 3)),
        torch.randn(3, 8, 8),
    ),
    "depth is left": (
        net_of(
            lambda self, x: self.b(F.relu(self.a(x)).mean((2, 3))),
            a=nn.Conv3d(3, 4, 3),
            b=nn.Linear(4, 3),
        ),
        torch.randn(2, 3, 6, 6, 6),
    ),
    "pooled features": (
        net_of(
            lambda self, x: self.b(F.max_pool1d(F.relu(self.a(x)).flatten(1), 5)),
            a=nn.Conv2d(3, 5, 3),
            b=nn.Linear(100, 3),
        ),
        IMAGES[0],
    ),
}


@pytest.mark.parametrize("name", UNLIKE_IMAGES)
@pytest.mark.filterwarnings("ignore::qrecipe.QRecipeWarning")
def test_channels_in_another_dimension_end_a_chain(name):
    net, batch = UNLIKE_IMAGES[name]
    assert _ended(net.eval(), batch) == {}


@pytest.mark.parametrize(
    "mean", [lambda x: x.mean((2, 3)), lambda x: x.mean([-1, -2], keepdim=True).flatten(1)]
)
def test_the_mean_of_images_hands_on_their_channels(mean):
    net = net_of(
        lambda self, x: self.b(mean(F.relu(self.a(x)))), a=nn.Conv2d(3, 4, 3), b=nn.Linear(4, 3)
    )
    assert list(_ended(net)) == [("a", "b")]


def test_a_norm_after_the_relu_ends_a_chain():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)).eval()
    with pytest.warns(qrecipe.QRecipeWarning, match="finds no chain"):
        qrecipe.quantize(net, _equalize(), IMAGES)


@pytest.mark.filterwarnings("ignore:.*QR222")
def test_a_tied_or_computed_weight_ends_a_chain():
    net = _linear()
    net[4] = nn.Linear(8, 8)
    net.add_module("5", nn.ReLU())
    net.add_module("6", nn.Linear(8, 8))
    net[6].weight = net[4].weight
    assert list(_ended(net.eval(), ROWS[0])) == [("0", "2")]
    parametrized = _linear()
    torch.nn.utils.parametrizations.weight_norm(parametrized[2])
    assert ("0", "2") not in _ended(parametrized, ROWS[0])


def test_a_weight_that_a_function_reads_too_ends_a_chain():
    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x))))) + F.linear(x, self.a.weight)

    net = net_of(forward, a=nn.Linear(12, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 8))
    assert list(_ended(net, ROWS[0])) == [("b", "c")]


# --- recipes


def test_listed_chains_are_taken_as_they_are_and_an_empty_list_switches_them_off():
    net = _linear()
    plan = qrecipe.plan(net, _equalize(chains='[["2", "4"]]'), ROWS[0])
    assert [chain.sites for chain in plan.chains] == [("2", "4")]
    none = qrecipe.plan(net, _equalize(chains="[]"), ROWS[0])
    assert none.chains == ()
    assert qrecipe.compile(net, _equalize(chains="[]"), ROWS[0]) is not None


@pytest.mark.parametrize(
    ("chains", "message"),
    [
        ('[["0", "3"]]', '"3" is not a layer that can be in a chain'),
        ('[["0", "4"]]', "4 does not read the channels of 0 alone"),
        ('[["0"]]', "a chain needs two sites or more"),
    ],
)
def test_a_chain_that_the_model_does_not_have_is_an_error_at_its_line(chains, message):
    with pytest.raises(qrecipe.PlanError) as caught:
        qrecipe.plan(_linear(), _equalize(chains=chains), ROWS[0])
    (finding,) = caught.value.findings
    assert finding.code == "QR340"
    assert message in finding.message
    assert finding.location.line == 6


def test_settings_of_transforms_are_merged_written_and_part_of_the_fingerprint():
    base = _equalize()
    again = qrecipe.parse_recipe(base.to_toml())
    assert again.fingerprint == base.fingerprint
    assert again.transform == base.transform
    assert base.fingerprint != recipe(base="builtin:x86-static-minmax").fingerprint
    assert _equalize("weights").fingerprint != base.fingerprint
    assert base.origin("transform.equalize.by").line == 5


def test_a_transform_without_batches_is_an_error():
    with pytest.raises(qrecipe.CalibrationError, match="QR408"):
        qrecipe.compile(_linear(), _equalize(), ROWS[0])


def test_a_step_that_changes_the_function_is_an_audit_error(monkeypatch):
    def wrong(model, *_):
        found = equalize.equalize_by_weights(model, *_[:1])
        with torch.no_grad():
            model[2].weight[0, 0] += 1e-4
        return found

    monkeypatch.setattr(equalize, "equalize_by_activations", wrong)
    with pytest.raises(qrecipe.AuditError, match="QR417"):
        qrecipe.transform(_linear(), _equalize(), ROWS)


def test_only_transformed_models_have_a_record():
    with pytest.raises(qrecipe.ArtifactError, match="QR501"):
        qrecipe.transformation(_linear())
    record = qrecipe.transformation(qrecipe.transform(_linear(), _equalize(), ROWS))
    assert "spread before" in str(record)
    assert dataclasses.is_dataclass(record)


def test_a_batch_with_nan_is_named():
    with pytest.raises(qrecipe.CalibrationError, match="QR403 batch 1"):
        qrecipe.transform(_linear(), _equalize(), [ROWS[0], ROWS[1] * float("nan")])


def test_outputs_that_are_nan_are_equal():
    def forward(self, x):
        return self.b(F.relu(self.a(x))), x * 0 / 0

    net = net_of(forward, a=nn.Linear(12, 8), b=nn.Linear(8, 4))
    assert qrecipe.transformation(qrecipe.transform(net, _equalize("weights"), ROWS)).chains


@pytest.mark.parametrize(
    "other",
    [
        nn.Sequential(nn.Linear(12, 4)),
        nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 8), *_linear()[3:]),
    ],
)
def test_another_model_cannot_be_scaled_as_a_transformed_one(other):
    converted = qrecipe.quantize(_linear(), _equalize(), ROWS)
    with pytest.raises(qrecipe.ArtifactError, match="QR420"):
        qrecipe.compare(other.eval(), converted, ROWS)


def test_eager_mode_says_that_it_knows_no_chains():
    settings = _equalize(base="builtin:x86-dynamic", head='executor = "eager"')
    with pytest.warns(qrecipe.QRecipeWarning, match="(?s)QR222.*in eager mode nothing shows"):
        qrecipe.plan(_linear(), settings, ROWS[0])
