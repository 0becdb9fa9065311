"""Launches of compiled kernels, done in Triton's interpreter on addresses: what `triton.cpp` calls.

Of a launch the grid, the addresses and the numbers are the program's; the constants are those that the loaded file was
compiled with, by the manifest. Every address that a kernel reads or writes must be allocated.
"""

import ctypes
import hashlib
import importlib
import json
import os
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts/kernels"))

import interpret  # noqa: E402  (sets the interpreter up before the kernels are imported)
import numpy as np  # noqa: E402
import triton.runtime.interpreter as interpreter  # noqa: E402

CUBIN = ROOT / "src/kernels/cuda/cubin"
MANIFEST = json.loads((CUBIN / "manifest.json").read_text())
# File -> (kernel, target). A kernel's name here is that of its file.
FILES = {target["file"]: (kernel, target) for kernel in MANIFEST["kernels"] for target in kernel["targets"]}
CONTENTS = {file: (CUBIN / file).read_bytes() for file in FILES}
ROOM = ctypes.CDLL(None).emulator_room
ROOM.restype, ROOM.argtypes = ctypes.c_uint64, [ctypes.c_uint64]


def kernel_of(address):
    """(file, kinds of the parameters) of the code at an address, or None."""
    start = ctypes.string_at(address, 4)
    for file, content in CONTENTS.items():
        # Machine code begins with its format's mark; text ends with a zero.
        if (start == b"\x7fELF") != file.endswith(".cubin"):
            continue
        found = ctypes.string_at(address, len(content)) if file.endswith(".cubin") else ctypes.string_at(address)
        if found == content:
            kinds = {"i32": "i", "i64": "l", "fp32": "f", "fp64": "d"}
            types = [a["type"] for a in FILES[file][0]["arguments"]]
            return file, "".join("p" if t.startswith("*") else kinds[t] for t in types)
    return None


def entry_of(file):
    return FILES[file][0]["entry"]


def fits(file, threads, shared):
    target = FILES[file][1]
    return threads == 32 * target["num_warps"] and shared == target["shared_bytes"]


class Address(interpret.Buffer):
    """A buffer of the device: an address with a type."""

    def __init__(self, address, kind):
        self.address, self.kind = address, kind
        self.dtype = f"torch.{interpret.NAMES.get(kind, 'int' + kind[1:])}"

    def data_ptr(self):
        return self.address

    def size(self):
        return ()

    def element_size(self):
        return np.dtype(interpret.DTYPES[self.kind]).itemsize


def _check(pointers, mask, size, doing):
    """Every address that is not masked must be allocated."""
    addresses = np.asarray(pointers.data)
    if mask is not None:
        addresses = addresses[np.broadcast_to(np.asarray(mask.data, bool), addresses.shape)]
    if not addresses.size:
        return
    lowest, highest = int(addresses.min()), int(addresses.max())
    if ROOM(lowest) >= highest - lowest + size:
        return
    addresses = np.unique(addresses)
    at = 0
    while at < len(addresses):
        room = ROOM(int(addresses[at]))
        assert room >= size, f"{doing} {size} bytes at {addresses[at]:#x}, where {room} are allocated"
        at = int(np.searchsorted(addresses, int(addresses[at]) + room - size, side="right"))


def _patch():
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def create_masked_load(self, pointers, mask, *rest):
        _check(pointers, mask, np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize, "reads")
        return load(self, pointers, mask, *rest)

    def create_masked_store(self, pointers, value, mask, *rest):
        _check(pointers, mask, np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize, "writes")
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store


_patch()


def function_of(kernel):
    """The function in the sources that was compiled."""
    for source in kernel["sources"]:
        module = importlib.import_module(Path(source).stem)
        for candidate in getattr(module, "KERNELS", []):
            if candidate.entry == kernel["entry"]:
                return candidate.function
    raise LookupError(kernel["name"])


def launch(file, values, count, *grid):
    kernel, target = FILES[file]
    assert count == len(kernel["arguments"]), (file, count)
    passed = {}
    for i, argument in enumerate(kernel["arguments"]):
        bits = ctypes.string_at(values + 8 * i, 8)
        kind = argument["type"]
        if kind.startswith("*"):
            value = address = struct.unpack("Q", bits)[0]
            value = Address(address, kind[1:])
        else:
            value = address = struct.unpack_from({"i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}[kind], bits)[0]
        promised = argument["multiple_of_16"]
        assert not promised or address % 16 == 0, f"{file}: {argument['name']} is {address}, not a multiple of 16"
        passed[argument["name"]] = value
    try:
        with np.errstate(all="ignore"):
            function_of(kernel)[tuple(grid)](**passed, **target["constants"])
    except Exception as error:
        raise RuntimeError(f"{file} with {({k: getattr(v, 'address', v) for k, v in passed.items()})}, grid {grid}") from error
