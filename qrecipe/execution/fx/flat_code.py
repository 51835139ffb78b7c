"""Generated code that looks each submodule up once, instead of from the top for every call.

FX writes ``getattr(getattr(self.blocks, "0"), "1").conv(x)`` for a call. Every step of that is a
look-up in Python, which takes some percent of the time of a small int8 net. The names of modules,
and so of the ``state_dict``, stay as they are, and TorchScript still compiles the code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx
from torch.fx.graph import CodeGen, PythonCode, _format_target

_ASSIGNED = re.compile(r"\s+(\w+)( : [^=]+)? = ")


def look_modules_up_once(graph_module: fx.GraphModule) -> None:
    """Let the code of a graph, and of its copies, keep what contains several modules in a local."""
    graph_module.graph.set_codegen(_FlatCode())
    graph_module.recompile()


class _FlatCode(CodeGen):
    def _gen_python_code(self, nodes: Any, root_module: str, *args: Any, **kwargs: Any) -> Any:
        code: PythonCode = super()._gen_python_code(nodes, root_module, *args, **kwargs)
        called = {
            node.name: str(node.target)
            for node in nodes
            if node.op == "call_module" and "." in str(node.target)
        }
        code.src = "\n".join(_flat(code.src, called, root_module))
        return code


def _flat(source: str, called: Mapping[str, str], root: str) -> Iterator[str]:
    """The lines of ``source``; ``called`` are the paths of modules by the name of the result."""
    taken = set(re.findall(r"\w+", source))
    local_of = {"": root}
    for line in source.split("\n"):
        assigned = _ASSIGNED.match(line)
        path = None if assigned is None else called.get(assigned[1])
        if assigned is None or path is None:
            yield line
            continue
        outer, _, name = path.rpartition(".")
        yield from _locals_for(outer, local_of, taken)
        chain = _format_target(root, path)
        rest = line[assigned.end() :].removeprefix(chain)
        yield f"{assigned[0]}{_format_target(local_of[outer], name)}{rest}"


def _locals_for(path: str, local_of: dict[str, str], taken: set[str]) -> Iterator[str]:
    """The lines that give the module at ``path``, and what contains it, a local name."""
    if path in local_of:
        return
    outer, _, name = path.rpartition(".")
    yield from _locals_for(outer, local_of, taken)
    local = re.sub(r"\W", "_", path)
    while local in taken or not local.isidentifier():
        local = f"_{local}"
    taken.add(local)
    local_of[path] = local
    yield f"    {local} = {_format_target(local_of[outer], name)}"
