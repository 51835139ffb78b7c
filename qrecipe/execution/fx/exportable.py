"""torch's decomposed conversion: plain functions, which exporters know.

Embeddings look up integers: their zero points are none. torch's decomposed conversion rounds each
weight before it adds one, which is up to a step off, and ONNX has integer zero points only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qrecipe._torch_ao import quiet
from qrecipe._torch_fx import ReferenceQuantizedModule, convert
from qrecipe.audit.sample import Sample
from qrecipe.errors.findings import ArtifactError, AuditError, Finding
from qrecipe.execution.fx.convert import as_torch_prepared
from qrecipe.execution.fx.reference import check_conversion, explicit, held
from qrecipe.execution.packing import one_each
from qrecipe.execution.part import Exportable, check_exportable
from qrecipe.model.call import Inputs, bind
from qrecipe.model.rewrite_proof import passing
from qrecipe.planning.backend import own_backend_config
from qrecipe.planning.plan import Plan
from qrecipe.process.memory import failing_as
from qrecipe.process.state import random_numbers_kept
from qrecipe.recipe.patterns import leave_float

_QUANTIZE = "quantized_decomposed.quantize_per_tensor"


def exportable(plan: Plan, prepared: fx.GraphModule, inputs: Inputs) -> Exportable:
    """The decomposed conversion on a copy, each module held against the prepared model's.

    Raises:
        ArtifactError: the plan has dynamic sites, or torch fails (QR512).
        AuditError: it computes something other than the prepared model (QR412, QR414), or fails
            (QR413).
    """
    check_exportable(plan)
    # what was trained rounds already
    before = prepared if plan.phase == "qat" else passing(prepared)
    with torch.no_grad():
        float_output = inputs.cloned().call(before)
    decomposed = _decomposed(prepared, plan)
    check_conversion(decomposed, prepared, Sample(inputs, float_output), plan.phase)
    explicit(decomposed)
    _look_up_integers(decomposed)
    _widen_ranges(decomposed)
    bound = bind(decomposed.eval(), prepared, inputs)
    return Exportable(decomposed, bound, _checked_output(decomposed, prepared, bound), float_output)


def _decomposed(prepared: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    what = "torch cannot convert the model for export"
    with failing_as(ArtifactError, "QR512", what), quiet(), random_numbers_kept():
        return convert(
            as_torch_prepared(prepared),
            True,
            is_decomposed=True,
            backend_config=own_backend_config(plan.backend),
        )


def _widen_ranges(decomposed: fx.GraphModule) -> None:
    """Clip at the limits of the dtype, in place: ONNX and the kernels have no other limits."""
    for node in decomposed.graph.nodes:
        if str(node.target).startswith(_QUANTIZE) and len(node.args) == 6:
            limits = torch.iinfo(node.args[-1])
            node.args = (*node.args[:3], limits.min, limits.max, node.args[-1])
    decomposed.recompile()


def _checked_output(decomposed: fx.GraphModule, prepared: fx.GraphModule, inputs: Any) -> Any:
    what = "the model to be exported fails"
    with (
        failing_as(AuditError, "QR413", what),
        torch.no_grad(),
        quiet(),
        held(decomposed, prepared) as wrong,
    ):
        output = decomposed(*inputs)
    if wrong:
        raise AuditError(
            [
                Finding(
                    "QR414",
                    f"{name} computes something else after export: {value:.1f} dB from "
                    "the float module with equal input and weights",
                    hint=leave_float(name),
                )
                for name, value in wrong.items()
            ]
        )
    return output


def _look_up_integers(decomposed: fx.GraphModule) -> None:
    """Let embeddings look up the integers of the kernels, in place."""
    for name, module in list(decomposed.named_modules()):
        if not isinstance(module, ReferenceQuantizedModule) or not _has_float_zero_points(module):
            continue
        if isinstance(module, nn.Embedding):
            decomposed.set_submodule(name, _Table(module))
        else:  # sums of rows
            module.table = _Table(module)
            vars(module)["get_weight"] = module.table.all


def _has_float_zero_points(module: Any) -> bool:
    return bool(module.weight_qscheme == torch.per_channel_affine_float_qparams)


class _Table(nn.Module):
    """The integers of an embedding, with a scale and a zero point for each row."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, reference: Any) -> None:
        super().__init__()
        scale, zero_point = reference.weight_scale, reference.weight_zero_point
        weight, kind = reference.weight.detach(), reference.weight_dtype
        quantized = torch.quantize_per_channel(weight, scale, zero_point, 0, kind)
        self.register_buffer("codes", one_each(quantized.int_repr(), weight.shape))
        self.register_buffer("scale", scale.view(-1, 1))
        self.register_buffer("zero_point", zero_point.view(-1, 1))

    def forward(self, indices: Tensor) -> Tensor:
        codes = F.embedding(indices, self.codes).float()
        return (codes - F.embedding(indices, self.zero_point)) * F.embedding(indices, self.scale)

    def all(self) -> Tensor:
        # an exporter would fold plain arithmetic into floats
        grid = (self.scale.flatten(), torch.zeros(len(self.scale), dtype=torch.int64), 0, 0, 255)
        steps: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.codes, *grid, torch.uint8
        )
        return steps - self.zero_point * self.scale
