"""Enter the names of the installed torch's module types and functions for `registry.builtin`.

    python tools/torch_names.py        # run with each version of torch that is to be supported

A test compares the committed file with what the installed torch gives.
"""

from __future__ import annotations

import json
import operator
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.ao.nn.quantized
from torch.fx.graph import inplace_methods, magic_methods
from torch.nn import functional
from torch.overrides import get_testing_overrides

Names = dict[str, Any]

PATH = Path(__file__).parents[1] / "qrecipe" / "registry" / "torch_names.json"

# Python's operators on tensors, by the function that computes the same.
OPERATORS = {
    "and": "bitwise_and",
    "floordiv": "floor_divide",
    "invert": "bitwise_not",
    "lshift": "bitwise_left_shift",
    "mod": "remainder",
    "or": "bitwise_or",
    "pos": "positive",
    "rshift": "bitwise_right_shift",
    "truediv": "div",
    "xor": "bitwise_xor",
}

# Documented as an alias of a function in one of the namespaces that recipes know.
ALIAS = re.compile(
    r"Alias (?:for|of) :\w+:`~?(?:torch\.nn\.functional\.|torch\.|Tensor\.)?(\w+)(?:\(\))?`"
)


def torch_names() -> Names:
    """Module types (public to internal name), functions by namespace, and merged families."""
    functions = _functions()
    return {
        "module_types": _module_types(),
        "functions": functions,
        "families": _families(functions),
    }


def _module_types() -> dict[str, str]:
    public = {
        f"torch.nn.{name}": value
        for name, value in vars(torch.nn).items()
        if isinstance(value, type) and issubclass(value, torch.nn.Module)
    }
    public["torch.ao.nn.quantized.FloatFunctional"] = torch.ao.nn.quantized.FloatFunctional
    return {name: f"{cls.__module__}.{cls.__qualname__}" for name, cls in sorted(public.items())}


def _functions() -> dict[str, list[str]]:
    tensor_functions = get_testing_overrides()
    native = dir(torch._C._VariableFunctions)
    own = [name for name, value in vars(functional).items() if _is_documented_here(value)]
    return {
        "torch": [
            name
            for name in _callables(torch)
            if name in native or getattr(torch, name) in tensor_functions
        ],
        "torch.nn.functional": [
            name
            for name in _callables(functional)
            if name in own or getattr(functional, name.rstrip("_"), None) in tensor_functions
        ],
        "torch.Tensor": _callables(torch.Tensor),
        "operator": sorted({*magic_methods, *inplace_methods} & set(dir(operator))),
    }


def _is_documented_here(value: object) -> bool:
    here = getattr(value, "__module__", None) == functional.__name__
    return here and getattr(value, "__doc__", None) is not None


def _callables(namespace: ModuleType | type) -> list[str]:
    values = {name: getattr(namespace, name) for name in dir(namespace) if name[0] != "_"}
    return sorted(
        name for name, value in values.items() if callable(value) and not isinstance(value, type)
    )


def _families(functions: dict[str, list[str]]) -> dict[str, str]:
    """Names, without the underscores of in-place forms, that belong to a family of another name."""
    in_place = {name: name[1:].strip("_") for name in inplace_methods if name[0] == "i"}
    operators = OPERATORS | {name: OPERATORS.get(base, base) for name, base in in_place.items()}
    aliases = {
        name.strip("_"): match[1].strip("_")
        for namespace, source in (("torch", torch), ("torch.Tensor", torch.Tensor))
        for name in functions[namespace]
        if (match := ALIAS.search(getattr(source, name).__doc__ or ""))
    }
    merged = aliases | operators
    return {name: family for name, family in sorted(merged.items()) if name != family}


def merged(table: Names, version: str, installed: Names) -> Names:
    """The table with the names of one more version of torch, or the same one read again.

    It holds the names of all versions, and for each version those that it lacks.
    """
    functions = {
        namespace: sorted({*table["functions"][namespace], *names})
        for namespace, names in installed["functions"].items()
    }
    module_types = table["module_types"] | installed["module_types"]
    every = dotted({"functions": functions, "module_types": module_types})
    new = every - dotted(table)
    lacking = {other: {*names, *new} for other, names in table["lacking"].items()}
    lacking[version] = every - dotted(installed)
    return {
        "module_types": module_types,
        "functions": functions,
        "families": table["families"] | installed["families"],
        "lacking": {version: sorted(names) for version, names in lacking.items()},
    }


def dotted(names: Names) -> set[str]:
    """The full names of functions and module types, such as ``torch.nn.functional.relu``."""
    functions = names["functions"].items()
    return {*names["module_types"], *(f"{space}.{name}" for space, of in functions for name in of)}


def main() -> None:
    table = json.loads(PATH.read_text(encoding="utf-8"))
    version = ".".join(torch.__version__.split(".")[:2])
    text = json.dumps(merged(table, version, torch_names()), indent=1, sort_keys=True)
    PATH.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
