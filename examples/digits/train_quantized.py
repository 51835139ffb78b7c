"""What training recovers: `python examples/digits/train_quantized.py [SEED ...]`.

The digits network with a synthetic rescale (`rescale.py`) loses accuracy with calibration alone,
and quantization-aware training recovers it. A seed determines the rescaling and the batches.
Without arguments there are three seeds, which take about two minutes.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from digits import BATCH_SIZE, DigitNet, calibration, evaluate, factory, training_digits
from rescale import rescaled
from torch import nn
from torch.nn import functional
from train import EPOCHS, PEAK_LEARNING_RATE, jitter

import qrecipe

RECIPE = Path(__file__).with_name("qat.toml")
SEEDS = (0, 1, 2)


def main() -> None:
    """Print float, calibrated and trained accuracy for each seed."""
    parser = argparse.ArgumentParser(description="Train the digits network for int8.")
    parser.add_argument("seeds", metavar="SEED", nargs="*", type=int, default=SEEDS)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(2)
    print("seed  float  calibrated  trained")
    for seed in seeds:
        torch.manual_seed(seed)
        model = rescaled(factory()[0], seed)
        accuracies = evaluate(model), evaluate(calibrated(model)), evaluate(trained(model))
        print("{}     {:.3f}  {:.3f}       {:.3f}".format(seed, *accuracies))


def calibrated(model: DigitNet) -> nn.Module:
    """Post-training quantization with the same recipe."""
    recipe = qrecipe.parse_recipe(
        f'format = 1\nextends = "./{RECIPE.name}"\nphase = "ptq"\n',
        path=RECIPE.with_name("ptq.toml"),
    )
    return qrecipe.quantize(model, recipe, calibration(), progress=lambda done, total: None)


def trained(model: DigitNet) -> nn.Module:
    """Quantization-aware training: an ordinary loop, with a scheduler of its own."""
    digits = training_digits()
    compiled = qrecipe.compile(model, RECIPE, digits.images[:BATCH_SIZE])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, calibration(), progress=lambda done, total: None)
    batches = -(-len(digits.labels) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(prepared.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=1e-2)
    schedule = qrecipe.qat_schedule(prepared, optimizer, original_steps=EPOCHS * batches)
    while schedule.last_epoch < schedule.total_steps:
        for chosen in torch.split(torch.randperm(len(digits.labels)), BATCH_SIZE):
            logits = prepared(jitter(digits.images[chosen]))
            loss = functional.cross_entropy(logits, digits.labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return compiled.convert(prepared)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=qrecipe.QRecipeWarning)
    main()
