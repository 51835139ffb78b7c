"""Models around their roots: proven as a whole, call by call, and refused where code looks in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from corpus import missing, torchvision
from plans import net_of, recipe
from runs import silent
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import AuditError, PlanError, QRecipeWarning, TraceError


class Body(nn.Module):
    scale = 3.0
    scales = torch.full((1,), 3.0)

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))

    def doubled(self, x):
        return x * 2


def rooted(*roots):
    listed = ", ".join(f'"{root}"' for root in roots)
    return recipe(head=f"[fx]\nroots = [{listed}]")


def rows(count=10):
    return [torch.randn(32, 8) for _ in range(count)]


def around(forward, **modules):
    return net_of(forward, **{"bb": Body(), **modules})


def quantized(model, *roots):
    return qrecipe.quantize(model, rooted(*(roots or ("bb",))), rows(), progress=silent)


# --- code that looks into a root


def asks_for_a_number(self, x):
    return self.bb(x) * getattr(self.bb, "scale", 1.0)


def asks_for_a_tensor(self, x):
    return self.bb(x) * getattr(self.bb, "scales", 1.0)


def asks_for_the_class(self, x):
    return self.bb(x) if isinstance(self.bb, Body) else self.bb(x) * 2


def calls_another_method(self, x):
    return self.bb(self.bb.doubled(x))


def test_a_number_of_a_root_is_there_after_conversion_too():
    model = around(asks_for_a_number)
    batch = rows(1)[0]
    assert sqnr_db(model(batch), quantized(model)(batch)) > 20


@pytest.mark.parametrize("forward", [asks_for_a_tensor, asks_for_the_class, calls_another_method])
def test_code_that_needs_more_of_a_root_than_a_call_is_found_by_the_plan(forward):
    with pytest.raises(PlanError, match=r"QR306 with graphs in place of fx\.roots") as caught:
        qrecipe.plan(around(forward), rooted("bb"), rows(1)[0])
    assert caught.value.findings[0].location is not None


def test_features_that_a_hook_takes_out_of_a_root_are_found_missing_by_the_plan():
    model = around(lambda self, x: self.bb(x) + self.kept["a"])
    model.kept = {}
    type(model).keep = lambda self, module, args, output: self.kept.update(a=output)
    model.bb.a.register_forward_hook(model.keep)
    with pytest.raises(PlanError, match=r"QR306 with graphs in place of fx\.roots"):
        qrecipe.plan(model, rooted("bb"), rows(1)[0])


def shares_a_weight(self, x):
    return F.linear(self.bb(x), self.bb.b.weight)


def asks_for_the_dtype(self, x):
    return self.bb(x.to(next(self.bb.parameters()).dtype))


@pytest.mark.parametrize("forward", [shares_a_weight, asks_for_the_dtype])
def test_code_that_reads_what_a_quantized_root_lacks_is_an_error_of_the_audit(forward):
    with pytest.raises(
        AuditError, match="QR413 the converted model fails in the code around its roots"
    ):
        quantized(around(forward))


def test_code_that_notices_the_quantized_classes_is_an_error_of_the_audit():
    def forward(self, x):
        return self.bb(x) if isinstance(self.bb.b, nn.Linear) else self.bb(x) * 2

    with pytest.raises(AuditError, match="QR412 the code around the quantized roots"):
        quantized(around(forward))


def test_code_around_the_roots_may_draw_random_numbers():
    torch.manual_seed(3)
    model = around(lambda self, x: self.bb(x) + torch.randn(32, 8) * 1e-3)
    x = rows(1)[0]
    assert sqnr_db(model(x), quantized(model)(x)) > 20


def test_a_root_under_autocast_would_give_another_dtype_and_is_refused():
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.bb(x)

    with pytest.raises(AuditError, match='"bb" returns float32, but returned bfloat16 before'):
        quantized(around(forward))


# --- several calls


def first_wide(self, x):
    return self.bb(x * 100), self.bb(x)


def first_narrow(self, x):
    return self.bb(x), self.bb(x * 100)


@pytest.mark.parametrize("forward", [first_wide, first_narrow])
def test_a_root_whose_calls_differ_too_much_for_one_set_of_ranges_is_warned_about(forward):
    accepted = recipe(head='[fx]\nroots = ["bb"]\n[lint]\nignore = ["QR203"]')
    with pytest.warns(QRecipeWarning, match='QR231 fx.roots "bb" is called 2 times in one forward'):
        qrecipe.quantize(around(forward), accepted, rows(), progress=silent)


def test_a_root_whose_calls_are_alike_is_quantized_for_all_of_them():
    def forward(self, x):
        return self.bb(x), self.bb(x.flip(1) * 1.2)

    model, x = around(forward), rows(1)[0]
    for expected, actual in zip(model(x), quantized(model)(x), strict=True):
        assert sqnr_db(expected, actual) > 20


# --- names


def test_a_root_that_is_called_by_another_name_is_quantized():
    model = around(lambda self, x: self.alias(x))
    model.alias = model.bb
    converted = quantized(model)
    assert converted.alias is converted.bb
    assert "quantized" in type(converted.alias.a).__module__


def test_a_root_whose_forward_is_called_directly_is_told_so():
    with pytest.raises(PlanError, match=r"not root\.forward\(x\)"):
        qrecipe.plan(around(lambda self, x: self.bb.forward(x)), rooted("bb"), rows(1)[0])


def test_a_module_that_a_root_shares_with_the_rest_is_reached_by_both_names():
    model = around(lambda self, x: self.bb(self.a(x)))
    model.__dict__["_modules"] = {"a": model.bb.a, "bb": model.bb}
    for name in ("a", "bb.a"):
        ruled = recipe(f'[rules.module_name]\n"{name}" = "float"', head='[fx]\nroots = ["bb"]')
        plan = qrecipe.plan(model, ruled, rows(1)[0])
        assert {s.name: s.verdict for s in plan.sites}["bb.a"] == "float"


def test_a_module_that_two_roots_share_is_decided_in_each():
    model = around(lambda self, x: self.other(self.bb(x)), other=Body())
    model.other.a = model.bb.a
    ruled = recipe('[rules.module_name]\n"other.a" = "float"', head='[fx]\nroots = ["bb", "other"]')
    plan = qrecipe.plan(model, ruled, rows(1)[0])
    found = {site.name: site.verdict for site in plan.sites}
    assert (found["bb.a"], found["other.a"]) == ("quantized", "float")


def test_the_roots_that_a_trace_error_proposes_are_called_and_quantize():
    def forward(self, x):
        y = self.bb(x)
        return self.unused(y) if y.sum() > 1e9 else self.stages[0](y)

    model = around(forward, unused=Body(), stages=nn.ModuleList([Body(), Body()]))
    with pytest.raises(TraceError) as caught:
        qrecipe.plan(model, "builtin:x86-static", rows(1)[0])
    assert '[fx] roots = ["bb", "stages.0"]' in caught.value.findings[0].hint
    x = rows(1)[0]
    assert sqnr_db(model(x), quantized(model, "bb", "stages.0")(x)) > 25


# --- what is whose


def test_a_model_with_roots_shares_no_tensor_with_the_callers_however_it_holds_it():
    model = around(lambda self, x: self.bb(x) * self.view * self.listed[0])
    model.register_buffer("p", torch.ones(1))
    model.view, model.w = model.p, nn.Parameter(torch.ones(1))
    model.listed = [model.w]
    converted, x = quantized(model), rows(1)[0]
    before = converted(x)
    with torch.no_grad():
        model.p.zero_()
        model.w.zero_()
    assert torch.equal(before, converted(x))
    assert converted.listed[0] is converted.w
    assert converted.view is converted.p


def test_what_calibration_writes_around_the_roots_does_not_reach_the_caller():
    def forward(self, x):
        self.seen += 1
        return self.bb(x)

    model = around(forward)
    model.register_buffer("seen", torch.zeros(()))
    converted = quantized(model)
    assert model.seen == 0
    assert converted.seen == 0


# --- as detectors and language models are built


class Pyramid(nn.Module):
    """A backbone of several levels, one head for all of them, and boxes that depend on data."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1))

    def forward(self, images):
        y = self.stem(torch.stack(images))
        levels = [y, F.max_pool2d(y, 2), F.max_pool2d(y, 4)]
        found = torch.cat([self.head(level).flatten(2) for level in levels], 2).transpose(1, 2)
        return [{"boxes": f[f[:, 0] > 0, :4], "scores": f[f[:, 0] > 0, 4]} for f in found]


def test_a_detector_with_a_shared_head_is_quantized_by_its_roots():
    model = Pyramid().eval()
    batches = [([torch.randn(3, 16, 16) for _ in range(2)],) for _ in range(10)]
    converted = qrecipe.quantize(model, rooted("stem", "head"), batches, progress=silent)
    assert "quantized" in type(converted.head.get_submodule("0")).__module__
    given = converted(*batches[0])
    assert [sorted(found) for found in given] == [["boxes", "scores"]] * 2
    assert (
        sqnr_db(
            model.head(model.stem(batches[0][0][0][None])),
            converted.head(converted.stem(batches[0][0][0][None])),
        )
        > 25
    )


@pytest.mark.slow
def test_the_retinanet_of_torchvision_is_quantized_and_its_coarsest_level_is_warned_about(
    monkeypatch,
):
    if missing():
        pytest.skip(missing())
    detection = torchvision("models.detection")
    # the build without compiled operators has no suppression of boxes; any choice will do here
    first_few = lambda boxes, scores, *_: torch.arange(len(scores))[:5]  # noqa: E731
    monkeypatch.setattr(torchvision("ops.boxes"), "batched_nms", first_few)
    torch.manual_seed(0)
    model = detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=96, max_size=96
    ).eval()
    batches = [([torch.rand(3, 96, 96)],) for _ in range(10)]
    roots = rooted("backbone", "head.classification_head.conv", "head.regression_head.conv")
    with pytest.warns(QRecipeWarning, match=r"^QR231 .*head\.conv. is called 5 times") as caught:
        converted = qrecipe.quantize(model, roots, batches, progress=silent)
    # QR234: ten batches are few for a moving average
    assert {str(warning.message)[:5] for warning in caught} == {"QR231", "QR234"}
    assert sorted(converted(*batches[0])[0]) == ["boxes", "labels", "scores"]
    image = model.transform(batches[0][0])[0].tensors  # as the backbone is given it
    for expected, actual in zip(
        model.backbone(image).values(), converted.backbone(image).values(), strict=True
    ):
        assert sqnr_db(expected, actual) > 15
