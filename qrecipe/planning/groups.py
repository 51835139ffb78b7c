"""Linear layers that read the same tensor, and where its channels can be scaled."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from qrecipe.errors.findings import Finding
from qrecipe.errors.spelling import did_you_mean
from qrecipe.model.addresses import SITE, unpacked
from qrecipe.model.graph_sites import Inventory, Match, readers_of
from qrecipe.model.nodes import reads_shape
from qrecipe.planning.chains import SCALING, called, inputs_of
from qrecipe.planning.changeable import NORMS, Changeable
from qrecipe.planning.plan import Group, Site
from qrecipe.recipe.recipe import Recipe
from qrecipe.recipe.schema import quantized_range
from qrecipe.rules.resolution import listed


def chosen_groups(
    inventory: Inventory, sites: Sequence[Site], recipe: Recipe
) -> tuple[tuple[Group, ...], tuple[Finding, ...]]:
    """The groups that a recipe smooths, and what is wrong with it (QR341) or idle (QR222).

    ``auto`` takes the groups in which a layer rounds what it reads, unless the tensor is rounded
    before a product could divide it.
    """
    table = recipe.transform.smooth
    if table is None or not table.groups:
        return (), ()
    is_auto = table.groups == "auto"
    static = {site.name for site in sites if site.mode == "static"} if is_auto else set()
    found = _Groups(inventory, static)
    if table.groups == "auto":
        rounded = {site.name for site in sites if _rounds_input(site)}
        read = [names for names in found.by_tensor if not rounded.isdisjoint(names)]
        groups = tuple(each for names in read for each in found.groups_of(names))
        location = recipe.origin(f"transform.smooth.{next(iter(table.model_fields_set))}")
        why = "its groups stay as they are, for the reasons in the plan"
        hint = f"remove it: {why if groups else 'no linear layer rounds what it reads'}"
        idle = Finding("QR222", "[transform.smooth] finds no group in this model", location, hint)
        return groups, () if any(group.place != "none" for group in groups) else (idle,)
    location = recipe.origin("transform.smooth.groups")
    groups, findings = (), []
    for names in table.groups:
        problem = found.problem(names)
        if problem is None:
            groups += tuple(found.groups_of(names))
        else:
            findings.append(Finding("QR341", problem[0], location, problem[1]))
    return groups, tuple(findings)


def has_group(inventory: Inventory, group: Group) -> bool:
    """Whether a model has a group of the plan of a transformed model, of the same width."""
    names = group.sites if group.at is None else (*group.sites, group.at)
    found = [inventory.matches.get(name) for name in names]
    width = len(group.exponents)
    return all(each is not None and each.module is not None for each in found) and all(
        isinstance(each.module, nn.Linear) and inputs_of(each) == width
        for each in found[: len(group.sites)]
        if each is not None and width
    )


def _rounds_input(site: Site) -> bool:
    spec = None if site.qconfig is None else site.qconfig.activation
    return site.mode in ("static", "dynamic") and spec is not None and bool(quantized_range(spec))


class _Groups:
    """The groups of a model, by what reads the same tensor."""

    def __init__(self, inventory: Inventory, rounding: Collection[str]) -> None:
        self._rounding = rounding
        self._matches = inventory.matches
        self._changeable = Changeable(inventory)
        self._sources = dict(_sources(inventory.matches))
        by_tensor: dict[fx.Node | str, list[str]] = {}
        for name, source in self._sources.items():
            by_tensor.setdefault(name if source is None else source, []).append(name)
        self.by_tensor = list(map(tuple, by_tensor.values()))

    def problem(self, names: Sequence[str]) -> tuple[str, str | None] | None:
        """Why these sites do not form a group, and a hint."""
        if not names:
            return "a group needs a site", 'groups = "auto" finds them'
        for name in names:
            if name not in self._sources:
                hint = did_you_mean(name, self._sources)
                return f'"{name}" is not a linear layer that can be in a group', hint
        if len({self._sources[name] for name in names}) > 1:
            others = "; ".join(map(", ".join, self.by_tensor))
            return f"{listed(names)} do not read the same tensor", f"groups are: {others}"
        return None

    def groups_of(self, names: Sequence[str]) -> Iterator[Group]:
        """The group of these layers, and one for each layer that has to stay as it is."""
        whys = {name: self._changeable.why_not(name) for name in names}
        changed = tuple(name for name, why in whys.items() if why is None)
        if changed:
            yield self._placed(changed)
        for name, why in whys.items():
            if why is not None:
                yield Group((name,), "none", reason=f"it {why}")

    def _placed(self, names: tuple[str, ...]) -> Group:
        """The group, with the tensor divided by the weights that give it if that can be."""
        source = self._sources[names[0]]
        found = _UNSEEN if source is None else self._giver(source, names)
        if not isinstance(found, _Obstacle):
            return Group(names, "folded", at=found)
        giver = None if source is None else source.meta.get(SITE)
        if giver in self._rounding:
            why = f"{found.why}, and {giver} rounds it before a product could divide it"
            return Group(names, "none", reason=why)
        if any(map(self._changeable.is_opened, names)):
            why = f"{found.why}, and a layer that is opened has no place for a product"
            return Group(names, "none", reason=why)
        return Group(names, "product", reason=found.why)

    def _giver(self, node: fx.Node, names: tuple[str, ...]) -> str | _Obstacle:
        """The site whose weights scale a tensor that nothing else reads."""
        readers: Iterable[str] = names
        while True:
            name = node.meta.get(SITE)
            if name is None:
                return _Obstacle("the tensor is an input or stored")
            found = [_reader(each) for each in readers_of(node) if not reads_shape(each)]
            others = [each for each in dict.fromkeys(found) if each not in readers]
            if others:
                return _Obstacle(f"{name} is read by {listed(others)} too")
            match = self._matches[name]
            if isinstance(match.layer, (*NORMS, nn.Linear)):
                why = self._why_unscaled(name, match, node)
                return name if why is None else _Obstacle(why)
            if called(match) not in SCALING or len(match.nodes[0].all_input_nodes) != 1:
                return _Obstacle(f"{name} ({match.operation.op}) does not scale with weights")
            (node,), readers = map(unpacked, match.nodes[0].all_input_nodes), (name,)

    def _why_unscaled(self, name: str, match: Match, node: fx.Node) -> str | None:
        module: Any = match.module
        first, *others = match.operation.members
        if node is not match.nodes[-1] or any(other.op.lower() != "relu" for other in others):
            return f"{name} does more than scale with its weights"
        if isinstance(module, NORMS) and len(module.normalized_shape) > 1:
            return f"{name} normalizes several dimensions"
        why = self._changeable.why_not(str(first.module))
        return None if why is None else f"{name} {why}"


@dataclass(frozen=True, slots=True)
class _Obstacle:
    why: str


_UNSEEN = _Obstacle("nothing shows what else reads the tensor")


def _sources(matches: Mapping[str, Match]) -> Iterator[tuple[str, fx.Node | None]]:
    """The linear layers and the tensors that they read; None where no graph shows it."""
    for name, match in matches.items():
        module = match.operation.members[0].module
        if isinstance(match.module, nn.Linear) and module == name:
            yield name, unpacked(match.nodes[0].all_input_nodes[0]) if match.nodes else None


def _reader(node: fx.Node) -> str:
    return "the model's caller" if node.op == "output" else str(node.meta.get(SITE, node.name))
