import unittest

from interpret import assert_close, both_precisions, named, rounded, run  # first: it turns the interpreter on
import gated_residual
import numpy as np

FORWARD, BACKWARD, TABLE = (
    named(gated_residual, "gated_residual_" + n) for n in ("forward", "backward", "table_gradient")
)
SAMPLES, TOKENS, WIDTH, ENTRIES, GATE = 2, 35, 144, 3, 2


class GatedResidual(unittest.TestCase):
    def check(self, conditioned, f32, tolerance):
        rng = np.random.default_rng(int(conditioned))
        sample, token = np.divmod(np.arange(SAMPLES * TOKENS), TOKENS)
        rows = sample + SAMPLES * (conditioned & (token >= TOKENS - 3))
        mods = rng.standard_normal((SAMPLES * (2 if conditioned else 1), ENTRIES, WIDTH))
        x, y, grad = (rng.standard_normal((len(rows), WIDTH)) for _ in range(3))
        exact = lambda a: a.astype(np.float32).astype(np.float64) if f32 else rounded(a)
        x64, y64, grad64, gates = exact(x), exact(y), exact(grad), exact(mods)[rows, GATE]
        common = {"TOKEN_ROWS": rows, "width": WIDTH, "entries": ENTRIES, "gate_entry": GATE}
        grid = {"all_tokens": len(rows)}
        block = {"BLOCK": 256}
        got = run(FORWARD, common | {"X": x, "Y": y, "MODS": mods, "OUT": x * 0}, grid, f32=f32, tile=block)
        assert_close(got["OUT"], x64 + gates * y64, tolerance, "forward")
        got = run(BACKWARD, common | {"GRAD": grad, "MODS": mods, "DY": x * 0}, grid, f32=f32, tile=block)
        assert_close(got["DY"], gates * grad64, tolerance, "backward")
        want = np.full(mods.shape, 7.0)
        for row in range(len(mods)):
            want[row, GATE] = (grad64 * y64)[rows == row].sum(0)
        arguments = {"Y": y, "GRAD": grad, "DMODS": np.full(mods.shape, 7.0), "tokens": TOKENS, "samples": SAMPLES}
        got = run(TABLE, common | arguments, {"table_rows": len(mods)}, f32=f32)
        assert_close(got["DMODS"], want, 5e-6, "gradient of the table")

    def test_forward_backward_and_table_gradient(self):
        for conditioned in (False, True):
            for f32, tolerance in both_precisions():
                with self.subTest(conditioned=conditioned, f32=f32):
                    self.check(conditioned, f32, tolerance)


if __name__ == "__main__":
    unittest.main()
