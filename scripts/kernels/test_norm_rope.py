import unittest

from interpret import assert_close, both_precisions, named, rounded, run  # first: it turns the interpreter on
import norm_rope
import numpy as np

FORWARD, BACKWARD = (named(norm_rope, "norm_rope_" + n) for n in ("forward", "backward"))
BATCH, TOKENS, HEADS, EPS = 2, 5, 3, 1e-6


def forward(x, weight, angles):
    """x (B, S, H, head)"""
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[None, :, None]
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def backward(x, weight, angles, grad):
    turned = (grad[..., 0::2] + 1j * grad[..., 1::2]) * np.exp(-1j * angles)[None, :, None]
    grad = np.stack([turned.real, turned.imag], -1).reshape(x.shape) * weight
    inv_rms = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    normed = x * inv_rms
    return inv_rms * (grad - normed * (grad * normed).mean(-1, keepdims=True))


class NormRope(unittest.TestCase):
    def check(self, head, f32, tolerance):
        rng = np.random.default_rng(head)
        # Queries as the first columns of a wider product; the gradient as the middle ones.
        width = HEADS * head
        wide = rng.standard_normal((BATCH, TOKENS, 3 * width)) * 1.5
        weight, angles = rng.standard_normal(head), rng.standard_normal((TOKENS, head // 2)) * 3
        grad = rng.standard_normal((BATCH, TOKENS, width))
        exact = lambda a: a.astype(np.float32).astype(np.float64) if f32 else rounded(a)
        shape = (BATCH, TOKENS, HEADS, head)
        x64, w64, g64 = exact(wide)[..., :width].reshape(shape), exact(weight), exact(grad).reshape(shape)
        common = {"X": wide, "WEIGHT": weight, "COS": np.cos(angles), "SIN": np.sin(angles)}
        common |= {"all_heads": BATCH * TOKENS * HEADS, "heads": HEADS, "tokens": TOKENS}
        common |= {"row_stride_x": 3 * width, "eps": EPS}
        variant, tile = f"_d{head}", {"BLOCK": 8}
        out = np.full((BATCH, TOKENS, width), 7.0)
        got = run(FORWARD, common | {"OUT": out, "row_stride_out": width}, {}, variant, f32=f32, tile=tile)
        assert_close(got["OUT"], forward(x64, w64, angles).reshape(out.shape), tolerance, "forward")

        dx = backward(x64, w64, angles, g64)
        step = rng.standard_normal(shape)
        loss = lambda x: (forward(x, w64, angles) * g64).sum()
        numeric = (loss(x64 + 1e-6 * step) - loss(x64 - 1e-6 * step)) / 2e-6
        self.assertAlmostEqual(numeric, (dx * step).sum(), delta=1e-5 * np.abs(dx * step).sum())
        arguments = {"GRAD": grad, "DX": np.full_like(wide, 7.0), "row_stride_grad": width, "row_stride_dx": 3 * width}
        got = run(BACKWARD, common | arguments, {}, variant, f32=f32, tile=tile)["DX"]
        assert_close(got[..., :width], dx.reshape(out.shape), tolerance, "backward")
        self.assertTrue((got[..., width:] == 7.0).all())

    def test_forward_and_backward_on_columns_of_a_wider_product(self):
        for head in (64, 128):
            for f32, tolerance in both_precisions():
                with self.subTest(head=head, f32=f32):
                    self.check(head, f32, tolerance)


if __name__ == "__main__":
    unittest.main()
