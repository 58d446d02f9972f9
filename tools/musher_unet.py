#!/usr/bin/env python3
"""A run's network in PyTorch: for whoever wants to use Musher's weights without Musher.

    python3 tools/musher_unet.py WEIGHTS [IMAGE...] [--out DIR] [--compare DIR] [--onnx FILE]

Builds the network that WEIGHTS (a run's best.safetensors) describes, loads it strictly, and writes each image's classes
as DIR/NAME.mask.png. --compare holds the results against those of `musher-worker predict --probabilities --out DIR`,
and fails where they differ; give it PNGs, as JPEG decoders differ by themselves. --onnx exports the network (needs onnx and onnxscript), for images f32 [N, 3, S, S],
normalised; where onnxruntime is there, it is checked against PyTorch. As a module: `net, metadata = load(path)`.

Needs torch, torchvision, safetensors, numpy and Pillow.
"""
import argparse
import json
import pathlib
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torchvision.models.resnet import Bottleneck, ResNet

STAGES = (64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)
# Largest deviation of probabilities: float32's, through eighty layers.
TOLERANCE = 1e-4


class Stage(nn.Module):
    """A stage of the decoder: up, join, twice convolve; ReLU before batch norm."""

    def __init__(self, inputs, skip, outputs):
        super().__init__()
        bn = lambda: nn.BatchNorm2d(outputs, eps=1e-3)
        self.up, self.up_bn = nn.ConvTranspose2d(inputs, outputs, 1, stride=2, output_padding=1), bn()
        self.conv1, self.bn1 = nn.Conv2d(outputs + skip, outputs, 3, padding=1), bn()
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1), bn()

    def forward(self, x, skip):
        x = torch.cat([self.up_bn(F.relu(self.up(x))), skip], 1)
        x = self.bn1(F.relu(self.conv1(x)))
        return self.bn2(F.relu(self.conv2(x)))


class UNet(ResNet):
    """Images [N, 3, S, S], normalised, to logits [N, classes, S/2, S/2]. `encoder`: "torchvision" or "keras"."""

    def __init__(self, classes=3, width=1.0, encoder="torchvision"):
        super().__init__(Bottleneck, [1, 1, 1, 1])
        del self.fc, self.avgpool
        w = lambda channels: max(1, round(channels * width))
        self.inplanes = w(64)
        self.conv1, self.bn1 = nn.Conv2d(3, w(64), 7, 2, 3, bias=False), nn.BatchNorm2d(w(64))
        for i, (channels, blocks, stride) in enumerate(STAGES, 1):
            setattr(self, f"layer{i}", self._make_layer(Bottleneck, w(channels), blocks, stride))
        if encoder == "keras":
            for module in self.modules():
                if isinstance(module, Bottleneck):
                    module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
                if isinstance(module, nn.BatchNorm2d):
                    module.eps = 1.001e-5
                if isinstance(module, nn.Conv2d):
                    module.bias = nn.Parameter(torch.zeros(module.out_channels))
        skips, outputs = (w(256) * 4, w(128) * 4, w(64) * 4, w(64)), (w(1024), w(512), w(256), w(64))
        self.decoder = nn.ModuleList(map(Stage, (w(512) * 4,) + outputs[:3], skips, outputs))
        self.head = nn.Conv2d(w(64), classes, 3, padding=1)

    def forward(self, x):
        taps = [F.relu(self.bn1(self.conv1(x)))]
        x = self.maxpool(taps[0])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            taps.append(x)
        for stage, skip in zip(self.decoder, reversed(taps[:-1])):
            x = stage(x, skip)
        return self.head(x)


def load(path):
    """The network, ready to evaluate, and the file's metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    net = UNet(int(metadata["classes"]), float(metadata["width"]), metadata["encoder"])
    # A count that evaluation does not use, and the file has not.
    counts = {name: tensor for name, tensor in net.state_dict().items() if name.endswith(".num_batches_tracked")}
    net.load_state_dict(tensors | counts, strict=True)
    return net.eval(), metadata


def normalised(pixels, how):
    """u8 [N, S, S, 3], RGB, to f32 [N, 3, S, S]."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    channels = lambda *values: torch.tensor(values).view(1, 3, 1, 1)
    if how == "caffe":
        return x.flip(1) - channels(103.939, 116.779, 123.68)
    x = x / 255
    return (x - channels(0.485, 0.456, 0.406)) / channels(0.229, 0.224, 0.225) if how == "imagenet" else x


def stretched(image, side):
    """[S, S, 3] u8: bilinear between pixel centres, without antialiasing, with weights of 11 bits.

    cv2.resize with INTER_LINEAR gives the same up to one of 255 steps; this gives the same bytes as Musher.
    """
    def neighbours(length):
        one = 1 << 32
        at = round(0.5 * length / side * one) + np.arange(side) * round(length / side * one) - one // 2 + (1 << 20)  # to the nearest weight
        first = at >> 32
        return np.clip(first, 0, length - 1), np.clip(first + 1, 0, length - 1), (at >> 21) & 2047

    pixels = np.array(image).astype(np.int64)
    left, right, across = neighbours(image.width)
    top, bottom, down = neighbours(image.height)
    across, down = across[None, :, None], down[:, None, None]
    row = lambda y: pixels[y][:, left] * (2048 - across) + pixels[y][:, right] * across
    return ((row(top) * (2048 - down) + row(bottom) * down + (1 << 21)) >> 22).astype(np.uint8)


@torch.no_grad()
def probabilities(net, metadata, image):
    """f32 [classes, height, width] of an RGB PIL image."""
    pixels = stretched(image, int(metadata["image_size"]))
    likely = net(normalised(pixels[None], metadata["normalize"])).softmax(1)
    return F.interpolate(likely, size=(image.height, image.width), mode="bilinear", align_corners=False)[0].numpy()


def export(net, metadata, path):
    side = int(metadata["image_size"])
    example = torch.rand(2, 3, side, side)
    batch = torch.export.Dim("batch")
    torch.onnx.export(net, (example,), path, input_names=["images"], output_names=["logits"], dynamic_shapes=({0: batch},), dynamo=True, external_data=False)
    try:
        import onnxruntime
    except ImportError:
        print(f"{path}: not checked, as onnxruntime is not installed")
        return
    (logits,) = onnxruntime.InferenceSession(path).run(None, {"images": example[:1].numpy()})
    with torch.no_grad():
        expected = net(example[:1]).numpy()
    gap = np.abs(logits - expected).max() / np.abs(expected).max()
    print(f"{path}: largest deviation {gap:.1e} of the largest logit")
    assert gap < TOLERANCE


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("images", nargs="*", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--compare", type=pathlib.Path)
    parser.add_argument("--onnx")
    args = parser.parse_args()
    net, metadata = load(args.weights)
    print(json.dumps({key: value for key, value in metadata.items() if key != "job"}))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    differing, pixels = 0, 0
    for path in args.images:
        found = probabilities(net, metadata, Image.open(path).convert("RGB"))
        classes = found.argmax(0).astype(np.uint8)
        if args.out:
            Image.fromarray(classes).save(args.out / f"{path.stem}.mask.png")
        if args.compare:
            theirs = np.load(args.compare / f"{path.stem}.probabilities.npy")
            mask = np.array(Image.open(args.compare / f"{path.stem}.mask.png"))
            gap, unequal = np.abs(found - theirs).max(), int((classes != mask).sum())
            print(f"{path.name}: probabilities differ by {gap:.1e} at most, {unequal} of {mask.size} pixels have another class")
            differing, pixels = differing + unequal, pixels + mask.size
            if gap > TOLERANCE:
                sys.exit("the networks differ")
    # Where two classes are equally likely, rounding decides.
    if differing > 1e-5 * pixels:
        sys.exit(f"{differing} of {pixels} pixels have another class")
    if args.onnx:
        export(net, metadata, args.onnx)


if __name__ == "__main__":
    main()
