"""The origin of a quantized model, as the text that its files for other runtimes carry."""

from __future__ import annotations

import json
import os
from zipfile import ZipFile

from qrecipe.artifact.carriers import ENTRY
from qrecipe.artifact.origin import Origin, needs_of, texts_of
from qrecipe.execution.provenance import Provenance
from qrecipe.planning.plan import Plan


def text_of(origin: Provenance) -> str:
    """A JSON text, which begins with `carriers.BEGINNING`; `carried.carried` reads it back."""
    stored = Origin(
        recipe=origin.recipe,
        fingerprint=origin.fingerprint,
        plan=origin.plan,
        versions=dict(origin.versions),
        needs=needs_of(Plan.from_json(origin.plan)),
        cpu=origin.cpu,
        unjudged=origin.unjudged,
    )
    return json.dumps(texts_of(stored))


def add_to_archive(path: str | os.PathLike[str], text: str) -> None:
    """Add the text to an archive of torch, below its root."""
    with ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/{ENTRY}", text)
