"""The float model as a file for another runtime, to compare with."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import nn

from qrecipe._torch_ao import quiet
from qrecipe.model.call import Inputs
from qrecipe.process.state import unheard
from qrecipe.process.warnings import held_back
from qrecipe.runtimes.executorch import MODULES


def onnx_content(model: nn.Module, inputs: Inputs) -> bytes:
    """ONNX, as torch exports it."""
    given = inputs.cloned()
    with unheard(), held_back([("", Warning)]):
        program = torch.onnx.export(
            model, given.args, kwargs=dict(given.kwargs), dynamo=True, verbose=False
        )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def pte_content(model: nn.Module, inputs: Inputs) -> bytes:
    """ExecuTorch, with the float kernels of XNNPACK."""
    exir, xnnpack, _ = map(import_module, MODULES)
    given = inputs.cloned()
    with unheard(), quiet(), held_back([("", Warning)]):
        exported = torch.export.export(model, given.args, dict(given.kwargs))
        partitioner = [xnnpack.XnnpackPartitioner()]
        edge = exir.to_edge_transform_and_lower(exported, partitioner=partitioner)
        return bytes(edge.to_executorch().buffer)
