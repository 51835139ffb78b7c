"""Parts of a model that are traced in place, while the rest runs untouched."""

from __future__ import annotations

import pytest
import torch
from routed import Body, Routed, recipe_of_roots
from runs import silent
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import CalibrationError, PlanError, TraceError, UnmatchedRuleError
from qrecipe.execution.prepared import prepared_state
from qrecipe.model.call import Inputs
from qrecipe.model.roots import inputs_of_roots


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Routed().eval()


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [torch.randn(8, 3, 8, 8) for _ in range(12)]


def test_only_what_is_in_the_roots_is_quantized_and_the_rest_runs_as_it_was(model, batches):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converted = qrecipe.quantize(
        model,
        recipe_of_roots(["backbone", "head"], '"head.fc2" = "float"'),
        batches,
        progress=silent,
    )
    assert type(converted) is Routed
    assert "quantized" in type(converted.backbone.conv).__module__
    assert "quantized" in type(converted.head.fc1).__module__
    assert type(converted.head.fc2) is nn.Linear
    assert type(converted.other) is nn.Linear
    assert sqnr_db(model(batches[0]), converted(batches[0])) > 25
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not mine & {p.untyped_storage().data_ptr() for p in converted.parameters()}
    assert '"head.fc1"' in qrecipe.provenance(converted).plan


def test_sites_bear_the_names_of_the_whole_model(model, batches):
    plan = qrecipe.plan(model, recipe_of_roots(["backbone", "head"]), batches[0])
    assert [site.name for site in plan.sites] == ["backbone.conv", "head.fc1", "head.fc2"]
    assert plan.sites[0].members == ("backbone.conv", "backbone.norm", "backbone.relu")
    assert plan.sites[1].members == ("head.fc1", "head:relu")
    assert "backbone.norm is a member" in plan.explain("backbone.norm")


def test_the_mapping_of_several_roots_is_keyed_by_the_whole_models_paths(model, batches):
    compiled = qrecipe.compile(model, recipe_of_roots(["backbone", "head"]), batches[0])
    mapping = compiled.qconfig_mapping.module_name_qconfigs
    assert mapping["backbone.conv"] is not None
    assert mapping["head.fc1"] is not None


def test_a_rule_outside_the_roots_matches_nothing_and_says_why(model, batches):
    with pytest.raises(UnmatchedRuleError) as caught:
        qrecipe.plan(model, recipe_of_roots(["backbone"], '"head.fc1" = "float"'), batches[0])
    assert "outside fx.roots" in caught.value.findings[0].message


def test_an_untraceable_model_is_told_the_roots_that_would_trace(model, batches):
    with pytest.raises(TraceError) as caught:
        qrecipe.plan(model, "builtin:x86-static", batches[0])
    assert 'roots = ["backbone", "head"]' in caught.value.findings[0].hint


@pytest.mark.parametrize(
    ("roots", "message"),
    [
        (["backbon"], 'did you mean "backbone"?'),
        (["other"], "single Linear"),
        (["backbone", "backbone"], "twice"),
    ],
)
def test_a_root_that_cannot_be_one_says_why(model, batches, roots, message):
    with pytest.raises(PlanError) as caught:
        qrecipe.plan(model, recipe_of_roots(roots), batches[0])
    assert message in str(caught.value)


def test_roots_within_each_other_are_refused(batches):
    outer = nn.Sequential(nn.Sequential(Body()), nn.Flatten()).eval()
    with pytest.raises(PlanError, match="is inside"):
        qrecipe.plan(outer, recipe_of_roots(["0", "0.0"]), batches[0])


def test_a_root_that_is_never_called_is_refused(model, batches):
    model.spare = Body().eval()
    with pytest.raises(PlanError, match="not called"):
        qrecipe.plan(model, recipe_of_roots(["spare"]), batches[0])


class Twice(nn.Module):
    """Calls one part on different tensors, and one whose name begins like the other's."""

    def __init__(self):
        super().__init__()
        self.part, self.part2 = Mlp(), Mlp()
        self.spare = nn.Dropout()

    def forward(self, x):
        return self.part2(self.part(self.part(x[:1]).repeat(3, 1)))


class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.ReLU())


def test_a_root_is_given_what_it_was_called_with_first_and_lies_in_none_that_begins_alike():
    x = torch.randn(2, 8)
    found = inputs_of_roots(Twice().eval(), Inputs((x,)), ["part", "part2"])
    assert list(found) == ["part", "part2"]
    assert torch.equal(found["part"].args[0], x[:1])
    assert found["part2"].args[0].shape == (3, 8)


def test_what_lies_outside_the_roots_is_in_eval_mode_too():
    batches = [torch.randn(2, 8) for _ in range(12)]
    model = Twice().train()
    with pytest.warns(qrecipe.QRecipeWarning, match="QR202"):
        converted = qrecipe.quantize(model, recipe_of_roots(["part"]), batches, progress=silent)
    untouched = (converted, converted.spare, *converted.part2.modules())
    assert not any(module.training for module in untouched)
    assert all(module.training for module in model.modules())


class Gate(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_module_that_is_not_to_be_traced_is_given_by_its_name_in_the_whole_model(model, batches):
    model.backbone.relu = Gate()
    text = (
        'format = 1\nextends = "builtin:x86-static"\n[fx]\nroots = ["backbone"]\n'
        'non_traceable_module_name = ["backbone.relu"]'
    )
    plan = qrecipe.plan(model, qrecipe.parse_recipe(text), batches[0])
    found = {site.name: site.verdict for site in plan.sites}
    assert found == {"backbone.conv": "quantized", "backbone.relu": "float"}


def test_a_quantized_model_keeps_no_calibration_data(model, batches):
    for chosen in (recipe_of_roots(["backbone"]), "builtin:x86-static"):
        subject = model if chosen != "builtin:x86-static" else Body().eval()
        converted = qrecipe.quantize(subject, chosen, batches, progress=silent)
        with pytest.raises(CalibrationError, match="QR406"):
            prepared_state(converted)
