"""The module of a program, prepared or converted."""

from __future__ import annotations

from typing import Any

from torch import fx

from qrecipe.errors.findings import ArtifactError


class ProgramModule(fx.GraphModule):
    """A graph that says what to do instead of pickling it.

    torch cannot: its programs hold functions without a name. It would also trace the graph again,
    and lose which operator is of which site.
    """

    def __reduce__(self) -> Any:
        raise ArtifactError.of(
            "QR511",
            "a program of PT2E cannot be pickled",
            hint="save_quantized stores a converted one and load_quantized makes it again, in any "
            "process; export_pt2 writes what torch alone can load; of a prepared one, pickle the "
            "state_dict",
        )
