"""Plugins of installed distributions: when they are imported, whose names are, and the list."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributions import install, observer_module
from plugin_recipes import ARGUMENTS, RECIPE, model, plan_with, recipe_with, refused
from runs import silent
from typer.testing import CliRunner

import qrecipe
from qrecipe.cli.app import app
from qrecipe.errors.findings import (
    QRecipeWarning,
    UnknownNameError,
)
from qrecipe.registry import table as registered
from qrecipe.registry.entry_points import entry_points


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
