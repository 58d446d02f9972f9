#!/usr/bin/env python3
"""The time of a step on 8 to 4,096 GPUs, on paper: docs/scaling.png and the tables of docs/scaling.md.

scaling.py [--figures docs/scaling.json] [--plot docs/scaling.png]     tables and plot; needs matplotlib
scaling.py --predict WORLD COMPUTE_MS EXCHANGE_MS MBIT_PER_S           what `overlap` should measure on such a link
scaling.py --sum GPUS BYTES                                            what a sum should take over the first network

All figures that were measured, or taken from elsewhere, are in the JSON file with their sources. The cost of a sum is
NCCL's own model of it (src/graph/tuning.cc), by which NCCL chooses its algorithm; it chooses here too.
"""
import argparse
import json
import math
from pathlib import Path

MICRO = 1e-6
# NCCL, src/graph/tuning.cc of 2.28: microseconds that each call, each hop in a node and each hop between nodes takes.
LATENCY = {
    ("ring", "simple"): (8.4, 3.4, 14.0),
    ("ring", "ll128"): (14.0, 1.9, 4.0),
    ("tree", "simple"): (8.4, 4.0, 14.0),
    ("tree", "ll128"): (14.0, 1.25, 8.5),
    ("tree", "ll"): (6.8, 0.6 * 1.8, 5.0),
}
NVLS_LATENCY = 25.0
# The same: how far trees fall short of their bandwidth, by the binary logarithm of the size over 64 bytes.
TREE_SHORTFALL = {
    "simple": [0.9] * 7 + [0.8, 0.7, 0.6, 0.6, 0.5, 0.5, 0.5, 0.5, 0.6, 0.7, 0.8, 0.7, 0.7, 0.8, 0.9, 0.9, 0.9],
    "ll128": [1.0] * 5 + [0.9, 0.8, 0.8, 0.8, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.8, 0.9, 0.9, 0.9, 0.9, 1.0, 1.0, 1.0],
}
RING_PLATEAU = 1.4
TREE_SHARE = 0.92
LL128_SHARE = 0.92


class Nccl:
    """Sums over `gpus` ranks, eight to a node."""

    def __init__(self, figures, gpus, network_gb_s):
        node = figures["node"]
        self.gpus, self.per_node = gpus, min(gpus, node["gpus"])
        self.nodes = max(1, gpus // node["gpus"])
        self.nvls = node["nvlink_sharp_gb_s"] if self.nodes == 1 else None
        ring = node["nvlink_ring_gb_s"]
        self.bus = ring if self.nodes == 1 else min(ring, network_gb_s)

    def seconds(self, size):
        """Of the algorithm that takes least, and its name."""
        if self.gpus == 1 or size == 0:
            return 0.0, "none"
        choices = [self.ring(size, protocol) for protocol in ("simple", "ll128")]
        choices += [self.tree(size, protocol) for protocol in ("simple", "ll128")]
        if self.nvls:
            rate = self.nvls * 1e9 * self.gpus / (2 * (self.gpus - 1))
            choices.append((NVLS_LATENCY * MICRO + size / rate, "NVLink SHARP"))
        return min(choices)

    def ring(self, size, protocol):
        base, inside, between = LATENCY["ring", protocol]
        hops = 2 * (self.gpus - 1)
        between_hops = 2 * self.nodes if self.nodes > 1 else 0
        latency = base + (hops - between_hops) * inside + between_hops * between
        if self.nodes > 1 and protocol == "simple":
            latency *= RING_PLATEAU
        share = LL128_SHARE if protocol == "ll128" else 1.0
        return latency * MICRO + size * hops / (self.gpus * self.bus * share * 1e9), "ring"

    def tree(self, size, protocol):
        base, inside, between = LATENCY["tree", protocol]
        latency = base + 2 * ((self.per_node - 1) * inside + math.log2(self.nodes) * between)
        steps = TREE_SHORTFALL[protocol]
        shortfall = steps[min(max(0, int(math.log2(size / 64))), len(steps) - 1)]
        share = TREE_SHARE * shortfall * (LL128_SHARE if protocol == "ll128" else 1.0)
        return latency * MICRO + 2 * size / (self.bus * share * 1e9), "tree"

    def word(self):
        """The control word of a step: a few bytes."""
        if self.gpus == 1:
            return 0.0
        base, inside, between = LATENCY["tree", "ll"]
        return (base + 2 * ((self.per_node - 1) * inside + math.log2(self.nodes) * between)) * MICRO


def buckets(figures, share=1.0):
    """Bytes of each, in the order in which backward fills them; `share` of what f32 takes travels."""
    whole, bucket = figures["network"]["gradient_bytes_fp32"], figures["network"]["bucket_bytes"]
    sizes = [bucket] * (whole // bucket) + [whole % bucket]
    return [size * share for size in sizes if size]


def compute_seconds(figures, images):
    """Of one GPU's step without any exchange: linear between what was measured, and beyond it."""
    measured = sorted((int(batch), int(batch) / rate) for batch, rate in figures["compute"]["images_per_second"].items())
    pairs = list(zip(measured, measured[1:]))
    (low, low_s), (high, high_s) = next((pair for pair in pairs if images <= pair[1][0]), pairs[-1])
    return low_s + (high_s - low_s) * (images - low) / (high - low)


def exposed(backward, sums):
    """Seconds of the sums that backward does not hide: each starts when its gradients are there, one after the other.
    Backward is taken to fill the buckets evenly."""
    ended = 0.0
    for index, seconds in enumerate(sums, 1):
        ended = max(ended, backward * index / len(sums)) + seconds
    return ended - backward


def step(figures, gpus, images, network_gb_s, how):
    """Seconds of one step. How: `none` (one GPU alone), `after`, `overlap`, `bf16` (overlapped and compressed)."""
    compute = compute_seconds(figures, images)
    if how == "none":
        return compute
    nccl = Nccl(figures, gpus, network_gb_s)
    share = 0.5 if how == "bf16" else 1.0
    sums = [nccl.seconds(size)[0] for size in buckets(figures, share)]
    if how == "bf16":  # to bf16 and back: each value is read and written twice, 12 bytes in all
        values = figures["network"]["parameters"]
        sums = [seconds + 12 * values / len(sums) / (figures["memory_gb_s"] * 1e9) for seconds in sums]
    backward = compute * (1 - figures["compute"]["forward_share"])
    waits = sum(sums) if how == "after" else exposed(backward, sums)
    return compute + waits + nccl.word()


COUNTS = [2**power for power in range(3, 13)]
IN_TABLES = (8, 16, 32, 64, 256, 1024, 4096)
STRONG_BATCH, WEAK_BATCH = 32, 32


def images_a_rank(gpus, scaling):
    return max(1, math.ceil(STRONG_BATCH / gpus)) if scaling == "strong" else WEAK_BATCH


def table(figures, scaling):
    print(f"| GPUs | images a GPU | computing | {' | '.join(net['name'] for net in figures['networks'])} |")
    print("| --- " * (3 + len(figures["networks"])) + "|")
    for gpus in IN_TABLES:
        images = images_a_rank(gpus, scaling)
        cells = [
            ", ".join(f"{step(figures, gpus, images, net['gb_s'], how) * 1e3:.1f}" for how in ("after", "overlap", "bf16"))
            for net in figures["networks"]
        ]
        print(f"| {gpus} | {images} | {compute_seconds(figures, images) * 1e3:.1f} | {' | '.join(cells)} |")


def sums_table(figures):
    net = figures["networks"][0]["gb_s"]
    print("| GPUs | nodes | 25 MiB, f32 | by | all gradients, f32 | bf16 | control word |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for gpus in IN_TABLES:
        nccl = Nccl(figures, gpus, net)
        one, name = nccl.seconds(figures["network"]["bucket_bytes"])
        whole, half = (sum(nccl.seconds(size)[0] for size in buckets(figures, share)) for share in (1.0, 0.5))
        print(
            f"| {gpus} | {nccl.nodes} | {one * 1e3:.2f} ms | {name} | {whole * 1e3:.1f} ms | {half * 1e3:.1f} ms |"
            f" {nccl.word() * 1e6:.0f} us |"
        )


def plot(figures, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ["#1b6ca8", "#d1701f", "#5a8f3c"]
    styles = {"after": (":", "sums after backward"), "overlap": ("-", "overlapped"), "bf16": ("--", "overlapped, bf16 sums")}
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.6), constrained_layout=True)
    titles = {
        "strong": f"Strong scaling: global batch {STRONG_BATCH}; beyond {STRONG_BATCH} GPUs ranks stand by",
        "weak": f"Weak scaling: {WEAK_BATCH} images a GPU",
    }
    for axis, scaling in zip(axes, titles):
        for colour, net in zip(colours, figures["networks"]):
            for how, (style, _) in styles.items():
                times = [step(figures, n, images_a_rank(n, scaling), net["gb_s"], how) * 1e3 for n in COUNTS]
                axis.plot(COUNTS, times, style, color=colour, linewidth=2 if how == "overlap" else 1.4)
        alone = [compute_seconds(figures, images_a_rank(n, scaling)) * 1e3 for n in COUNTS]
        axis.plot(COUNTS, alone, color="#222222", linewidth=1, marker="o", markersize=3)
        axis.set_xscale("log", base=2)
        axis.set_xticks(COUNTS, [f"{n:,}" for n in COUNTS])
        axis.set_ylim(bottom=0)
        axis.minorticks_off()
        axis.grid(True, alpha=0.3)
        axis.set_title(titles[scaling], fontsize=11)
        axis.set_xlabel("GPUs, 8 to a node")
        axis.set_ylabel("milliseconds a step")
    from matplotlib.lines import Line2D

    networks = [Line2D([], [], color=colour, label=net["name"]) for colour, net in zip(colours, figures["networks"])]
    ways = [Line2D([], [], color="#555555", linestyle=style, label=label) for style, label in styles.values()]
    alone = Line2D([], [], color="#222222", marker="o", markersize=3, linewidth=1, label="computing alone")
    # Column by column: a network above a way.
    handles = [handle for pair in zip(networks, ways) for handle in pair] + [alone]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def predict(figures, world, compute_ms, exchange_ms, mbit_per_s):
    """What `cargo run --example overlap` should measure: a ring of such links. On a machine whose cores are all busy
    with backward, what the exchange itself computes does not hide."""
    rate = mbit_per_s * 1e6 / 8 * world / (2 * (world - 1))
    sums = [size / rate for size in buckets(figures)]
    compute = compute_ms / 1e3
    waits = exposed(compute * (1 - figures["compute"]["forward_share"]), sums)
    after, alongside = compute + sum(sums), compute + waits + exchange_ms / 1e3
    print(f"after {after * 1e3:.0f} ms, alongside {alongside * 1e3:.0f} ms, ratio {alongside / after:.3f}")
    print(f"of the exchange {100 * (1 - waits / sum(sums)):.0f} % is hidden")


def main():
    here = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=here / "docs/scaling.json")
    parser.add_argument("--plot", type=Path, default=here / "docs/scaling.png")
    parser.add_argument("--predict", nargs=4, type=float, metavar=("WORLD", "COMPUTE_MS", "EXCHANGE_MS", "MBIT_PER_S"))
    parser.add_argument("--sum", nargs=2, type=int, metavar=("GPUS", "BYTES"))
    args = parser.parse_args()
    figures = json.loads(args.figures.read_text())
    if args.predict:
        world, compute, exchange, rate = args.predict
        return predict(figures, int(world), compute, exchange, rate)
    if args.sum:
        gpus, size = args.sum
        seconds, name = Nccl(figures, gpus, figures["networks"][0]["gb_s"]).seconds(size)
        return print(f"{seconds * 1e6:.0f} us by {name}")
    print("Sums over", figures["networks"][0]["name"])
    sums_table(figures)
    for scaling in ("strong", "weak"):
        print(f"\nMilliseconds a step, {scaling} scaling: sums after backward, overlapped, overlapped in bf16")
        table(figures, scaling)
    plot(figures, args.plot)


if __name__ == "__main__":
    main()
