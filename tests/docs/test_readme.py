"""What the README names is there; its blocks are run by tests/support/pages.py."""

from __future__ import annotations

import re

from places import ROOT
from typer.testing import CliRunner

from qrecipe.cli.app import app

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_and_file_that_is_named_is_there():
    commands = set(re.findall(r"`qrecipe (\w+)", README))
    assert {"check", "show", "plan", "explain", "list"} <= commands
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
    text = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)]+)\)", text)
    scripts = re.findall(r"(?:benchmarks|examples)/[\w/]+\.py", README)
    assert links
    assert scripts
    files = [path.partition("#")[0] for path in (*links, *scripts)]
    assert [path for path in files if not (ROOT / path).exists()] == []
