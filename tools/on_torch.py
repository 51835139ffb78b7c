"""Run something with several versions of torch, by default the tests.

    python tools/on_torch.py 2.10 2.15
    python tools/on_torch.py --python python3.12 --in .torch-py312 2.13
    python tools/on_torch.py 2.13 2.10 2.15 -- tools/digits_on_torch.py .torch/digits

Each version has an environment of its own, `.torch/VERSION`, with the versions of constraints.txt
for all else. It is made where there is none, and used as it is where there is one; remove it when
you are done (1 to 6 GB). What pip is set to holds: with PIP_EXTRA_INDEX_URL set to PyTorch's index
of CPU wheels, CPU builds are installed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ("-m", "pytest")
CHOSEN_BY_PIP = ("torch==", "torchvision==")


def main(arguments: Sequence[str]) -> int:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = _parser().parse_args(arguments[:end])
    command = arguments[end + 1 :] or TESTS
    folder: Path = options.folder
    failed = False
    summary = []
    for version in options.versions:
        python = environment(version, options.python, folder / version)
        code, last = run(python, command)
        failed |= code != 0
        summary.append(f"torch {version:8}{'FAILED' if code else 'ok':8}{last}")
    print("", *summary, sep="\n")
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--python PYTHON] [--in FOLDER] VERSION... [-- ARGUMENTS OF PYTHON]",
    )
    parser.add_argument("versions", nargs="+", metavar="VERSION", help="such as 2.10 or 2.12.1")
    parser.add_argument("--python", default=sys.executable, help="makes new environments")
    parser.add_argument(
        "--in",
        dest="folder",
        type=Path,
        default=ROOT / ".torch",
        metavar="FOLDER",
        help="has the environments; .torch if left out",
    )
    return parser


def environment(version: str, python: str, folder: Path) -> Path:
    """The Python of the environment with that torch, which is made first where there is none."""
    there = folder.absolute() / "bin" / "python"
    if there.exists():
        return there
    try:
        make(version, python, folder)
    except BaseException:
        there.unlink(missing_ok=True)  # what is half made is completed next time
        raise
    return there


def make(version: str, python: str, folder: Path) -> None:
    """Make an environment with that torch, the pinned versions of all else, and this clone."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [folder.absolute() / "bin" / "python", "-m", "pip", "install", "--quiet"]
    pinned = folder / "pinned.txt"
    pinned.write_text("\n".join(pins()) + "\n", encoding="utf-8")
    subprocess.run([*pip, requirement(version), "-r", pinned], check=True)
    subprocess.run([*pip, "--no-deps", "-e", ROOT], check=True)
    corpus = [*pip, requirement(version), "-e", f"{ROOT}[corpus]"]
    if subprocess.run(corpus, check=False).returncode != 0:
        print(f"no torchvision for torch {version}: tests that need it are skipped")


def requirement(version: str) -> str:
    """``torch==2.10.*`` for 2.10, ``torch==2.12.1`` for 2.12.1."""
    return f"torch=={version}" if version.count(".") == 2 else f"torch=={version}.*"


def pins() -> Iterator[str]:
    """The lines of constraints.txt, without what depends on the version of torch."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith(("#", *CHOSEN_BY_PIP)):
            yield line


def run(python: Path, arguments: Sequence[str]) -> tuple[int, str]:
    """Run Python in the clone, show what it prints, and return its exit code and its last line."""
    bare = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    path = os.pathsep.join([str(python.parent), bare["PATH"]])
    last = ""
    with subprocess.Popen(
        [python, *arguments],
        cwd=ROOT,
        env={**bare, "PATH": path, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode, last


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
