"""Runs a kernel in Triton's interpreter on numpy arrays: no GPU, no torch.

Every buffer lies between guards. A read beyond a buffer brings in a NaN, a write beyond it is seen afterwards, and the
promises of a kernel's arguments (multiples of 16) are checked as the real launch checks them.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.runtime.interpreter as interpreter

GUARD_BYTES = 4096
DTYPES = {
    "bf16": np.uint16,
    "fp16": np.float16,
    "fp32": np.float32,
    "fp64": np.float64,
    "i8": np.int8,
    "i32": np.int32,
    "i64": np.int64,
}
NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def to_bf16(values):
    """bf16 bits of f32 values, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def from_bf16(bits):
    """f32 values of bf16 bits."""
    return (np.ascontiguousarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def rounded(values):
    """f64 values rounded to bf16 once."""
    return from_bf16(to_bf16(np.asarray(values, np.float32))).astype(np.float64)


def _patch():
    """Two things the interpreter of 3.6.0 gets wrong for bf16: a carry out of the mantissa is lost in rounding, and a
    product of matrices takes the bits for integers."""
    import triton.language as tl

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(data, source, target, mode):
        match (source, target):
            case (tl.float32, tl.bfloat16):
                return to_bf16(data)
            case (tl.bfloat16, tl.float32):
                return from_bf16(data)
            case (tl.float32, tl.float16) | (tl.float16, tl.float32):
                return data.astype(DTYPES["fp16" if target == tl.float16 else "fp32"])
        return convert(data, source, target, mode)

    def create_dot(self, a, b, d, *rest):
        def widen(x):
            bits = x.dtype.scalar == tl.bfloat16
            return interpreter.TensorHandle(from_bf16(x.data), tl.float32) if bits else x

        return dot(self, widen(a), widen(b), d, *rest)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


_patch()


class Buffer:
    """As much of a torch tensor as the interpreter looks at, with guards around the memory."""

    def __init__(self, values, kind):
        values = np.asarray(values)
        self.kind, self.shape = kind, values.shape
        dtype = np.dtype(DTYPES[kind])
        bits = to_bf16(values) if kind == "bf16" else values.astype(dtype)
        size = bits.nbytes
        raw = np.full(size + 2 * GUARD_BYTES + 16, 0xFF, np.uint8)
        start = GUARD_BYTES + -(raw.ctypes.data + GUARD_BYTES) % 16
        self.raw, self.start, self.end = raw, start, start + size
        self.bits = raw[start : start + size].view(dtype)
        self.bits[:] = bits.ravel()
        self.dtype = f"torch.{NAMES.get(kind, 'int' + kind[1:])}"

    def view(self, first):
        """The same memory from element `first` on."""
        view = object.__new__(Buffer)
        view.__dict__ |= self.__dict__
        view.bits = self.bits[first:]
        return view

    def guards_are_whole(self):
        return (self.raw[: self.start] == 0xFF).all() and (self.raw[self.end :] == 0xFF).all()

    def values(self):
        """What is there now; bf16 as f32. Of a view everything, from the memory's beginning."""
        bits = self.raw[self.start : self.end].view(DTYPES[self.kind])
        return (from_bf16(bits) if self.kind == "bf16" else bits.copy()).reshape(self.shape)

    def data_ptr(self):
        return self.bits.ctypes.data

    # The interpreter copies tensors to the host and back: there is nothing to copy.
    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def copy_(self, other):
        pass

    def storage_offset(self):
        return 0

    def size(self):
        return self.shape

    def stride(self):
        return ()

    def new_empty(self, size, device=None):
        return self

    def set_(self, *storage):
        pass

    def element_size(self):
        return self.bits.itemsize


def cdiv(a, b):
    return -(-a // b)


def run(kernel, arguments, grid={}, variant="", f32=False, arch=90, tile={}):
    """Launches a kernel of `spec.Kernel` on copies of numpy arrays and numbers; gives every buffer's contents after it.

    f32: bf16 arguments are f32 instead, so that a wrong term is not lost in rounding.
    tile: constants other than the compiled ones, smaller for speed.
    """
    constants = kernel.variants[variant]
    constants = constants | kernel.tiles(arch, constants).constants | tile
    assert arguments.keys() == kernel.arguments.keys(), arguments.keys() ^ kernel.arguments.keys()
    passed, buffers = {}, {}
    for name, value in arguments.items():
        kind, promised = kernel.argument(name)
        if kind.startswith("*"):
            kind = kind[1:]
            value = value if isinstance(value, Buffer) else Buffer(value, "fp32" if f32 and kind == "bf16" else kind)
            buffers[name] = value
            address = value.data_ptr()
        else:
            address = value
        assert not promised or address % 16 == 0, f"{name} is {address}, not a multiple of 16"
        passed[name] = value
    numbers = {n: v for n, v in arguments.items() if not kernel.arguments[n].startswith("*")}
    names = {"cdiv": cdiv} | constants | numbers | {name: grid[name] for name in kernel.grid_arguments}
    blocks = tuple(eval(expression, {}, names) for expression in kernel.grid)
    with np.errstate(all="ignore"):
        kernel.function[blocks](**passed, **constants)
    for name, buffer in buffers.items():
        assert buffer.guards_are_whole(), f"{kernel.entry} wrote beyond {name}"
    return {name: buffer.values() for name, buffer in buffers.items()}


def named(module, entry):
    """The kernel of a module with that entry."""
    return next(kernel for kernel in module.KERNELS if kernel.entry == entry)


def assert_close(got, want, tolerance, what=""):
    """The largest error is within `tolerance` of the largest value. A NaN is an error."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (what, got.shape, want.shape)
    top = max(np.abs(want).max(initial=0.0), 1e-30)
    error = np.abs(got - want).max(initial=0.0) / top
    assert error <= tolerance, f"{what}: error {error:.2e} of the largest value, allowed {tolerance:.1e}"


# f32 rounding of a sum of n unit terms is about 6e-8 sqrt(n); room for the sums of these tests, none for a wrong term.
F32 = 5e-6
# bf16 keeps 8 bits: half a unit in the last place of the largest value, rounded once, plus what f32 adds.
BF16 = 2.0**-8


def both_precisions():
    """(f32, tolerance) for tests that run in f32, where a wrong term shows, and in bf16, where rounding is tested."""
    return [(True, F32), (False, BF16)]
