"""One observer for all tensors that have to share a scale.

Operations that copy give their output the scale of their input, and `cat` that of its first input.
torch shares observers from one such operation to the next, but fails if a later `cat` takes over
the producer of an earlier one.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from qrecipe._torch_ao import is_observer


def share_connected_observers(prepared: fx.GraphModule) -> None:
    """Merge all observers that are connected by copying operations, in place."""
    groups: dict[nn.Module, set[str]] = {}
    for node in prepared.graph.nodes:
        info = node.meta.get("target_dtype_info") or {}
        if not info.get("input_output_share_observers"):
            continue
        names = set(_observer_names(node, prepared))
        if not any(user.target in names for user in node.users):
            continue  # its output is not observed: it stays float
        merged: set[str] = set()
        for name in names:
            group = groups.setdefault(prepared.get_submodule(name), set())
            group.add(name)
            if group is not merged:
                smaller, merged = sorted((merged, group), key=len)
                merged |= smaller
                groups |= {prepared.get_submodule(name): merged for name in smaller}
    for names in {id(names): names for names in groups.values()}.values():
        first = prepared.get_submodule(min(names))
        for name in names:
            prepared.set_submodule(name, first)


def _observer_names(node: fx.Node, prepared: fx.GraphModule) -> Iterator[str]:
    """The observers of a node's inputs and of its output."""
    for other in (*node.all_input_nodes, *node.users):
        if other.op != "call_module":
            continue
        if is_observer(prepared.get_submodule(str(other.target))):
            yield str(other.target)
