"""Opens the layers of a model that hold layers, and proves that it computes the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain, takewhile
from typing import Any

from torch import nn

from qrecipe.errors.text import first_line
from qrecipe.model.altered_modules import alteration
from qrecipe.model.call import Inputs, on_few
from qrecipe.model.class_names import class_names
from qrecipe.model.copies import runnable_copy, structural_copy
from qrecipe.model.dry_run import try_out
from qrecipe.model.opened import transformer
from qrecipe.model.opened.activations import open_activation
from qrecipe.model.opened.attention import open_attention
from qrecipe.model.opened.linear import is_linear, is_product, open_product
from qrecipe.model.opened.whole import note_class
from qrecipe.model.opened.windows import open_windows
from qrecipe.model.trace_proof import difference
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.process.state import random_numbers_kept
from qrecipe.process.warnings import held_back
from qrecipe.recipe.schema import FxTable
from qrecipe.rules.structure import enclosing

_Opener = Callable[[Any], None]
"""Turns a layer into one of ours, in place."""


def _turn_into(kind: type[nn.Module]) -> _Opener:
    def turn(module: nn.Module) -> None:
        module.__class__ = kind

    return turn


_OPENERS: Mapping[type[nn.Module], _Opener] = {
    nn.MultiheadAttention: open_attention,
    nn.TransformerEncoderLayer: _turn_into(transformer.TransformerEncoderLayer),
    nn.TransformerDecoderLayer: _turn_into(transformer.TransformerDecoderLayer),
    nn.TransformerEncoder: transformer.open_encoder,
    nn.TransformerDecoder: _turn_into(transformer.TransformerDecoder),
    nn.Transformer: _turn_into(transformer.Transformer),
}
_OF_TORCHVISION = {
    f"torchvision.models.swin_transformer.{name}": open_windows
    for name in ("ShiftedWindowAttention", "ShiftedWindowAttentionV2")
}
"""By name, as torchvision need not be installed."""
_STAYS = "it stays one operation: "


@dataclass(frozen=True, slots=True)
class Opening:
    """The paths of the layers that are opened, outermost first, and why others stay ``whole``."""

    paths: tuple[str, ...] = ()
    whole: Mapping[str, str] = field(default_factory=dict)

    def without(self, at: str, why: str) -> Opening | None:
        """Without the outermost opened layer around ``at``, or None if none is opened there."""
        outermost = next((path for path in reversed(enclosing(at)) if path in self.paths), None)
        if outermost is None:
            return None
        paths = tuple(path for path in self.paths if outermost not in enclosing(path))
        return Opening(paths, {**self.whole, outermost: f"{_STAYS}{why}"})


def opened_at(model: nn.Module, paths: Collection[str]) -> nn.Module:
    """A copy of the model with the layers at ``paths`` opened; it shares all tensors.

    Without paths, it is the model itself.
    """
    if not paths:
        return model
    copied = structural_copy(model)
    for path in paths:
        module = copied.get_submodule(path)
        opener = _opener(module) or open_activation
        kind = type(module)
        note_class(module, kind)
        opener(module)
        if _replaces_code(kind):  # ours in the place of torch's, which super() of its code finds
            bases = kind, type(module)
            module.__class__ = type(kind.__name__, bases, {"__module__": __name__})
    return copied


def opening_of(model: nn.Module, inputs: Inputs, table: FxTable) -> Opening:
    """What can be opened within the roots, with the same outputs for the example inputs.

    Nothing is opened in a model that does not run.
    """
    return proven(_candidates(model, table), model, inputs)


def proven(found: Opening, model: nn.Module, inputs: Inputs) -> Opening:
    """What of an opening gives the same outputs for the example inputs."""
    if not found.paths:
        return found
    try:
        few, expected = on_few(inputs, lambda few: (few, _output(model, few)))
    except Exception as error:
        raise_lack_of_memory(error)
        return Opening()
    if _difference(model, found.paths, few, expected) is None:
        return found
    for path in found.paths:
        group = tuple(each for each in found.paths if path in enclosing(each))
        why = _difference(model, group, few, expected)
        if why is not None and path in found.paths:
            why = _left_out(type(model.get_submodule(path))) or why
            found = found.without(path, why) or found
    return found


def _candidates(model: nn.Module, table: FxTable) -> Opening:
    whole: dict[str, str] = {}
    paths: list[str] = []
    for path, module in model.named_modules():
        opener = _opener(module)
        if opener is open_product and not (path and is_product(module)):
            continue  # the calls of its forward, as of the model's own, are sites
        owner = path.rpartition(".")[0]
        if path and isinstance(model.get_submodule(owner), nn.MultiheadAttention):
            continue  # it reads the weights of what it holds
        if opener is None or not _is_traced(path, module, table):
            continue
        if not whole.keys().isdisjoint(enclosing(path)):
            continue
        why = alteration(module)
        if why is None:
            paths.append(path)
        else:
            whole[path] = why
    return Opening(tuple(paths), whole)


def _is_traced(path: str, module: nn.Module, table: FxTable) -> bool:
    """Whether a path is inside the roots, and tracing may look into the module."""
    around = enclosing(path)
    kind = type(module)
    return (
        (not table.roots or not set(table.roots).isdisjoint(around))
        and set(table.non_traceable_module_name).isdisjoint(around)
        and class_names(kind).isdisjoint(table.non_traceable_module_class)
    )


def _opener(module: nn.Module) -> _Opener | None:
    """What opens a layer of torch's or of a subclass, or makes one that multiplies linear."""
    torchs = _torchs(type(module))
    if torchs is not None:
        return _OPENERS[torchs]
    if is_linear(module):
        return open_product
    return _OF_TORCHVISION.get(f"{type(module).__module__}.{type(module).__qualname__}")


def _torchs(kind: type) -> type[nn.Module] | None:
    return next((each for each in kind.__mro__ if each in _OPENERS), None)


def _replaces_code(kind: type) -> bool:
    """Whether a subclass of one of torch's layers replaces code that it inherits."""
    torchs = _torchs(kind)
    if torchs is None:
        return False
    own = chain.from_iterable(map(vars, takewhile(lambda each: each is not torchs, kind.__mro__)))
    code = {name for name, value in vars(torchs).items() if inspect.isfunction(value)}
    return not code.isdisjoint(set(own) - {"__init__"})


_BLOCKS = ("_sa_block", "_ff_block")


def _left_out(kind: type) -> str | None:
    """Why an encoder layer with blocks of its own, which torch's fast path skips, stays whole."""
    torchs = nn.TransformerEncoderLayer
    if not issubclass(kind, torchs):
        return None
    own = [name for name in _BLOCKS if getattr(kind, name) is not getattr(torchs, name)]
    if not own:
        return None
    return (
        f"without gradients, torch's fast path leaves out its own {' and '.join(own)}, and so does "
        "this model; torch.backends.mha.set_fastpath_enabled(False), called before, lets torch "
        "call it"
    )


def _output(model: nn.Module, inputs: Inputs) -> Any:
    # the model gives its warnings when it is traced
    with random_numbers_kept(), held_back([("", Warning)]):
        return try_out(runnable_copy(model), inputs.cloned(), model)


def _difference(
    model: nn.Module, paths: Collection[str], inputs: Inputs, expected: Any
) -> str | None:
    """What changes if the layers at ``paths`` are opened, or None."""
    try:
        actual = _output(opened_at(model, paths), inputs)
    except Exception as error:
        raise_lack_of_memory(error)
        return f"opened, it does not run: {first_line(error)}"
    found = difference(expected, actual)
    return None if found is None else f"opened, it would compute something else: {found}"
