"""A prepared program that computes what the converted one must, without torchao's conversion."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, fx, nn

from qrecipe.errors.findings import Finding
from qrecipe.execution.pt2e.adapters import AnyAdapter, adapter_at, with_weights_observed
from qrecipe.execution.pt2e.structure import Grid, grid_of
from qrecipe.model.addresses import observed_name, site_of
from qrecipe.model.nodes import module_of


class Rounding(nn.Module):
    """Rounds a tensor to the grid of an observer."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, adapter: AnyAdapter) -> None:
        super().__init__()
        scale, zero_point = adapter.calculate_qparams()
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", zero_point.detach().clone())
        self.low, self.high = int(adapter.quant_min), int(adapter.quant_max)
        self.axis = int(adapter.ch_axis) if "per_channel" in str(adapter.qscheme) else None

    @property
    def grid(self) -> Grid:
        return Grid(
            tuple(self.scale.flatten().tolist()),
            tuple(map(int, self.zero_point.flatten().tolist())),
            self.low,
            self.high,
            self.axis,
        )

    def forward(self, x: Tensor) -> Tensor:
        scale, zero_point = self._shaped(self.scale, x), self._shaped(self.zero_point, x)
        return _rounded(x, scale, zero_point, self.low, self.high)

    def _shaped(self, values: Tensor, x: Tensor) -> Tensor:
        if self.axis is None:
            return values
        return values.view([-1 if axis == self.axis else 1 for axis in range(x.dim())])


class RoundingByCall(nn.Module):
    """Rounds each tensor to a grid over its own range, which contains 0."""

    def __init__(self, adapter: AnyAdapter) -> None:
        super().__init__()
        self.low, self.high = int(adapter.quant_min), int(adapter.quant_max)
        self.least = float(adapter.eps)

    @property
    def grid(self) -> Grid:
        return Grid((), (), self.low, self.high, None)

    def forward(self, x: Tensor) -> Tensor:
        least, most = x.min().clamp(max=0), x.max().clamp(min=0)
        scale = ((most - least) / (self.high - self.low)).clamp(min=self.least)
        zero_point = (self.low - (least / scale).round()).clamp(self.low, self.high)
        return _rounded(x, scale, zero_point, self.low, self.high)


def _rounded(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    steps = (x * (1.0 / scale)).round_().add_(zero_point).clamp_(low, high)
    return steps.sub_(zero_point).mul_(scale)


def reference(prepared: fx.GraphModule) -> fx.GraphModule:
    """A copy of the prepared program that rounds where observers stand."""
    made = with_weights_observed(prepared)
    for node in made.graph.nodes:
        adapter = adapter_at(node)
        if adapter is not None:
            kind = RoundingByCall if adapter.is_dynamic else Rounding
            made.add_submodule(str(node.target), kind(adapter))
    return made


def conversion_findings(reference: fx.GraphModule, converted: fx.GraphModule) -> Iterator[Finding]:
    """Where conversion did not put the scales of the observers (QR410)."""
    nodes = {node.name: node for node in converted.graph.nodes}
    for node in reference.graph.nodes:
        if node.op == "call_module" or node.name not in nodes:
            continue
        pairs = zip(node.all_input_nodes, nodes[node.name].all_input_nodes, strict=False)
        for before, after in pairs:
            expected, found = _rounding(before), grid_of(after)
            if expected != found:
                name = site_of(node) or "the output"
                what = "is not what was calibrated" if expected and found else "does not fit"
                yield Finding(
                    "QR410",
                    f"conversion went wrong where {name} reads {observed_name(before)}: "
                    f"the scale {what}",
                    hint="report the model",
                )


def _rounding(node: fx.Node) -> Grid | None:
    module = module_of(node)
    return module.grid if isinstance(module, (Rounding, RoundingByCall)) else None
