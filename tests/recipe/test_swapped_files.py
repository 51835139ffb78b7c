"""What is checked is what is read: files that are replaced between the two."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

import pytest

import qrecipe
from qrecipe import files
from qrecipe.errors.findings import QRecipeError, RecipeReferenceError
from qrecipe.recipe import references

HEAD = 'format = 1\nbackend = "x86"\n[rules]\nglobal = "float"\n'
SECRET = "do not read this"


@pytest.fixture(params=["step by step", "compared afterwards"])
def opening(request, monkeypatch):
    """Both ways to open a file; systems without `dir_fd` have the second only."""
    if request.param == "compared afterwards":
        monkeypatch.setattr(files, "_STEP_BY_STEP", False)
    elif not files._STEP_BY_STEP:
        pytest.skip("needs dir_fd and O_NOFOLLOW")


@pytest.fixture
def tree(tmp_path):
    """A project with a base in a folder, and outside of it the same names with a secret."""
    for place, name in (("project", "base"), ("outside", SECRET)):
        (tmp_path / place / "sub").mkdir(parents=True)
        for file in ("sub/base.toml", "top.toml"):
            (tmp_path / place / file).write_text(f"name = '{name}'\n{HEAD}")
    project = tmp_path / "project"
    (project / "pyproject.toml").touch()
    (project / "top.toml").write_text("extends = './sub/base.toml'\nformat = 1\n")
    assert qrecipe.load_recipe(project / "top.toml").name == "base"
    return project


def swap(place, by):
    place.rename(place.with_name("former"))
    place.symlink_to(by, target_is_directory=by.is_dir())


def swapping(monkeypatch, file, place, by):
    """Replace ``place`` once ``file`` has been checked and before it is opened."""

    def read_text(tree, path, name):
        if path.name == file:
            swap(place, by)
        return original(tree, path, name)

    original = references.read_text
    monkeypatch.setattr(references, "read_text", read_text)


@pytest.mark.parametrize(
    ("file", "swapped"),
    [
        ("base.toml", "sub/base.toml"),
        ("base.toml", "sub"),
        ("base.toml", "."),
        ("top.toml", "top.toml"),
        ("top.toml", "."),
    ],
)
def test_a_link_that_replaces_what_was_checked_is_not_followed(
    opening, monkeypatch, tree, file, swapped
):
    outside = tree.parent / "outside"
    swapping(monkeypatch, file, tree / swapped, outside / swapped)
    with pytest.raises(RecipeReferenceError, match="QR001") as caught:
        qrecipe.load_recipe(tree / "top.toml")
    (finding,) = caught.value.findings
    assert "a link has replaced it, or a folder above it" in finding.message
    assert SECRET not in str(caught.value)


def test_a_link_to_a_file_of_the_same_tree_is_not_followed_either(opening, monkeypatch, tree):
    (tree / "other.toml").write_text(HEAD)
    swapping(monkeypatch, "base.toml", tree / "sub/base.toml", tree / "other.toml")
    with pytest.raises(RecipeReferenceError, match="a link has replaced it"):
        qrecipe.load_recipe(tree / "top.toml")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX pipes")
def test_a_pipe_that_replaces_what_was_checked_is_not_waited_for(monkeypatch, tree):
    def read_text(folder, path, name):
        if path.name == "base.toml":
            path.unlink()
            os.mkfifo(path)
        return original(folder, path, name)

    original = references.read_text
    monkeypatch.setattr(references, "read_text", read_text)
    with pytest.raises(RecipeReferenceError, match="not a regular file"):
        qrecipe.load_recipe(tree / "top.toml")


def test_links_that_were_there_before_are_read(opening, tree):
    swap(tree / "sub", tree / "former")
    assert qrecipe.load_recipe(tree / "top.toml").name == "base"
    (tree / "link.toml").symlink_to(tree / "top.toml")
    assert qrecipe.load_recipe(tree / "link.toml").name == "base"


@pytest.mark.skipif(not files._STEP_BY_STEP, reason="needs dir_fd and O_NOFOLLOW")
def test_a_folder_that_is_swapped_all_the_time_never_gives_away_what_is_outside(tree):
    """The link and the folder change places as fast as a thread can."""
    (tree / "link").symlink_to(tree.parent / "outside" / "sub")
    ended = threading.Event()

    def exchange():
        while not ended.is_set():
            (tree / "sub").rename(tree / "folder")
            (tree / "link").rename(tree / "sub")
            (tree / "sub").rename(tree / "link")
            (tree / "folder").rename(tree / "sub")

    thread = threading.Thread(target=exchange)
    thread.start()
    names = set()
    try:
        for _ in range(300):
            with suppress(QRecipeError):  # while the folder is away
                names.add(qrecipe.load_recipe(tree / "top.toml").name)
    finally:
        ended.set()
        thread.join()
    assert names == {"base"}


def test_no_descriptor_stays_open(opening, monkeypatch, tree):
    folder = "/proc/self/fd"
    if not os.path.isdir(folder):
        pytest.skip("needs /proc")
    before = len(os.listdir(folder))
    for _ in range(5):
        qrecipe.load_recipe(tree / "top.toml")
    swapping(monkeypatch, "base.toml", tree / "sub/base.toml", tree)
    with pytest.raises(RecipeReferenceError):
        qrecipe.load_recipe(tree / "top.toml")
    with pytest.raises(RecipeReferenceError):
        qrecipe.load_recipe(tree)
    assert len(os.listdir(folder)) == before
