"""What the documentation takes from the project when it is built: the version, and the repository.

A hook of MkDocs. The repository is where the clone comes from, so that no address stands in the
sources; a clone of a folder has none, and the site no link. `QRECIPE_REPOSITORY` names another one.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_config(config: Any) -> Any:
    config.site_name = f"qrecipe {version()}"
    config.repo_url = repository(os.environ.get("QRECIPE_REPOSITORY") or origin())
    config.repo_name = "Repository" if config.repo_url else None
    return config


def version() -> str:
    text = (ROOT / "qrecipe" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'__version__ = "(.+)"', text)
    assert found
    return found[1]


def origin() -> str:
    """The remote that the clone comes from; empty if there is none."""
    command = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        return ""


def repository(remote: str) -> str | None:
    """The address of a remote in a browser: ``git@host:owner/name.git`` is one as well."""
    found = re.fullmatch(
        r"(?:https?://(?:[^/@]*@)?|ssh://(?:[^/@]*@)?|[\w.-]+@)([\w.-]+)(?::\d+)?[:/](.+?)(?:\.git)?/?",
        remote,
    )
    return f"https://{found[1]}/{found[2]}" if found else None
