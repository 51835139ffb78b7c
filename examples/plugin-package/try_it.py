"""Installs this plugin and quantizes with it: `python examples/plugin-package/try_it.py`.

This happens in a temporary environment. Nothing is downloaded: the environment sees the packages of
this Python, which must include qrecipe and hatchling.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
DIGITS = PACKAGE.parent / "digits" / "digits.py"
RECIPE = "qrecipe-example-plugin:x86-percentile"
FUNCTIONS = {"model": "factory", "data": "calibration", "evaluate": "evaluate"}


def main() -> None:
    """Install, list what is available, and quantize the digits network with the plugin's recipe."""
    with tempfile.TemporaryDirectory() as folder:
        python = environment_with_plugin(Path(folder))
        qrecipe = (str(python), "-m", "qrecipe")
        run(*qrecipe, "list")
        functions = [f"--{name}={DIGITS}:{value}" for name, value in FUNCTIONS.items()]
        run(*qrecipe, "quantize", RECIPE, "--threads=1", *functions)


def environment_with_plugin(folder: Path) -> Path:
    """The Python of a new environment inside ``folder``, with the plugin installed."""
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    show_outer_packages(environment)
    # building leaves files next to the source
    source = shutil.copytree(PACKAGE, folder / "source")
    offline = ("--no-index", "--no-deps", "--no-build-isolation")
    pip = (sys.executable, "-m", "pip", "--python", str(python))
    run(*pip, "install", "--quiet", *offline, str(source))
    return python


def show_outer_packages(environment: Path) -> None:
    """Let an environment see the packages of the one that this program runs in.

    `--system-site-packages` would show those of the Python that both were made from.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in site.getsitepackages()]
    own = environment / "lib" / version / "site-packages"
    (own / "outer.pth").write_text("".join(lines), encoding="utf-8")


def run(*command: str) -> None:
    """Run a command and show its output. Raises `CalledProcessError` if it fails."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, env=variables)


if __name__ == "__main__":
    main()
