"""`qrecipe check` as a hook of pre-commit, run by pre-commit itself in a repository of git."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

HOOKS = ".pre-commit-hooks.yaml"
GOOD = 'format = 1\nextends = "builtin:x86-static"\n'
BAD = f'{GOOD}[tensor.activation]\nobserver = "histogramm"\n'


@pytest.fixture
def command(tmp_path):
    """Runs a command in a folder, with this environment's programs and no user's settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    programs = Path(sys.executable).parent  # not resolved: a link there leads out of it
    names = ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL")
    variables = {
        **kept,
        **dict.fromkeys(names, "tests@example.org"),
        "PATH": f"{programs}{os.pathsep}{kept['PATH']}",
        "PRE_COMMIT_HOME": str(tmp_path / "cache"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
    }

    def run(folder, *arguments):
        return subprocess.run(
            arguments, cwd=folder, env=variables, capture_output=True, text=True, check=False
        )

    return run


@pytest.fixture
def repository(tmp_path, command):
    """A user's repository that has the hook of a commit of ours in its configuration."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
        assert command(folder, "git", "init", "--quiet").returncode == 0
    shutil.copy(ROOT / HOOKS, ours / HOOKS)
    commit(command, ours)
    revision = command(ours, "git", "rev-parse", "HEAD").stdout.strip()
    (theirs / ".pre-commit-config.yaml").write_text(
        f"repos:\n  - repo: {ours}\n    rev: {revision}\n    hooks:\n      - id: qrecipe-check\n"
    )
    (theirs / "recipes").mkdir()
    return theirs


def commit(command, folder):
    assert command(folder, "git", "add", "--all").returncode == 0
    done = command(folder, "git", "commit", "--quiet", "--no-verify", "--message", "all")
    assert done.returncode == 0, done.stderr


def pre_commit(command, folder):
    command(folder, "git", "add", "--all")
    return command(folder, sys.executable, "-m", "pre_commit", "run", "--color=never")


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_pre_commit_refuses_a_wrong_recipe_and_takes_it_once_it_is_mended(repository, command):
    recipes = repository / "recipes"
    (recipes / "good.toml").write_text(GOOD)
    (recipes / "bad.toml").write_text(BAD)
    done = pre_commit(command, repository)
    assert done.returncode == 1, done.stdout + done.stderr
    assert 'recipes/bad.toml:4:12: QR104 unknown observer "histogramm"' in done.stdout
    assert 'did you mean "histogram"?' in done.stdout
    assert "2 recipes checked: 1 error" in done.stdout
    (recipes / "bad.toml").write_text(BAD.replace("mm", "m"))
    done = pre_commit(command, repository)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "check quantization recipes" in done.stdout
    assert "Passed" in done.stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_pre_commit_leaves_alone_what_is_no_recipe(repository, command):
    (repository / "pyproject.toml").write_text("[project]\n")
    (repository / "recipes" / "cnn.lock.toml").write_text("lock = 1\n")
    (repository / "recipes" / "notes.md").write_text("# notes\n")
    done = pre_commit(command, repository)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Skipped" in done.stdout
