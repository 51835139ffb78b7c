"""The changelog tells of everything public."""

from __future__ import annotations

import re

from places import ROOT
from typer.main import get_command

import qrecipe
from qrecipe.cli.app import app

TEXT = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_changelog_has_the_version_and_every_public_name_and_command():
    assert f"## [{qrecipe.__version__}]" in TEXT
    named = set(re.findall(r"`([^`]+)`", TEXT))
    public = {
        name
        for name in qrecipe._HOME
        if not (isinstance(value := getattr(qrecipe, name), type) and issubclass(value, Exception))
    }
    assert public - named == set()
    commands = {f"qrecipe {command.name}" for command in get_command(app).commands.values()}
    assert commands - named == set()
