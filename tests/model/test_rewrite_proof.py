"""Every rewritten graph is held against the caller's model, whatever made it wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from runs import silent
from torch import nn

import qrecipe
import qrecipe.execution.eager.executor
import qrecipe.execution.fx.convert
import qrecipe.model.graph_sites
from qrecipe._torch_fx import ReferenceQuantizedModule
from qrecipe.errors.findings import AuditError, PlanError
from qrecipe.model.trace_proof import difference

STATIC = 'format = 1\nextends = "builtin:x86-static"\n'
DYNAMIC = 'format = 1\nextends = "builtin:x86-dynamic"\n'
FLOAT = 'format = 1\nbackend = "x86"\n[rules]\nglobal = "float"\n'


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(288, 4))

    def forward(self, x):
        return self.head(self.block(x))


def blocks():
    return Blocks().eval()


def batches(count=10):
    return [torch.randn(4, 3, 8, 8) for _ in range(count)]


def parsed(text, phase="ptq", fx=""):
    return qrecipe.parse_recipe(f"{text}[fx]\n{fx}\n".replace("\n", f'\nphase = "{phase}"\n', 1))


def turn_channels(graph_module):
    """What a fold along the wrong axis does: channels get each other's factors."""
    for name, module in list(graph_module.named_modules()):
        if isinstance(module, nn.Conv2d):
            turned = copy.deepcopy(module)
            forward = type(turned).forward
            vars(turned)["forward"] = lambda x, own=turned, run=forward: run(own, x).roll(1, 1)
            graph_module.set_submodule(name, turned)
    return graph_module


@pytest.fixture
def wrong_fusing(monkeypatch):
    fuse = qrecipe.model.graph_sites.fuse
    monkeypatch.setattr(
        qrecipe.model.graph_sites,
        "fuse",
        lambda *args, **kwargs: turn_channels(fuse(*args, **kwargs)),
    )


@pytest.fixture
def wrong_preparing(monkeypatch):
    prepare = qrecipe.execution.fx.convert.prepare
    monkeypatch.setattr(
        qrecipe.execution.fx.convert,
        "prepare",
        lambda *args, **kwargs: turn_channels(prepare(*args, **kwargs)),
    )


@pytest.mark.parametrize("text", [STATIC, DYNAMIC, FLOAT])
@pytest.mark.parametrize("phase", ["ptq", "qat"])
@pytest.mark.parametrize("fx", ["", 'roots = ["block", "head"]'])
def test_a_plan_names_what_is_fused_to_something_else(wrong_fusing, text, phase, fx):
    if text is DYNAMIC and phase == "qat":
        pytest.skip("dynamic recipes are not trained")
    with pytest.raises(PlanError) as caught:
        qrecipe.plan(blocks(), parsed(text, phase, fx), batches(1)[0])
    assert str(caught.value) == (
        "QR306 block.0, block.1, block.2 computes something else after fusion: "
        "a tensor differs\n"
        "  leave the module around it float: "
        '[fx] non_traceable_module_name = ["block"]'
    )


def test_the_advice_for_what_is_fused_wrongly_works(monkeypatch):
    fuse = qrecipe.model.graph_sites.fuse

    def wrong_where_it_fuses(model, *args):
        fused = fuse(model, *args)
        has_fused = any("intrinsic" in type(module).__module__ for module in fused.modules())
        return turn_channels(fused) if has_fused else fused

    monkeypatch.setattr(qrecipe.model.graph_sites, "fuse", wrong_where_it_fuses)
    with pytest.raises(PlanError, match='non_traceable_module_name = \\["block"\\]'):
        qrecipe.plan(blocks(), parsed(STATIC), batches(1)[0])
    recipe = parsed(STATIC, fx='non_traceable_module_name = ["block"]')
    qrecipe.plan(blocks(), recipe, batches(1)[0])


@pytest.mark.parametrize("phase", ["ptq", "qat"])
@pytest.mark.parametrize("fx", ["", 'roots = ["block", "head"]'])
def test_what_is_prepared_to_something_else_is_refused_before_calibration(
    wrong_preparing, phase, fx
):
    compiled = qrecipe.compile(blocks(), parsed(STATIC, phase, fx), batches(1)[0])
    with pytest.raises(PlanError, match=r"QR306 block.0, block.1, block.2 .* after it is prepared"):
        compiled.prepare()


def test_quantize_takes_one_batch_of_a_model_that_is_prepared_wrongly(wrong_preparing):
    taken = []

    def loader():
        for batch in batches():
            taken.append(batch)
            yield batch

    with pytest.raises(PlanError, match=r"QR306 .* after it is prepared"):
        qrecipe.quantize(blocks(), parsed(STATIC), loader(), progress=silent)
    assert len(taken) == 1


@pytest.fixture
def runs_of_the_fused(monkeypatch):
    """How often the fused graph is run to prove it."""
    runs = []
    honest = qrecipe.model.graph_sites.prove_fused

    def counted(*args):
        runs.append(args)
        honest(*args)

    monkeypatch.setattr(qrecipe.model.graph_sites, "prove_fused", counted)
    return runs


def test_quantize_takes_one_batch_of_a_model_that_is_fused_wrongly(wrong_fusing):
    taken = []

    def loader():
        for batch in batches():
            taken.append(batch)
            yield batch

    with pytest.raises(PlanError, match=r"QR306 block.0, block.1, block.2 .* after fusion"):
        qrecipe.quantize(blocks(), parsed(STATIC), loader(), progress=silent)
    assert len(taken) == 1


@pytest.mark.parametrize("text", [DYNAMIC, FLOAT])
def test_quantize_without_observers_refuses_what_is_fused_wrongly(wrong_fusing, text):
    with pytest.raises(PlanError, match="after fusion"):
        qrecipe.quantize(blocks(), parsed(text), batches(), progress=silent)


def test_the_first_batch_of_calibration_proves_the_fused_graph(runs_of_the_fused):
    qrecipe.quantize(blocks(), parsed(STATIC), batches(), progress=silent)
    assert not runs_of_the_fused
    qrecipe.compile(blocks(), parsed(STATIC), batches(1)[0])  # nobody has to calibrate it
    assert len(runs_of_the_fused) == 1


class Mixing(Blocks):
    def forward(self, x):
        y = super().forward(x)
        return y - y.mean(0, keepdim=True)


def noisy(model, batch):
    return model(batch + torch.rand_like(batch))


@pytest.mark.parametrize(("kind", "forward"), [(Mixing, None), (Blocks, noisy)])
def test_a_first_batch_that_proves_nothing_is_no_proof(
    monkeypatch, runs_of_the_fused, kind, forward
):
    def quantize():
        model = kind().eval()
        qrecipe.quantize(model, parsed(STATIC), batches(), forward=forward, progress=silent)

    quantize()
    assert len(runs_of_the_fused) == 1
    fuse = qrecipe.model.graph_sites.fuse
    monkeypatch.setattr(qrecipe.model.graph_sites, "fuse", lambda *a: turn_channels(fuse(*a)))
    with pytest.raises(PlanError, match="after fusion"):
        quantize()


def test_what_is_fused_wrongly_is_told_before_what_is_prepared_wrongly(
    wrong_fusing, wrong_preparing
):
    with pytest.raises(PlanError, match="after fusion"):
        qrecipe.quantize(blocks(), parsed(STATIC), batches(), progress=silent)


def test_weights_that_changed_after_compiling_are_told_from_a_wrong_graph():
    model = blocks()
    compiled = qrecipe.compile(model, parsed(STATIC), batches(1)[0])
    model.head[1].weight.data.mul_(2)
    with pytest.raises(
        PlanError, match=r"QR306 the model's weights have changed since it was compiled"
    ):
        compiled.prepare()


def test_example_inputs_may_be_overwritten_after_compiling():
    batch = batches(1)[0]
    compiled = qrecipe.compile(blocks(), parsed(STATIC), batch)
    batch.zero_()
    compiled.prepare()


def test_training_with_zero_weights_of_a_batch_norm_is_refused_and_the_advice_works():
    model = blocks()
    norm = model.block[1]
    norm.weight.data[3] = 0
    x = batches(1)[0]
    qrecipe.compile(model, parsed(STATIC), x).prepare()  # nothing is divided without training
    with pytest.raises(
        PlanError, match=r"QR306 block.0, block.1, block.2 cannot be trained.* are 0"
    ):
        qrecipe.compile(model, parsed(STATIC, "qat"), x).prepare()
    norm.weight.data[norm.weight == 0] = 1e-6
    prepared = qrecipe.compile(model, parsed(STATIC, "qat"), x).prepare()
    assert torch.isfinite(prepared(x)).all()


def test_in_training_torch_itself_gives_nan_where_a_batch_norm_has_a_zero_weight():
    fused = torch.ao.nn.intrinsic.qat.ConvBn2d(
        3, 8, 3, qconfig=torch.ao.quantization.get_default_qat_qconfig("x86")
    ).eval()
    fused.bn.weight.data[3] = 0
    assert fused(batches(1)[0]).isnan().any()


def test_a_preparation_leaves_no_trace_of_the_proof():
    model, x = blocks(), batches(1)[0]
    prepared = qrecipe.compile(model, parsed(STATIC), x).prepare()
    for module in prepared.modules():
        assert "forward" not in vars(module) or module is prepared
        low = getattr(module, "min_val", None)
        assert low is None or not torch.isfinite(low).any()


def test_rounding_may_flip_single_results_of_a_threshold_and_no_more():
    mask = torch.arange(10_000) % 2
    flipped = mask.clone()
    flipped[:10] = 1 - flipped[:10]
    assert difference(mask, flipped) is not None
    for kind in (torch.bool, torch.int64, torch.float32):
        assert difference(mask.to(kind), flipped.to(kind), 1e-3) is None
    flipped[10] = 1 - flipped[10]
    assert difference(mask, flipped, 1e-3) is not None
    assert difference(mask[:100], 1 - mask[:100], 1e-3) is not None


@pytest.fixture
def wrong_converting(monkeypatch):
    """A fault in torch's reference conversion, which every kernel then shares."""
    honest = qrecipe.execution.fx.convert.reference

    def wrong(*args):
        reference = honest(*args)
        for module in reference.modules():
            if isinstance(module, ReferenceQuantizedModule):
                module.weight.data = module.weight.data.roll(1, 0)
        return reference

    monkeypatch.setattr(qrecipe.execution.fx.convert, "reference", wrong)


@pytest.mark.parametrize("phase", ["ptq", "qat"])
def test_a_fault_that_kernels_and_their_reference_share_is_an_error(wrong_converting, phase):
    compiled = qrecipe.compile(blocks(), parsed(STATIC, phase), batches(1)[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, batches(), progress=silent)
    with pytest.raises(AuditError, match=r"QR411 .* of (block\.0|head\.1) .* something else"):
        compiled.convert(prepared)


def test_a_fault_of_dynamic_kernels_that_their_reference_shares_is_an_error(wrong_converting):
    with pytest.raises(AuditError, match=r"QR411 .* head\.1 .* something else"):
        qrecipe.quantize(blocks(), parsed(DYNAMIC), batches())


class Untraceable(Blocks):
    def forward(self, x):
        return super().forward(x if x.sum() > -1e9 else -x)


def test_a_wrong_weight_in_eager_mode_is_an_error(monkeypatch):
    honest = qrecipe.execution.eager.executor.quantize_dynamic

    def wrong(model, *args, **kwargs):
        linear = model.head[1]
        linear.weight = nn.Parameter(linear.weight.data.roll(1, 0))
        return honest(model, *args, **kwargs)

    monkeypatch.setattr(qrecipe.execution.eager.executor, "quantize_dynamic", wrong)
    with pytest.raises(AuditError, match=r"QR411 .* head\.1 .* something else"):
        qrecipe.quantize(Untraceable().eval(), parsed(DYNAMIC), example_inputs=batches(1)[0])


# --- what tracing does not follow: the cause cannot be told, and every cure can be followed


class Either(nn.Module):
    """Takes one tensor or several, as torchvision's DenseNet."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        if isinstance(x, torch.Tensor):
            x = [x]
        return self.fc(torch.cat(x, 1))


class EitherAsked(Either):
    def forward(self, x):
        if not isinstance(x, (tuple, list)):
            x = [x]
        return self.fc(torch.cat(x, 1))


class Keyed(Either):
    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            x = x["x"]
        return self.fc(x)


class InTraining(Either):
    def forward(self, x):
        return self.fc(x).detach() * 2 if torch.is_grad_enabled() else self.fc(x)


@pytest.mark.filterwarnings("error", "ignore:.*QR207")
@pytest.mark.parametrize("kind", [Either, Keyed, InTraining])
def test_another_branch_in_the_trace_is_named_as_a_cause_and_the_model_is_not_to_be_left_out(kind):
    with pytest.raises(PlanError, match="QR306 the traced graph") as caught:
        qrecipe.plan(kind().eval(), parsed(STATIC), torch.rand(2, 8))
    told = str(caught.value)
    assert "isinstance(x, torch.Tensor) and torch.is_grad_enabled()" in told
    assert "an in-place change" in told
    assert "non_traceable_module_name" not in told
    qrecipe.plan(EitherAsked().eval(), parsed(STATIC), torch.rand(2, 8))


@pytest.mark.filterwarnings("error", "ignore:.*QR207")
@pytest.mark.parametrize("kind", [Either, Keyed, InTraining])
def test_what_needs_no_graph_is_done_without_one_that_takes_another_branch(kind):
    plan = qrecipe.plan(kind().eval(), parsed(DYNAMIC), torch.rand(2, 8))
    assert plan.executor == "eager"
    (warning,) = [each for each in plan.warnings if each.code == "QR210"]
    assert "because the traced graph" in warning.message
    assert warning.notes[0].startswith("tracing may have taken another branch")
    assert qrecipe.plan(EitherAsked().eval(), parsed(DYNAMIC), torch.rand(2, 8)).executor == "fx"


def test_a_module_of_the_callers_inside_may_be_left_out():
    model = nn.Sequential(nn.Linear(8, 8), Either()).eval()
    with pytest.raises(PlanError, match=r"or leave the module .*non_traceable_module_name"):
        qrecipe.plan(model, parsed(STATIC), torch.rand(2, 8))
    plan = qrecipe.plan(
        model, parsed(STATIC, fx='non_traceable_module_name = ["1"]'), torch.rand(2, 8)
    )
    assert [site.verdict for site in plan.sites] == ["quantized", "float"]
