#!/usr/bin/env python3
"""The data alone: Musher's loader beside torch's DataLoader with albumentations and OpenCV, interleaved.

bench_data.py --data PETS [--python PYTHON] [--repeats 5] [--size 64 --size 224] [--epochs 2]

PYTHON has torch, albumentations and opencv-python-headless. Both sides read, decode, augment (rotation, mirror, crop)
and batch the training samples of PETS, and end in floats 0..1 and classes, each pinned to one core. Counted are samples
for a second of CPU time, of all threads and processes, so that a busy machine does not matter much. The DataLoader
works in its own process ("in-process"), which spares it the copies between processes, and with one worker process;
it has no cache of decoded samples, so one was written for it here. Prints a Markdown table: medians, and the ratio of
each pair of runs.
"""
import argparse, json, pathlib, resource, statistics, subprocess, sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROWS = [  # what is compared: label, Musher's figure, the peer's
    ("image and mask decoded", "decode", "decode"),
    ("augmented, decoded before", "augment", "augment"),
    ("whole, cold; DataLoader in-process", "cold", "cold"),
    ("whole, cold; DataLoader with a worker", "cold", "cold_worker"),
    ("whole, kept decoded; DataLoader in-process, cold", "cached", "cold"),
    ("whole, kept decoded; DataLoader in-process, kept decoded too", "cached", "cached"),
]


def measure_peer(root, size, epochs):
    import albumentations as A, cv2, numpy as np, torch
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    lines = pathlib.Path(root, "annotations/trainval.txt").read_text().splitlines()
    names = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
    augment = A.Compose([A.Rotate(30, border_mode=cv2.BORDER_REFLECT_101), A.HorizontalFlip(),
                         A.RandomResizedCrop(size=(size, size), scale=(0.7, 1.0))])

    def decode(name):
        image = cv2.imread(f"{root}/images/{name}.jpg", cv2.IMREAD_COLOR)[:, :, ::-1]
        return image, cv2.imread(f"{root}/annotations/trimaps/{name}.png", cv2.IMREAD_GRAYSCALE)

    def render(image, mask):
        made = augment(image=image, mask=mask)
        return made["image"], cv2.resize(made["mask"], (size // 2, size // 2), interpolation=cv2.INTER_NEAREST)

    class Pets(torch.utils.data.Dataset):
        def __init__(self, decoded=None):
            self.decoded = decoded

        def __len__(self):
            return len(names)

        def __getitem__(self, at):
            image, mask = render(*(self.decoded[at] if self.decoded else decode(names[at])))
            image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float().div_(255)
            return image, torch.from_numpy(mask).long() - 1

    def cpu_seconds():
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    def rate(work, count):
        start = cpu_seconds()
        work()
        return count / (cpu_seconds() - start)

    def load(dataset, workers, epochs):
        def run():
            loader = torch.utils.data.DataLoader(dataset, 32, num_workers=workers, persistent_workers=workers > 0)
            for _ in range(epochs):
                for _batch in loader:
                    pass
            del loader  # its worker's time counts once it has ended
        return rate(run, len(names) * epochs)

    decoded = [decode(name) for name in names]
    decoded = [(np.ascontiguousarray(image), mask) for image, mask in decoded]
    count = len(names) * epochs
    print(json.dumps({
        "decode": rate(lambda: [decode(name) for _ in range(epochs) for name in names], count),
        "augment": rate(lambda: [render(*pair) for _ in range(epochs) for pair in decoded], count),
        "cold": load(Pets(), 0, epochs), "cold_worker": load(Pets(), 1, epochs), "cached": load(Pets(decoded), 0, epochs),
    }))


def pinned(a, command):
    out = subprocess.run(["taskset", "-c", a.core, *map(str, command)], capture_output=True, text=True)
    if out.returncode:
        sys.exit(f"{command[0]} failed: {out.stderr.strip()}")
    return json.loads(out.stdout.strip().splitlines()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True); p.add_argument("--python", default=sys.executable)
    p.add_argument("--repeats", type=int, default=5); p.add_argument("--epochs", type=int, default=2)
    p.add_argument("--size", type=int, action="append"); p.add_argument("--core", default="0", help="to run on")
    p.add_argument("--measure-peer", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.measure_peer:
        return measure_peer(a.data, a.size[0], a.epochs)
    subprocess.run(["cargo", "build", "--release", "--locked", "-q", "-p", "musher-dataset", "--example", "rate"], cwd=ROOT, check=True)
    print("| image | | PyTorch | Musher | Musher / PyTorch (min .. max) |\n| --- | --- | --- | --- | --- |", flush=True)
    for size in a.size or [64, 224]:
        theirs, ours = [], []
        for _ in range(a.repeats):
            theirs.append(pinned(a, [a.python, __file__, "--measure-peer", "--data", a.data, "--size", size, "--epochs", a.epochs]))
            ours.append(pinned(a, [ROOT / "target/release/examples/rate", a.data, size, a.epochs]))
        for label, our_key, their_key in ROWS:
            pairs = [(t[their_key], o[our_key]) for t, o in zip(theirs, ours)]
            t, o = (statistics.median(side) for side in zip(*pairs))
            ratios = [o / t for t, o in pairs]
            print(f"| {size} | {label} | {t:.0f} | {o:.0f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f}) |", flush=True)
        parts = ", ".join(f"{key} {statistics.median(o[key] for o in ours):.0f}" for key in ["read", "images", "masks"])
        print(f"\nMusher's parts at {size}, samples for a second of CPU time: {parts}\n", flush=True)


main()
