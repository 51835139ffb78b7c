"""Numbers that keep the range of what they come from are observed once, there.

The parts and means of a tensor share its observer, but are narrower: observed as well, they would
narrow a moving average, and the whole would be clipped. torch's conversion, however, wants an
observer at every output.
"""

from __future__ import annotations

from torch import fx

from qrecipe._torch_ao import FakeQuantizeBase
from qrecipe.execution.fake_quants import RoundsAlike
from qrecipe.execution.fx.drops import before_drops
from qrecipe.model.kept_ranges import gives_all, keeps_range
from qrecipe.model.moving import moves
from qrecipe.model.same_graph import observing


def observe_once(prepared: fx.GraphModule) -> None:
    """Remove the observers of what keeps the range of its input, which has them as well, in place.

    In training, means are still rounded. What gives all numbers of its input is left alone.
    """
    nodes = _keeping_range(prepared)
    is_observer = observing(prepared)
    origin_of: dict[fx.Node, fx.Node] = {}  # the observer that a narrower tensor shares
    for node in nodes:
        source = before_drops(node.all_input_nodes[0])
        origin = origin_of.get(source, source)
        is_narrower = source in origin_of or not gives_all(node, prepared)
        if not is_observer(origin) or not is_narrower:
            continue
        origin_of[node] = origin
        shared = prepared.get_submodule(str(origin.target))
        for user in list(node.users):
            if not is_observer(user) or prepared.get_submodule(str(user.target)) is not shared:
                continue
            if isinstance(shared, FakeQuantizeBase) and not moves(node):
                prepared.set_submodule(str(user.target), RoundsAlike(shared))
                origin_of[user] = origin
            else:
                user.replace_all_uses_with(node)
                prepared.graph.erase_node(user)
                prepared.delete_submodule(str(user.target))
    if nodes:
        prepared.recompile()


def observe_again(prepared: fx.GraphModule) -> None:
    """Put the observers back that `observe_once` removed, in place."""
    nodes = _keeping_range(prepared)
    is_observer = observing(prepared)
    qconfigs = prepared.meta["_observed_graph_module_attrs"].node_name_to_qconfig
    for node in nodes:
        source, readers = before_drops(node.all_input_nodes[0]), list(node.users)
        if not is_observer(source) or qconfigs.get(node.name) is None:
            continue
        shared = prepared.get_submodule(str(source.target))
        observed = [
            reader
            for reader in filter(is_observer, readers)
            if (module := prepared.get_submodule(str(reader.target))) is shared
            or isinstance(module, RoundsAlike)
        ]
        for reader in observed:
            reader.target = source.target
        if observed:
            continue
        with prepared.graph.inserting_after(node):
            again = prepared.graph.call_module(str(source.target), (node,))
        for reader in readers:
            reader.replace_input_with(node, again)
    if nodes:
        prepared.recompile()


def _keeping_range(prepared: fx.GraphModule) -> list[fx.Node]:
    return [node for node in prepared.graph.nodes if keeps_range(node, prepared)]
