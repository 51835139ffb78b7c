"""``qrecipe inspect``: show a stored model without torch."""

from __future__ import annotations

from collections import Counter
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrecipe.cli import options
from qrecipe.cli.output import out, out_json, reported
from qrecipe.errors.text import counted, one_line
from qrecipe.terminal.tables import render_table

if TYPE_CHECKING:
    from qrecipe.artifact.metadata import StoredModel


def inspect(file: options.Artifact, json: options.Json = False) -> None:
    """Show the recipe, plan and versions of a stored model, without torch.

    \b
    Examples:
      qrecipe inspect model.safetensors
      qrecipe inspect model.safetensors --json
    """
    with reported(as_json=json):
        from qrecipe.artifact.container import opened
        from qrecipe.artifact.metadata import stored_model

        with opened(Path(file)) as stored:
            found = stored_model(stored)
            stored.check()
        if json:
            out_json(_values(found))
        else:
            _show(found)


def _show(found: StoredModel) -> None:
    """Its origin and needs, then the recipe, the plan and the tensors."""
    from qrecipe.planning.text import SITE_COLUMNS, site_row

    header, contents, plan = found.header, found.contents, found.plan
    counts: Counter[str] = Counter(site.verdict for site in plan.sites)
    kinds = ("quantized", "passthrough", "float")
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in kinds)
    rows = [
        ("file", f"{header.file}, {header.start + header.nbytes:,} bytes, checksum ok"),
        ("recipe", f"{plan.recipe}, fingerprint {contents.fingerprint}"),
        ("plan", f"{plan.backend} ({plan.phase}): {counted(len(plan.sites), 'site')}, {verdicts}"),
        ("needs", _needs_text(found)),
        ("made on", _cpu_text(found)),
        ("saved by", ", ".join(f"{name} {text}" for name, text in contents.versions.items())),
        ("tensors", f"{len(header.tensors)}, {header.nbytes:,} bytes"),
    ]
    out("\n".join(f"{name:<9} {one_line(text)}" for name, text in rows))
    out(f"\n{contents.recipe}")
    out(render_table(SITE_COLUMNS, [tuple(map(one_line, site_row(site))) for site in plan]))
    tensors: list[tuple[str, ...]] = [
        (one_line(name), entry.dtype, "x".join(map(str, entry.shape)), f"{entry.nbytes:,}")
        for name, entry in sorted(header.tensors.items())
    ]
    tensors += [
        (one_line(name), "", "", one_line(f"is {stored}"))
        for name, stored in contents.aliases.items()
    ]
    out("\n" + render_table(("tensor", "dtype", "shape", "bytes"), tensors))


def _values(found: StoredModel) -> dict[str, Any]:
    """The same as one document; the plan is as in ``qrecipe plan --json``."""
    header, contents = found.header, found.contents
    return {
        "file": header.file,
        "bytes": header.start + header.nbytes,
        "tensor_bytes": header.nbytes,
        "fingerprint": contents.fingerprint,
        "recipe": contents.recipe,
        "plan": loads(contents.plan),
        "versions": dict(contents.versions),
        "needs": contents.needs.model_dump(mode="json"),
        "cpu": contents.cpu,
        "unjudged": list(contents.unjudged),
        "tensors": {
            name: {"dtype": entry.dtype, "shape": list(entry.shape), "bytes": entry.nbytes}
            for name, entry in sorted(header.tensors.items())
        },
        "aliases": dict(contents.aliases),
    }


def _cpu_text(found: StoredModel) -> str:
    from qrecipe.rules.resolution import listed

    contents = found.contents
    if not contents.unjudged:
        return contents.cpu or "an unknown CPU"
    return f"{contents.cpu}, which checked these with 7 bits only: {listed(contents.unjudged)}"


def _needs_text(found: StoredModel) -> str:
    plan, contents = found.plan, found.contents
    if plan.is_for_export:
        return f"nothing: a reference model, to be exported for {plan.backend}"
    vnni = "; a CPU with VNNI, or results may saturate" if contents.needs.vnni else ""
    return f"torch's engine {' and '.join(contents.needs.engines)}{vnni}"
