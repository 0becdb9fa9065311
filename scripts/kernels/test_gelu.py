import unittest

from interpret import both_precisions, assert_close, named, rounded, run  # first: it turns the interpreter on
import gelu
import numpy as np

FORWARD, BACKWARD = (named(gelu, n) for n in ("gelu_forward", "gelu_backward"))


def reference(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def derivative(x):
    return (reference(x + 1e-6) - reference(x - 1e-6)) / 2e-6


class Gelu(unittest.TestCase):
    def test_forward_into_strided_rows_and_backward_in_place(self):
        rng = np.random.default_rng(0)
        rows, width, stride = 3, 2064, 2096  # one whole block and a ragged one
        for f32, tolerance in both_precisions():
            x, grad = (rng.standard_normal((rows, width)) * 2 for _ in range(2))
            x[0, :7] = [0.0, 50.0, -50.0, 1e-3, -1e-3, 4.0, -4.0]
            exact = x.astype(np.float32).astype(np.float64) if f32 else rounded(x)
            exact_grad = grad.astype(np.float32).astype(np.float64) if f32 else rounded(grad)
            out = np.full((rows, stride), 7.0)
            got = run(
                FORWARD,
                {"X": x, "OUT": out, "width": width, "row_stride_out": stride},
                {"rows": rows},
                f32=f32,
            )["OUT"]
            assert_close(got[:, :width], reference(exact), tolerance, "forward")
            self.assertTrue((got[:, width:] == 7.0).all(), "columns beyond the width are not touched")
            for variant in BACKWARD.variants:
                arguments = {
                    "X": x,
                    "GRAD": grad,
                    "ACTIVATED": out,
                    "width": width,
                    "row_stride_activated": stride,
                }
                got = run(BACKWARD, arguments, {"rows": rows}, variant, f32=f32)
                assert_close(got["GRAD"], exact_grad * derivative(exact), tolerance, "backward")
                if variant:
                    assert_close(got["ACTIVATED"][:, :width], reference(exact), tolerance, "activated again")
                else:
                    self.assertTrue((got["ACTIVATED"] == 7.0).all())


if __name__ == "__main__":
    unittest.main()
