"""ONNX files in fewer bits: float16 throughout, or matrices in 8 bit with activations quantised as they come.

Legend: of a graph, "initializers" are its weights.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np

from megakd.runtime.extras import library

# Convolutions stay in float32: onnxruntime's of whole numbers are slower on a CPU than its float ones.
_IN_8_BIT = ("MatMul", "Gemm", "Gather")


def half(source: Path, target: Path, *, external: bool) -> None:
    """Write `source` in float16: weights, and what is computed. Inputs and outputs stay float32."""
    onnx = library("onnx", "an ONNX export needs", "onnx")
    model = onnx.load(source)
    graph, floats, halves = model.graph, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    for weight in graph.initializer:
        if weight.data_type == floats:
            _to_half(weight, onnx)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t") and attribute.t.data_type == floats:
                _to_half(attribute.t, onnx)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == floats:
                attribute.i = halves
    before = [onnx.helper.make_node("Cast", [name], [_inner(name)], to=halves) for name in _float_names(graph.input, floats)]
    after = [onnx.helper.make_node("Cast", [_inner(name)], [name], to=floats) for name in _float_names(graph.output, floats)]
    renamed = {*_float_names(graph.input, floats), *_float_names(graph.output, floats)}
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = _inner(name) if name in renamed else name
    nodes = [copy.deepcopy(node) for node in (*before, *_transposed_late(graph, onnx), *after)]
    del graph.node[:], graph.value_info[:]  # the types of what lies between are found anew
    graph.node.extend(nodes)
    onnx.save(model, target, save_as_external_data=external, location=f"{target.name}.data")


def _inner(name: str) -> str:
    return f"{name}_in_float16"


def _float_names(values: Any, floats: int) -> list[str]:
    return [value.name for value in values if value.type.tensor_type.elem_type == floats]


def _to_half(tensor: Any, onnx: Any) -> None:
    """In place; finite numbers stay finite, as masks hold float32's lowest one."""
    values, most = onnx.numpy_helper.to_array(tensor), np.finfo(np.float16).max
    kept = np.where(np.isfinite(values), np.clip(values, -most, most), values).astype(np.float16)
    tensor.CopyFrom(onnx.numpy_helper.from_array(kept, tensor.name))


def _transposed_late(graph: Any, onnx: Any) -> list[Any]:
    """The nodes, with a matrix of weights before the permutation of rows that it followed: the same numbers.

    onnxruntime 1.32 fuses the two, and its CPU optimiser then ends the process where they are float16.
    """
    permuted = {node.output[0]: node for node in graph.node if node.op_type == "Transpose"}
    weights = {weight.name for weight in graph.initializer}
    nodes = []
    for node in graph.node:
        transpose = permuted.get(node.input[0]) if node.op_type == "MatMul" and node.input[1] in weights else None
        axes = [] if transpose is None else list(transpose.attribute[0].ints)
        if transpose is None or axes[-1] != len(axes) - 1:
            nodes.append(node)
            continue
        inner = f"{node.output[0]}_in_rows"
        nodes.append(onnx.helper.make_node("MatMul", [transpose.input[0], node.input[1]], [inner]))
        nodes.append(onnx.helper.make_node("Transpose", [inner], [node.output[0]], perm=axes))
    return nodes


def whole_numbers(source: Path, target: Path, *, external: bool) -> None:
    """Write `source` with its matrices and tables of words in int8, a scale for each output; activations are quantised in each run."""
    quantization = library("onnxruntime.quantization", "an ONNX export needs", "onnx")
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises to optimise the graph beforehand, which torch's exporter has done
    try:
        quantization.quantize_dynamic(
            source,
            target,
            op_types_to_quantize=list(_IN_8_BIT),
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            use_external_data_format=external,
        )
    finally:
        logging.disable(disabled)
