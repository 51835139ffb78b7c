"""The range of torch is the same wherever it is said; what older ones lack is made up for."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tomli
import torch
from packaging.requirements import Requirement
from places import ROOT

from qrecipe import _torch_versions
from qrecipe._torch_versions import TESTED_TORCH, cpu_capabilities, warn_if_untested
from qrecipe.errors.findings import QRecipeWarning

PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSIONS_PAGE = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line.startswith(("torch==", "torchvision=="))
)


def neighbours():
    (oldest, *_, newest) = (int(version.removeprefix("2.")) for version in TESTED_TORCH)
    return [f"2.{oldest - 1}.9", f"2.{newest + 1}.0"]


def test_untested_torch_is_warned_about():
    for version in (*neighbours(), "3.0.0"):
        with pytest.warns(QRecipeWarning, match=f"QR200 torch {version} is outside"):
            warn_if_untested(version)
    for version in TESTED_TORCH:
        warn_if_untested(f"{version}.1+cpu")


def test_the_warning_points_at_the_line_that_first_used_qrecipe(tmp_path):
    script = tmp_path / "caller.py"
    script.write_text('import torch\ntorch.__version__ = "2.9.1"\nimport qrecipe\nqrecipe.plan\n')
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=True
    )
    assert f"{script}:4: QRecipeWarning: QR200 torch 2.9.1" in done.stderr


def test_the_package_asks_for_the_tested_versions_and_no_others():
    (requirement,) = (r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "torch")
    assert all(f"{version}.0" in requirement.specifier for version in TESTED_TORCH)
    assert not any(version in requirement.specifier for version in neighbours())


def test_the_pinned_versions_are_in_the_supported_ranges():
    extras = PROJECT["optional-dependencies"]
    requirements = [*map(Requirement, (*PROJECT["dependencies"], *extras["corpus"]))]
    ranges = {each.name: each.specifier for each in requirements}
    assert PINS["torch"] in ranges["torch"]
    assert PINS["torchvision"] in ranges["torchvision"]


def test_the_page_on_versions_has_a_row_for_each_tested_version():
    rows = re.findall(r"^\| (2\.\d+)[ .]", VERSIONS_PAGE, re.MULTILINE)
    assert rows == list(TESTED_TORCH)


def test_what_an_older_torch_tells_of_the_cpu_is_what_a_newer_one_tells(monkeypatch):
    if not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("this torch is an older one")
    known, cpu = torch.cpu.get_capabilities(), torch.cpu
    older = ("_is_avx2_supported", "_is_avx512_supported", "_is_vnni_supported")
    kept = SimpleNamespace(**{name: getattr(cpu, name) for name in older})
    monkeypatch.setattr(_torch_versions, "torch", SimpleNamespace(cpu=kept))
    told = cpu_capabilities()
    assert {"avx2", "avx512_f", "avx512_vnni"} <= told.keys()
    assert told == {name: known[name] for name in told}


# --- tools/on_torch.py


@pytest.fixture(scope="module")
def on_torch():
    return runpy.run_path(str(ROOT / "tools" / "on_torch.py"))


def test_environments_have_the_pins_without_what_depends_on_torch(on_torch):
    pins = [*on_torch["pins"]()]
    names = {Requirement(pin).name for pin in pins}
    assert {"pytest", "numpy", "sympy"} <= names
    assert not {"torch", "torchvision"} & names
    assert Requirement(on_torch["requirement"]("2.10")).specifier.contains("2.10.1")
    assert not Requirement(on_torch["requirement"]("2.10.0")).specifier.contains("2.10.1")


def test_an_environment_that_could_not_be_made_is_not_taken_for_one(on_torch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\nmkdir -p "$3/bin"\ntouch "$3/bin/python"\nexit 1\n')
    broken.chmod(0o755)
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            on_torch["environment"]("2.10", str(broken), tmp_path / "2.10")


def test_a_command_runs_in_the_environment_that_is_there(on_torch, tmp_path, capfd):
    for version, code in (("2.10", 0), ("2.11", 3)):
        python = tmp_path / version / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\necho "$@"\necho "in {version}"\nexit {code}\n')
        python.chmod(0o755)
    main = on_torch["main"]
    assert main(["--in", str(tmp_path), "2.10"]) == 0
    assert "-m pytest\nin 2.10\n" in capfd.readouterr().out
    assert main(["--in", str(tmp_path), "2.10", "2.11", "--", "some.py", "-x"]) == 1
    shown = capfd.readouterr().out
    assert shown.count("some.py -x\n") == 2
    assert re.search(r"torch 2\.10 +ok +in 2\.10\ntorch 2\.11 +FAILED +in 2\.11\n$", shown)


@pytest.mark.slow  # with one torch, it shows what tests/artifact/test_artifact.py shows
def test_digits_stored_by_this_torch_have_the_same_outputs_once_loaded(tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "tools" / "digits_on_torch.py"))["main"]
    assert main(tmp_path) == 0
    assert "6400 of 6400 outputs are equal" in capsys.readouterr().out
