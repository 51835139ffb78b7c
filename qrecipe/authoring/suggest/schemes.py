"""What a recipe is suggested for, and the schemes that a suggestion chooses from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qrecipe.audit.moving_averages import MANY_BATCHES
from qrecipe.model.graph_sites import Inventory
from qrecipe.model.work import Work, nearest
from qrecipe.planning.plan import Plan
from qrecipe.recipe.overlay import merged_rules
from qrecipe.recipe.recipe import Recipe, parse_recipe
from qrecipe.recipe.schema import FLOAT, Executor
from qrecipe.recipe.toml.writer import toml_text

Scheme = Literal["static", "dynamic", "mixed", "float16"]

MOST = 0.5
"""Below this share of the work in quantized operations a recipe does little."""

_RECURRENT = ("LSTM", "GRU", "LSTMCell", "GRUCell", "RNNCell")


@dataclass(frozen=True, slots=True)
class Remedy:
    """A transform with its settings, and why the model needs it."""

    name: str
    settings: Mapping[str, Any]
    reason: str


@dataclass(frozen=True, slots=True)
class Subject:
    """A model's sites and work, the roots if only those can be traced, and who executes it.

    ``work_of_sites`` counts multiplications with weights by site; ``reasons`` say why the model is
    not taken as a whole, and what was tried in vain; ``num_batches`` is the number of calibration
    batches, if known; ``remedies`` are the transforms that it needs.
    """

    inventory: Inventory
    work: Work
    work_of_sites: Mapping[str, int]
    roots: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    num_batches: int | None = None
    executor: Executor | None = None
    remedies: tuple[Remedy, ...] = ()

    def covered(self, plan: Plan) -> float:
        """The share of the work in quantized operations, 0 to 1; 1 if there is none."""
        quantized = (site.name for site in plan.sites if site.verdict == "quantized")
        done = sum(self.work_of_sites.get(name, 0) for name in quantized)
        return done / self.work.total if self.work.total else 1.0

    @property
    def has_few_batches(self) -> bool:
        return self.num_batches is not None and self.num_batches < MANY_BATCHES

    @property
    def has_recurrent_layers(self) -> bool:
        return self.has(_RECURRENT)

    def has(self, kinds: Sequence[str]) -> bool:
        """Whether an operation has one of these kinds, alone or at the head of a group."""
        operations = self.inventory.structure.operations
        return any(operation.op.partition("+")[0] in kinds for operation in operations)

    @property
    def work_elsewhere(self) -> Mapping[str, int]:
        """The work outside all sites, by innermost module ("": the model's own forward)."""
        if not self.roots and self.inventory.untraced is None:
            return {}
        inside = self.roots or tuple(self.inventory.matches)
        return {
            path: count for path, count in self.work.places.items() if nearest(path, inside) is None
        }


FEW_CONVOLUTIONS = 0.1
"""Below this share of the multiplications, convolutions are not worth a calibration."""

MANY_CONVOLUTIONS = 0.5
"""Above this share, a model without recurrent layers is a convolutional net."""

_EMBEDDINGS = ("Embedding", "EmbeddingBag")

_EMBEDDING_TABLES = {
    "tensor": {
        "embedding": {
            "observer": "per_channel_minmax",
            "dtype": "uint8",
            "qscheme": "per_channel_affine_float_qparams",
        }
    },
    "qconfig": {"embedding": {"weight": "embedding"}},
}


def schemes(subject: Subject) -> Sequence[Scheme]:
    """The scheme that fits best, then those to fall back on if nothing can honour it."""
    if subject.executor is not None:
        return ("static",)
    share = subject.work.convolution_share
    if subject.inventory.untraced is not None:
        return ("dynamic", "float16")
    if share < FEW_CONVOLUTIONS:
        return ("dynamic", "static")
    if share > MANY_CONVOLUTIONS and not subject.has_recurrent_layers:
        return ("static", "dynamic")
    return ("mixed", "static", "dynamic")


def values_for(subject: Subject, scheme: Scheme) -> dict[str, Any]:
    """The scheme as a recipe that extends a built-in one, with rules for embeddings, if any."""
    values = _values(scheme, subject.has_few_batches)
    if subject.remedies:
        values["transform"] = {each.name: each.settings for each in subject.remedies}
    if subject.executor is not None:
        return {**values, "executor": subject.executor}
    kinds = [kind for kind in _EMBEDDINGS if subject.has([kind])]
    return with_roots(_with_embeddings(values, kinds) if kinds else values, subject.roots)


def in_graphs(roots: Sequence[str] = ()) -> Recipe:
    """A recipe to trace a model for, whole or in parts."""
    return parse_recipe(toml_text(with_roots(_values("static", False), roots)))


def in_programs() -> Recipe:
    """A recipe to export a model for, whole."""
    return parse_recipe(toml_text({**_values("static", False), "executor": "pt2e"}))


def by_modules() -> Recipe:
    """A recipe to find the modules for that are quantized one by one."""
    return parse_recipe(toml_text(_with_embeddings(_values("dynamic", False), _EMBEDDINGS)))


def with_rules(values: Mapping[str, Any], rules: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, "rules": merged_rules(values["rules"], rules)}


def with_roots(values: dict[str, Any], roots: Sequence[str]) -> dict[str, Any]:
    return {**values, "fx": {"roots": list(roots)}} if roots else values


def _values(scheme: Scheme, few_batches: bool) -> dict[str, Any]:
    if scheme in ("dynamic", "float16"):
        built_in = "x86-dynamic" if scheme == "dynamic" else "float16-dynamic"
        reason = "a dynamic recipe quantizes linear and recurrent layers"
        return _extending(built_in, {"global": {"qconfig": FLOAT, "reason": reason}})
    if scheme == "static":
        return _extending("x86-static-minmax" if few_batches else "x86-static", {})
    linear = {
        "module_type": {"torch.nn.Linear": "int8-dynamic"},
        "function": {"torch.nn.functional.linear": "int8-dynamic"},
    }
    values = with_rules(_extending("cnn-lstm", {}), linear)
    if not few_batches:
        return values
    both = [values["extends"], "builtin:x86-static-minmax"]
    return {**values, "name": "suggested-mixed", "extends": both}


def _with_embeddings(values: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    rules = {"module_type": {f"torch.nn.{kind}": "embedding" for kind in kinds}}
    return {**with_rules(values, rules), **_EMBEDDING_TABLES}


def _extending(built_in: str, rules: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": 1, "extends": f"builtin:{built_in}", "rules": dict(rules)}
