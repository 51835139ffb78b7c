"""The console script, and ``python -m qrecipe``."""

from __future__ import annotations

import sys
from io import TextIOWrapper


def main() -> None:
    """Run the command line; without its extra, say so and end with status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a pipe may take ASCII only
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        text = "QR602 qrecipe's command line needs the extra cli: pip install 'qrecipe[cli]'"
        print(f"{text}\n  {error}", file=sys.stderr)
        sys.exit(2)
    from qrecipe.cli.app import app

    app(prog_name="qrecipe")


if __name__ == "__main__":
    main()
