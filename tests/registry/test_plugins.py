"""Plugins of installed distributions: when they are imported, and what broken ones can spoil."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributions import install, observer_module
from runs import silent
from torch import nn
from typer.testing import CliRunner

import qrecipe
from qrecipe.cli.app import app
from qrecipe.errors.findings import (
    PluginError,
    QRecipeError,
    QRecipeWarning,
    SchemaError,
    UnknownNameError,
    UnsupportedError,
)
from qrecipe.observers import loading as plugins
from qrecipe.recipe.validation import MAX_FINDINGS
from qrecipe.registry import table as registered
from qrecipe.registry.entry_points import entry_points

RECIPE = """\
format = 1
extends = "builtin:x86-static"
[tensor.activation]
observer = {observer}
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed distributions; what they register is forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(plugins, "_failed", {})
    before, modules = registered.snapshot(), set(sys.modules)
    yield folder
    registered.restore(before)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def recipe_with(observer: str) -> qrecipe.Recipe:
    return qrecipe.parse_recipe(RECIPE.format(observer=observer))


def plan_with(observer: str) -> qrecipe.Plan:
    return qrecipe.plan(model(), recipe_with(observer), torch.rand(2, 4))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()


def refused(observer: str, error: type[QRecipeError] = PluginError) -> qrecipe.Finding:
    """The only finding about a recipe, which stands under its line 4."""
    with pytest.raises(error) as caught:
        plan_with(observer)
    (finding,) = caught.value.findings
    assert (finding.location.file, finding.location.line) == ("<recipe>", 4)
    return finding


def under_caret(finding: qrecipe.Finding) -> str:
    at = finding.location
    return at.source[at.column - 1 : at.end_column - 1]


# --- when a plugin is imported


def test_loading_a_recipe_imports_nothing_and_planning_only_what_it_names(site):
    install(
        site,
        "acme",
        {"observer.mine": "acme_mine", "observer.other": "acme_other", "fake_quant.mine": "os"},
        acme_mine=observer_module("mine"),
        acme_other="raise SystemExit('imported')",
    )
    recipe = recipe_with('"mine"')
    assert "acme_mine" not in sys.modules
    plan = qrecipe.plan(model(), recipe, torch.rand(2, 4))
    assert plan.sites[0].qconfig.activation.observer.name == "mine"
    assert "acme_mine" in sys.modules
    assert "acme_other" not in sys.modules


def test_the_versions_of_the_plugins_that_a_recipe_names_are_kept_with_the_model(site):
    install(site, "acme", {"observer.mine": "acme_mine"}, "2.5", acme_mine=observer_module("mine"))
    install(site, "idle", {"observer.idle": "idle"})
    batches = [torch.rand(8, 4) for _ in range(10)]
    converted = qrecipe.quantize(model(), recipe_with('"mine"'), batches, progress=silent)
    versions = qrecipe.provenance(converted).versions
    assert versions["acme"] == "2.5"
    assert set(versions) == {"qrecipe", "torch", "python", "acme"}


def test_no_distribution_can_pass_for_the_version_of_torch(site):
    install(site, "python", {"observer.mine": "acme_mine"}, acme_mine=observer_module("mine"))
    batches = [torch.rand(8, 4) for _ in range(10)]
    converted = qrecipe.quantize(model(), recipe_with('"mine"'), batches, progress=silent)
    assert qrecipe.provenance(converted).versions["python"] == sys.version.split()[0]


def test_checking_a_recipe_of_a_plugin_needs_neither_torch_nor_the_plugin(site, tmp_path):
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine="raise SystemExit(7)")
    (tmp_path / "mine.toml").write_text(RECIPE.format(observer='{ name = "mine", x = 1 }'))
    text = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.modules['torch'] = None\n"
        f"import qrecipe; qrecipe.load_recipe({str(tmp_path / 'mine.toml')!r})\n"
        "assert 'acme_mine' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_name_that_nobody_claims_is_answered_with_the_nearest_claimed_one(site):
    install(site, "acme", {"observer.mine": "acme_mine", "fake_quant.mime": "x"})
    with pytest.raises(UnknownNameError) as caught:
        recipe_with('"minee"')
    assert caught.value.findings[0].hint == 'did you mean "mine"?'
    with pytest.raises(UnknownNameError):  # of the other kind
        recipe_with('"mime"')


def test_a_recipe_whose_plugin_was_uninstalled_since_is_told_so_at_its_line(site):
    install(site, "acme", {"observer.mine": "acme_mine"})
    recipe = recipe_with('"mine"')
    for file in (site / "acme-1.0.dist-info").iterdir():
        file.unlink()
    (site / "acme-1.0.dist-info").rmdir()
    with pytest.raises(UnknownNameError) as caught:
        qrecipe.plan(model(), recipe, torch.rand(2, 4))
    assert caught.value.findings[0].location.line == 4


def test_importing_a_plugin_leaves_the_random_numbers_alone(site):
    source = observer_module("mine") + "import torch\ntorch.manual_seed(3)\ntorch.rand(3)\n"
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine=source)
    net, recipe, x = model(), recipe_with('"mine"'), torch.rand(2, 4)
    before = torch.get_rng_state()
    qrecipe.plan(net, recipe, x)
    assert "acme_mine" in sys.modules
    assert torch.equal(torch.get_rng_state(), before)


# --- arguments


ARGUMENTS = """
import qrecipe
from pydantic import BaseModel, Field, field_validator
from torch.ao.quantization.observer import MinMaxObserver

class Options(BaseModel, extra="forbid"):
    share: float = Field(default=0.9, gt=0, le=1)
    names: dict[str, int] = {}
    odd: int = 0

    @field_validator("odd")
    @classmethod
    def check(cls, value):
        if value == 13:
            raise RuntimeError("unlucky")
        return value

@qrecipe.register_observer("opted", options=Options)
class Opted(MinMaxObserver):
    def __init__(self, share=0.9, names=None, odd=0, **spec):
        super().__init__(**spec)

@qrecipe.register_observer("plain")
class Plain(MinMaxObserver):
    def __init__(self, share: float = 0.9, **spec):
        super().__init__(**spec)
        if share < 0:
            raise ValueError("share is negative")
        if share == 0:
            raise SystemExit("no share")
"""


@pytest.mark.parametrize(
    ("observer", "code", "marked", "says"),
    [
        ('{ name = "opted", shar = 1 }', "QR105", "shar", 'did you mean "share"?'),
        ('{ name = "opted", share = 2 }', "QR106", "2", "less than or equal to 1"),
        ('{ name = "opted", share = "x" }', "QR106", '"x"', "cannot be"),
        ('{ name = "opted", odd = 13 }', "QR106", '"opted"', "unlucky"),
        ('{ name = "plain", share = true }', "QR106", "true", "a finite number"),
        ('{ name = "plain", names = 1 }', "QR105", "names", 'it takes "share"'),
        ('{ name = "plain", share = -1 }', "QR311", '{ name = "plain", share = -1 }', "negative"),
        ('{ name = "plain", share = 0 }', "QR311", '{ name = "plain", share = 0 }', "no share"),
    ],
)
def test_arguments_are_checked_when_planning_at_their_place(site, observer, code, marked, says):
    install(site, "acme", {"observer.opted": "acme", "observer.plain": "acme"}, acme=ARGUMENTS)
    kind = {"QR105": UnknownNameError, "QR106": SchemaError, "QR311": UnsupportedError}[code]
    finding = refused(observer, kind)
    assert (finding.code, under_caret(finding)) == (code, marked)
    assert says in str(finding)


def test_what_no_observer_can_be_made_with_is_a_finding_before_any_model_runs(site):
    module = ARGUMENTS.replace("names: dict[str, int] = {}", "names: dict[str, int] = {'a': 1}")
    install(site, "acme", {"observer.opted": "acme"}, acme=module)
    assert refused('"opted"', UnsupportedError).code == "QR311"


def test_findings_about_several_plugins_come_at_once(site):
    install(
        site,
        "acme",
        {"observer.opted": "acme", "observer.gone": "acme_gone", "fake_quant.gone": "acme_gone"},
        acme=ARGUMENTS,
    )
    text = RECIPE.format(observer='{ name = "opted", shar = 1 }')
    text += 'fake_quant = "gone"\n[tensor.weight]\nobserver = "gone"\n'
    with pytest.raises(QRecipeError) as caught:
        qrecipe.plan(model(), qrecipe.parse_recipe(text), torch.rand(2, 4))
    found = sorted((f.location.line, f.code) for f in caught.value.findings)
    assert found == [(4, "QR105"), (5, "QR152"), (7, "QR152")]


def test_a_finding_stands_in_the_base_recipe_that_names_the_plugin(site, tmp_path):
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine="raise OSError")
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "base.toml").write_text(RECIPE.format(observer='"mine"'))
    (tmp_path / "top.toml").write_text('extends = "./base.toml"\n')
    with pytest.raises(PluginError) as caught:
        qrecipe.plan(model(), tmp_path / "top.toml", torch.rand(2, 4))
    assert str(caught.value.findings[0].location) == f"{tmp_path / 'base.toml'}:4:12"


def test_odd_names_of_tensors_do_not_hide_where_a_plugin_is_named(site):
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine="raise OSError")
    odd = "a.\\u001b\\u2028" + "x" * 200
    text = RECIPE.format(observer='"minmax"') + (
        f'[tensor."{odd}"]\ndtype = "uint8"\nqscheme = "per_tensor_affine"\nobserver = "mine"\n'
    )
    with pytest.raises(PluginError) as caught:
        qrecipe.plan(model(), qrecipe.parse_recipe(text), torch.rand(2, 4))
    assert caught.value.findings[0].location.line == 8


AT_THE_MISTAKE = """\
own.toml:4:30: QR105 observer "opted" has no argument "shar"
    4 | observer = { name = "opted", shar = 1.0 }
      |                              ^^^^ did you mean "share"?
"""


def test_the_command_line_checks_what_it_can_and_plans_with_the_rest(site, tmp_path, monkeypatch):
    install(site, "acme", {"observer.opted": "acme"}, acme=ARGUMENTS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.toml").write_text(RECIPE.format(observer='{ name = "opted", shar = 1.0 }'))
    (tmp_path / "net.py").write_text("import torch\ndef net():\n    return torch.nn.Linear(4, 4)\n")
    assert CliRunner().invoke(app, ["check", "own.toml"]).exit_code == 0
    command = ["plan", "own.toml", "--model", "net.py:net", "--input", "1x4"]
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, result.stderr) == (1, AT_THE_MISTAKE)


# --- broken plugins


CONTRACT = observer_module("mine").replace(
    "    pass", "    def forward(self, x):\n        return super().forward(x) * 2"
)
WEIRD = """
class Weird(BaseException):
    def __str__(self):
        raise RuntimeError("no text")
raise Weird
"""
FORGED = """
from qrecipe.errors.findings import PluginError
raise PluginError("not findings")
"""
WARNING = """
from qrecipe.errors.findings import Finding, PluginError
raise PluginError([Finding("QR201", "x"), Finding("QR999", "y")])
"""

BROKEN = {
    "raises": ("raise ValueError('first\\nsecond')", "QR152", "ValueError: first"),
    "exits": ("raise SystemExit(3)", "QR152", "SystemExit: 3"),
    "imports nothing": ("import not_installed_at_all", "QR152", "No module named"),
    "syntax": ("def", "QR152", "SyntaxError"),
    "weird": (WEIRD, "QR152", "Weird"),
    "forged": (FORGED, "QR152", "PluginError"),
    "escape": ("raise ValueError('\\x1b[2J\\u202e')", "QR152", "ValueError: \ufffd[2J\ufffd"),
    "long": ("raise ValueError('x' * 10**6)", "QR152", "ValueError: xxx"),
    "registers nothing": ("", "QR153", "it registers nothing"),
    "another name": (observer_module("mina"), "QR153", 'it registers observer "mina"'),
    "breaks the contract": (CONTRACT, "QR150", "changes the tensor that it observes"),
    "torch's own name": (observer_module("minmax"), "QR151", "is built in"),
    "itself": (
        f"import qrecipe\nqrecipe.plan(None, qrecipe.parse_recipe({RECIPE!r}"
        ".format(observer='\"mine\"')), None)",
        "QR152",
        "it registers nothing",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_plugin_is_named_with_its_distribution_at_the_line_of_the_recipe(site, how):
    source, code, says = BROKEN[how]
    install(site, "Acme.Observers", {"observer.mine": "acme_mine"}, "3.1", acme_mine=source)
    table, filters = registered.snapshot(), list(sys.path)
    first = refused('"mine"')
    assert first.code == code
    assert says in str(first)
    assert 'observer "mine" of Acme.Observers 3.1' in first.message
    assert under_caret(first) == '"mine"'
    assert len(str(first)) < 1500
    assert registered.snapshot() == table
    assert sys.path == filters
    assert refused('"mine"') == first  # and the second time


def test_findings_that_a_plugin_makes_up_do_not_pass_for_ours(site):
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine=WARNING)
    with pytest.raises(PluginError) as caught:
        plan_with('"mine"')
    assert [finding.code for finding in caught.value.findings] == ["QR152", "QR152"]


def test_the_line_where_a_plugin_failed_is_said(site):
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine="\n\nraise ValueError\n")
    assert refused('"mine"').notes == (f"raised at {site / 'acme_mine.py'}:3",)


@pytest.mark.parametrize("value", ["os:system", "a-b", "../x", "a.b [extra]", "1x"])
def test_an_entry_point_that_names_no_module_is_refused_and_nothing_imported(site, value):
    install(site, "acme", {"observer.mine": value})
    finding = refused('"mine"')
    assert finding.code == "QR152"
    assert '"observer.mine" = "package.module"' in finding.hint


def test_two_distributions_that_claim_one_name_are_both_named_and_not_imported(site):
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine=observer_module("mine"))
    install(site, "rival", {"observer.mine": "rival"}, "2.0", rival=observer_module("mine"))
    finding = refused('"mine"')
    assert finding.code == "QR154"
    assert finding.message == (
        'observer "mine" is claimed by acme 1.0 (acme_mine) and by rival 2.0 (rival)'
    )
    assert not {"acme_mine", "rival"} & set(sys.modules)


def test_a_plugin_that_takes_the_name_of_another_is_reported_and_the_other_serves(site):
    thief = observer_module("mine") + observer_module("theirs", "Theirs")
    install(site, "thief", {"observer.mine": "thief"}, thief=thief)
    install(site, "honest", {"observer.theirs": "honest"}, honest=observer_module("theirs"))
    finding = refused('"mine"')
    assert finding.code == "QR155"
    assert 'also registers observer "theirs", which belongs to honest 1.0' in finding.message
    plan_with('"theirs"')
    assert registered.find("observer", "theirs").module == "honest"


def test_a_plugin_may_build_on_another_one(site):
    base = observer_module("base")
    built = "from base_plugin import Mine as Base\nimport qrecipe\n"
    built += '@qrecipe.register_observer("built")\nclass Built(Base):\n    pass\n'
    install(site, "base", {"observer.base": "base_plugin"}, base_plugin=base)
    install(site, "built", {"observer.built": "built_plugin"}, built_plugin=built)
    plan_with('"built"')
    plan_with('"base"')


def test_a_plugin_that_was_imported_in_python_before_serves_all_the_same(site):
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine=observer_module("mine"))
    import acme_mine  # noqa: F401

    plan_with('"mine"')


@pytest.mark.parametrize("source", [observer_module("mine"), ""])
def test_a_name_that_was_registered_in_python_before_is_not_taken_over_in_silence(site, source):
    @qrecipe.register_observer("mine")
    class Own(torch.ao.quantization.MinMaxObserver):
        pass

    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine=source)
    finding = refused('"mine"')
    assert finding.code == "QR151"
    assert "acme 1.0" in finding.message
    assert "test_plugins" in finding.message
    assert registered.find("observer", "mine").cls is Own


def test_torchs_own_name_stays_torchs_and_the_claim_is_a_warning(site):
    install(site, "acme", {"observer.minmax": "acme_mine"}, acme_mine="raise SystemExit(1)")
    with pytest.warns(QRecipeWarning, match=r"<recipe>:4:12: QR156 .* acme 1\.0") as caught:
        plan_with('"minmax"')
    assert len(caught) == 1
    assert "acme_mine" not in sys.modules
    text = RECIPE.format(observer='"minmax"') + '[lint]\nignore = ["QR156"]\n'
    qrecipe.plan(model(), qrecipe.parse_recipe(text), torch.rand(2, 4))


def test_a_plugin_that_fails_halfway_leaves_no_registration_behind(site):
    source = observer_module("mine") + observer_module("extra", "Extra") + "\nraise ValueError\n"
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine=source)
    assert refused('"mine"').code == "QR152"
    assert registered.find("observer", "extra") is None
    with pytest.raises(UnknownNameError):
        recipe_with('"extra"')


def test_ctrl_c_during_an_import_is_no_finding(site):
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        plan_with('"mine"')


DAMAGE = {
    "entry_points.txt": b"[qrecipe.plugins]\nno equals sign\n",
    "METADATA": b"Version: 1.0\n",
    "binary": b"\xff\xfe\x00qrecipe.plugins\x80",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_metadata_of_one_distribution_do_not_hide_the_others(site, what):
    install(site, "damaged", {"observer.lost": "lost"})
    file = "entry_points.txt" if what == "binary" else what
    (site / "damaged-1.0.dist-info" / file).write_bytes(DAMAGE[what])
    (site / "bare-1.0.dist-info").mkdir()
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine=observer_module("mine"))
    assert [p.name for p in entry_points("qrecipe.plugins")] == ["observer.mine"]
    plan_with('"mine"')


def test_of_two_versions_on_the_path_the_first_counts_and_the_other_claims_nothing(
    site, tmp_path, monkeypatch
):
    install(site, "acme", {"observer.gone": "gone", "observer.mine": "older"}, "1.0")
    newer = tmp_path / "newer"
    install(newer, "Acme", {"observer.mine": "acme_mine"}, "2.0")
    monkeypatch.syspath_prepend(str(newer))
    (point,) = entry_points("qrecipe.plugins")
    assert (point.value, point.version) == ("acme_mine", "2.0")


def test_what_is_installed_while_the_process_runs_is_seen(site):
    with pytest.raises(UnknownNameError):
        recipe_with('"mine"')
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine=observer_module("mine"))
    plan_with('"mine"')


def test_thousands_of_tensors_of_a_broken_plugin_import_it_once(site):
    counting = "import builtins\nbuiltins.acme = getattr(builtins, 'acme', 0) + 1\nraise OSError\n"
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine=counting)
    import builtins

    tensors = "".join(
        f'[tensor.t{n}]\ndtype = "uint8"\nqscheme = "per_tensor_affine"\nobserver = "mine"\n'
        for n in range(1100)
    )
    recipe = qrecipe.parse_recipe(RECIPE.format(observer='"minmax"') + tensors)
    try:
        with pytest.raises(PluginError) as caught:
            qrecipe.plan(model(), recipe, torch.rand(2, 4))
        assert len(caught.value.findings) == MAX_FINDINGS
        assert builtins.acme == 1
    finally:
        del builtins.acme


# --- qrecipe list


def listing(*arguments: str):
    result = CliRunner().invoke(app, ["list", *arguments], prog_name="qrecipe")
    assert result.exit_code == 0, result.output
    return result.stdout


def test_list_shows_where_each_name_comes_from_and_what_is_wrong_with_it(site):
    install(
        site,
        "acme",
        {
            "observer.opted": "acme",
            "observer.broken": "broken",
            "mine": "x",
            "observer.minmax": "x",
        },
        acme=ARGUMENTS,
        broken="raise SystemExit(3)",
    )
    install(site, "rival", {"observer.broken": "x"})
    install(site, "other", {"observer.exits": "exits"}, exits="print('hello')\nraise SystemExit(3)")
    (Path(site) / "damaged-1.0.dist-info").mkdir()
    (Path(site) / "damaged-1.0.dist-info" / "entry_points.txt").write_text("[qrecipe.recipes]\nx")

    @qrecipe.register_fake_quant("own")
    class Own(torch.ao.quantization.FakeQuantize):
        pass

    document = json.loads(listing("--json"))
    lines = {line["name"]: line for line in document["observers"]}
    assert lines["minmax"]["origin"] == "torch"
    assert lines["opted"]["origin"] == "acme 1.0"
    assert lines["opted"]["arguments"] == ["share", "names", "odd"]
    assert lines["broken"]["origin"] == "acme 1.0, rival 1.0"
    assert "QR154" in lines["broken"]["problem"]
    assert "SystemExit: 3" in lines["exits"]["problem"]
    (own,) = [line for line in document["fake_quants"] if line["name"] == "own"]
    assert own["origin"] == "test_plugins"
    ignored = {(line["entry_point"], line["origin"]) for line in document["ignored_plugins"]}
    assert ignored == {("mine", "acme 1.0"), ("observer.minmax", "acme 1.0")}
    text = listing()
    assert all(
        word in text for word in ("acme 1.0", "QR154", "belongs to torch", "share, names, odd")
    )


def test_list_without_torch_shows_plugins_without_their_arguments(site, monkeypatch):
    install(site, "acme", {"observer.mine": "acme_mine"})
    monkeypatch.setitem(sys.modules, "torch", None)
    lines = {line["name"]: line for line in json.loads(listing("--json"))["observers"]}
    assert lines["mine"]["origin"] == "acme 1.0"
    assert "without torch" in lines["mine"]["problem"]
    assert lines["histogram"]["arguments"] == ["bins"]
