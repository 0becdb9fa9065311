import unittest

from interpret import assert_close, from_bf16, named, rounded, run, to_bf16  # first: it turns the interpreter on
import int8
import numpy as np

QUANTISE, DEQUANTISE = (named(int8, n) for n in ("int8_quantise", "int8_dequantise"))
F32 = np.float32


def ggml(w):
    """ggml's quantize_row_q8_0_ref, in f32: (q, d)."""
    groups = w.astype(F32).reshape(-1, 32)
    d = np.abs(groups).max(1, keepdims=True) / F32(127)
    inverse = np.where(d > 0, F32(1) / np.where(d > 0, d, F32(1)), F32(0))
    scaled = groups * inverse
    q = np.trunc(scaled) + np.trunc(2 * (scaled - np.trunc(scaled)))  # halves away from zero
    return q.reshape(w.shape), d.astype(np.float16).reshape(w.shape[0], -1)


class Int8(unittest.TestCase):
    def test_quantises_as_ggml_does_and_back_into_strided_rows(self):
        rng = np.random.default_rng(0)
        rows, width, stride = 7, 96, 160
        w = rounded(rng.standard_normal((rows, width)) * 0.03)
        w[0, :32] = 0.0
        w[1, :32] = np.linspace(-1, 1, 32) * 127  # d = 1, and halves that must go away from zero
        w[1, 1:5] = [2.5, -2.5, 0.5, -0.5]
        w = rounded(w)
        q, d = ggml(w)
        self.assertEqual([q[1, i] for i in (1, 2, 3, 4)], [3, -3, 1, -1])
        grid = {"Q": np.zeros(w.shape), "SCALES": np.zeros((rows, width // 32)), "rows": rows, "width": width}
        got = run(QUANTISE, {"W": w} | grid, tile={"BLOCK_G": 2})
        np.testing.assert_array_equal(got["Q"], q)
        np.testing.assert_array_equal(got["SCALES"], d)

        arguments = grid | {"Q": q, "SCALES": d, "W": np.full((rows, stride), 7.0), "row_stride_w": stride}
        got = run(DEQUANTISE, arguments, tile={"BLOCK_G": 2})["W"]
        exact = q.astype(F32) * np.repeat(d.astype(F32), 32, axis=1)
        np.testing.assert_array_equal(got[:, :width], from_bf16(to_bf16(exact)))
        self.assertTrue((got[:, width:] == 7.0).all())
        assert_close(got[2:, :width], w[2:], 1 / 127 / 2 + 2**-9 + 2**-11, "half a step, and two roundings")


if __name__ == "__main__":
    unittest.main()
