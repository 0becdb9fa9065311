import unittest

from interpret import assert_close, both_precisions, named, rounded, run  # first: it turns the interpreter on
import modulated_norm
import numpy as np

FORWARD, BACKWARD, TABLE = (
    named(modulated_norm, "modulated_norm_" + n) for n in ("forward", "backward", "table_gradient")
)
SAMPLES, TOKENS, WIDTH, ENTRIES, SHIFT, SCALE, EPS = 2, 37, 144, 6, 3, 4, 1e-6


def token_rows(conditioned):
    """Two samples; with conditions the last five tokens of each take the second half of the table."""
    sample = np.repeat(np.arange(SAMPLES), TOKENS)
    return sample + SAMPLES * (conditioned & (np.arange(SAMPLES * TOKENS) % TOKENS >= TOKENS - 5))


def forward(x, mods, rows):
    mean = x.mean(1, keepdims=True)
    inv_std = 1 / np.sqrt(x.var(1, keepdims=True) + EPS)
    normed = (x - mean) * inv_std
    return normed * (1 + mods[rows, SCALE]) + mods[rows, SHIFT], normed, mean, inv_std


class ModulatedNorm(unittest.TestCase):
    def check(self, conditioned, f32, tolerance):
        rng = np.random.default_rng(int(conditioned))
        rows = token_rows(conditioned)
        stride = WIDTH + 48
        mods = rng.standard_normal((SAMPLES * (2 if conditioned else 1), ENTRIES, WIDTH)) * 0.5
        x = rng.standard_normal((SAMPLES * TOKENS, WIDTH)) * 1.5 + 0.3
        grad = rng.standard_normal((SAMPLES * TOKENS, stride))
        exact = lambda a: a.astype(np.float32).astype(np.float64) if f32 else rounded(a)
        x64, mods64, grad64 = exact(x), exact(mods), exact(grad)[:, :WIDTH]
        want, normed, mean, inv_std = forward(x64, mods64, rows)

        common = {"X": x, "MODS": mods, "TOKEN_ROWS": rows, "width": WIDTH, "entries": ENTRIES}
        grid = {"all_tokens": len(rows)}
        arguments = common | {"OUT": np.full_like(grad, 7.0), "STATS": np.zeros((len(rows), 2)), "eps": EPS}
        arguments |= {"shift_entry": SHIFT, "scale_entry": SCALE, "row_stride_out": stride}
        got = run(FORWARD, arguments, grid, f32=f32, tile={"BLOCK": 256})
        assert_close(got["OUT"][:, :WIDTH], want, tolerance, "forward")
        self.assertTrue((got["OUT"][:, WIDTH:] == 7.0).all())
        assert_close(got["STATS"], np.hstack([mean, inv_std]), 1e-6, "mean and 1 / std")
        stats = got["STATS"]

        gs = grad64 * (1 + mods64[rows, SCALE])
        dx = inv_std * (gs - gs.mean(1, keepdims=True) - normed * (gs * normed).mean(1, keepdims=True))
        arguments = common | {"GRAD": grad, "STATS": stats, "DX": np.zeros_like(x)}
        arguments |= {"scale_entry": SCALE, "row_stride_grad": stride}
        got = run(BACKWARD, arguments, grid, f32=f32, tile={"BLOCK": 256})
        assert_close(got["DX"], dx, tolerance, "backward")

        # The gradient that was derived by hand against a difference of the forward formula.
        step = rng.standard_normal(x.shape)
        loss = lambda x: (forward(x, mods64, rows)[0] * grad64).sum()
        numeric = (loss(x64 + 1e-6 * step) - loss(x64 - 1e-6 * step)) / 2e-6
        self.assertAlmostEqual(numeric, (dx * step).sum(), delta=1e-5 * abs(dx * step).sum())

        want = np.full(mods.shape, 7.0)
        for row in range(len(mods)):
            want[row, SHIFT] = grad64[rows == row].sum(0)
            want[row, SCALE] = (grad64 * normed)[rows == row].sum(0)
        arguments = {"X": x, "GRAD": grad, "TOKEN_ROWS": rows, "STATS": stats, "DMODS": np.full(mods.shape, 7.0)}
        arguments |= {"tokens": TOKENS, "samples": SAMPLES, "width": WIDTH, "entries": ENTRIES}
        arguments |= {"shift_entry": SHIFT, "scale_entry": SCALE, "row_stride_grad": stride}
        got = run(TABLE, arguments, {"table_rows": len(mods)}, f32=f32)
        assert_close(got["DMODS"], want, 5e-6, "gradient of the table")

    def test_forward_backward_and_table_gradient(self):
        for conditioned in (False, True):
            for f32, tolerance in both_precisions():
                with self.subTest(conditioned=conditioned, f32=f32):
                    self.check(conditioned, f32, tolerance)

    def test_the_compiled_block_on_the_real_width(self):
        rng = np.random.default_rng(2)
        x, mods = rng.standard_normal((2, 3072)), rng.standard_normal((1, 2, 3072))
        rows = np.zeros(2, int)
        arguments = {"X": x, "MODS": mods, "TOKEN_ROWS": rows, "OUT": x, "STATS": np.zeros((2, 2)), "width": 3072}
        arguments |= {"entries": 2, "shift_entry": 1, "scale_entry": 0, "row_stride_out": 3072, "eps": EPS}
        got = run(FORWARD, arguments, {"all_tokens": 2}, f32=True)["OUT"]
        normed = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + EPS)
        assert_close(got, normed * (1 + mods[0, 0]) + mods[0, 1], 5e-6)


if __name__ == "__main__":
    unittest.main()
