"""Which rules match what in a model: each name is looked up once, and not for every rule."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache

from qrecipe.recipe.patterns import NamePatterns, is_exact
from qrecipe.recipe.recipe import Rule
from qrecipe.registry.builtin import canonical_module_type, function_family
from qrecipe.rules.structure import Member, ModelStructure


class RuleIndex:
    """The rules of a recipe by what they match in one model; they are known by their position."""

    def __init__(self, structure: ModelStructure, rules: Sequence[Rule]) -> None:
        self._modules = structure.modules
        self._names: dict[str, list[str]] = {path: [path] for path in structure.modules}
        for alias, path in structure.aliases.items():
            self._names[path].append(alias)
        self.globs = {
            index
            for index, rule in enumerate(rules)
            if rule.tier == "module_name" and not is_exact(rule.key)
        }
        self._tiers: dict[str, dict[str, list[int]]] = {}
        for index, rule in enumerate(rules):
            keys = self._tiers.setdefault(rule.tier, {})
            keys.setdefault(_canonical(rule), []).append(index)
        named = self._tiers.pop("module_name", {})
        self._by_position = [index for found in named.values() for index in found]
        self._patterns = NamePatterns(list(named))
        self.of_module = cache(self._of_module)

    def distances(self, member: Member) -> dict[int, int]:
        """The rules that cover a call, and how many levels above it is what they match."""
        found = dict.fromkeys(self.of_call(member), 0)
        for functions in member.functions:
            found.update(dict.fromkeys(self._of("function", functions), 0))
        found.update(dict.fromkeys(self._of("global", ""), 0))
        for distance, path in enumerate(member.scopes, 0 if member.module is not None else 1):
            for index in self.of_module(path):
                found.setdefault(index, distance)
        return found

    def of_call(self, member: Member) -> list[int]:
        """The rules whose key is a name that selects this particular call."""
        path = member.scopes[0]
        rest = member.name[len(path) :]
        names = (name + rest for name in self._names[path])
        return self._named(at for name in names for at in self._patterns.selecting(name))

    def modules(self, wanted: Collection[int]) -> Mapping[int, list[str]]:
        """The modules that each of some rules matches, called or not, by all their names."""
        found: dict[int, list[str]] = {index: [] for index in wanted}
        for path, types in self._modules.items():
            for index in (index for each in types for index in self._of("module_type", each)):
                if index in found:
                    found[index].append(path)
        for name in filter(None, (name for names in self._names.values() for name in names)):
            for index in self._named(self._patterns.matching(name)):
                if index in found:
                    found[index].append(name)
        return found

    def _of_module(self, path: str) -> list[int]:
        """The rules that match a module by a name or its type."""
        names = filter(None, self._names[path])
        named = self._named(at for name in names for at in self._patterns.matching(name))
        return named + [
            index for each in self._modules[path] for index in self._of("module_type", each)
        ]

    def _named(self, positions: Iterable[int]) -> list[int]:
        return [self._by_position[at] for at in dict.fromkeys(positions)]

    def _of(self, tier: str, key: str) -> Sequence[int]:
        return self._tiers.get(tier, {}).get(key, ())


def _canonical(rule: Rule) -> str:
    if rule.tier == "module_type":
        return canonical_module_type(rule.key)
    if rule.tier == "function":
        return function_family(rule.key) or rule.key
    return rule.key
