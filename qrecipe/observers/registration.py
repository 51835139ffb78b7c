"""Names for observers, fake-quants and transforms: built-in and user-registered ones.

A class is tested against a contract when it is registered, so that problems show up in its
definition and not in a model.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from qrecipe._torch_ao import FakeQuantizeBase, ObserverBase, named_class
from qrecipe.errors.findings import Finding, PluginError, UnknownNameError
from qrecipe.errors.text import shown
from qrecipe.observers.contract import contract_findings
from qrecipe.registry import table as registered
from qrecipe.registry.arguments import KIND_TITLE, SPEC_ARGUMENTS, Kind, Signature, TypeTag
from qrecipe.registry.builtin import BUILTIN, signature, unknown_name
from qrecipe.registry.entry_points import PLAIN_NAME

_C = TypeVar("_C", bound=type)


def register_observer(name: str, *, options: type[BaseModel] | None = None) -> Callable[[_C], _C]:
    """Make a class available to recipes as ``observer = "name"``; a decorator.

    The arguments that a recipe may give are those of ``__init__``, or of ``options``, a Pydantic
    model that also validates them. Registering a class of the same module and qualified name again
    replaces it.

    Raises:
        PluginError: the name is taken (QR151), or the class breaks the contract (QR150).
    """
    return decorator("observer", name, options, callers_module(), _contract("observer", name))


def register_fake_quant(name: str, *, options: type[BaseModel] | None = None) -> Callable[[_C], _C]:
    """Make a class available to recipes as ``fake_quant = "name"``; see `register_observer`."""
    return decorator("fake_quant", name, options, callers_module(), _contract("fake_quant", name))


def constructor_arguments(kind: Kind, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments for the class of that name, from those in a recipe."""
    registration = registered.find(kind, name)
    if registration is None or registration.options is None:
        return dict(given)
    return registration.options(**given).model_dump()


def created(kind: Kind, name: str, given: Mapping[str, Any]) -> Any:
    """An instance of the class of that name, with the arguments in a recipe."""
    return class_of(kind, name)(**constructor_arguments(kind, name, given))


def class_of(kind: Kind, name: str) -> type[Any]:
    """The class of that name. Raises UnknownNameError (QR104)."""
    registration = registered.find(kind, name)
    if registration is not None:
        return registration.cls
    found = signature(kind, name)
    if found is None:
        problem = unknown_name(kind, name)
        raise UnknownNameError.of(problem.code, problem.message, hint=problem.hint)
    return named_class(found.target)


def callers_module() -> str:
    """The module of the caller's caller."""
    return str(sys._getframe(2).f_globals.get("__name__", "?"))


Contract = Callable[[object], Sequence[Finding]]
"""Tries a class, and says what is wrong with it."""


def _contract(kind: Kind, name: str) -> Contract:
    return lambda cls: contract_findings(kind, name, cls)


def decorator(
    kind: Kind, name: str, options: type[BaseModel] | None, module: str, contract: Contract
) -> Callable[[_C], _C]:
    """What registers a class of a kind under a name, for ``module``.

    Raises ``PluginError`` as `register_observer`.
    """
    problem = _misuse(kind, name, options)
    if problem is not None:
        raise PluginError(problem)

    def register(cls: _C) -> _C:
        findings = _name_findings(kind, name, cls) or list(contract(cls))
        if findings:
            raise PluginError(findings)
        found = _signature_of(cls, options)
        registered.put(registered.Registration(name, kind, cls, found, module, options))
        return cls

    return register


def _misuse(kind: Kind, name: object, options: object) -> Finding | None:
    """The finding for a decorator without a name, or with invalid options."""
    written = f'write @register_{kind}("name") above the class'
    if not isinstance(name, str):
        return Finding("QR150", f"register_{kind} got {shown(str(name))} as its name", hint=written)
    if options is None or (isinstance(options, type) and issubclass(options, BaseModel)):
        return None
    return Finding(
        "QR150",
        f"the options of {shown(name)} are {shown(str(options))}",
        hint="options must be a subclass of pydantic.BaseModel",
    )


def _name_findings(kind: Kind, name: str, cls: type) -> list[Finding]:
    title = f"{KIND_TITLE[kind]} {shown(name)}"
    if not PLAIN_NAME.fullmatch(name):
        mend = "use lower-case letters, digits and underscores, with a letter first"
        return [Finding("QR150", f"{title} has an invalid name", hint=mend)]
    if name in BUILTIN[kind]:
        return [Finding("QR151", f"{title} is built in", hint="choose another name")]
    earlier = registered.find(kind, name)
    if earlier is not None and earlier.signature.target != _qualified_name(cls):
        mend = "choose another name"
        return [Finding("QR151", f"{title} is taken by {earlier.signature.target}", hint=mend)]
    return []


def _qualified_name(cls: object) -> str:
    return f"{getattr(cls, '__module__', '?')}.{getattr(cls, '__qualname__', '?')}"


def _signature_of(cls: type, options: type[BaseModel] | None) -> Signature:
    if options is not None:
        fields = options.model_fields
        tags = {
            name: _tag(field.annotation, inspect.Parameter.empty) for name, field in fields.items()
        }
        required = frozenset(name for name, field in fields.items() if field.is_required())
        return Signature(_qualified_name(cls), tags, required)
    return Signature(_qualified_name(cls), dict(own_parameters(cls)))


def own_parameters(cls: type) -> Iterator[tuple[str, TypeTag]]:
    """The constructor's arguments that are not in the tensor spec, with their type tags.

    If a constructor takes ``**kwargs``, the arguments of its base classes count as well.
    """
    seen = {"self", "observer", *SPEC_ARGUMENTS}
    for base in cls.__mro__:
        if base in (ObserverBase, FakeQuantizeBase):
            return
        if "__init__" not in vars(base):
            continue
        hints = _hints(base)
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        for parameter in parameters:
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if named and parameter.name not in seen:
                yield parameter.name, _tag(hints.get(parameter.name), parameter.default)
                seen.add(parameter.name)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(vars(cls)["__init__"])
    except Exception:  # annotations that cannot be resolved are not an error here
        return {}


_TAGS: dict[Any, TypeTag] = {bool: "bool", int: "int", float: "float", str: "str"}


def _tag(annotation: Any, default: Any) -> TypeTag:
    if annotation in _TAGS:
        return _TAGS[annotation]
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (list, tuple, Sequence) and all(a in (int, float, ...) for a in inner):
        return "number_list"
    if annotation is None and type(default) in _TAGS:
        return "float" if type(default) is int else _TAGS[type(default)]
    return "any"
