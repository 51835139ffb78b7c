"""FX graph mode as an executor."""

from __future__ import annotations

from collections.abc import Sequence

from qrecipe._torch_fx import QConfigMapping
from qrecipe.execution.fx.configs import Configs
from qrecipe.execution.fx.isolated import isolated
from qrecipe.execution.fx.parts import FxPart, compile_part
from qrecipe.execution.fx.rebuilt import rebuilt
from qrecipe.execution.fx.structure import realised_sites
from qrecipe.execution.part import Compiled, Task
from qrecipe.model.copies import with_parts
from qrecipe.planning.backend import backend_config
from qrecipe.rules.structure import joined

__all__ = ["compile", "isolated", "realised_sites", "rebuilt", "traced_paths"]


def compile(task: Task) -> Compiled:
    """The graphs of the inventory, with the plan in them."""
    configs = Configs.of(task.plan, task.model, task.recipe.fx.preserved_attributes)
    parts = tuple(
        compile_part(task.plan, part, configs, task.unjudged) for part in task.inventory.parts
    )
    whole = with_parts(task.model, {part.path: part.graph_module for part in task.inventory.parts})
    return Compiled(
        parts,
        whole,
        _mapping(parts),
        backend_config(task.plan.backend, task.plan.phase),
        configs.prepare,
        configs.convert,
    )


def traced_paths(roots: Sequence[str]) -> tuple[str, ...]:
    """The roots, or the whole model."""
    return tuple(roots) or ("",)


def _mapping(parts: Sequence[FxPart]) -> QConfigMapping:
    """The very mapping that is executed; with several roots, those of all of them."""
    if not parts[0].path:
        return parts[0].emission.qconfig_mapping
    mapping = QConfigMapping().set_global(None)
    for part in parts:
        for name, qconfig in part.emission.qconfig_mapping.module_name_qconfigs.items():
            mapping.set_module_name(joined(part.path, name), qconfig)
    return mapping
