#!/usr/bin/env python3
"""Writes encoders with random weights, in their libraries' own files, and the features that the libraries compute.

    python3 tools/encoder_reference.py [--full] [OUT]

OUT gets torchvision.pth, torchvision_legacy.pth, torchvision.safetensors, keras.h5 and features.safetensors: `pixels`
[N, 3, S, S] u8, and of each library the taps `LIBRARY.I`, f32 [N, C, H, W], for pixels divided by 255. Without --full
the networks are a few channels wide, and OUT is worker/model/tests/reference/encoders, without the two files that hold
what torchvision.pth does. Nothing of Musher is used. Needs torch, torchvision, safetensors, keras (on torch) and h5py.
"""
import argparse
import os
import pathlib

os.environ["KERAS_BACKEND"] = "torch"

import h5py
import keras
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from keras.src.applications import resnet as keras_resnet
from keras.src.legacy.saving import legacy_h5_format
from safetensors.torch import save_file
from torchvision.models.resnet import Bottleneck, ResNet

NARROW = 0.03
KERAS_TAPS = "conv1_relu", "conv2_block3_out", "conv3_block4_out", "conv4_block6_out", "conv5_block3_out"


def torchvision_encoder(w):
    """torchvision's ResNet50 with scaled channels: its class, its blocks, its initial layers."""
    net = ResNet(Bottleneck, [1, 1, 1, 1])
    net.inplanes = w(64)
    net.conv1, net.bn1 = nn.Conv2d(3, w(64), 7, 2, 3, bias=False), nn.BatchNorm2d(w(64))
    for i, (channels, blocks, stride) in enumerate(((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)), 1):
        setattr(net, f"layer{i}", net._make_layer(Bottleneck, w(channels), blocks, stride))
    net.fc = nn.Linear(4 * w(512), 10)
    return net


def torchvision_taps(net, x):
    taps = [F.relu(net.bn1(net.conv1(x)))]
    x = net.maxpool(taps[0])
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = layer(x)
        taps.append(x)
    return taps


def keras_encoder(w, side):
    """Keras' ResNet50 with scaled channels: its function, its blocks; only the stem's 64 filters are replaced."""
    blocks = keras_resnet.stack_residual_blocks_v1

    def stack(x):
        x = blocks(x, w(64), 3, stride1=1, name="conv2")
        x = blocks(x, w(128), 4, name="conv3")
        x = blocks(x, w(256), 6, name="conv4")
        return blocks(x, w(512), 3, name="conv5")

    layers = keras_resnet.layers
    whole = layers.Conv2D
    layers.Conv2D = lambda filters, *args, name, **kwargs: whole(w(64) if name == "conv1_conv" else filters, *args, name=name, **kwargs)
    try:
        net = keras_resnet.ResNet(stack, preact=False, use_bias=True, include_top=False, weights=None, input_shape=(side, side, 3))
    finally:
        layers.Conv2D = whole
    return keras.Model(net.inputs, [net.get_layer(name).output for name in KERAS_TAPS]), net


def random_weights(named_shapes, generator):
    """Values that leave nothing at its default; fan-in from the kernel's shape without its outputs."""
    for name, shape, fan_in in named_shapes:
        kind = name.rsplit(".", 1)[-1].rsplit("/", 1)[-1]
        if kind == "num_batches_tracked":
            continue
        low, high = {"running_var": (0.5, 2.0), "moving_variance": (0.5, 2.0), "gamma": (0.5, 1.2)}.get(kind, (-0.3, 0.3))
        if len(shape) > 1:
            high = (3 / fan_in) ** 0.5
            low = -high
        elif kind == "weight":
            low, high = 0.5, 1.2
        yield name, generator.uniform(low, high, shape).astype(np.float32)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true")
    parser.add_argument("out", nargs="?", type=pathlib.Path, default=pathlib.Path(__file__).parents[1] / "worker/model/tests/reference/encoders")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    width, side, samples = (1.0, 96, 1) if args.full else (NARROW, 64, 2)
    w = lambda channels: max(1, round(channels * width))
    generator = np.random.default_rng(5)
    pixels = generator.integers(0, 256, (samples, 3, side, side), dtype=np.uint8)
    images = pixels.astype(np.float32) / 255
    features = {"pixels": torch.from_numpy(pixels)}

    net = torchvision_encoder(w)
    state = net.state_dict()
    shapes = [(name, tuple(t.shape), int(np.prod(t.shape[1:]))) for name, t in state.items()]
    for name, values in random_weights(shapes, generator):
        state[name].copy_(torch.from_numpy(values))
    torch.save(net.state_dict(), args.out / "torchvision.pth")
    if args.full:
        torch.save(net.state_dict(), args.out / "torchvision_legacy.pth", _use_new_zipfile_serialization=False)
        save_file({name: t.contiguous() for name, t in net.state_dict().items()}, args.out / "torchvision.safetensors")
    net = net.double().eval()
    with torch.no_grad():
        for i, tap in enumerate(torchvision_taps(net, torch.from_numpy(images).double())):
            features[f"torchvision.{i}"] = tap.float().contiguous()

    taps, net = keras_encoder(w, side)
    shapes = [(v.path, tuple(v.shape), int(np.prod(v.shape[:-1]))) for v in net.weights]
    for variable, (_, values) in zip(net.weights, random_weights(shapes, generator), strict=True):
        variable.assign(values)
    with h5py.File(args.out / "keras.h5", "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, net)
    for i, tap in enumerate(taps(images.transpose(0, 2, 3, 1), training=False)):
        features[f"keras.{i}"] = tap.detach().permute(0, 3, 1, 2).contiguous().float()
    save_file(features, args.out / "features.safetensors")


main()
