"""From the float model to the int8 file that ships: `python examples/digits/end_to_end.py`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from digits import calibration, evaluate, factory, held_out_digits

import qrecipe

RECIPE = "builtin:x86-static"


def main() -> None:
    """Plan, quantize, evaluate, compare, save and load; print the result of each step."""
    model, example_inputs = factory()
    plan = qrecipe.plan(model, RECIPE, example_inputs)
    quantized = [site for site in plan.sites if site.verdict == "quantized"]
    print(f"planned   {len(quantized)} of {len(plan.sites)} sites quantized by {plan.recipe}")

    converted = qrecipe.quantize(model, RECIPE, calibration())
    print(f"accuracy  {evaluate(model):.3f} -> {evaluate(converted):.3f}")

    images = held_out_digits().images
    report = qrecipe.compare(model, converted, torch.split(images, 100))
    worst = report.sites[0]
    assert report.output is not None
    assert worst.activation is not None
    print(f"output    SQNR {report.output.sqnr_db:.1f} dB on images not calibrated with")
    print(f"worst     {worst.name} ({worst.op}), SQNR {worst.activation.sqnr_db:.1f} dB")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "digits-int8.safetensors")
        qrecipe.save_quantized(converted, file)
        architecture, _ = factory()  # its weights do not matter: they come from the file
        loaded = qrecipe.load_quantized(file, architecture)
        equal = torch.equal(loaded(images), converted(images))
        print(f"shipped   {file.stat().st_size / 1000:.0f} kB, outputs equal when loaded: {equal}")


if __name__ == "__main__":
    main()
