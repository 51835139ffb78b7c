"""The console script, and ``python -m qrecipe``."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from io import TextIOWrapper

_UNWRITTEN = 1


def main() -> None:
    """Run the command line; exit with status 2 if its extra is not installed.

    If nobody reads the output any more, exit silently with status 1; if the output cannot be
    written, say so.
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
            sys.stdout.flush()  # not at exit, where an error could not be reported
    except OSError as error:
        if error.filename is not None:  # an error of a file, not of the output
            raise
        _give_up(error)


def _open_streams() -> None:
    """Replace closed streams, and escape what the encoding of a stream does not have."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _give_up(error: OSError) -> None:
    """Exit because stdout cannot be written; a closed pipe is not an error."""
    # the rest of the buffer would be written at exit, and fail again
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno != errno.EPIPE:
        with suppress(OSError):
            why = (error.strerror or str(error)).lower()
            print(f"QR431 cannot write to the standard output: {why}", file=sys.stderr)
    sys.exit(_UNWRITTEN)


if __name__ == "__main__":
    main()
