"""Folders of parcels go with their owners, also with those that are killed."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from places import ROOT

from qrecipe.pool import folder as module
from qrecipe.pool.folder import own_folder

pytest.importorskip("fcntl")

OWNER = """
import os, signal, sys, tempfile
from qrecipe.pool.folder import own_folder
tempfile.tempdir = sys.argv[1]
with own_folder() as folder:
    (folder / "work").write_text("large")
    print(folder, flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_folder_of_a_process_that_was_killed_is_removed_and_that_of_a_living_one_stays(place):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    name = os.path.basename(owner.stdout.readline().strip())
    with own_folder() as own, own_folder() as other:
        assert {each.name for each in place.iterdir()} == {name, own.name, other.name}
    assert [each.name for each in place.iterdir()] == [name]
    owner.communicate()
    assert owner.returncode == -signal.SIGKILL
    assert (place / name / "work").exists()
    with own_folder() as own:
        assert [each.name for each in place.iterdir()] == [own.name]
    assert not list(place.iterdir())


@pytest.mark.parametrize("whose", ["another machine", "nobody", "another user", "a link"])
def test_folders_that_may_be_in_use_or_of_others_stay(place, whose, monkeypatch):
    folder = place / "kept"
    folder.mkdir()
    if whose != "nobody":
        machine = platform.node() + "2" * (whose == "another machine")
        (folder / "owner").write_text(machine)
    if whose == "another user":
        monkeypatch.setattr(module.os, "getuid", lambda: -1)
    named = place / "qrecipe-pool-abc"
    named.symlink_to(folder) if whose == "a link" else folder.rename(named)
    with own_folder():
        pass
    assert named.exists()


def test_a_file_system_without_locks_and_a_system_without_them_work(place, monkeypatch):
    def fail(*given):
        raise OSError("no locks available")

    with monkeypatch.context() as patch:
        patch.setattr(module._fcntl, "flock", fail)
        with own_folder() as one, own_folder() as other:
            assert all(map(Path.exists, (one, other)))
    monkeypatch.setattr(module, "_fcntl", None)
    with own_folder() as folder:
        assert folder.exists()
    assert not list(place.iterdir())
