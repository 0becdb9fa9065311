import unittest

from interpret import Buffer, assert_close, cdiv, named, run, to_bf16, from_bf16  # first: it turns the interpreter on
import multi_tensor
import numpy as np

ADAMW, NORM, COEFFICIENT = (named(multi_tensor, n) for n in ("adamw", "squared_norm", "clip_coefficient"))
LENGTHS, CHUNK = [300, 1, 128, 129], 128
CHUNKS = [(tensor, piece) for tensor, length in enumerate(LENGTHS) for piece in range(cdiv(length, CHUNK))]
F32 = np.float32


class Tensors:
    """Weights, gradient and moments of some tensors; the second has no bf16 copy."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        kinds = ["fp32"] * 4 + ["bf16"]
        self.buffers = [[Buffer(rng.standard_normal(n) * 0.1, kind) for kind in kinds] for n in LENGTHS]
        for buffers in self.buffers:
            buffers[3].bits[:] = np.abs(buffers[3].bits)
        addresses = [[b.data_ptr() for b in buffers] for buffers in self.buffers]
        addresses[1][4] = 0
        self.arguments = {"POINTERS": np.array(addresses), "LENGTHS": np.array(LENGTHS), "CHUNKS": np.array(CHUNKS)}

    def values(self, column):
        return [buffers[column].values() for buffers in self.buffers]

    def guards_are_whole(self):
        return all(b.guards_are_whole() for buffers in self.buffers for b in buffers)


def update_numbers(beta1, beta2, eps, weight_decay, lr, step):
    """`optim::adamw::Update::new`."""
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    return [1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, np.sqrt(correction2), eps, -lr / correction1]


def update(numbers, w, g, m, v):
    """`optim::adamw::Update::apply`, every operation in f32."""
    shrink, one_minus_beta1, beta2, one_minus_beta2, root, eps, neg_step_size = np.array(numbers, F32)
    m = m + one_minus_beta1 * (g - m) if one_minus_beta1 < 0.5 else g - (g - m) * (F32(1) - one_minus_beta1)
    v = v * beta2 + one_minus_beta2 * g * g
    return w * shrink + neg_step_size * m / (np.sqrt(v) / root + eps), m, v


class MultiTensor(unittest.TestCase):
    def test_adamw_has_the_bits_of_the_formula_for_every_tensor(self):
        tensors = Tensors(0)
        # Step counts and betas differ: a parameter without gradient in some step lags behind.
        betas_and_steps = [(0.3, 5), (0.9, 1), (0.9, 40), (0.9, 7)]
        numbers = [update_numbers(beta1, 0.999, 1e-8, 0.01, 1e-3, step) for beta1, step in betas_and_steps]
        before = [tensors.values(column) for column in range(5)]
        coefficient = F32(0.37)
        arguments = tensors.arguments | {"NUMBERS": np.array(numbers), "COEFFICIENT": np.array([coefficient])}
        run(ADAMW, arguments, {"chunks": len(CHUNKS)}, tile={"CHUNK": CHUNK})
        self.assertTrue(tensors.guards_are_whole())
        for i, (w, g, m, v, copy) in enumerate(zip(*before)):
            want = update(numbers[i], w, g * coefficient, m, v)
            for column, want in zip((0, 2, 3), want):
                np.testing.assert_array_equal(tensors.values(column)[i], want, f"tensor {i}, column {column}")
            want = copy if i == 1 else from_bf16(to_bf16(tensors.values(0)[i]))
            np.testing.assert_array_equal(tensors.values(4)[i], want)
            np.testing.assert_array_equal(tensors.values(1)[i], g)

    def test_norm_and_coefficient_of_clipping(self):
        tensors = Tensors(1)
        arguments = tensors.arguments | {"PARTIALS": np.full(len(CHUNKS), 7.0)}
        partials = run(NORM, arguments, {"chunks": len(CHUNKS)}, tile={"CHUNK": CHUNK})["PARTIALS"]
        exact = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in tensors.values(1)))

        def clip(partials, max_norm):
            arguments = {"PARTIALS": partials, "NORM": np.zeros(1), "COEFFICIENT": np.zeros(1)}
            got = run(COEFFICIENT, arguments | {"chunks": len(partials), "max_norm": max_norm}, tile={"BLOCK": 4})
            return got["NORM"][0], got["COEFFICIENT"][0]

        for max_norm in (exact / 3, exact * 3, 0.0):
            norm, coefficient = clip(partials, max_norm)
            assert_close(norm, exact, 1e-14)
            clipped = max_norm == exact / 3
            self.assertEqual(coefficient, F32(max_norm / (norm + 1e-6)) if clipped else F32(1))
        for bad in (np.inf, np.nan):
            norm, coefficient = clip(np.append(partials, bad), 1.0)
            self.assertFalse(np.isfinite(norm))
            self.assertEqual(coefficient, F32(1))


if __name__ == "__main__":
    unittest.main()
