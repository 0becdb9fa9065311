#!/usr/bin/env python3
"""Times `qwen-lora merge` of two rank-32 adapters into a base folder against `cp` of that base and `sync`, in turn.

  python merge.py --binary target/release/qwen-lora --work DIR [--rounds 5] [--torch PYTHON]

DIR needs room for the base and one copy (2 x 4.1 GB); base and adapters are made there once. Prints a Markdown table of
medians. Private memory is the peak of RssAnon of the merging process. The page cache is warmed by reading the base
before each run, and everything written is synced before the next begins.
"""
import argparse, json, os, shutil, statistics, struct, subprocess, threading, time

ap = argparse.ArgumentParser()
ap.add_argument("--binary", required=True); ap.add_argument("--work", required=True)
ap.add_argument("--rounds", type=int, default=5); ap.add_argument("--torch")
ap.add_argument("--layers", default="6"); ap.add_argument("--threads", default="2")
a = ap.parse_args()
base = os.path.join(a.work, "base")
out = os.path.join(a.work, "out")


def adapter(path, seed):
    """Rank 32, alpha 16, on the twelve usual targets of every block: bf16 in kohya's spelling, values from a hash."""
    targets = {"attn_to_q": (3072, 3072), "attn_to_k": (3072, 3072), "attn_to_v": (3072, 3072), "attn_to_out_0": (3072, 3072),
               "attn_add_q_proj": (3072, 3072), "attn_add_k_proj": (3072, 3072), "attn_add_v_proj": (3072, 3072),
               "attn_to_add_out": (3072, 3072), "img_mlp_net_0_proj": (12288, 3072), "img_mlp_net_2": (3072, 12288),
               "txt_mlp_net_0_proj": (12288, 3072), "txt_mlp_net_2": (3072, 12288)}
    header, at, sizes = {}, 0, []
    for block in range(int(a.layers)):
        for name, (rows, cols) in targets.items():
            stem = f"lora_unet_transformer_blocks_{block}_{name}"
            for end, shape in (("lora_down.weight", [32, cols]), ("lora_up.weight", [rows, 32])):
                size = 2 * shape[0] * shape[1]
                header[f"{stem}.{end}"] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
                at += size
                sizes.append(size)
            header[f"{stem}.alpha"] = {"dtype": "F32", "shape": [], "data_offsets": [at, at + 4]}
            at += 4
            sizes.append(4)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    state = seed
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for size in sizes:
            if size == 4:
                f.write(struct.pack("<f", 16.0))
                continue
            # A repeated page of bf16 values of magnitude 2^-7 with either sign: the values do not matter, their
            # number does.
            page = bytearray((state * 2654435761 + i * 40503 >> 7) & 0xFF for i in range(4096))
            page[1::2] = bytes((b & 0x80) | 0x3C for b in page[1::2])
            noise = (page * (size // 4096 + 1))[:size]
            f.write(noise)
            state += 1


if not os.path.isdir(base):
    os.makedirs(a.work, exist_ok=True)
    subprocess.run([a.binary, "synth", "--preset", "bench", "--out", base, "--layers", a.layers, "--heads", "24",
                    "--head-dim", "128", "--axes", "16,56,56", "--joint-dim", "3584", "--dtype", "bf16"], check=True)
adapters = [os.path.join(a.work, f"adapter{i}.safetensors") for i in (1, 2)]
for i, path in enumerate(adapters):
    if not os.path.exists(path):
        adapter(path, i + 1)


def warm():
    for folder in (base, a.work):
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                with open(path, "rb") as f:
                    while f.read(1 << 24):
                        pass


def run(command):
    """Seconds until the command has ended and everything is on the disk, and the peak of its private memory in MiB."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    warm()
    peak = 0
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.02):
            try:
                with open(f"/proc/{process.pid}/status") as f:
                    for line in f:
                        if line.startswith("RssAnon:"):
                            peak = max(peak, int(line.split()[1]) // 1024)
            except OSError:
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    os.sync()
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    assert code == 0, command
    return seconds, peak


jobs = {
    "cp + sync": ["cp", "-r", base, out],
    "qwen-lora merge": [a.binary, "merge", base, *adapters, "--weights", "0.8,-0.3", "--out", out, "--threads", a.threads, "--quiet"],
}
if a.torch:
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "merge_torch.py")
    jobs["PyTorch script"] = [a.torch, script, base, out, *adapters, "--weights", "0.8,-0.3"]
results = {name: [] for name in jobs}
for round in range(a.rounds):
    for name, command in jobs.items():
        results[name].append(run(command))
        print(f"round {round + 1}: {name}: {results[name][-1][0]:.2f} s, {results[name][-1][1]} MiB", flush=True)
shutil.rmtree(out, ignore_errors=True)
size = sum(os.path.getsize(os.path.join(base, n)) for n in os.listdir(base))
copy = statistics.median(s for s, _ in results["cp + sync"])
print(f"\nbase {size / 1e9:.2f} GB, {a.rounds} rounds in turn, medians (least to most)\n")
print("| job | seconds | against cp | private memory, MiB |\n|---|---|---|---|")
for name, runs in results.items():
    seconds = [s for s, _ in runs]
    median = statistics.median(seconds)
    print(f"| {name} | {median:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | {median / copy:.2f}x | {max(p for _, p in runs)} |")
