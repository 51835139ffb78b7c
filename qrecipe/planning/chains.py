"""Layers that hand channels to one another through operations that scale with their input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qrecipe.errors.findings import Finding
from qrecipe.errors.spelling import did_you_mean
from qrecipe.model.graph_sites import Inventory, Match
from qrecipe.planning.changeable import LAYERS, Changeable, Layer
from qrecipe.planning.clamps import limits_of
from qrecipe.planning.pixels import mean_of_image
from qrecipe.planning.plan import Chain
from qrecipe.recipe.recipe import Recipe

SCALING = frozenset(
    {
        *(nn.ReLU, F.relu, torch.relu, nn.LeakyReLU, F.leaky_relu, nn.PReLU, nn.Identity),
        *(nn.Dropout, nn.Dropout2d, nn.Dropout3d),
    }
)
"""Operations that give twice as much for twice the input."""

_POOLS = frozenset(
    {
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d),
        *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    }
)
"""The same for images, whose channels they keep apart."""


def layer_of(match: Match) -> Layer | None:
    """The modules of a site that can scale its channels; None if it is something else.

    What follows them in the site can only be a ReLU.
    """
    first, *others = match.operation.members
    if first.module is None or not isinstance(match.layer, LAYERS):
        return None
    norms = [member for member in others if member.op.startswith("BatchNorm")]
    rest = [member for member in others if member not in norms]
    if len(norms) > 1 or any(member.op.lower() != "relu" for member in rest):
        return None
    return Layer(first.module, norms[0].module if norms else None)


def chains_of(inventory: Inventory) -> tuple[Chain, ...]:
    """All chains of the model, the longest possible ones, in order of execution."""
    links = dict(links_of(inventory))
    reached = {link.reader for link in links.values() if link.reader is not None}
    found = []
    for name, link in links.items():
        if name in reached or link.reader is None:
            continue
        sites = [name]
        while (reader := links[sites[-1]].reader) is not None:
            sites.append(reader)
        found.append(Chain(tuple(sites), links[sites[-1]].end))
    return tuple(found)


def chosen_chains(
    inventory: Inventory, recipe: Recipe
) -> tuple[tuple[Chain, ...], tuple[Finding, ...]]:
    """The chains that a recipe equalizes, and what is wrong with it (QR340) or idle (QR222)."""
    table = recipe.transform.equalize
    if table is None or not table.chains:
        return (), ()
    location = recipe.origin(f"transform.equalize.{next(iter(table.model_fields_set))}")
    if table.chains == "auto":
        found = chains_of(inventory)
        why = _IDLE if inventory.parts else _UNTRACED
        idle = Finding("QR222", "[transform.equalize] finds no chain in this model", location, why)
        return found, () if found else (idle,)
    links = dict(links_of(inventory))
    location = recipe.origin("transform.equalize.chains")
    chains, findings = [], []
    for sites in table.chains:
        problem = _problem(sites, links)
        if problem is None:
            chains.append(Chain(sites, "as the recipe says"))
            continue
        message, hint = problem
        findings.append(Finding("QR340", message, location, hint))
    return tuple(chains), tuple(findings)


def has_chain(inventory: Inventory, chain: Chain) -> bool:
    """Whether a model has a chain of the plan of a transformed model, of the same widths."""
    links, matches = dict(links_of(inventory)), inventory.matches
    return all(
        first in links and links[first].reader == second and outputs_of(matches[first]) == len(each)
        for (first, second), each in zip(pairwise(chain.sites), chain.exponents, strict=True)
    )


_IDLE = "remove it: no two layers follow each other with only ReLUs or pools between them"

_UNTRACED = "remove it: in eager mode nothing shows which layer reads the channels of another"


def _problem(sites: tuple[str, ...], links: Mapping[str, _Link]) -> tuple[str, str | None] | None:
    if len(sites) < 2:
        return "a chain needs two sites or more", 'chains = "auto" finds them'
    for name in sites:
        if name not in links:
            return f'"{name}" is not a layer that can be in a chain', did_you_mean(name, links)
    for first, second in pairwise(sites):
        link = links[first]
        if link.reader != second:
            found = f"{link.reader} does" if link.reader is not None else link.end
            return f"{second} does not read the channels of {first} alone", found
    return None


@dataclass(frozen=True, slots=True)
class _Link:
    """The layer that alone reads a site's channels, or why there is none."""

    reader: str | None
    end: str = ""


def links_of(inventory: Inventory) -> Iterator[tuple[str, _Link]]:
    """Each layer of the model, and what reads its channels."""
    checked = Changeable(inventory)
    for name, match in inventory.matches.items():
        layer = layer_of(match)
        if layer is None or not match.nodes:
            continue
        why = checked.obstacle(layer)
        if why is not None:
            yield name, _Link(None, why)
            continue
        link = _reader_of(match, inventory)
        after = None if link.reader is None else inventory.matches[link.reader]
        if after is not None:
            reading = layer_of(after)
            if reading is None:
                link = _Link(None, f"{link.reader} does more than scale its input")
            elif (why := checked.obstacle(Layer(reading.path, None))) is not None:
                link = _Link(None, why)
            elif inputs_of(after) % outputs_of(match):
                link = _Link(None, f"{link.reader} mixes the channels of {name} otherwise")
        yield name, link


def _reader_of(match: Match, inventory: Inventory) -> _Link:
    node, is_image = match.nodes[-1], not isinstance(match.module, nn.Linear)
    while True:
        users = list(node.users)
        if len(users) != 1:
            return _Link(None, f"{len(users)} operations read the result")
        (user,) = users
        if user.op == "output":
            return _Link(None, "the model returns the result")
        name = str(user.meta.get("site", ""))
        reader = inventory.matches.get(name)
        if reader is None:
            return _Link(None, f"{user.name} is not a site")
        if isinstance(reader.layer, LAYERS) and user is reader.nodes[0]:
            if is_image == isinstance(reader.layer, nn.Linear):
                return _Link(None, f"{name} reads other dimensions")
            return _Link(name)
        if is_image:
            stays_image = _image_after(reader, match)
        else:
            scales = called(reader) in SCALING or reader.operation.is_inserted
            stays_image = False if scales else None
        if stays_image is None:
            what = f"{reader.operation.name} ({reader.operation.op})"
            clamps = limits_of(reader) is not None
            does = "clamps at a number" if clamps else "does not scale with its input"
            return _Link(None, f"{what} {does}")
        is_image, node = stays_image, reader.nodes[-1]


def _image_after(match: Match, layer: Match) -> bool | None:
    """Whether an operation gives images, for the images of a layer; False for features.

    None if it mixes channels, or does not scale with its input.
    """
    function = called(match)
    if function in SCALING or function in _POOLS:
        return True
    module: Any = layer.module
    if layer.shape is None or len(layer.shape) != module.weight.dim():
        return None  # without a batch, channels are in another dimension
    node = match.nodes[0]
    if function is torch.flatten:
        return False if tuple(node.args[1:]) in ((1,), (1, -1)) and not node.kwargs else None
    is_mean = function is torch.mean and len(layer.shape) == 4
    return mean_of_image(node) if is_mean else None


def called(match: Match) -> Any:
    """The function or the class of module that a site of one call calls; None for a fused one."""
    node = match.nodes[0]
    if len(match.nodes) > 1:
        return None
    return type(match.module) if node.op == "call_module" else node.target


def outputs_of(match: Match) -> int:
    """The channels or features that a layer gives."""
    module: Any = match.module
    return int(module.weight.shape[0])


def inputs_of(match: Match) -> int:
    """The channels or features that a layer reads."""
    module: Any = match.module
    return int(module.weight.shape[1]) * int(getattr(module, "groups", 1))
