#!/usr/bin/env python3
"""Writes the reference of musher-worker's team tests: worker/tests/reference/losses.json.

A second writing of the whole step, on one process and the whole global batch: the epoch's order, the network (batch
norm frozen) from plain tensors by name, the loss, clipping, the schedule and Adam in Keras' form, all in float32.
Weights and images follow from formulas that the test has too. Nothing of Musher is used. Needs torch and numpy:

    python3 tools/team_reference.py [OUT]
"""
import json
import math
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F

WIDTH, SIZE, SAMPLES, GLOBAL_BATCH, EPOCHS, SEED, CLASSES = 0.05, 64, 11, 4, 4, 44, 3
JOBS = {
    "plain": dict(),
    "cosine_clipped": dict(cosine=True, clip_norm=0.3),
    "weighted_dice": dict(class_weights=(0.5, 1.0, 3.0), dice_weight=0.7),
    "warmed_up": dict(cosine=True, warmup_steps=5, encoder_rate=0.1),
    "frozen": dict(freeze_encoder=True),
}
MASK64 = (1 << 64) - 1


# --- the epoch's order ------------------------------------------------------------------------------------------------


def scramble(x):
    """SplitMix64's finaliser."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
    return x ^ (x >> 31)


def order(epoch, length):
    """Six rounds of a balanced Feistel network, walked along its cycle into the range."""
    half = max(1, math.ceil((length - 1).bit_length() / 2))
    mask, state, keys = (1 << half) - 1, scramble(SEED ^ scramble(epoch)), []
    for _ in range(6):
        state = (state + 0x9E3779B97F4A7C15) & MASK64
        keys.append(scramble(state))

    def encrypt(value):
        left, right = value >> half, value & mask
        for key in keys:
            left, right = right, left ^ (scramble(right ^ key) & mask)
        return left << half | right

    for value in range(length):
        value = encrypt(value)
        while value >= length:
            value = encrypt(value)
        yield value


# --- images, masks and weights by formula -----------------------------------------------------------------------------


def sample(index):
    """An image u8 [3, S, S] of waves that no two samples share, and its mask [S/2, S/2]: a disc with a rim."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.int64)
    image = [((x * (c + index % 5 + 1) + y * (index % 3 + 2 * c + 1) + 37 * index) * 3) % 256 for c in range(3)]
    y, x = np.mgrid[0 : SIZE // 2, 0 : SIZE // 2].astype(np.int64)
    distance = (x - 8 - index) ** 2 + (y - 16) ** 2
    mask = np.where(distance < 64, 0, np.where(distance < 100, 2, 1))
    return np.stack(image).astype(np.uint8), mask


def uniform(tensor_index, shape, low, high):
    words = np.array([scramble(tensor_index << 32 | i) >> 40 for i in range(math.prod(shape))], dtype=np.float64)
    return torch.from_numpy((low + (high - low) * (words / (1 << 24))).astype(np.float32)).reshape(shape)


def spread(name, shape):
    """The range of a tensor's values: weak residual branches and mostly open ReLUs keep fifty layers well-conditioned."""
    encoder = not name.startswith(("decoder.", "head."))
    kind, of_norm = name.rsplit(".", 1)[1], "bn" in name or "downsample.1" in name
    if kind == "running_mean":
        return -0.3, 0.3
    if kind == "running_var":
        return 0.5, 2.0
    if kind == "weight" and of_norm:
        return (0.1, 0.3) if ".bn3." in name else (0.5, 1.5)
    if kind == "weight":
        bound = math.sqrt(6.0 / ((shape[0] + shape[1]) * math.prod(shape[2:])))
        return -bound, bound
    if of_norm:
        return (1.7, 2.3) if encoder and ("bn1." in name or "bn2." in name) else (-0.3, 0.3)
    return 0.2, 0.8


def shapes():
    """Name to shape of all tensors of the network."""
    w, out = lambda channels: max(1, round(channels * WIDTH)), {}

    def norm(name, channels):
        out.update({f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")})

    def conv(name, inputs, outputs, kernel, bias=False, transposed=False):
        out[f"{name}.weight"] = (inputs, outputs, 1, 1) if transposed else (outputs, inputs, kernel, kernel)
        if bias:
            out[f"{name}.bias"] = (outputs,)

    conv("conv1", 3, w(64), 7), norm("bn1", w(64))
    inputs = w(64)
    for stage, (channels, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        for block in range(blocks):
            name, inner, outputs = f"layer{stage}.{block}", w(channels), 4 * w(channels)
            for i, (a, b, kernel) in enumerate(((inputs, inner, 1), (inner, inner, 3), (inner, outputs, 1)), 1):
                conv(f"{name}.conv{i}", a, b, kernel), norm(f"{name}.bn{i}", b)
            if block == 0:
                conv(f"{name}.downsample.0", inputs, outputs, 1), norm(f"{name}.downsample.1", outputs)
            inputs = outputs
    skips = 4 * w(256), 4 * w(128), 4 * w(64), w(64)
    for stage, (skip, outputs) in enumerate(zip(skips, map(w, (1024, 512, 256, 64)))):
        name = f"decoder.{stage}"
        conv(f"{name}.up", inputs, outputs, 1, bias=True, transposed=True), norm(f"{name}.up_bn", outputs)
        conv(f"{name}.conv1", outputs + skip, outputs, 3, bias=True), norm(f"{name}.bn1", outputs)
        conv(f"{name}.conv2", outputs, outputs, 3, bias=True), norm(f"{name}.bn2", outputs)
        inputs = outputs
    conv("head", inputs, CLASSES, 3, bias=True)
    return out


def weights():
    shape_of = shapes()
    return {name: uniform(i, shape_of[name], *spread(name, shape_of[name])) for i, name in enumerate(sorted(shape_of))}


# --- the network, the loss and the optimizer --------------------------------------------------------------------------


def forward(t, x):
    conv = lambda x, name, stride=1: F.conv2d(x, t[f"{name}.weight"], t.get(f"{name}.bias"), stride, t[f"{name}.weight"].shape[-1] // 2)

    def norm(x, name):
        eps = 1e-3 if name.startswith("decoder.") else 1e-5
        column = lambda part: t[f"{name}.{part}"][None, :, None, None]
        return (x - column("running_mean")) / torch.sqrt(column("running_var") + eps) * column("weight") + column("bias")

    skips = [F.relu(norm(conv(x, "conv1", 2), "bn1"))]
    x = F.max_pool2d(skips[0], 3, 2, 1)
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.relu(norm(conv(x, f"{name}.conv1"), f"{name}.bn1"))
            y = F.relu(norm(conv(y, f"{name}.conv2", stride), f"{name}.bn2"))
            y = norm(conv(y, f"{name}.conv3"), f"{name}.bn3")
            x = F.relu(y + (norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1") if block == 0 else x))
        skips.append(x)
    skips.pop()
    for stage, skip in enumerate(reversed(skips)):
        name = f"decoder.{stage}"
        # A transposed 1x1 convolution of stride 2: values at even places, the bias everywhere.
        values = torch.einsum("nchw,cd->ndhw", x, t[f"{name}.up.weight"][:, :, 0, 0])
        up = torch.zeros(*values.shape[:2], 2 * values.shape[2], 2 * values.shape[3])
        up[:, :, ::2, ::2] = values
        up = F.relu(up + t[f"{name}.up.bias"][None, :, None, None])
        x = torch.cat([norm(up, f"{name}.up_bn"), skip], 1)
        x = norm(F.relu(conv(x, f"{name}.conv1")), f"{name}.bn1")
        x = norm(F.relu(conv(x, f"{name}.conv2")), f"{name}.bn2")
    return conv(x, "head")


def batch_loss(logits, masks, class_weights, dice_weight):
    """Weighted cross-entropy over the number of pixels, and the mean of each sample's Dice loss."""
    weights = torch.tensor(class_weights) if class_weights else None
    loss = F.cross_entropy(logits, masks, weight=weights, reduction="sum") / masks.numel()
    for scores, mask in zip(logits, masks):
        if not dice_weight:
            break
        shares = torch.softmax(scores, 0)
        ratios = []
        for c in range(CLASSES):
            truth = (mask == c).float()
            ratios.append((2 * (shares[c] * truth).sum() + 1) / (shares[c].sum() + truth.sum() + 1))
        loss = loss + dice_weight * (1 - sum(ratios) / CLASSES) / len(masks)
    return loss


def scheduled(rate, step, total, cosine, warmup_steps):
    """Of the step with that index, from 0."""
    if step < warmup_steps:
        return rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total - warmup_steps)
    return rate * (0.5 * (1 + math.cos(math.pi * progress)) if cosine else 1.0)


def train(start, images, masks, rate=3e-4, cosine=False, clip_norm=0.0, warmup_steps=0, encoder_rate=1.0, freeze_encoder=False,
          class_weights=(), dice_weight=0.0):
    """Losses of all steps."""
    t = {name: tensor.clone() for name, tensor in start.items()}
    is_encoder = lambda name: not name.startswith(("decoder.", "head."))
    trained = [name for name in t if ".running_" not in name and not (freeze_encoder and is_encoder(name))]
    m, v = ({name: torch.zeros_like(t[name]) for name in trained} for _ in range(2))
    losses, total = [], EPOCHS * math.ceil(SAMPLES / GLOBAL_BATCH)
    for epoch in range(1, EPOCHS + 1):
        ids = list(order(epoch, SAMPLES))
        for first in range(0, SAMPLES, GLOBAL_BATCH):
            batch = ids[first : first + GLOBAL_BATCH]
            leaves = [t[name].requires_grad_() for name in trained]
            loss = batch_loss(forward(t, images[batch]), masks[batch], class_weights, dice_weight)
            gradients = torch.autograd.grad(loss, leaves)
            norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
            factor = min(1.0, clip_norm / norm) if clip_norm else 1.0
            now = scheduled(rate, len(losses), total, cosine, warmup_steps)
            losses.append(loss.item())
            step = len(losses)
            now *= math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
            for name, gradient in zip(trained, gradients):
                m[name].lerp_(factor * gradient, 1 - 0.9)
                v[name].lerp_((factor * gradient) ** 2, 1 - 0.999)
                own = now * (encoder_rate if is_encoder(name) else 1.0)
                t[name] = t[name].detach() - own * m[name] / (v[name].sqrt() + 1e-7)
            print(f"step {step}: loss {losses[-1]:.6f}, gradient {norm:.4f}", file=sys.stderr)
    return losses


def main():
    here = pathlib.Path(__file__).parents[1] / "worker/tests/reference"
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    images, masks = zip(*map(sample, range(SAMPLES)))
    images = torch.from_numpy(np.stack(images)).float() / 255
    masks = torch.from_numpy(np.stack(masks))
    start = weights()
    losses = {job: train(start, images, masks, **options) for job, options in JOBS.items()}
    (out / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    main()
