import unittest

from interpret import assert_close, both_precisions, named, rounded, run  # first: it turns the interpreter on
import lora
import numpy as np

ADD = named(lora, "lora_add")
ROWS, WIDTH, STRIDE, SCALE = 70, 144, 160, 0.75


class LoraAdd(unittest.TestCase):
    def check(self, variant, rank, has_bias, f32, tolerance):
        rng = np.random.default_rng(rank)
        y, bias = rng.standard_normal((ROWS, STRIDE)), rng.standard_normal(WIDTH)
        # T as some columns of the product of a group of layers.
        t, stride_t = rng.standard_normal((ROWS, rank + 3)), rank + 3
        b = rng.standard_normal((rank, WIDTH + 5) if variant else (WIDTH, rank + 1))
        exact = lambda a: a.astype(np.float32).astype(np.float64) if f32 else rounded(a)
        factor = exact(b)[:, :WIDTH] if variant else exact(b)[:, :rank].T
        want = exact(y)[:, :WIDTH] + SCALE * exact(t)[:, :rank] @ factor + (exact(bias) if has_bias else 0.0)
        arguments = {"Y": y, "BIAS": bias, "T": t, "B": b, "rows": ROWS, "width": WIDTH, "rank": rank}
        arguments |= {"row_stride_y": STRIDE, "row_stride_t": stride_t, "row_stride_b": b.shape[1]}
        got = run(ADD, arguments | {"has_bias": int(has_bias), "scale": SCALE}, {}, variant, f32=f32)["Y"]
        assert_close(got[:, :WIDTH], want, tolerance)
        assert_close(got[:, WIDTH:], exact(y)[:, WIDTH:], 1e-7, "beyond the width")

    def test_any_rank_with_and_without_bias(self):
        for variant in ADD.variants:
            for rank, has_bias in [(16, True), (5, False), (40, True), (0, True)]:
                for f32, tolerance in both_precisions():
                    with self.subTest(variant=variant, rank=rank, f32=f32):
                        self.check(variant, rank, has_bias, f32, tolerance)


if __name__ == "__main__":
    unittest.main()
