"""The decoder as one self-contained ONNX file: what a device runs without torch.

    heard (block, token, slot, 2), snr_db (block,), share (block,), kept (block,), user (block,), all float32
        -> pictures (block, 3, side, side) float32, about 0 to 1

Opset 17 and IR 8, so that the ONNX Runtime of every board loads it, operators of a short list, any number of blocks.
The same weights give the same bytes. PyTorch's exporter by tracing is used: the newer one needs a package more and
gives later opsets. Nothing in the decoder depends on values.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn

from wdmoe.broadcast.codec.model import BroadcastCodec
from wdmoe.broadcast.codec.tiling import SIDE
from wdmoe.errors import BundleError

OPSET = 17
IR_VERSION = 8
INPUTS = ("heard", "snr_db", "share", "kept", "user")
OUTPUT = "pictures"
OPERATORS = frozenset(
    {
        "Abs", "Add", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv", "Cos", "DepthToSpace", "Div",
        "Equal", "Erf", "Exp", "Expand", "Flatten", "Floor", "Gather", "GatherElements", "Gemm", "Greater", "Identity",
        "LayerNormalization", "LeakyRelu", "Less", "Log", "MatMul", "Max", "Min", "Mod", "Mul", "Neg", "Pow",
        "Reciprocal", "ReduceMean", "ReduceSum", "Relu", "Reshape", "Round", "Shape", "Sigmoid", "Sin", "Slice",
        "Softmax", "Softplus", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze", "Where"
    }
)  # fmt: skip
_TRACED_BLOCKS = 3  # any number that no size of the model has


class _Decode(nn.Module):
    """`BroadcastCodec.decode` as a module's forward."""

    def __init__(self, codec: BroadcastCodec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, heard: Tensor, snr_db: Tensor, share: Tensor, kept: Tensor, user: Tensor) -> Tensor:
        return self.codec.decode(heard, snr_db, share, kept, user)


def decoder_graph(codec: BroadcastCodec) -> bytes:
    """The file for blocks of 32x32 pixels, of a codec in evaluation mode on the CPU.

    Raises:
        BundleError: the decoder uses something that has no place in such a file.
    """
    settings = codec.settings
    tokens = (SIDE // settings.patch) ** 2
    example = (torch.zeros(_TRACED_BLOCKS, tokens, settings.slots, 2), *(torch.ones(_TRACED_BLOCKS) for _ in range(4)))
    file: Any = io.BytesIO()  # the older exporter writes to such, which its type does not say any more
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # that the exporter is the older one, and what its tracing fixes
            torch.onnx.export(
                _Decode(codec).eval(),
                example,
                file,
                dynamo=False,
                opset_version=OPSET,
                input_names=list(INPUTS),
                output_names=[OUTPUT],
                dynamic_axes={name: {0: "block"} for name in (*INPUTS, OUTPUT)},
            )
    except RuntimeError as error:  # what the exporter raises is one, too
        raise BundleError(f"the decoder has no ONNX form: {' '.join(str(error).split())[:200]}") from error
    return _tidied(onnx.load_model_from_string(file.getvalue()))


def _tidied(model: onnx.ModelProto) -> bytes:
    """Without what names this machine or its versions, and checked."""
    model.producer_name, model.producer_version, model.doc_string = "wdmoe", "", ""
    for node in model.graph.node:
        node.doc_string = ""
        if node.domain or node.op_type not in OPERATORS:
            raise BundleError(f"the decoder uses the operator {node.op_type!r}, which is not on the list")
    opsets = [(entry.domain, entry.version) for entry in model.opset_import]
    outside = any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer)
    if opsets != [("", OPSET)] or model.ir_version > IR_VERSION or model.functions or outside:
        raise BundleError(f"the decoder must be one file of opset {OPSET} and IR {IR_VERSION}, got {opsets}")
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString(deterministic=True)
    return data
