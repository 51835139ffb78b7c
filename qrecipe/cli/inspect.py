"""``qrecipe inspect``: show a stored model without torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qrecipe.artifact.container import opened
from qrecipe.artifact.metadata import Contents, StoredModel, stored_model
from qrecipe.cli.output import out, out_json
from qrecipe.errors.text import counted, one_line
from qrecipe.planning.text import SITE_COLUMNS, site_row
from qrecipe.rules.resolution import listed
from qrecipe.terminal.tables import render_table


def inspect(file: str) -> StoredModel:
    """Raises ArtifactError for a file that `load_quantized` would refuse with any model."""
    with opened(Path(file)) as stored:
        return stored_model(stored)


def show_text(found: StoredModel) -> None:
    """Its origin and needs, then the recipe, the plan and the tensors."""
    header, contents, plan = found.header, found.contents, found.plan
    counts: Counter[str] = Counter(site.verdict for site in plan.sites)
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in _VERDICTS)
    rows = [
        ("file", f"{header.file}, {header.start + header.nbytes:,} bytes, checksum ok"),
        ("recipe", f"{plan.recipe}, fingerprint {contents.fingerprint}"),
        ("plan", f"{plan.backend} ({plan.phase}): {counted(len(plan.sites), 'site')}, {verdicts}"),
        ("needs", _needs_text(found)),
        ("made on", _cpu_text(contents)),
        ("saved by", ", ".join(f"{name} {text}" for name, text in contents.versions.items())),
        ("tensors", f"{len(header.tensors)}, {header.nbytes:,} bytes"),
    ]
    out("\n".join(f"{name:<9} {one_line(text)}" for name, text in rows))
    out(f"\n{contents.recipe}")
    out(render_table(SITE_COLUMNS, [tuple(map(one_line, site_row(site))) for site in plan]))
    out("\n" + render_table(("tensor", "dtype", "shape", "bytes"), list(_tensor_rows(found))))


def show_json(found: StoredModel) -> None:
    """The same as one document; the plan is as in ``qrecipe plan --json``."""
    header, contents = found.header, found.contents
    out_json(
        {
            "file": header.file,
            "bytes": header.start + header.nbytes,
            "tensor_bytes": header.nbytes,
            "fingerprint": contents.fingerprint,
            "recipe": contents.recipe,
            "plan": json.loads(contents.plan),
            "versions": dict(contents.versions),
            "needs": contents.needs.model_dump(mode="json"),
            "cpu": contents.cpu,
            "unjudged": list(contents.unjudged),
            "tensors": {name: _entry_json(found, name) for name in sorted(header.tensors)},
            "aliases": dict(contents.aliases),
        }
    )


_VERDICTS = ("quantized", "passthrough", "float")


def _cpu_text(contents: Contents) -> str:
    if not contents.unjudged:
        return contents.cpu or "an unknown CPU"
    return f"{contents.cpu}, which checked these with 7 bits only: {listed(contents.unjudged)}"


def _needs_text(found: StoredModel) -> str:
    if found.plan.is_for_export:
        return f"nothing: a reference model, to be exported for {found.plan.backend}"
    engines = " and ".join(found.contents.needs.engines)
    vnni = "; a CPU with VNNI, or results may saturate" if found.contents.needs.vnni else ""
    return f"torch's engine {engines}{vnni}"


def _tensor_rows(found: StoredModel) -> Iterator[tuple[str, ...]]:
    for name, entry in sorted(found.header.tensors.items()):
        yield one_line(name), entry.dtype, "x".join(map(str, entry.shape)), f"{entry.nbytes:,}"
    for name, stored in found.contents.aliases.items():
        yield one_line(name), "", "", one_line(f"is {stored}")


def _entry_json(found: StoredModel, name: str) -> Mapping[str, Any]:
    entry = found.header.tensors[name]
    return {"dtype": entry.dtype, "shape": list(entry.shape), "bytes": entry.nbytes}
