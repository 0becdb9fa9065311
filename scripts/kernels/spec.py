"""What a kernel needs to be compiled, launched and tested without a GPU: stated once, beside the kernel."""

from dataclasses import dataclass, field

# Compute capabilities that get a cubin. Others load the PTX of the first.
ARCHES = (80, 89, 90)

# Dynamic shared memory that one block may have, in bytes. sm_80 has 163 KB, but its cubins and its PTX also run on
# cards of 8.6 and 12.0, which have what sm_89 has.
SHARED_LIMIT = {80: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Tile:
    """How one block of threads works: constants of the source, warps, and stages of the software pipeline."""

    constants: dict = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    arguments: name -> type, in the order of the source: `*bf16`, `*fp32`, `i32`, .. A type that ends in `%16` is a
        promise of the caller: the address (in bytes) or the number is a multiple of 16.
    grid: up to three expressions in arguments, constants and `grid_arguments`, with + * // - and cdiv(a, b).
    grid_arguments: names that only the grid uses.
    variants: suffix of the name -> constants of the source.
    tiles: (arch, constants of the variant) -> Tile.
    fused_multiply_add: whether a * b + c may be rounded once. Off where the CPU's bits are wanted.
    """

    function: object
    arguments: dict
    grid: tuple
    tiles: object
    grid_arguments: tuple = ()
    variants: dict = field(default_factory=lambda: {"": {}})
    fused_multiply_add: bool = True

    @property
    def entry(self):
        return self.function.__name__

    def argument(self, name):
        """(type, promised multiple of 16)"""
        text = self.arguments[name]
        return text.removesuffix("%16"), text.endswith("%16")
