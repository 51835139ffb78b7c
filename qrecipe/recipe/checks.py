"""Checks beyond the schema: undefined names, contradictions, and what is legal but doubtful.

Each file is checked for what it says itself; what its bases may complete is checked after merging.
Warnings are only about what the outermost file sets itself, if it is a file: bases and published
recipes may well offer more than one recipe uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice

from qrecipe.errors.findings import Finding, SchemaError
from qrecipe.errors.spelling import did_you_mean, nearest
from qrecipe.errors.text import shown
from qrecipe.recipe.extends import Composition
from qrecipe.recipe.layers import Layer
from qrecipe.recipe.patterns import NamePatterns, check_pattern, is_exact
from qrecipe.recipe.references import is_reference
from qrecipe.recipe.schema import (
    FLOAT,
    INHERIT,
    RESERVED_QCONFIG_NAMES,
    QConfigTable,
    RecipeTable,
    RuleTable,
)
from qrecipe.recipe.tensor_checks import argument_findings, tensor_findings, use_findings
from qrecipe.recipe.toml.positions import KeyPath
from qrecipe.recipe.validation import MAX_FINDINGS, dotted, one_of
from qrecipe.registry.builtin import (
    function_families,
    function_family,
    is_module_type,
    module_types,
)

MAX_PATTERNS = 200_000
"""The most characters that all name patterns of a recipe may have; exact names do not count."""

_ABBREVIATIONS = {
    "F": "torch.nn.functional",
    "nn": "torch.nn",
    "nn.functional": "torch.nn.functional",
}


def findings_of(recipe: Composition, table: RecipeTable) -> list[Finding]:
    """All problems of a composed recipe; ``table`` has its merged values."""
    by_file = (islice(_layer_findings(layer), MAX_FINDINGS) for layer in recipe.layers)
    merged = chain(
        _missing(recipe, table),
        *(tensor_findings(recipe, name, spec) for name, spec in table.tensor.items()),
        *(
            _role_findings(recipe, table, ("qconfig", name), qconfig)
            for name, qconfig in table.qconfig.items()
        ),
        _rule_findings(recipe, table),
        *(
            argument_findings(recipe, "transform", name, each.arguments, ("transform", name))
            for name, each in table.transform.tables.items()
        ),
        _calibration_findings(recipe, table),
    )
    return [*chain.from_iterable(by_file), *islice(merged, MAX_FINDINGS)]


def rules_of(table: RecipeTable) -> Iterator[tuple[KeyPath, RuleTable]]:
    """All rules of a recipe and their paths."""
    if table.rules.global_ is not None:
        yield ("rules", "global"), table.rules.global_
    for tier in ("module_type", "function", "module_name"):
        for key, rule in getattr(table.rules, tier).items():
            yield ("rules", tier, key), rule


def _layer_findings(layer: Layer) -> Iterator[Finding]:
    found = chain(
        _reserved_names(layer),
        *(_form_of_rule(layer, path, rule) for path, rule in rules_of(layer.table)),
        _keys_of_rules(layer),
    )
    return map(layer.noted, found)


def _reserved_names(layer: Layer) -> Iterator[Finding]:
    for name in sorted(RESERVED_QCONFIG_NAMES & layer.table.qconfig.keys()):
        message = f'"{name}" is reserved and cannot name a qconfig'
        yield Finding("QR109", message, layer.key(("qconfig", name)), "choose another name")


def _form_of_rule(layer: Layer, path: KeyPath, rule: RuleTable) -> Iterator[Finding]:
    inline = [role for role in ("weight", "activation") if getattr(rule, role) is not None]
    if rule.qconfig is not None and inline:
        message = f'a rule has "qconfig" or "{inline[0]}", not both'
        yield Finding("QR109", message, layer.key((*path, inline[0])), "remove one of them")
    if rule.qconfig is None and not inline and layer.is_sound(path):
        hint = f'it needs "qconfig", or "weight" and "activation"; "{FLOAT}" does not quantize it'
        yield Finding("QR103", f"{dotted(path)} does not say what to do", layer.key(path), hint)


def _keys_of_rules(layer: Layer) -> Iterator[Finding]:
    patterns = (key for key in layer.table.rules.module_name if not is_exact(key))
    if sum(map(len, patterns)) > MAX_PATTERNS:
        message = f"the name patterns have more than {MAX_PATTERNS:,} characters in all"
        yield Finding("QR110", message, layer.key(("rules", "module_name")))
        return
    for path, _ in rules_of(layer.table):
        yield from _key_of_rule(layer, path)


def _key_of_rule(layer: Layer, path: KeyPath) -> Iterator[Finding]:
    tier, key = str(path[1]), str(path[-1])
    if tier == "module_name":
        try:
            check_pattern(key)
        except SchemaError as error:
            for finding in error.findings:
                yield replace(finding, location=layer.key(path))
    elif tier == "module_type" and not _may_be_module_type(key):
        message = f"torch has no module type {shown(key)}"
        yield Finding("QR108", message, layer.key(path), _module_type_hint(key))
    elif tier == "function" and not _may_be_function(key):
        message = f"torch has no function {shown(key)}"
        yield Finding("QR108", message, layer.key(path), _function_hint(key))


def _may_be_module_type(key: str) -> bool:
    """Known to torch, or the dotted name of a class from elsewhere."""
    is_own = not key.startswith("torch.") and _is_dotted_name(key)
    return is_module_type(key) or (is_own and not _is_known(_unabbreviated(key)))


def _module_type_hint(key: str) -> str:
    full = _of_torch_nn(key)
    if "." in key and function_family(full) is not None:
        return f"it is a function: [rules.function] {shown(full)}"
    return did_you_mean(full, module_types()) or "write its dotted name, such as torch.nn.Linear"


def _of_torch_nn(key: str) -> str:
    return _unabbreviated(key) if "." in key else f"torch.nn.{key}"


def _may_be_function(key: str) -> bool:
    """Known to torch or operator, or the dotted name of a function from another package."""
    if "." not in key or key.startswith(("torch.", "operator.", "Tensor.")):
        return function_family(key) is not None
    full = _unabbreviated(key)
    return _is_dotted_name(key) and (full == key or not _is_known(full))


def _is_known(key: str) -> bool:
    """Whether torch or operator has a module type or a function of that name."""
    return is_module_type(key) or function_family(key) is not None


def _is_dotted_name(key: str) -> bool:
    parts = key.split(".")
    return len(parts) > 1 and all(part.isidentifier() or part == "<locals>" for part in parts)


def _unabbreviated(key: str) -> str:
    """The name with a conventional import alias such as ``F`` or ``nn`` expanded."""
    namespace, _, last = key.rpartition(".")
    return f"{_ABBREVIATIONS[namespace]}.{last}" if namespace in _ABBREVIATIONS else key


def _function_hint(key: str) -> str:
    if (full := _unabbreviated(key)) != key and function_family(full) is not None:
        return f"did you mean {shown(full)}?"
    if is_module_type(full := _of_torch_nn(key)):
        return f"it is a module type: [rules.module_type] {shown(full)}"
    namespace, _, last = key.rpartition(".")
    for near in nearest(last, function_families(), 3):
        full = f"{namespace}.{near}" if namespace else near
        if function_family(full) is not None:
            return f"did you mean {shown(full)}?"
    return "write its dotted name, such as torch.matmul"


def _missing(recipe: Composition, table: RecipeTable) -> Iterator[Finding]:
    keep_float = f'global = "{FLOAT}" keeps whatever no other rule covers in float'
    for path, value, hint in (
        (("format",), table.format, "format = 1"),
        (("backend",), table.backend, 'for example backend = "x86"'),
        (("rules", "global"), table.rules.global_, keep_float),
    ):
        if value is None and recipe.is_whole and recipe.is_sound(*path):
            start = recipe.top.document.spans.start()
            yield Finding("QR103", f"the recipe needs {dotted(path)}", start, hint)


def _rule_findings(recipe: Composition, table: RecipeTable) -> Iterator[Finding]:
    known = {*table.qconfig, *RESERVED_QCONFIG_NAMES}
    for path, rule in rules_of(table):
        yield from _role_findings(recipe, table, path, rule)
        if rule.qconfig is None or rule.qconfig in known or not recipe.is_whole:
            continue
        if recipe.is_sound("qconfig", rule.qconfig):
            message = f"there is no qconfig {shown(rule.qconfig)}"
            hint = one_of(rule.qconfig, [*table.qconfig, FLOAT, INHERIT])
            yield recipe.about_value("QR107", message, (*path, "qconfig"), hint)


def _role_findings(
    recipe: Composition, table: RecipeTable, path: KeyPath, roles: QConfigTable | RuleTable
) -> Iterator[Finding]:
    """Problems of the tensors that a qconfig or rule names, alone and combined."""
    for role, name in (("weight", roles.weight), ("activation", roles.activation)):
        if name in table.tensor:
            yield from use_findings(recipe, (*path, role), role, name, table.tensor[name])
        elif name is not None and recipe.is_whole and recipe.is_sound("tensor", name):
            message = f"there is no tensor {shown(name)}"
            hint = one_of(name, table.tensor) if table.tensor else "no tensors are defined"
            yield recipe.about_value("QR107", message, (*path, role), hint)
    if roles.weight in table.tensor and roles.activation in table.tensor:
        yield from _pair_findings(recipe, table, path, roles.weight, roles.activation)


def _pair_findings(
    recipe: Composition, table: RecipeTable, path: KeyPath, weight: str, activation: str
) -> Iterator[Finding]:
    of_weight, of_activation = table.tensor[weight], table.tensor[activation]
    halves = [spec.dtype == "float16" for spec in (of_weight, of_activation)]
    are_known = None not in (of_weight.dtype, of_activation.dtype)
    if of_activation.is_dynamic and are_known and halves[0] != halves[1]:
        kinds = f"a dynamic activation of {of_activation.dtype}", f"a weight of {of_weight.dtype}"
        message = " cannot be combined with ".join(kinds)
        hint = "dynamic float16 needs float16 for both tensors"
        yield recipe.about_value("QR109", message, (*path, "weight"), hint)


def _calibration_findings(recipe: Composition, table: RecipeTable) -> Iterator[Finding]:
    least, most = table.calibration.min_batches, table.calibration.max_batches
    if least > most and recipe.is_sound("calibration"):
        sets_least = "min_batches" in table.calibration.model_fields_set
        message = f"min_batches = {least} is more than max_batches = {most}"
        at = ("calibration", "min_batches" if sets_least else "max_batches")
        yield recipe.about_value("QR109", message, at)


_LONGEST_PROBED = 60
"""The longest pattern that is checked for matching everything."""

_PROBES = ("a", "_", "0", "fc", "layer12", "Backbone_q7")
"""Names that only a pattern that matches every name matches all of."""


def doubtful_findings(recipe: Composition, table: RecipeTable) -> Iterator[Finding]:
    """The warnings about a valid recipe; ``table`` has its merged values."""
    if is_reference(recipe.top.name):
        return
    yield from _unused(recipe, table)
    yield from _rules_for_everything(recipe)


def _unused(recipe: Composition, table: RecipeTable) -> Iterator[Finding]:
    """Qconfigs (QR214) and tensors (QR215) that no rule uses."""
    rules = [rule for _, rule in rules_of(table)]
    used = {rule.qconfig for rule in rules}
    for name in recipe.top.table.qconfig:
        if name not in used:
            message = f"no rule uses the qconfig {shown(name)}"
            at = recipe.top.key(("qconfig", name))
            yield Finding("QR214", message, at, "remove it, or name it in a rule")
    qconfigs = [qconfig for name, qconfig in table.qconfig.items() if name in used]
    reached = {name for names in (*map(_roles, rules), *map(_roles, qconfigs)) for name in names}
    namers = {
        name: qconfig for qconfig, use in reversed(table.qconfig.items()) for name in _roles(use)
    }
    for name in recipe.top.table.tensor:
        if name not in reached:
            message = f"no rule uses the tensor {shown(name)}"
            hint = "remove it, or name it in a qconfig or a rule"
            if name in namers:
                hint = f"only the qconfig {shown(namers[name])} uses it, which no rule uses"
            yield Finding("QR215", message, recipe.top.key(("tensor", name)), hint)


def _roles(each: QConfigTable | RuleTable) -> tuple[str | None, str | None]:
    return each.weight, each.activation


def _rules_for_everything(recipe: Composition) -> Iterator[Finding]:
    for key in recipe.top.table.rules.module_name:
        is_probed = "*" in key and len(key) <= _LONGEST_PROBED
        if is_probed and all(map(NamePatterns([key]).matching, _PROBES)):
            what = "matches every module, and overrides every rule by type"
            at = recipe.top.key(("rules", "module_name", key))
            message = f"module_name {shown(key)} {what}"
            yield Finding("QR216", message, at, "use rules.global for that")
