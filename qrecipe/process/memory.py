"""Running out of memory is reported as such, whichever step it interrupts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from qrecipe.errors.findings import ExecutionError, QRecipeError
from qrecipe.errors.text import first_line

_TORCHS = re.compile("can't allocate memory|out of memory|bad_alloc")
_BYTES = re.compile(r"tried to allocate (\d+) bytes")


def lacks_memory(error: BaseException) -> bool:
    """Whether Python or torch got no memory; torch says so in the text of a RuntimeError."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _TORCHS.search(str(error)) is not None
    )


@contextmanager
def lack_of_memory_said() -> Iterator[None]:
    """Raises ``ExecutionError`` (QR407) for an error that lack of memory has caused.

    Steps that call the caller's model turn what it raises into findings about the model.
    """
    try:
        yield
    except Exception as error:
        cause = next(filter(lacks_memory, _causes(error)), None)
        if cause is None or _is_said(error):
            raise
        asked = _BYTES.search(str(cause))
        what = "" if asked is None else f" for {int(asked[1]):,} bytes"
        hint = "use smaller batches, or a machine with more memory"
        text = f"there is not enough memory{what}"
        raise ExecutionError.of("QR407", text, hint=hint) from error


def _is_said(error: Exception) -> bool:
    """Whether an error of ours says it, of a step or (QR423) of the caller's own function."""
    return isinstance(error, ExecutionError) and error.findings[0].code in ("QR407", "QR423")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those during which it was raised."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def raise_lack_of_memory(error: Exception) -> None:
    """Raise the error again if memory ran out: what was running then is not to blame."""
    if any(map(lacks_memory, _causes(error))):
        raise error


@contextmanager
def failing_as(
    kind: type[QRecipeError], code: str, what: str, hint: str | None = None
) -> Iterator[None]:
    """What is raised inside becomes an error of ours: ``what``, and the first line of its message.

    Lack of memory stays what it is.
    """
    try:
        yield
    except Exception as error:
        raise_lack_of_memory(error)
        raise kind.of(code, f"{what}: {first_line(error)}", hint=hint) from error
