"""Lock files: written once, held against the plan, and what is said where it differs."""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import suppress
from itertools import product
from pathlib import Path

import distributions
import pytest
import tomli
import torch
from any_text import any_text
from command_line import DEEPER, NET, STATIC, TOP, model_folder, run
from distributions import observer_module
from hypothesis import given
from hypothesis import strategies as st
from nets import NETS, Mlp
from plans import ROWS, recipe
from recipe_files import BASE, install, write
from shares import every
from torch import nn
from torch.ao.quantization.observer import MinMaxObserver

import qrecipe
from qrecipe.authoring.lock import file as locking
from qrecipe.authoring.lock.check import check_lock, compare
from qrecipe.authoring.lock.file import lock_path, lock_text, make_lock, read_lock
from qrecipe.errors.findings import PlanError
from qrecipe.planning.plan import Plan
from qrecipe.registry import table as registered

LOCK = "cnn.lock.toml"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    yield from model_folder(tmp_path, monkeypatch)


@pytest.fixture
def locked(folder):
    """A recipe and its lock."""
    (folder / "base.toml").write_text(TOP)
    (folder / "cnn.toml").write_text(
        'format = 1\nextends = "./base.toml"\n[rules.module_name]\n"fc" = "float"\n'
    )
    done = run("lock", "cnn.toml", *NET)
    assert (done.exit_code, done.stdout) == (0, f"{LOCK}: 4 sites locked\n"), done.stderr
    return folder


def lines_of(result):
    assert result.exit_code == 1, result.output
    return [line.strip() for line in result.stderr.splitlines()]


def checked(*options):
    return run("plan", "cnn.toml", "--check", *(options or NET))


# what is written


def test_a_lock_has_a_line_for_each_site_and_says_what_they_came_from(locked):
    text = (locked / LOCK).read_text()
    lock = tomli.loads(text)
    assert list(lock["sites"]) == ["conv", "up", ":mean", "fc"]
    assert lock["sites"]["conv"] == {
        "op": "Conv2d+BatchNorm2d+relu",
        "verdict": "quantized static",
        "weight": "int8 per_channel_minmax per_channel_symmetric",
        "activation": "uint8 moving_average_minmax per_tensor_affine reduce_range",
        "input": "float, quantized here",
        "engine": "onednn",
        "by": "global = int8",
    }
    assert lock["sites"]["up"]["weight"] == "int8 minmax per_tensor_symmetric"
    assert lock["sites"]["fc"] == {
        "op": "Linear",
        "verdict": "float",
        "by": 'module_name "fc" = float',
    }
    assert lock["torch"].startswith("2.")
    assert lock["recipe"]["fingerprint"] == qrecipe.load_recipe("cnn.toml").fingerprint
    assert [base["name"] for base in lock["bases"]] == ["base.toml", STATIC]
    assert len([line for line in text.splitlines() if line.startswith("conv = ")]) == 1
    assert str(locked) not in text


def test_writing_a_lock_again_gives_the_same_bytes_whatever_the_folder_it_is_written_from(
    locked, monkeypatch
):
    text = (locked / LOCK).read_bytes()
    sub = locked / "sub"
    sub.mkdir()
    monkeypatch.chdir(sub)
    model = ("--model", "../net_of_tests.py:factory")
    assert run("lock", "../cnn.toml", *model).exit_code == 0
    assert (locked / LOCK).read_bytes() == text
    assert run("lock", str(locked / "cnn.toml"), *model).exit_code == 0
    assert (locked / LOCK).read_bytes() == text


def test_a_lock_reads_back_as_what_was_written(locked):
    lock = read_lock(locked / LOCK)
    assert lock_text(lock) == (locked / LOCK).read_text()
    assert compare(lock, lock).changes == compare(lock, lock).causes == ()


@pytest.mark.parametrize(
    ("recipe", "path"),
    [
        ("cnn.toml", "cnn.lock.toml"),
        ("sub/cnn.v2.toml", "sub/cnn.v2.lock.toml"),
        ("cnn", "cnn.lock.toml"),
        ("builtin:x86-static", "x86-static.lock.toml"),
    ],
)
def test_a_lock_lies_beside_its_recipe_and_that_of_a_reference_in_this_folder(recipe, path):
    assert lock_path(recipe) == Path(path)


def test_weights_are_no_part_of_the_structure_and_classes_are():
    def fingerprint(model):
        plan = qrecipe.plan(model.eval(), STATIC, ROWS)
        return locking.structure_fingerprint(plan.structure)

    class Special(Mlp):
        pass

    assert fingerprint(Mlp()) == fingerprint(Mlp())
    assert fingerprint(Mlp()) != fingerprint(Special())


# what is held against it


def test_a_plan_that_is_as_locked_passes(locked):
    result = checked()
    assert (result.exit_code, result.stdout) == (0, f"{LOCK}: 4 sites as locked\n")
    document = json.loads(checked(*NET, "--json").stdout)
    assert document == {"lock": LOCK, "findings": [], "changed_without_effect": []}


def test_a_changed_recipe_fails_with_each_site_old_and_new_and_the_cause(locked):
    path = locked / "cnn.toml"
    path.write_text(path.read_text().replace('"fc"', '"conv"'))
    lines = lines_of(checked())
    assert lines[0].startswith(f'QR323 the plan differs from "{LOCK}" in ')
    assert "conv: verdict quantized static -> float" in lines
    assert "fc: verdict float -> quantized static" in lines
    assert any(re.match("recipe cnn.toml: fingerprint [0-9a-f]{12} -> ", line) for line in lines)
    assert 'fc: decided by module_name "fc" = float -> global = int8' in lines
    (finding,) = json.loads(checked(*NET, "--json").stdout)["findings"]
    assert finding["code"] == "QR323"
    assert "  conv: verdict quantized static -> float" in finding["notes"]


def test_a_changed_base_fails_and_is_named(locked):
    base = locked / "base.toml"
    base.write_text(TOP + "[tensor.activation]\nobserver = { name = 'histogram', bins = 512 }\n")
    lines = lines_of(checked())
    assert (
        "conv: activation uint8 moving_average_minmax per_tensor_affine reduce_range -> "
        "uint8 histogram(bins=512) per_tensor_affine reduce_range"
    ) in lines
    assert any(line.startswith("recipe base.toml: fingerprint ") for line in lines)


def test_a_changed_model_fails_and_new_and_missing_sites_are_named(locked):
    lines = lines_of(checked(*DEEPER))
    assert "last: site (none) -> Linear, quantized static" in lines
    assert any(line.startswith("the model: structure ") for line in lines)
    assert run("lock", "cnn.toml", *DEEPER).exit_code == 0
    assert "last: site Linear, quantized static -> (none)" in lines_of(checked())


def test_another_backend_or_phase_is_another_outcome_though_every_site_reads_the_same():
    plan = qrecipe.plan(Mlp().eval(), STATIC, ROWS)
    lock = make_lock(plan, Path(LOCK))
    other = lock.model_copy(update={"backend": "onednn", "phase": "qat"})
    assert [str(change) for change in compare(lock, other).changes] == [
        "the plan: backend x86 -> onednn",
        "the plan: phase ptq -> qat",
    ]


def test_another_torch_without_another_outcome_is_mentioned_and_passes(locked, monkeypatch):
    installed = torch.__version__
    monkeypatch.setattr(locking.torch, "__version__", "2.13.9")
    result = checked()
    assert result.exit_code == 0, result.stderr
    assert f"torch {installed}" in result.stdout
    assert "-> 2.13.9" in result.stdout
    assert "run `qrecipe lock` to update the file" in result.stdout


def test_another_torch_is_named_as_cause_where_an_outcome_differs(locked, monkeypatch):
    installed = torch.__version__
    monkeypatch.setattr(locking.torch, "__version__", "2.13.9")
    (locked / "base.toml").write_text(TOP + "[tensor.weight]\ndtype = 'int4'\n")
    lines = lines_of(checked())
    assert f"torch {installed} -> 2.13.9" in lines


def test_a_comment_a_reason_and_another_rule_with_the_same_effect_are_no_failure(locked):
    path = locked / "cnn.toml"
    text = path.read_text()
    path.write_text(text.replace('"float"', '{ qconfig = "float", reason = "12 dB" }'))
    assert checked().stdout == f"{LOCK}: 4 sites as locked\n"
    path.write_text("# a comment\n" + text.replace('"fc"', '"f?"'))
    result = checked()
    assert result.exit_code == 0
    assert 'fc: decided by module_name "fc" = float -> module_name "f?" = float' in result.stdout


def test_another_version_of_a_published_base_is_a_cause_and_names_both(folder, monkeypatch):
    package = install(folder / "site", monkeypatch, "acme.vision")
    base = BASE.partition("[rules.module_name]")[0] + "[rules.module_type]\n"
    (package / "base.toml").write_text(base)
    write(folder, cnn='format = 1\nname = "top"\nextends = "acme-recipes:cnn"\n')
    assert run("lock", "cnn.toml", *NET).exit_code == 0
    assert 'distribution = "acme-recipes", version = "1.0"' in (folder / LOCK).read_text()
    metadata = folder / "site" / "acme_recipes-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))
    assert "recipe acme-recipes:cnn: version 1.0 -> 1.1" in checked().stdout
    (package / "base.toml").write_text(base + '"torch.nn.Linear" = "float"\n')
    lines = lines_of(checked())
    assert "fc: verdict quantized static -> float" in lines
    assert "recipe acme-recipes:cnn: version 1.0 -> 1.1" in lines


def test_another_class_under_the_name_of_a_plugin_is_another_outcome(tmp_path):
    def plan_with(name):
        cls = type(name, (MinMaxObserver,), {"__module__": "pluggy.observers"})
        qrecipe.register_observer("house")(cls)
        try:
            text = '[tensor.activation]\nobserver = "house"\n'
            return make_lock(qrecipe.plan(Mlp().eval(), recipe(text), ROWS), tmp_path / LOCK)
        finally:
            registered.remove("observer", "house")

    one, other = plan_with("One"), plan_with("Other")
    plugin = one.plugins["observer house"]
    assert plugin.class_ == "pluggy.observers.One"
    assert (plugin.distribution, plugin.version) == ("pluggy", "1.7.0")
    assert [str(change) for change in compare(one, other).changes] == [
        "plugin observer house: class pluggy.observers.One -> pluggy.observers.Other"
    ]
    newer = plugin.model_copy(update={"version": "2.0"})
    updated = one.model_copy(update={"plugins": {"observer house": newer}})
    assert compare(one, updated).changes == ()
    assert [str(cause) for cause in compare(one, updated).causes] == [
        "plugin observer house pluggy 1.7.0 -> pluggy 2.0"
    ]


def test_another_version_of_an_installed_plugin_is_a_cause_and_named(folder, monkeypatch):
    site = folder / "site"
    points = {"observer.of_lock_tests": "plugin_of_lock_tests"}
    source = observer_module("of_lock_tests")
    distributions.install(site, "acme-observers", points, plugin_of_lock_tests=source)
    monkeypatch.syspath_prepend(str(site))
    (folder / "cnn.toml").write_text(TOP + '[tensor.activation]\nobserver = "of_lock_tests"\n')
    try:
        assert run("lock", "cnn.toml", *NET).exit_code == 0
        plugin = tomli.loads((folder / LOCK).read_text())["plugins"]["observer of_lock_tests"]
        assert plugin == {
            "class": "plugin_of_lock_tests.Mine",
            "distribution": "acme-observers",
            "version": "1.0",
        }
        assert checked().stdout == f"{LOCK}: 4 sites as locked\n"
        lock = (folder / LOCK).read_text()
        (folder / LOCK).write_text(lock.replace('version = "1.0"', 'version = "0.9"'))
        assert "observer of_lock_tests acme-observers 0.9 -> acme-observers 1.0" in checked().stdout
    finally:
        registered.remove("observer", "of_lock_tests")
        sys.modules.pop("plugin_of_lock_tests", None)


def test_a_fake_quant_is_an_outcome_of_training_alone():
    text = '[tensor.activation]\nfake_quant = "fused_moving_average"\n'
    plan = qrecipe.plan(Mlp().eval(), recipe(text), ROWS)
    outcome = make_lock(plan, Path(LOCK)).sites["fc1"]
    assert "fake_quant" not in str(outcome)
    trained = qrecipe.plan(Mlp().eval(), recipe(text, head='phase = "qat"'), ROWS)
    outcome = make_lock(trained, Path(LOCK)).sites["fc1"]
    assert outcome.activation.endswith("fake_quant=fused_moving_average")
    assert outcome.weight.endswith("fake_quant=fake_quantize")


@pytest.mark.parametrize("name", every(4, NETS))
def test_a_lock_of_any_net_holds_its_own_plan_and_no_float_one(name, tmp_path):
    net = NETS[name]
    plan = qrecipe.plan(net.model(), STATIC, net.batches(1)[0])
    locking.write_lock(plan, tmp_path / LOCK)
    assert check_lock(plan, tmp_path / LOCK).causes == ()
    left = qrecipe.plan(net.model(), recipe("[rules]\nglobal = 'float'"), net.batches(1)[0])
    if any(site.verdict != "float" for site in plan.sites):
        assert compare(make_lock(plan, tmp_path), make_lock(left, tmp_path)).changes


def test_names_that_toml_has_to_quote_come_back():
    names = ['odd "name"', "tab\tbed", "ünïcode", "back\\slash", "", "delete\x7f", ":add#1"]
    site = _EXAMPLE.sites["fc1"]
    lock = _EXAMPLE.model_copy(update={"sites": dict.fromkeys(names, site)})
    assert list(tomli.loads(lock_text(lock))["sites"]) == names


# damaged, hostile, missing


def test_a_missing_lock_says_how_to_write_it(folder):
    (folder / "cnn.toml").write_text(TOP)
    lines = lines_of(checked())
    assert lines == [
        f'QR320 there is no lock file "{LOCK}"',
        "write it with `qrecipe lock`, and commit it",
    ]


def test_the_lock_of_another_recipe_is_refused(locked):
    (locked / "other.toml").write_text(TOP)
    result = run("plan", "other.toml", "--check", "--lock", LOCK, *NET)
    assert lines_of(result)[0] == f'QR324 "{LOCK}" is the lock of "cnn.toml"'


HOSTILE = {
    "empty": b"",
    "binary": bytes(range(256)),
    "utf16": "lock = 1".encode("utf-16"),
    "conflict": b"<<<<<<< HEAD\nlock = 1\n=======\n",
    "deep": b"x = " + b"[" * 50_000,
    "number": b"lock = " + b"9" * 10_000,
    "recipe": TOP.encode(),
    "wrong": b"lock = true",
    "zero": b"lock = 0",
    "steering": b'"\\u001b[2J" = 1',
}


@pytest.mark.parametrize("name", every(2, HOSTILE))
def test_a_damaged_lock_is_a_finding_and_is_mended_by_writing_it_anew(locked, name):
    (locked / LOCK).write_bytes(HOSTILE[name])
    result = checked()
    assert lines_of(result)[0].startswith(f'QR321 "{LOCK}" is not a valid lock file: ')
    assert "\x1b" not in result.output
    assert "qrecipe lock --force" in result.output
    if HOSTILE[name]:  # it may be a file of the user's
        assert run("lock", "cnn.toml", *NET).exit_code == 2
        assert (locked / LOCK).read_bytes() == HOSTILE[name]
    assert run("lock", "cnn.toml", "--force", *NET).exit_code == 0
    assert checked().exit_code == 0


def test_a_lock_of_a_newer_qrecipe_is_said_to_be_one(locked):
    text = (locked / LOCK).read_text().replace("lock = 1\n", "lock = 2\nnews = 3\n")
    (locked / LOCK).write_text(text)
    assert lines_of(checked())[0].startswith("QR322 ")


def test_a_lock_that_is_a_pipe_or_a_folder_or_endless_is_no_traceback(locked):
    (locked / LOCK).unlink()
    os.mkfifo(locked / LOCK)
    assert lines_of(checked())[0].endswith("it is not a regular file")
    result = run("lock", "cnn.toml", *NET)
    assert result.exit_code == 2
    assert f"{LOCK}: not a regular file" in result.output
    (locked / LOCK).unlink()
    (locked / LOCK).mkdir()
    assert lines_of(checked())[0].endswith("it is not a regular file")
    (locked / LOCK).rmdir()
    (locked / LOCK).symlink_to(LOCK)
    assert lines_of(checked())[0].startswith("QR321")
    (locked / LOCK).unlink()
    with (locked / LOCK).open("wb") as stream:
        stream.truncate(locking.MAX_BYTES + 1)
    assert "larger than" in lines_of(checked())[0]


@pytest.mark.parametrize("name", ["cnn.toml", "lock", "", "cnn.lock"])
def test_a_name_that_is_no_lock_files_is_wrong_usage_and_overwrites_nothing(locked, name):
    before = (locked / "cnn.toml").read_text()
    result = run("lock", "cnn.toml", *NET, "--lock", name)
    assert result.exit_code == 2
    assert ".lock.toml" in result.stderr
    assert (locked / "cnn.toml").read_text() == before


def test_a_lock_file_is_named_for_check_alone(locked):
    result = run("plan", "cnn.toml", *NET, "--lock", LOCK)
    assert (result.exit_code, "--check" in result.stderr) == (2, True)


def test_a_recipe_that_does_not_fit_the_model_writes_no_lock(folder):
    (folder / "cnn.toml").write_text(TOP + '[rules.module_name]\n"convv" = "float"\n')
    assert "QR301" in run("lock", "cnn.toml", *NET).stderr
    assert not (folder / LOCK).exists()


@given(
    st.recursive(
        st.one_of(st.integers(), any_text(), st.booleans(), st.floats(allow_nan=False)),
        lambda inner: st.lists(inner) | st.dictionaries(any_text(), inner),
        max_leaves=6,
    ),
    st.sampled_from(["sites", "bases", "recipe", "plugins", "lock", "torch", "extra"]),
)
def test_any_value_in_a_lock_is_read_or_refused(tmp_path_factory, value, key):
    path = tmp_path_factory.mktemp("lock") / LOCK
    values = {**_EXAMPLE.model_dump(by_alias=True, exclude_none=True), key: value}
    path.write_text("".join(f"{k} = {locking.toml_value(v)}\n" for k, v in values.items()))
    with suppress(PlanError):
        assert read_lock(path).lock == 1


_PLAN: Plan = qrecipe.plan(Mlp().eval(), STATIC, ROWS)
_EXAMPLE = make_lock(_PLAN, Path(LOCK))


CPUS = ("avx512_vnni", "avx512", "avx_vnni", "avx2", "other")
CONVOLUTIONS = {
    "depthwise": lambda: nn.Conv2d(96, 96, 3, groups=96),
    "many_groups": lambda: nn.Conv2d(128, 128, 3, groups=128),
    "groups_of_three": lambda: nn.Conv2d(96, 96, 3, padding=1, groups=32),
    "many_groups_of_three": lambda: nn.Conv2d(384, 384, 3, padding=1, groups=128),
    "in_three_dimensions": lambda: nn.Conv3d(16, 16, 3, groups=16),
    "upsampling": lambda: nn.ConvTranspose2d(16, 16, 2, stride=2),
    "narrowing_upsampling": lambda: nn.ConvTranspose2d(16, 8, 2, stride=2),
    "odd_upsampling": lambda: nn.ConvTranspose2d(12, 6, 2, stride=2),
    "padded_upsampling": lambda: nn.ConvTranspose2d(16, 16, 3, stride=2, output_padding=1),
}


@pytest.mark.parametrize(
    "case", every(3, product(CONVOLUTIONS, ["x86-static", "x86-vnni-static"])), ids="-".join
)
def test_a_lock_is_the_same_on_every_cpu(monkeypatch, tmp_path, case):
    kind, name = case
    layer = CONVOLUTIONS[kind]()
    dimensions = len(layer.kernel_size)
    last = (nn.Conv2d, nn.Conv3d)[dimensions - 2](layer.out_channels, 4, 1)
    model = nn.Sequential(layer, last).eval()
    x = torch.randn(2, layer.in_channels, *[5] * dimensions)
    texts = set()
    for cpu in CPUS:
        monkeypatch.setattr("qrecipe.planning.cpu.class_of_cpu", lambda cpu=cpu: cpu)
        plan = qrecipe.plan(model, f"builtin:{name}", x)
        texts.add(lock_text(make_lock(plan, tmp_path / LOCK)))
    assert len(texts) == 1
