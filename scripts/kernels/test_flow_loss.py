import unittest

from interpret import assert_close, both_precisions, named, rounded, run  # first: it turns the interpreter on
import flow_loss
import numpy as np

LOSS = named(flow_loss, "flow_loss")


class FlowLoss(unittest.TestCase):
    def test_seed_and_sums_of_every_sample(self):
        rng = np.random.default_rng(0)
        samples, size, block = 3, 176, 128
        weights = np.array([1.0, 0.25, 3.0])
        factors = 2 * weights / (size * samples)
        for f32, tolerance in both_precisions():
            prediction, target = (rng.standard_normal((samples, size)) for _ in range(2))
            exact = prediction.astype(np.float32).astype(np.float64) if f32 else rounded(prediction)
            error = exact - target.astype(np.float32)
            arguments = {"PREDICTION": prediction, "TARGET": target, "FACTORS": factors, "SEED": prediction * 0}
            arguments |= {"PARTIALS": np.full((samples, 2), 7.0), "size": size}
            got = run(LOSS, arguments, {"samples": samples}, f32=f32, tile={"BLOCK": block})
            assert_close(got["SEED"], factors[:, None] * error, tolerance, "gradient")
            loss = got["PARTIALS"].sum(1) / size
            assert_close(loss, (error**2).mean(1), 1e-6, "mean squared error")
            # The seed is the gradient of the weighted mean.
            step = rng.standard_normal(error.shape)
            mean = lambda e: ((e**2).mean(1) * weights).mean()
            numeric = (mean(error + 1e-6 * step) - mean(error - 1e-6 * step)) / 2e-6
            self.assertAlmostEqual(numeric, (factors[:, None] * error * step).sum(), places=8)


if __name__ == "__main__":
    unittest.main()
