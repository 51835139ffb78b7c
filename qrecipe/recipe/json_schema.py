"""The recipe format as JSON Schema, for editors and other validators.

It is generated from the tables that recipes are validated with and from the observers and
fake-quants known in this process. It only uses keywords that mean the same in drafts 4, 6 and 7,
because TOML editors support different drafts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qrecipe.recipe.schema import FORMAT, RecipeTable
from qrecipe.registry.arguments import Interval, Kind, Signature, TypeTag
from qrecipe.registry.builtin import known_names, signature

Schema = dict[str, Any]

_TYPES: Mapping[TypeTag, Schema] = {
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "str": {"type": "string"},
    "number_list": {"type": "array", "items": {"type": "number"}},
    "any": {"type": ["boolean", "number", "string", "array"]},
}


def recipe_schema() -> Schema:
    """The schema of one recipe file; nothing is required, since a base can supply it.

    References to other tables or to bases are not checked, so `load_recipe` may reject what the
    schema accepts, but not the other way round.
    """
    made = _plain(RecipeTable.model_json_schema(ref_template="#/definitions/{model}"))
    definitions = made.pop("$defs")
    del definitions["Constructor"]
    keys = definitions["TensorSpec"]["properties"]
    kinds: tuple[Kind, ...] = ("observer", "fake_quant")
    for kind in kinds:
        definitions[kind] = _constructor(kind)
        either = [{"$ref": f"#/definitions/{kind}"}]
        keys[kind] = {"description": keys[kind]["description"], "anyOf": either}
    definitions["TransformTable"] = _with_plugins(
        definitions["TransformTable"], definitions.pop("PluginTable")
    )
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": f"Quantization recipe, format {FORMAT}",
        **made,
        "definitions": dict(sorted(definitions.items())),
    }


def _with_plugins(table: Schema, plugin: Schema) -> Schema:
    """The table of transforms with those that are registered or claimed."""
    names = [name for name in known_names("transform") if name not in table["properties"]]
    found = {name: signature("transform", name) for name in names}
    own = {name: _plugin(plugin, each) for name, each in found.items()}
    return {**table, "properties": {**table["properties"], **own}, "additionalProperties": False}


def _plugin(plugin: Schema, found: Signature | None) -> Schema:
    """The table of a plugin; with any arguments if it is not imported yet."""
    if found is None:
        return plugin
    return {**plugin, **_called(found, (), plugin["properties"])}


def _plain(node: Any) -> Any:
    """The schema without titles, null and the defaults of unset keys: TOML has no null."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = dict(node)
    if branches := [branch for branch in node.pop("anyOf", ()) if branch != {"type": "null"}]:
        node |= branches[0] if len(branches) == 1 else {"anyOf": branches}
    kept = {key: _plain(value) for key, value in node.items()}
    if kept.keys() & {"properties", "type", "$ref", "anyOf", "enum"}:
        kept = {key: value for key, value in kept.items() if not _says_nothing(key, value)}
    if isinstance(kept.get("description"), str) and "properties" in kept:
        text = " ".join(kept["description"].split()).replace("``", "`")
        kept["description"] = f"{text.partition('. ')[0].removesuffix('.')}."
    if "exclusiveMinimum" in kept:  # a number in draft 7, true or false in draft 4
        bound = kept.pop("exclusiveMinimum")
        kept |= {"minimum": bound, "not": {"enum": [bound]}}
    return kept


def _says_nothing(key: str, value: Any) -> bool:
    """Whether it is a title that repeats the key, or the default of an unset key or a table."""
    is_title = key == "title" and isinstance(value, str)
    return is_title or (key == "default" and (value is None or isinstance(value, (list, dict))))


def _constructor(kind: Kind) -> Schema:
    """A name, or a table with the name and its arguments."""
    found = {name: signature(kind, name) for name in known_names(kind)}
    alone = [name for name, found_ in found.items() if found_ is None or not found_.required]
    return {"anyOf": [{"enum": alone}, *(_call(name, each) for name, each in found.items())]}


def _call(name: str, found: Signature | None) -> Schema:
    """A name with arguments; any arguments for a plugin that is not imported yet."""
    named: Schema = {"name": {"enum": [name]}}
    if found is None:
        return {"type": "object", "required": ["name"], "properties": named}
    return {"type": "object", **_called(found, ("name",), named)}


def _called(found: Signature, required: tuple[str, ...], properties: Schema) -> Schema:
    """What a table with arguments for a signature needs besides some properties."""
    limits = {name: _bounds(limit) for name, limit in found.limits.items()}
    arguments = {
        name: {**_TYPES[tag], **limits.get(name, {})} for name, tag in found.parameters.items()
    }
    return {
        "description": found.target,
        "required": [*required, *sorted(found.required)],
        "properties": {**properties, **arguments},
        "additionalProperties": False,
    }


def _bounds(limit: Interval) -> Schema:
    bounds: Schema = {"minimum": limit.low} if math.isfinite(limit.low) else {}
    if math.isfinite(limit.high):
        bounds["maximum"] = limit.high
    return {**bounds, "not": {"enum": [limit.low]}} if limit.open_low else bounds
