#!/usr/bin/env python3
"""Images per second on one GPU, Musher and PyTorch interleaved, at several batch sizes: the step alone, and with the data path.

bench_gpu.py --peer peer_ddp.py [--data PETS] [--python PYTHON] [--bin target/release] [--device cuda:0] [--size 224]
             [--batches 4 8 32 64] [--steps 50] [--repeats 3]

PyTorch runs eager and compiled, in bf16 and channels-last; with --data also with its loader and augmentation. Musher's figures are
those of examples/step_rate. Prints a Markdown table of medians, and the share of the GPU's bf16 peak (H100 SXM: 989 TFLOP/s dense)
that Musher's step alone reaches, counting convolutions, a backward pass as twice its forward.
"""
import argparse, json, os, pathlib, statistics, subprocess, sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PEAK = 989e12


def lines(command, env=None):
    out = subprocess.run([str(c) for c in command], capture_output=True, text=True, env={**os.environ, **(env or {})})
    if out.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{out.stderr[-2000:]}")
    return [json.loads(line) for line in out.stdout.splitlines() if line.startswith("{")]


def peer(a, batch, *flags):
    cuda = a.device.startswith("cuda")
    command = [a.python, a.peer, "--image-size", a.size, "--batch", batch, "--steps", a.steps, "--warmup", 10, "--amp", "--channels-last",
               "--device", "cuda" if cuda else "cpu", "--loaders", os.cpu_count(), *flags]
    single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29431"}
    return lines(command, single)[-1]["images_per_s"]


def musher(a, batch):
    data = ["--root", a.data] if a.data else []
    command = [a.bin / "examples/step_rate", "--device", a.device, "--precision", "bf16", "--size", a.size, "--steps", a.steps, "--batch", batch]
    return lines(command + data)[-1]


def flops(size):
    """Of the convolutions of one image's forward pass (2 for a multiplication and its addition)."""
    total, side = 2 * 7 * 7 * 3 * 64 * (size // 2) ** 2, size // 4
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            before, side = side, side // (stride if block == 0 else 1)
            total += 2 * (inputs * width * before**2 + (9 * width * width + 4 * width * width) * side**2)
            total += 2 * inputs * 4 * width * side**2 if block == 0 else 0
            inputs = 4 * width
    for skip, width in ((1024, 1024), (512, 512), (256, 256), (64, 64)):
        total += 2 * inputs * width * side**2
        side *= 2
        total += 2 * 9 * ((width + skip) * width + width * width) * side**2
        inputs = width
    return total + 2 * 9 * 64 * 3 * side**2


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--peer", required=True); p.add_argument("--data"); p.add_argument("--python", default=sys.executable)
    p.add_argument("--bin", type=pathlib.Path, default=ROOT / "target/release"); p.add_argument("--device", default="cuda:0")
    p.add_argument("--size", type=int, default=224); p.add_argument("--batches", type=int, nargs="*", default=[4, 8, 32, 64])
    p.add_argument("--steps", type=int, default=50); p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--no-compile", action="store_true", help="leave the compiled peer out: compiling takes a minute a size")
    a = p.parse_args()
    head = ["batch", "eager", "compiled", "Musher", "/ eager", "/ compiled", "share of peak", "PyTorch with data", "Musher with data", "/ PyTorch"]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head), flush=True)
    for batch in a.batches:
        rows = []
        for _ in range(a.repeats):
            ours = musher(a, batch)
            rows.append({"eager": peer(a, batch), "compiled": float("nan") if a.no_compile else peer(a, batch, "--compile"), "step": ours["step"],
                         "peer_data": peer(a, batch, "--data", a.data) if a.data else float("nan"), "with_data": ours["with_data"]})
        of = lambda key: statistics.median(row[key] for row in rows)
        ratio = lambda top, bottom: statistics.median(row[top] / row[bottom] for row in rows)
        share = 3 * flops(a.size) * of("step") / PEAK
        print(f"| {batch} | {of('eager'):.1f} | {of('compiled'):.1f} | {of('step'):.1f} | {ratio('step', 'eager'):.2f} | {ratio('step', 'compiled'):.2f} "
              f"| {share:.1%} | {of('peer_data'):.1f} | {of('with_data'):.1f} | {ratio('with_data', 'peer_data'):.2f} |", flush=True)


if __name__ == "__main__":
    main()
