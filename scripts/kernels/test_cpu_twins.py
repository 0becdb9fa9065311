"""Every kernel against what the CPU op of the same name computed in f32 (`src/kernels/cuda/twins.rs` recorded it)."""

import json
import unittest
from pathlib import Path

from interpret import Buffer, F32, assert_close, named, run  # first: it turns the interpreter on
import attention_backward
import attention_forward
import gated_residual
import gelu
import int8
import lora
import modulated_norm
import multi_tensor
import norm_rope
import numpy as np

FILE = Path(__file__).resolve().parents[2] / "tests/fixtures/kernels/cpu.safetensors"


def read_safetensors(path):
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        assert entry["dtype"] == "F32", name
        first, last = entry["data_offsets"]
        tensors[name] = np.frombuffer(data[end + first : end + last], np.float32).reshape(entry["shape"])
    return tensors


TENSORS = read_safetensors(FILE)


def case(name):
    """The tensors of one op."""
    return {key.removeprefix(name + "."): value for key, value in TENSORS.items() if key.startswith(name + ".")}


def kernel_run(module, entry, arguments, grid={}, variant="", tile={}):
    return run(named(module, entry), arguments, grid, variant, f32=True, tile=tile)


# Two samples of five tokens, the last two of each under conditions.
TOKEN_ROWS = np.array([0, 0, 0, 2, 2, 1, 1, 1, 3, 3])


class CpuTwins(unittest.TestCase):
    def test_joint_attention(self):
        t = case("attention")
        streams = [("TEXT", "text", 0), ("IMAGE", "image", 1)]
        blank = lambda *names: {f"{s}_{x}": t[f"{n}_q"] * 0 for s, n, _ in streams for x in names}
        inputs = {f"{s}_{x}": t[f"{n}_{x.lower()}"] for s, n, _ in streams for x in "QKV"}
        inputs |= {"LENGTHS": np.array([7, 3]), "text_tokens": 7, "image_tokens": 20, "heads": 1}
        inputs |= {name: 64 for name in ("row_stride_qk", "row_stride_v", "row_stride_out")}
        grid, tile = {"samples": 2}, {"BLOCK_Q": 16, "BLOCK_K": 16}
        masked = tile | {"BLOCK_MASKED": 16}
        arguments = inputs | blank("OUT") | {"LOG_SUMS": np.zeros((2, 1, 27))}
        forward = kernel_run(attention_forward, "attention_forward", arguments, grid, "_d64", masked)
        for s, _, i in streams:
            assert_close(forward[f"{s}_OUT"], t[f"out.{i}"], F32, s)

        inputs |= {f"{s}_GRAD": t[f"grad.{i}"] for s, _, i in streams}
        inputs |= {"LOG_SUMS": forward["LOG_SUMS"], "text_gradient": 1, "row_stride_dqk": 64}
        outputs = {f"{s}_OUT": forward[f"{s}_OUT"] for s, _, _ in streams}
        arguments = inputs | outputs | blank("DQ") | {"DELTA": np.zeros((2, 1, 27))}
        queries = kernel_run(attention_backward, "attention_backward_queries", arguments, grid, "_d64", masked)
        arguments = inputs | blank("DK", "DV") | {"DELTA": queries["DELTA"], "row_stride_dv": 64}
        keys = kernel_run(attention_backward, "attention_backward_keys", arguments, grid, "_d64", tile)
        for s, n, _ in streams:
            assert_close(queries[f"{s}_DQ"], t[f"d.{n}_q"], F32, f"{s} dq")
            assert_close(keys[f"{s}_DK"], t[f"d.{n}_k"], F32, f"{s} dk")
            assert_close(keys[f"{s}_DV"], t[f"d.{n}_v"], F32, f"{s} dv")

    def test_modulated_norm(self):
        t = case("modulated_norm")
        common = {"X": t["x"], "TOKEN_ROWS": TOKEN_ROWS, "width": 48, "entries": 3, "scale_entry": 0}
        token_grid, tile = {"all_tokens": 10}, {"BLOCK": 64}
        arguments = common | {"MODS": t["mods"], "OUT": t["x"] * 0, "STATS": np.zeros((10, 2)), "shift_entry": 2}
        arguments |= {"row_stride_out": 48, "eps": 1e-6}
        got = kernel_run(modulated_norm, "modulated_norm_forward", arguments, token_grid, tile=tile)
        assert_close(got["OUT"], t["out.0"], F32)
        common |= {"GRAD": t["grad.0"], "STATS": got["STATS"], "row_stride_grad": 48}
        arguments = common | {"MODS": t["mods"], "DX": t["x"] * 0}
        got = kernel_run(modulated_norm, "modulated_norm_backward", arguments, token_grid, tile=tile)
        assert_close(got["DX"], t["d.x"], F32)
        arguments = common | {"DMODS": t["mods"] * 0, "tokens": 5, "samples": 2, "shift_entry": 2}
        got = kernel_run(modulated_norm, "modulated_norm_table_gradient", arguments, {"table_rows": 4}, tile=tile)
        assert_close(got["DMODS"], t["d.mods"], F32)

    def test_gated_residual(self):
        t = case("gated_residual")
        common = {"TOKEN_ROWS": TOKEN_ROWS, "width": 48, "entries": 3, "gate_entry": 1}
        token_grid, tile = {"all_tokens": 10}, {"BLOCK": 64}
        arguments = common | {"X": t["x"], "Y": t["y"], "MODS": t["mods"], "OUT": t["x"] * 0}
        got = kernel_run(gated_residual, "gated_residual_forward", arguments, token_grid, tile=tile)
        assert_close(got["OUT"], t["out.0"], F32)
        arguments = common | {"GRAD": t["grad.0"], "MODS": t["mods"], "DY": t["x"] * 0}
        got = kernel_run(gated_residual, "gated_residual_backward", arguments, token_grid, tile=tile)
        assert_close(got["DY"], t["d.y"], F32)
        arguments = common | {"Y": t["y"], "GRAD": t["grad.0"], "DMODS": t["mods"] * 0, "tokens": 5, "samples": 2}
        got = kernel_run(gated_residual, "gated_residual_table_gradient", arguments, {"table_rows": 4}, tile=tile)
        assert_close(got["DMODS"], t["d.mods"], F32)

    def test_norm_rope(self):
        t = case("norm_rope")
        common = {"X": t["x"], "WEIGHT": t["weight"], "COS": t["cos"], "SIN": t["sin"], "row_stride_x": 128}
        common |= {"all_heads": 12, "heads": 2, "tokens": 3, "eps": 1e-6}
        arguments = common | {"OUT": t["x"] * 0, "row_stride_out": 128}
        got = kernel_run(norm_rope, "norm_rope_forward", arguments, {}, "_d64", {"BLOCK": 8})
        assert_close(got["OUT"], t["out.0"], F32)
        arguments = common | {"GRAD": t["grad.0"], "DX": t["x"] * 0, "row_stride_grad": 128, "row_stride_dx": 128}
        got = kernel_run(norm_rope, "norm_rope_backward", arguments, {}, "_d64", {"BLOCK": 8})
        assert_close(got["DX"], t["d.x"], F32)

    def test_linear_with_adapter_after_gelu(self):
        """The products with a wide side are numpy's here and cuBLAS's on the GPU."""
        t = case("linear")
        rows, inner, outer, rank, scale = 5, 32, 16, 3, 0.75
        arguments = {"X": t["x"], "OUT": t["x"] * 0, "width": inner, "row_stride_out": inner}
        activated = kernel_run(gelu, "gelu_forward", arguments, {"rows": rows})["OUT"]
        arguments = {"Y": activated @ t["weight"].T, "BIAS": t["bias"], "T": activated @ t["a"].T, "B": t["b"]}
        arguments |= {"rows": rows, "width": outer, "rank": rank, "row_stride_y": outer, "row_stride_t": rank}
        arguments |= {"row_stride_b": rank, "has_bias": 1, "scale": scale}
        assert_close(kernel_run(lora, "lora_add", arguments)["Y"], t["out.0"], F32, "forward")

        dy = t["grad.0"]
        dt = dy @ t["b"]
        arguments |= {"Y": dy @ t["weight"], "BIAS": dy, "T": dt, "B": t["a"], "width": inner, "has_bias": 0}
        arguments |= {"row_stride_y": inner, "row_stride_b": inner}
        dx = kernel_run(lora, "lora_add", arguments, {}, "_by_rank")["Y"]
        arguments = {"X": t["x"], "GRAD": dx, "ACTIVATED": dx * 0, "width": inner, "row_stride_activated": inner}
        got = kernel_run(gelu, "gelu_backward", arguments, {"rows": rows}, "_recompute")
        assert_close(got["GRAD"], t["d.x"], F32, "dx")
        assert_close(scale * dt.T @ got["ACTIVATED"], t["d.a"], F32, "da")

    def test_clipping_and_adamw(self):
        t = case("adamw")
        sizes, tile, grid = [15, 7], {"CHUNK": 8}, {"chunks": 3}
        chunks = np.array([(0, 0), (0, 1), (1, 0)])
        weights = [Buffer(t[f"start.{i}"].ravel(), "fp32") for i in range(2)]
        moments1, moments2 = ([Buffer(np.zeros(n), "fp32") for n in sizes] for _ in range(2))
        for step in range(2):
            grads = [Buffer(t[f"{step}.{i}.grad"].ravel(), "fp32") for i in range(2)]
            pointers = [[b.data_ptr() for b in row] + [0] for row in zip(weights, grads, moments1, moments2)]
            common = {"POINTERS": np.array(pointers), "LENGTHS": np.array(sizes), "CHUNKS": chunks}
            partials = kernel_run(multi_tensor, "squared_norm", common | {"PARTIALS": np.zeros(3)}, grid, tile=tile)
            arguments = {"PARTIALS": partials["PARTIALS"], "NORM": np.zeros(1), "COEFFICIENT": np.zeros(1)}
            got = kernel_run(multi_tensor, "clip_coefficient", arguments | {"chunks": 3, "max_norm": 1.0})
            assert_close(got["NORM"], t[f"{step}.norm"], 1e-7, "norm")
            correction1, correction2 = 1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1)
            numbers = [1 - 1e-3 * 0.01, 1 - 0.9, 0.999, 1 - 0.999, np.sqrt(correction2), 1e-8, -1e-3 / correction1]
            arguments = common | {"NUMBERS": np.array([numbers] * 2), "COEFFICIENT": got["COEFFICIENT"]}
            kernel_run(multi_tensor, "adamw", arguments, grid, tile=tile)
            for name, buffers in {"weights": weights, "exp_avg": moments1, "exp_avg_sq": moments2}.items():
                for i, buffer in enumerate(buffers):
                    want = t[f"{step}.{i}.{name}"].ravel()
                    np.testing.assert_array_equal(buffer.values(), want, f"step {step}, tensor {i}, {name}")

    def test_int8_has_the_bits_of_candles_q8_0(self):
        t = case("int8")
        arguments = {"W": t["w"], "Q": np.zeros((4, 96)), "SCALES": np.zeros((4, 3)), "rows": 4, "width": 96}
        got = kernel_run(int8, "int8_quantise", arguments)
        np.testing.assert_array_equal(got["Q"], t["q"])
        np.testing.assert_array_equal(got["SCALES"], t["scales"])


if __name__ == "__main__":
    unittest.main()
