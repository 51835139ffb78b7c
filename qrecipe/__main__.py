"""The console script, and ``python -m qrecipe``."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from io import TextIOWrapper

_UNWRITTEN = 1


def main() -> None:
    """Run the command line; without its extra, say so and end with status 2.

    Where nobody reads the output any more it ends in silence with status 1, and where the output
    cannot be written it says so.
    """
    _open_streams()
    try:
        import typer  # noqa: F401
    except ImportError as error:
        text = "QR602 qrecipe's command line needs the extra cli: pip install 'qrecipe[cli]'"
        print(f"{text}\n  {error}", file=sys.stderr)
        sys.exit(2)
    from qrecipe.cli.app import app

    try:
        try:
            app(prog_name="qrecipe")
        finally:
            sys.stdout.flush()  # not at exit, where nothing could be said of an error
    except OSError as error:
        if error.filename is not None:  # of a file, and not of the output
            raise
        _give_up(error)


def _open_streams() -> None:
    """Take what was closed for a stream that nobody reads, and a pipe that takes ASCII only."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _give_up(error: OSError) -> None:
    """End where stdout takes no more: that a pipe is closed is no error of anybody's."""
    # what is still held would be written at exit, and fail again
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno != errno.EPIPE:
        with suppress(OSError):
            why = (error.strerror or str(error)).lower()
            print(f"QR431 cannot write to the standard output: {why}", file=sys.stderr)
    sys.exit(_UNWRITTEN)


if __name__ == "__main__":
    main()
