"""Quantize the digits network of README.md with this torch, and load what others have stored.

    python tools/digits_on_torch.py FOLDER

Stores the quantized model and its outputs in FOLDER/VERSION, and loads each model in FOLDER: how
many of its outputs are, bit by bit, those that it had with the torch that stored it? Fails where
one is off by more than the step between two neighbouring outputs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import qrecipe
from examples.digits.digits import calibration, evaluate, factory

MODEL, OUTPUTS = "model.safetensors", "outputs.safetensors"


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    model, _ = factory()
    batches = list(calibration())
    version = torch.__version__.partition("+")[0]
    quantized = qrecipe.quantize(model, "builtin:x86-static", batches)
    store(folder / version, quantized, outputs(quantized, batches))
    print(f"torch {version}: accuracy {evaluate(model):.3f} -> {evaluate(quantized):.3f}")
    apart = 0
    for stored in sorted(path for path in folder.iterdir() if (path / OUTPUTS).exists()):
        loaded = qrecipe.load_quantized(stored / MODEL, model)
        before = load_file(stored / OUTPUTS)["outputs"]
        steps = (outputs(loaded, batches) - before).abs() / before.unique().diff().min()
        print(
            f"torch {version}: as stored by {stored.name}, {int((steps == 0).sum())} of "
            f"{steps.numel()} outputs are equal, at most {float(steps.max()):.0f} steps apart"
        )
        apart += bool(steps.max().round() > 1)
    return apart


def store(folder: Path, quantized: nn.Module, given: Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    qrecipe.save_quantized(quantized, folder / MODEL)
    save_file({"outputs": given}, folder / OUTPUTS)


@torch.no_grad()
def outputs(model: nn.Module, batches: list[Tensor]) -> Tensor:
    return torch.cat([model(batch) for batch in batches])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
