#!/usr/bin/env python3
"""Compiles every kernel to `src/kernels/cuda/cubin/`, writes the manifest that the program launches them by, and the
table in `docs/kernels.md`.

    build.py                 all
    build.py --check         compiles again and compares with what is there, byte for byte
    build.py --only NAME     only kernels whose name contains NAME; says what came out, writes nothing

Needs no GPU. Wants the versions of setup_env.sh: other ones write other bytes.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # no source lines in the cubins, and no path of the machine

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parents[1] / "src/kernels/cuda/cubin"
DOCUMENT = HERE.parents[1] / "docs/kernels.md"
TRITON_VERSION = "3.6.0"
PTX_ARCH = 80
# Cards that load the PTX, and the assembler that knows them: what their drivers will do with it is tried here.
PTX_CARDS = {86: "ptxas", 100: "ptxas-blackwell", 120: "ptxas-blackwell"}

# One module per idea; each has a list KERNELS.
MODULES = [
    "attention_forward",
    "attention_backward",
    "gelu",
    "modulated_norm",
    "gated_residual",
    "norm_rope",
    "lora",
    "int8",
    "flow_loss",
    "multi_tensor",
]


def sources(module):
    """Files that a kernel's machine code depends on: its module and what that imports from here."""
    imports = re.findall(r"^from (\w+) import", (HERE / f"{module}.py").read_text(), re.MULTILINE)
    return [f"scripts/kernels/{name}.py" for name in [module, *imports] if (HERE / f"{name}.py").exists()]


def source_hash(files):
    digest = hashlib.sha256()
    for file in files:
        digest.update((HERE.parents[1] / file).read_bytes())
    return digest.hexdigest()


def compile_one(kernel, constants, arch):
    """(compiled, tile) of one kernel for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tile = kernel.tiles(arch, constants)
    all_constants = constants | tile.constants
    names = kernel.function.arg_names
    signature = {n: kernel.argument(n)[0] if n in kernel.arguments else "constexpr" for n in names}
    source = ASTSource(
        fn=kernel.function,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in all_constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in kernel.arguments if kernel.argument(n)[1]},
    )
    options = {
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": kernel.fused_multiply_add,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    # `mul.f32` without `.rn` is one that the assembler may still fuse.
    fused = re.search(r"\bfma\.|\b(mul|add|sub)\.f32", compiled.asm["ptx"])
    assert kernel.fused_multiply_add or not fused, f"{kernel.entry} for sm_{arch} has {fused[0]}"
    return compiled, tile


def tool(name, content, *arguments):
    """What one of the compiler's own tools says about a file of that content."""
    import triton

    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin" / name, *arguments, file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def resources(cubin):
    """(registers of a thread, bytes of a thread that spilled to memory)"""
    text = tool("cuobjdump", cubin, "-res-usage")
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)


def try_portable(name, ptx):
    """Assembles PTX for cards that get no cubin; it must fit their registers."""
    for arch, assembler in PTX_CARDS.items():
        text = tool(assembler, ptx, "-v", f"-arch=sm_{arch}", "-o", os.devnull)
        stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text).groups()
        assert stores == loads == "0", f"{name} from PTX for sm_{arch} spills {stores} bytes of registers"


def portable_ptx(text):
    """PTX without comments and blank lines."""
    lines = (re.sub(r"\s*//.*", "", line).strip() for line in text.splitlines())
    return "".join(line + "\n" for line in lines if line)


def build_variant(module, kernel, suffix, constants):
    """The manifest's entry of one kernel, and its files."""
    from spec import ARCHES, SHARED_LIMIT

    name = kernel.entry + suffix
    files, targets, files_of_source = {}, [], sources(module)
    for arch in ARCHES:
        compiled, tile = compile_one(kernel, constants, arch)
        meta = compiled.metadata
        assert meta.shared <= SHARED_LIMIT[arch], f"{name} for sm_{arch} wants {meta.shared} bytes of shared memory"
        registers, spilled = resources(compiled.asm["cubin"])
        assert not spilled, f"{name} for sm_{arch} spills {spilled} bytes of registers"
        binaries = [("cubin", f"{name}.sm{arch}.cubin", compiled.asm["cubin"])]
        if arch == PTX_ARCH:
            ptx = portable_ptx(compiled.asm["ptx"]).encode()
            try_portable(name, ptx)
            binaries.append(("ptx", f"{name}.ptx", ptx))
        for kind, file, content in binaries:
            files[file] = content
            targets.append(
                {
                    "kind": kind,
                    "arch": arch,
                    "file": file,
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "constants": {k: int(v) for k, v in (constants | tile.constants).items()},
                    "num_warps": meta.num_warps,
                    "num_stages": meta.num_stages,
                    "shared_bytes": meta.shared,
                    "global_scratch_bytes": meta.global_scratch_size,
                    "profile_scratch_bytes": meta.profile_scratch_size,
                    "registers": registers,
                    "spilled_bytes": spilled,
                }
            )
    entry = {
        "name": name,
        "entry": kernel.entry,
        "sources": files_of_source,
        "source_sha256": source_hash(files_of_source),
        "arguments": [
            {"name": n, "type": kernel.argument(n)[0], "multiple_of_16": kernel.argument(n)[1]}
            for n in kernel.function.arg_names
            if n in kernel.arguments
        ],
        "grid": list(kernel.grid),
        "grid_arguments": list(kernel.grid_arguments),
        "targets": targets,
    }
    return entry, files


def rust_table(files):
    """The files as bytes in the program."""
    lines = ["// Written by scripts/kernels/build.py.", "", "/// Every compiled kernel, by file name."]
    lines.append("pub static FILES: &[(&str, &[u8])] = &[")
    lines += [f'    ("{f}", include_bytes!("{f}")),' for f in sorted(files)]
    return "\n".join(lines + ["];", ""])


def document(entries, files):
    """`docs/kernels.md` with its table of what the compiler made."""
    lines = ["| kernel | tiles | warps | registers 8.0 / 8.9 / 9.0 | shared KB 8.0 / 8.9 / 9.0 | KB in all |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for entry in entries:
        cubins = [target for target in entry["targets"] if target["kind"] == "cubin"]
        tiles = [
            " x ".join(str(value) for name, value in target["constants"].items() if name.startswith(("BLOCK", "CHUNK")))
            for target in cubins
        ]
        cells = [
            f"`{entry['name']}`",
            tiles[0] if len(set(tiles)) == 1 else " / ".join(tiles),
            " / ".join(sorted({str(target["num_warps"]) for target in cubins})),
            " / ".join(str(target["registers"]) for target in cubins),
            " / ".join(f"{target['shared_bytes'] / 1024:.3g}" for target in cubins),
            f"{sum(len(files[target['file']]) for target in entry['targets']) / 1000:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    begin, end = "<!-- kernels: written by scripts/kernels/build.py -->\n", "<!-- kernels: end -->"
    before, rest = DOCUMENT.read_text().split(begin)
    return before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1]


def build(only):
    import importlib

    entries, files = [], {}
    for module in MODULES:
        for kernel in importlib.import_module(module).KERNELS:
            for suffix, constants in kernel.variants.items():
                if only and only not in kernel.entry + suffix:
                    continue
                entry, new = build_variant(module, kernel, suffix, constants)
                entries.append(entry)
                files |= new
                for target in entry["targets"]:
                    size = len(new[target["file"]])
                    print(
                        f"{target['file']:48} {size:7} bytes, {target['registers']:3} registers, "
                        f"{target['spilled_bytes']:3} spilled, {target['shared_bytes']:6} shared",
                        flush=True,
                    )
    manifest = {"format": 1, "triton": TRITON_VERSION, "kernels": entries}
    files["manifest.json"] = (json.dumps(manifest, indent=1) + "\n").encode()
    files["files.rs"] = rust_table([f for f in files if f != "manifest.json"]).encode()
    return files, document(entries, files)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only")
    args = parser.parse_args()
    import triton

    assert triton.__version__ == TRITON_VERSION, f"wants triton {TRITON_VERSION}, found {triton.__version__}"
    # A fresh cache: what is compiled is what is there now.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        files, text = build(args.only)
    total = sum(len(content) for content in files.values())
    print(f"{len(files)} files, {total / 1e6:.2f} MB")
    if args.only:
        return 0
    if args.check:
        there = {p.name: p.read_bytes() for p in OUTPUT.iterdir()}
        wrong = sorted(f for f in files.keys() | there.keys() if files.get(f) != there.get(f))
        wrong += [DOCUMENT.name] if DOCUMENT.read_text() != text else []
        print("differ: " + ", ".join(wrong) if wrong else "all as checked in")
        return int(bool(wrong))
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for file in OUTPUT.iterdir():
        file.unlink()
    for file, content in files.items():
        (OUTPUT / file).write_bytes(content)
    DOCUMENT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    sys.exit(main())
