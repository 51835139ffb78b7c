"""Whether tuning by the profile gives faster models than tuning by float time.

``OMP_NUM_THREADS=1 python benchmarks/tune_speed.py`` tunes a net with two depthwise transposed
convolutions, which int8 has only a slow kernel for, and times the results in turns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

import qrecipe
from qrecipe.authoring.fastest.costs import Costs
from qrecipe.authoring.tune.levers import Lever
from qrecipe.authoring.tune.trials import ModelBench
from qrecipe.measure.turns import Pass, Timing, run_in_turn
from qrecipe.model.call import Inputs
from qrecipe.recipe.recipe import Recipe

_ROUNDS = 30

_by_profile = ModelBench._priced


def _by_float_time(bench: ModelBench, levers: tuple[Lever, ...]) -> Costs:
    sites = (
        replace(site, int8=None if site.int8 is None else 0.0, channels_last=site.contiguous)
        for site in _by_profile(bench, levers).sites
    )
    return Costs(tuple(replace(site, follows=False, producers=()) for site in sites), ())


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU()),
        *(nn.ConvTranspose2d(64, 64, 4, 2, 1, groups=64), nn.Conv2d(64, 48, 3, 1, 1), nn.ReLU()),
        *(nn.ConvTranspose2d(48, 48, 4, 2, 1, groups=48), nn.Conv2d(48, 8, 1)),
    ).eval()


def _loss(model: nn.Module, batches: list[torch.Tensor]) -> Callable[[nn.Module], float]:
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    whole = sum(float(each.square().sum()) for each in expected)

    def evaluate(other: nn.Module) -> float:
        with torch.no_grad():
            pairs = zip(batches, expected, strict=True)
            return -sum(float((other(x) - y).square().sum()) for x, y in pairs) / whole

    return evaluate


def _main() -> None:
    warnings.simplefilter("ignore")
    model, batches = _net(), [torch.randn(2, 3, 96, 96) for _ in range(3)]
    recipe, evaluate = qrecipe.load_recipe("builtin:x86-static"), _loss(model, batches)
    all_int8 = qrecipe.quantize(model, recipe, batches, progress=False)
    for share in (0.2, 0.05):
        models = {"float": model, "all int8": all_int8}
        for name, priced in (("float time", _by_float_time), ("profile", _by_profile)):
            ModelBench._priced = priced  # type: ignore[method-assign, assignment]
            most = -evaluate(all_int8) * share
            result = qrecipe.tune(model, recipe, batches, evaluate, max_drop=most, progress=False)
            tuned: Recipe = result.recipe
            made = qrecipe.quantize(model, tuned, batches, progress=False)
            models[f"{name}, {len(result.trials)} trials"] = made
        passes = {name: Pass.of(each, [Inputs((batches[0],), {})]) for name, each in models.items()}
        with torch.no_grad():
            run_in_turn(list(passes.values()), _ROUNDS)
        for name, each in passes.items():
            print(f"{share:3}  {name:22} {1000 * Timing.of(each.whole).seconds:8.2f} ms")


if __name__ == "__main__":
    _main()
