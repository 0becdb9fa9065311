import unittest

from interpret import BF16, Buffer, F32, assert_close, named, rounded, run  # first: it turns the interpreter on
import attention_backward
import attention_forward
import numpy as np

FORWARD = named(attention_forward, "attention_forward")
QUERIES, KEYS = (named(attention_backward, "attention_backward_" + n) for n in ("queries", "keys"))
HEADS = 2
# The columns of the products.
GROUPS = {"QKV": ("Q", "K", "V"), "DQKV": ("DQ", "DK", "DV")}
# Tiles that do not divide the sequences below, and masked blocks that do not divide the others.
TILE = {"BLOCK_Q": 16, "BLOCK_K": 32, "BLOCK_MASKED": 16}


def reference(q, k, v, grad, lengths, text):
    """Outputs, log-sum-exp and gradients in f64: q, k, v, grad (B, S, H, head), text first."""
    out, dq, dk, dv = (np.zeros_like(q) for _ in range(4))
    log_sums = np.zeros((q.shape[0], q.shape[2], q.shape[1]))
    for b, length in enumerate(lengths):
        keys = np.r_[0:length, text : q.shape[1]]
        for h in range(q.shape[2]):
            scale = q.shape[3] ** -0.5
            scores = q[b, :, h] @ k[b, keys, h].T * scale
            log_sums[b, h] = np.logaddexp.reduce(scores, 1)
            p = np.exp(scores - log_sums[b, h][:, None])
            out[b, :, h] = p @ v[b, keys, h]
            dp = grad[b, :, h] @ v[b, keys, h].T
            ds = p * (dp - (grad[b, :, h] * out[b, :, h]).sum(1, keepdims=True))
            dq[b, :, h] = ds @ k[b, keys, h] * scale
            dk[b, keys, h] = ds.T @ q[b, :, h] * scale
            dv[b, keys, h] = p.T @ grad[b, :, h]
    return out, log_sums, dq, dk, dv


class Streams:
    """A batch in the layout of the kernels. Queries, keys and values of a stream are columns of one product, and so are
    their gradients; outputs and their gradients are matrices of their own."""

    def __init__(self, head, text, image, lengths, f32, size=1.0, arch=None):
        self.head, self.text, self.image, self.lengths, self.f32 = head, text, image, lengths, f32
        self.arch = arch  # with the tiles compiled for it, else with the small ones above
        rng = np.random.default_rng(0)
        self.width = HEADS * head
        self.qkv = rng.standard_normal((len(lengths), text + image, 3 * self.width)) * size
        self.grad = rng.standard_normal((len(lengths), text + image, self.width))

    def by_head(self, x):
        """What the kernel reads, in f64."""
        x = x.astype(np.float32).astype(np.float64) if self.f32 else rounded(x)
        return x.reshape(*x.shape[:2], HEADS, self.head)

    def reference(self, grad):
        q, k, v = (self.by_head(x) for x in np.split(self.qkv, 3, axis=2))
        return reference(q, k, v, self.by_head(grad), self.lengths, self.text)

    def run(self, kernel, matrices, rows, numbers={}):
        """Launches the kernel; gives every matrix, and every number of a row, as it is afterwards, the streams joined.

        matrices: name -> (B, S, heads * HEAD), `QKV` and `DQKV` three times as wide. rows: name -> (B, heads, S).
        """
        kind = "fp32" if self.f32 else "bf16"
        parts = {"TEXT": slice(0, self.text), "IMAGE": slice(self.text, None)}
        buffers = {(s, n): Buffer(x[:, part], kind) for n, x in matrices.items() for s, part in parts.items()}
        wide = {n: (whole, i) for whole, names in GROUPS.items() for i, n in enumerate(names)}
        arguments = {}
        for name in kernel.arguments:
            stream, _, matrix = name.partition("_")
            if stream in parts:
                whole, column = wide.get(matrix, (matrix, 0))
                arguments[name] = buffers[stream, whole].view(column * self.width)
            elif name.startswith("row_stride"):
                arguments[name] = self.width * (1 if name.endswith("out") else 3)
            elif name in rows:
                arguments[name] = rows[name]
        arguments |= {"LENGTHS": np.array(self.lengths), "text_tokens": self.text, "image_tokens": self.image}
        arguments |= {"heads": HEADS} | numbers
        tile = {n: v for n, v in TILE.items() if n in kernel.function.arg_names and not self.arch}
        grid, arch = {"samples": len(self.lengths)}, self.arch or 90
        got = run(kernel, arguments, grid, f"_d{self.head}", f32=self.f32, arch=arch, tile=tile)
        joined = {n: np.concatenate([buffers[s, n].values() for s in parts], 1) for n in matrices}
        return joined | {n: got[n] for n in rows if n in got}


class Attention(unittest.TestCase):
    def check(self, streams, tolerance, text_gradient=True):
        flat = lambda x: x.reshape(*x.shape[:2], streams.width)
        grad = streams.grad.copy()
        if not text_gradient:
            grad[:, : streams.text] = 0.0
        out, log_sums, *want = streams.reference(grad)
        blank = {"OUT": np.full(grad.shape, 7.0), "DQKV": np.full(streams.qkv.shape, 7.0)}
        got = streams.run(FORWARD, blank | {"QKV": streams.qkv}, {"LOG_SUMS": np.full(log_sums.shape, 7.0)})
        assert_close(got["OUT"], flat(out), tolerance, "output")
        assert_close(got["LOG_SUMS"], log_sums / np.log(2), 1e-6 if streams.f32 else 1e-5, "log-sum-exp")

        if not text_gradient:
            grad[:, : streams.text] = np.nan  # not read
        rows = {"LOG_SUMS": got["LOG_SUMS"], "DELTA": np.full(log_sums.shape, np.nan)}
        matrices = blank | {"QKV": streams.qkv, "OUT": got["OUT"], "GRAD": grad}
        numbers = {"text_gradient": int(text_gradient)}
        # Each kernel fills its own columns and leaves the others.
        got = streams.run(QUERIES, matrices, rows, numbers)
        dq, *others = np.split(got["DQKV"], 3, axis=2)
        self.assertTrue((np.array(others) == 7.0).all())
        rows["DELTA"] = got["DELTA"]
        if not text_gradient:
            self.assertTrue((got["DELTA"][..., : streams.text] == 0.0).all())
        other, dk, dv = np.split(streams.run(KEYS, matrices, rows, numbers)["DQKV"], 3, axis=2)
        self.assertTrue((other == 7.0).all())

        # Products of gradients and probabilities pass through bf16 once more.
        tolerance = tolerance if streams.f32 else 2 * tolerance
        for name, got, want in zip(("dq", "dk", "dv"), (dq, dk, dv), want):
            assert_close(got, flat(want), tolerance, name)
        if not text_gradient:
            self.assertTrue((dq[:, : streams.text] == 0.0).all())
        for b, length in enumerate(streams.lengths):
            for padding in (dk[b, length : streams.text], dv[b, length : streams.text]):
                self.assertTrue((padding == 0.0).all(), "padding has no gradient")

    def test_ragged_streams_and_text_lengths(self):
        ragged, whole = (21, 75, [21, 5]), (16, 64, [0, 16])
        for head, f32, tolerance, sizes in (
            (64, True, F32, ragged),
            (128, True, F32, whole),
            (64, False, BF16, whole),
            (128, False, BF16, ragged),
        ):
            with self.subTest(head=head, f32=f32, sizes=sizes):
                self.check(Streams(head, *sizes, f32), tolerance)

    def test_the_compiled_tiles(self):
        for arch in (80, 90):
            self.check(Streams(128, 20, 150, [11], True, arch=arch), F32)

    def test_a_picture_smaller_than_a_block(self):
        self.check(Streams(64, 40, 9, [33], True), F32)

    def test_an_unused_text_output(self):
        self.check(Streams(64, 21, 40, [21, 3], True), F32, text_gradient=False)

    def test_large_scores_do_not_overflow(self):
        # Scores in the hundreds carry an f32 rounding of 3e-5, which the exponential passes on.
        self.check(Streams(64, 21, 40, [7], True, size=8.0), 2e-4)
        # Scores around -500: the probability of a key that is not there, whose score is 0, is infinite in f32.
        streams = Streams(64, 21, 40, [7], True)
        streams.qkv[..., : streams.width] -= 8.0
        streams.qkv[..., streams.width : 2 * streams.width] += 8.0
        self.check(streams, 1e-3)


if __name__ == "__main__":
    unittest.main()
