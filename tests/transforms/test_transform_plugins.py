"""Transforms of plugins: their contract, and what a recipe that names one is in every other way."""

import json

import pytest
import torch
from plans import recipe
from pydantic import BaseModel, Field
from shares import every
from torch import nn
from typer.testing import CliRunner

import qrecipe
from qrecipe.authoring.lock.check import check_lock
from qrecipe.authoring.lock.file import make_lock, write_lock
from qrecipe.cli.app import app
from qrecipe.recipe.json_schema import recipe_schema
from qrecipe.registry import table as registered
from qrecipe.registry.builtin import TRANSFORMS, signature
from qrecipe.transforms import equalize, smooth

ROWS = [torch.randn(16, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(10)]

pytestmark = pytest.mark.filterwarnings("ignore:.*QR2(03|07|08|34)")


@pytest.fixture(autouse=True)
def forgotten():
    """What a test registers is forgotten afterwards."""
    before = registered.snapshot()
    yield
    registered.restore(before)


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


class Doubled(qrecipe.Transform):
    """Linear layers that follow each other: twice as much, and half of it read."""

    def __init__(self, times: float = 2.0, layers: tuple[str, ...] = ()):
        self.times = times

    def apply(self, model, context):
        for layer in _of_rows(model)[:1]:
            layer.weight.data.mul_(self.times)
            layer.bias.data.mul_(self.times)
        for layer in _of_rows(model)[1:2]:
            layer.weight.data.div_(self.times)


def _of_rows(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def _doubled(more="times = 4.0", base="builtin:x86-static-minmax", head=""):
    return recipe(f"[transform.doubled]\n{more}", base=base, head=head)


@pytest.fixture
def doubled():
    return qrecipe.register_transform("doubled")(Doubled)


# --- one mechanism


def test_our_own_transforms_are_entries_of_the_same_registry():
    assert list(TRANSFORMS) == ["equalize", "smooth"]
    assert signature("transform", "equalize").target == "qrecipe.transforms.equalize.Equalize"
    for kind in (equalize.Equalize, smooth.Smooth):
        assert issubclass(kind, qrecipe.Transform)
        assert kind.tolerance == 0
    with pytest.raises(qrecipe.PluginError, match=r"QR151.*built in"):
        qrecipe.register_transform("smooth")(Doubled)


@pytest.mark.parametrize("executor", ["fx", pytest.param("pt2e", marks=pytest.mark.slow)])
def test_a_registered_transform_changes_the_model_before_it_is_quantized(doubled, executor):
    net, settings = _net(), _doubled(head=f'executor = "{executor}"')
    changed = qrecipe.transform(net, settings, ROWS)
    assert torch.equal(changed[0].weight, net[0].weight * 4)
    with torch.no_grad():
        assert torch.equal(changed(ROWS[0]), net(ROWS[0]))
    step = qrecipe.Step("doubled", 0.0, changed=("0", "2"), moved=("0",))
    assert qrecipe.transformation(changed).steps == (step,)
    assert "doubled" in str(qrecipe.transformation(changed))
    converted = qrecipe.quantize(net, settings, ROWS)
    plan = qrecipe.Plan.from_json(qrecipe.provenance(converted).plan)
    assert plan.steps == qrecipe.transformation(changed).steps


def test_plugins_come_before_our_own(doubled):
    text = '[transform.equalize]\nby = "weights"\n[transform.doubled]\ntimes = 16.0\n'
    settings = recipe(text, base="builtin:x86-static-minmax")
    record = qrecipe.transformation(qrecipe.transform(_net(), settings, ROWS))
    plain = recipe('[transform.equalize]\nby = "weights"', base="builtin:x86-static-minmax")
    before = qrecipe.transformation(qrecipe.transform(_net(), plain, ROWS))
    (exponents,), (others,) = record.chains[0].exponents, before.chains[0].exponents
    assert {a - b for a, b in zip(exponents, others, strict=True)} == {4}


def test_the_plan_is_pure_and_lists_the_step(doubled):
    net = _net()
    plan = qrecipe.plan(net, _doubled(), ROWS[0])
    assert plan.steps == (qrecipe.Step("doubled", 0.0),)
    assert "to the bit" in str(plan)
    assert qrecipe.Plan.from_json(plan.to_json()) == plan
    compiled = qrecipe.compile(net, _doubled(), ROWS[0], batches=ROWS)
    assert "doubled has changed its tensors" in compiled.plan.explain("0")
    assert "doubled has moved its result" in compiled.plan.explain("0")
    assert "doubled has moved its result" not in compiled.plan.explain("2")


# --- the contract


class Seen(qrecipe.Transform):
    def apply(self, model, context):
        self.count = 0

        def see(*_):
            self.count += 1

        with model.register_forward_hook(see):
            context.run(model)
        assert self.count >= 2
        assert len(context.plan) > 0


def test_a_transform_sees_the_plan_and_all_batches():
    qrecipe.register_transform("seen")(Seen)
    settings = recipe("[transform.seen]\nenabled = true")
    record = qrecipe.transformation(qrecipe.transform(_net(), settings, ROWS))
    assert record.steps == (qrecipe.Step("seen", 0.0),)


def _changing(change, tolerance=0.0):
    def apply(self, model, context):
        with torch.no_grad():
            change(model)

    return type("Wrong", (qrecipe.Transform,), {"apply": apply, "tolerance": tolerance})


def _added(model):
    _of_rows(model)[0].weight.add_(1e-3)


def _replaced(model):
    _of_rows(model)[0].weight = nn.Parameter(_of_rows(model)[0].weight.clone())


def _exchanged(model):
    model[-1] = nn.Sequential(model[-1])


def _stored(model):
    model.register_buffer("more", torch.zeros(1))


def _nan(model):
    _of_rows(model)[0].weight.fill_(float("nan"))


def _failing(model):
    raise RuntimeError("out of order")


BREACHES = {
    "another function": (_added, 0.0, "changes what a small model computes: outputs differ by"),
    "beyond its tolerance": (_added, 1e-6, "and it declares 1e-06"),
    "a replaced parameter": (_replaced, 0.0, "replaces 9.weight instead of changing it in place"),
    "another module": (_exchanged, 0.0, "adds, removes or replaces modules"),
    "another buffer": (_stored, 0.0, "adds or removes parameters or buffers"),
    "nan": (_nan, 0.05, "no longer finite"),
    "an error": (_failing, 0.0, "RuntimeError: out of order"),
    "a wide tolerance": (lambda model: None, 0.5, "declares the tolerance"),
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_of_the_contract_is_found_at_registration(name):
    change, tolerance, message = BREACHES[name]
    with pytest.raises(qrecipe.PluginError) as caught:
        qrecipe.register_transform("wrong")(_changing(change, tolerance))
    assert {finding.code for finding in caught.value.findings} == {"QR150"}
    assert message in str(caught.value)
    assert caught.value.findings[0].hint
    assert registered.find("transform", "wrong") is None


@pytest.mark.parametrize("cls", [nn.Linear, "text"])
def test_other_classes_are_no_transforms(cls):
    with pytest.raises(qrecipe.PluginError, match="not a subclass of Transform"):
        qrecipe.register_transform("wrong")(cls)


def test_a_class_with_required_arguments_is_refused():
    class Needy(qrecipe.Transform):
        def __init__(self, times):
            pass

    with pytest.raises(qrecipe.PluginError, match="give all arguments of __init__ a default"):
        qrecipe.register_transform("needy")(Needy)


def _only_here(change):
    """Does nothing to the model of the registration, which has convolutions."""

    def changed(model):
        if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
            change(model)

    return changed


@pytest.mark.parametrize(
    ("change", "tolerance", "message"),
    [
        (_added, 0.0, "outputs differ by .* and it declares nothing"),
        (_added, 1e-7, "outputs differ by .* and it declares 1e-07"),
        (_replaced, 0.0, "replaces 0.weight"),
        (_exchanged, 0.0, "replaces modules"),
    ],
)
def test_what_breaks_the_contract_on_the_users_model_is_an_audit_error(change, tolerance, message):
    qrecipe.register_transform("wrong")(_changing(_only_here(change), tolerance))
    settings = recipe("[transform.wrong]\nenabled = true")
    with pytest.raises(qrecipe.AuditError, match=rf"QR417.*transform\.wrong.*{message}"):
        qrecipe.quantize(_net(), settings, ROWS)


def test_within_its_tolerance_a_transform_may_move_the_outputs():
    qrecipe.register_transform("rough")(_changing(_added, 0.05))
    settings = recipe("[transform.rough]\nenabled = true", base="builtin:x86-static-minmax")
    assert "within 0.05" in str(qrecipe.plan(_net(), settings, ROWS[0]))
    assert qrecipe.quantize(_net(), settings, ROWS) is not None


def test_a_transform_that_fails_is_named():
    qrecipe.register_transform("failing")(_changing(_only_here(_failing)))
    settings = recipe("[transform.failing]\nenabled = true")
    with pytest.raises(qrecipe.ExecutionError, match=r"QR418.*RuntimeError: out of order"):
        qrecipe.quantize(_net(), settings, ROWS)


# --- part of the recipe in every sense


def test_arguments_are_checked_where_they_are_written(doubled):
    for more, code, line in (
        ("tims = 4.0", "QR105", 5),
        ('times = "four"', "QR106", 5),
    ):
        with pytest.raises(qrecipe.RecipeError) as caught:
            _doubled(more)
        (finding,) = caught.value.findings
        assert (finding.code, finding.location.line) == (code, line)


def test_an_options_model_validates_arguments():
    class Options(BaseModel, extra="forbid"):
        times: float = Field(default=2.0, gt=0)

    qrecipe.register_transform("doubled", options=Options)(Doubled)
    with pytest.raises(qrecipe.SchemaError, match=r"QR106.*greater than 0"):
        _doubled("times = -1.0")
    assert _doubled() is not None


@pytest.mark.parametrize(
    ("name", "hint"), [("smoth", 'did you mean "smooth"'), ("equalise", 'did you mean "equalize"')]
)
def test_an_unknown_name_is_an_error_at_its_table(name, hint):
    with pytest.raises(qrecipe.UnknownNameError) as caught:
        recipe(f"[transform.{name}]\nalpha = 0.5")
    (finding,) = caught.value.findings
    assert finding.code == "QR104"
    assert finding.location.line == 4
    assert hint in finding.hint


def test_settings_are_merged_by_key_switched_off_written_and_fingerprinted(doubled, tmp_path):
    (tmp_path / "base.toml").write_text(
        'format = 1\nextends = "builtin:x86-static"\n[transform.doubled]\ntimes = 4.0\n'
    )

    def derived(more):
        text = f'format = 1\nextends = "./base.toml"\n{more}'
        return qrecipe.parse_recipe(text, path=tmp_path / "derived.toml")

    merged = derived('[transform.doubled]\nlayers = ["0"]\n')
    assert merged.transform.plugins["doubled"].arguments == {"times": 4.0, "layers": ["0"]}
    assert merged.origin("transform.doubled.times").file.endswith("base.toml")
    off = derived("[transform.doubled]\nenabled = false\n")
    assert not off.transform.changes
    assert qrecipe.plan(_net(), off, ROWS[0]).steps == ()
    assert len({merged.fingerprint, off.fingerprint, derived("").fingerprint}) == 3
    again = qrecipe.parse_recipe(merged.to_toml())
    assert again.fingerprint == merged.fingerprint
    assert again.transform == merged.transform


def test_a_misspelt_name_is_an_error_even_where_it_is_switched_off():
    with pytest.raises(qrecipe.QRecipeError, match='QR104 unknown transform "smoth"'):
        qrecipe.parse_recipe(
            'format = 1\nextends = "builtin:x86-static"\n[transform.smoth]\nenabled = false\n'
        )


def test_a_stored_model_needs_neither_batches_nor_the_plugin(doubled, tmp_path):
    net, settings = _net(), _doubled()
    converted = qrecipe.quantize(net, settings, ROWS)
    qrecipe.save_quantized(converted, tmp_path / "net.safetensors")
    registered.remove("transform", "doubled")
    loaded = qrecipe.load_quantized(tmp_path / "net.safetensors", net)
    assert torch.equal(loaded(ROWS[0]), converted(ROWS[0]))


def _compared(reference, converted):
    report = qrecipe.compare(reference, converted, ROWS[:2])
    return report, {site.name: site for site in report.sites}


@pytest.mark.parametrize("executor", ["fx", pytest.param("pt2e", marks=pytest.mark.slow)])
@pytest.mark.parametrize("more", every(2, ["[transform.equalize]\nby = 'weights'", ""]))
def test_the_float_model_itself_is_compared_but_for_what_a_plugin_moved(doubled, executor, more):
    net = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), *_net()).eval()
    settings = _doubled(f"times = 4.0\n{more}", head=f'executor = "{executor}"')
    converted = qrecipe.quantize(net, settings, ROWS)
    full, every = _compared(qrecipe.transform(net, settings, ROWS), converted)
    report, sites = _compared(net, converted)
    assert (full.lacking, report.lacking) == ((), ("doubled",))
    assert report.output == full.output
    assert sites["0"].activation is None
    assert sites["0"].weight is None
    assert sites["2"].weight is None
    assert sites["2"].activation == every["2"].activation  # which the last of the two restores
    assert sites["4"].activation == every["4"].activation
    assert sites["4"].weight == every["4"].weight
    assert all(every[name].activation and every[name].weight for name in ("0", "2", "4"))
    assert "doubled" in str(report)


def test_an_older_plan_does_not_say_what_was_moved_so_it_may_be_anything(doubled):
    values = json.loads(qrecipe.plan(_net(), _doubled(), ROWS[0]).to_json())
    del values["steps"][0]["moved"]
    (step,) = qrecipe.Plan.from_json(json.dumps(values)).steps
    assert step.moved == ("0", "2")


def test_weights_of_an_opened_layer_are_those_of_the_layer(doubled):
    class Turned(qrecipe.Transform):
        def apply(self, model, context):
            for module in model.modules():
                if isinstance(module, nn.MultiheadAttention):
                    width = module.embed_dim
                    module.in_proj_weight.data[2 * width :].mul_(2)
                    module.in_proj_bias.data[2 * width :].mul_(2)
                    module.out_proj.weight.data.div_(2)

    qrecipe.register_transform("turned")(Turned)
    net = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True).eval()
    batches = [torch.randn(2, 5, 16) for _ in range(3)]
    settings = recipe("[transform.turned]\nenabled = true", base="builtin:x86-dynamic")
    converted = qrecipe.quantize(net, settings, batches)
    sites = {site.name: site for site in qrecipe.compare(net, converted, batches).sites}
    assert sites["linear1"].weight is not None
    assert {name for name in sites if name.startswith("self_attn.") and sites[name].weight} == set()
    assert sites["self_attn.out_proj"].activation is not None


def test_in_eager_mode_too(doubled):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _net()

        def forward(self, x):
            return self.net(x) if x.sum() > -1e9 else x

    settings = _doubled(base="builtin:x86-dynamic")
    converted = qrecipe.quantize(Branching().eval(), settings, ROWS)
    report, sites = _compared(Branching().eval(), converted)
    assert report.lacking == ("doubled",)
    assert sites["net.0"].activation is None
    assert sites["net.2"].activation is not None


def test_the_command_compares_every_site(doubled, tmp_path):
    (tmp_path / "net.toml").write_text(
        'format = 1\nextends = "builtin:x86-static-minmax"\n[transform.doubled]\ntimes = 4.0\n'
    )
    (tmp_path / "model.py").write_text(
        "import torch\nfrom torch import nn\n\ndef factory():\n"
        "    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()\n\n"
        "def batches():\n    return [torch.randn(4, 12) for _ in range(3)]\n"
    )
    names = ["--model", f"{tmp_path}/model.py:factory", "--data", f"{tmp_path}/model.py:batches"]
    shown = CliRunner().invoke(app, ["compare", str(tmp_path / "net.toml"), *names, "--json"])
    assert shown.exit_code == 0
    report = json.loads(shown.stdout)
    assert report["lacking"] == []
    assert all(site["activation"] and site["weight"] for site in report["sites"])


def test_what_a_plugin_did_cannot_be_taken_back(doubled):
    changed = qrecipe.transform(_net(), _doubled(), ROWS)
    with pytest.raises(qrecipe.PlanError, match="QR342"):
        qrecipe.transform(changed, _doubled("times = 2.0"), ROWS)
    assert qrecipe.quantize(changed, _doubled(), ROWS) is not None


def test_locks_and_diffs_show_chains_groups_and_steps(doubled, tmp_path):
    tables = "[transform.doubled]\ntimes = 4.0\n[transform.equalize]\nby = 'weights'\n"
    text = f'format = 1\nextends = "builtin:x86-static"\n{tables}[transform.smooth]\nalpha = 0.5\n'
    (tmp_path / "net.toml").write_text(text)
    plan = qrecipe.plan(_net(), str(tmp_path / "net.toml"), ROWS[0])
    lock = make_lock(plan, tmp_path / "net.lock.toml")
    assert lock.plugins["transform doubled"].class_.endswith("Doubled")
    assert lock.transforms["transform doubled"] == "keeps the outputs to the bit"
    assert lock.transforms["chain 0 > 2"].startswith("ends: ")
    assert lock.transforms["group 2"] == "divided by the weights of 0"
    write_lock(plan, tmp_path / "net.lock.toml")
    assert check_lock(plan, tmp_path / "net.lock.toml").changes == ()
    (tmp_path / "net.toml").write_text(text.replace("alpha = 0.5", "groups = []"))
    other = qrecipe.plan(_net(), str(tmp_path / "net.toml"), ROWS[0])
    with pytest.raises(qrecipe.PlanError, match=r"QR323(.|\n)*group 2 divided by .* -> \(none\)"):
        check_lock(other, tmp_path / "net.lock.toml")


def test_diff_with_a_model_shows_what_transforms_change(doubled, tmp_path):
    (tmp_path / "model.py").write_text(
        "from torch import nn, randn\n\ndef factory():\n"
        "    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))\n"
        "    return net.eval(), (randn(2, 12),)\n"
    )
    tables = "[transform.equalize]\nby = 'weights'\n[transform.smooth]\nalpha = 0.5\n"
    (tmp_path / "a.toml").write_text(f'format = 1\nextends = "builtin:x86-static"\n{tables}')
    names = [str(tmp_path / "a.toml"), "builtin:x86-static"]
    model = ["--model", f"{tmp_path}/model.py:factory"]
    shown = CliRunner().invoke(app, ["diff", *names, *model])
    assert shown.exit_code == 1
    assert "chain 0 > 2" in shown.output
    assert "group 2" in shown.output
    assert "0 of 2 sites differ" in shown.output
    values = json.loads(CliRunner().invoke(app, ["diff", *names, *model, "--json"]).stdout)
    assert {each["site"] for each in values["sites"]} >= {"chain 0 > 2", "group 2"}


def test_list_and_schema_have_the_transforms(doubled):
    listed = json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)
    by_name = {each["name"]: each for each in listed["transforms"]}
    assert by_name["smooth"]["origin"] == "qrecipe"
    assert by_name["smooth"]["arguments"] == ["alpha", "groups"]
    assert by_name["doubled"]["arguments"] == ["times", "layers"]
    properties = recipe_schema()["definitions"]["TransformTable"]["properties"]
    assert set(properties) == {"equalize", "smooth", "doubled"}
    assert set(properties["doubled"]["properties"]) == {"enabled", "times", "layers"}
