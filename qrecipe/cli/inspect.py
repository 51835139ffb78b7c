"""``qrecipe inspect``: show a stored or exported model without torch."""

from __future__ import annotations

from collections import Counter
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from qrecipe.cli import options
from qrecipe.cli.output import out, out_json
from qrecipe.errors.text import counted, one_line
from qrecipe.terminal.tables import render_table

if TYPE_CHECKING:
    from qrecipe.artifact.carried import Carried
    from qrecipe.artifact.metadata import Origin, StoredModel
    from qrecipe.planning.plan import Plan


def inspect(
    file: Annotated[
        str, options.argument("FILE", "A file from save_quantized, or one that was exported.")
    ],
    json: options.Json = False,
) -> None:
    """Show the recipe, plan and versions of a stored or exported model, without torch.

    \b
    Examples:
      qrecipe inspect model.safetensors
      qrecipe inspect model.safetensors --json
      qrecipe inspect model.onnx
    """
    from qrecipe.artifact.carried import carried
    from qrecipe.artifact.container import opened
    from qrecipe.artifact.metadata import stored_model

    exported = carried(Path(file))
    if exported is not None:
        if json:
            own = {"file": exported.file, "kind": exported.kind, "bytes": exported.nbytes}
            out_json({**own, **_origin_values(exported.origin)})
        else:
            _show_exported(exported)
        return
    with opened(Path(file)) as stored:
        found = stored_model(stored)
        stored.check()
    if json:
        out_json(_values(found))
    else:
        _show(found)


def _show_exported(found: Carried) -> None:
    """Its origin, then the recipe and the plan."""
    origin, plan = found.origin, found.checked.plan
    _show_origin(
        origin,
        plan,
        ("file", f"{found.file}, {found.kind}, {found.nbytes:,} bytes"),
        ("made on", _cpu_text(origin)),
        ("saved by", _versions_text(origin)),
    )


def _show(found: StoredModel) -> None:
    """Its origin and needs, then the recipe, the plan and the tensors."""
    header, contents, plan = found.header, found.contents, found.plan
    _show_origin(
        contents,
        plan,
        ("file", f"{header.file}, {header.start + header.nbytes:,} bytes, checksum ok"),
        ("needs", _needs_text(found)),
        ("made on", _cpu_text(contents)),
        ("saved by", _versions_text(contents)),
        ("tensors", f"{len(header.tensors)}, {header.nbytes:,} bytes"),
    )
    tensors: list[tuple[str, ...]] = [
        (one_line(name), entry.dtype, "x".join(map(str, entry.shape)), f"{entry.nbytes:,}")
        for name, entry in sorted(header.tensors.items())
    ]
    tensors += [
        (one_line(name), "", "", one_line(f"is {stored}"))
        for name, stored in contents.aliases.items()
    ]
    out("\n" + render_table(("tensor", "dtype", "shape", "bytes"), tensors))


def _show_origin(origin: Origin, plan: Plan, *others: tuple[str, str]) -> None:
    """Rows about the file, the first of them first, then the recipe and the plan."""
    from qrecipe.planning.text import site_table

    counts: Counter[str] = Counter(site.verdict for site in plan.sites)
    kinds = ("quantized", "passthrough", "float")
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in kinds)
    file, *more = others
    rows = [
        file,
        ("recipe", f"{plan.recipe}, fingerprint {origin.fingerprint}"),
        ("plan", f"{plan.backend} ({plan.phase}): {counted(len(plan.sites), 'site')}, {verdicts}"),
        *more,
    ]
    out("\n".join(f"{name:<9} {one_line(text)}" for name, text in rows))
    out(f"\n{origin.recipe}")
    out(site_table(plan.sites).text())


def _origin_values(origin: Origin) -> dict[str, Any]:
    return {
        "fingerprint": origin.fingerprint,
        "recipe": origin.recipe,
        "plan": loads(origin.plan),
        "versions": dict(origin.versions),
        "needs": origin.needs.model_dump(mode="json"),
        "cpu": origin.cpu,
        "unjudged": list(origin.unjudged),
    }


def _values(found: StoredModel) -> dict[str, Any]:
    """The same as one document; the plan is as in ``qrecipe plan --json``."""
    header, contents = found.header, found.contents
    return {
        "file": header.file,
        "bytes": header.start + header.nbytes,
        "tensor_bytes": header.nbytes,
        **_origin_values(contents),
        "tensors": {
            name: {"dtype": entry.dtype, "shape": list(entry.shape), "bytes": entry.nbytes}
            for name, entry in sorted(header.tensors.items())
        },
        "aliases": dict(contents.aliases),
    }


def _cpu_text(origin: Origin) -> str:
    from qrecipe.rules.resolution import listed

    if not origin.unjudged:
        return origin.cpu or "an unknown CPU"
    return f"{origin.cpu}, which checked these with 7 bits only: {listed(origin.unjudged)}"


def _versions_text(origin: Origin) -> str:
    return ", ".join(f"{name} {text}" for name, text in origin.versions.items())


def _needs_text(found: StoredModel) -> str:
    plan, contents = found.plan, found.contents
    if plan.is_for_export:
        return f"nothing: a reference model, to be exported for {plan.backend}"
    vnni = "; a CPU with VNNI, or results may saturate" if contents.needs.vnni else ""
    names = contents.needs.engines
    return f"torch's engine{'s' if len(names) > 1 else ''} {' and '.join(names)}{vnni}"
