#!/usr/bin/env python3
"""Writes the reference data of musher-model's tests: worker/model/tests/reference/*.safetensors.

The network is torchvision's ResNet50 class with a decoder written here, a few channels wide, in float64; Adam is
Keras' formula in NumPy. Nothing of Musher is used. Needs torch, torchvision, safetensors, numpy:

    python3 tools/model_reference.py [--count] [OUT]

With --count it prints the full networks' parameter counts instead.
"""
import argparse
import pathlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torchvision.models.resnet import Bottleneck, ResNet

WIDTH, SIZE, BATCH, CLASSES, LEARNING_RATE = 0.03, 64, 4, 3, 1e-3
# Of 400 seeds one with no ReLU's input so near zero that float32's rounding would flip it: a flip moves a gradient of
# such a narrow network by percents. Also with PyTorch itself in float32, contiguous and channels-last: within 5e-4.
SEED = 141
# Adam's second and third gradients are multiples of the first: real ones would measure the amplified rounding instead.
FACTORS = 1.0, -0.5, 3.0


def encoder(w, keras):
    """ResNet50 with scaled channels; Keras' has v1 strides, convolution biases and another epsilon."""
    net = ResNet.__new__(ResNet)
    nn.Module.__init__(net)
    net._norm_layer, net.inplanes, net.dilation, net.groups, net.base_width = nn.BatchNorm2d, w(64), 1, 1, 64
    net.conv1, net.bn1 = nn.Conv2d(3, w(64), 7, 2, 3, bias=False), nn.BatchNorm2d(w(64))
    for i, (channels, blocks, stride) in enumerate(((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)), 1):
        setattr(net, f"layer{i}", net._make_layer(Bottleneck, w(channels), blocks, stride))
    if keras:
        for module in net.modules():
            if isinstance(module, Bottleneck):
                module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
            if isinstance(module, nn.BatchNorm2d):
                module.eps, module.momentum = 1.001e-5, 0.01
            if isinstance(module, nn.Conv2d):
                module.bias = nn.Parameter(torch.zeros(module.out_channels))
    return net


class Stage(nn.Module):
    def __init__(self, inputs, skip, outputs):
        super().__init__()
        bn = lambda: nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
        self.up, self.up_bn = nn.ConvTranspose2d(inputs, outputs, 1, stride=2, output_padding=1), bn()
        self.conv1, self.bn1 = nn.Conv2d(outputs + skip, outputs, 3, padding=1), bn()
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1), bn()

    def forward(self, x, skip):
        x = torch.cat([self.up_bn(F.relu(self.up(x))), skip], 1)
        x = self.bn1(F.relu(self.conv1(x)))
        return self.bn2(F.relu(self.conv2(x)))


class UNet(nn.Module):
    def __init__(self, width, keras=False):
        super().__init__()
        w = lambda channels: max(1, round(channels * width))
        self.encoder = encoder(w, keras)
        skips, outputs = (w(256) * 4, w(128) * 4, w(64) * 4, w(64)), (w(1024), w(512), w(256), w(64))
        self.decoder = nn.ModuleList(map(Stage, (w(512) * 4,) + outputs[:3], skips, outputs))
        self.head = nn.Conv2d(w(64), CLASSES, 3, padding=1)

    def taps(self, x):
        e = self.encoder
        taps = [F.relu(e.bn1(e.conv1(x)))]
        x = F.max_pool2d(taps[0], 3, 2, 1)
        for layer in (e.layer1, e.layer2, e.layer3, e.layer4):
            x = layer(x)
            taps.append(x)
        return taps

    def forward(self, x):
        *skips, x = self.taps(x)
        for stage, skip in zip(self.decoder, reversed(skips)):
            x = stage(x, skip)
        return self.head(x)


def musher_name(name):
    return name.removeprefix("encoder.")


def tensors(net):
    return {musher_name(k): v.detach().clone() for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}


def randomise(net, generator):
    """Weights and statistics that leave nothing at its default, yet keep fifty narrow layers well-conditioned.

    Weak residual branches and mostly open ReLUs: else float32's rounding alone moves gradients by several percent.
    """
    uniform = lambda like, low, high: torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    module.bias.copy_(uniform(module.bias, 0.2, 0.8))
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.3, 0.3), (module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 2.0)):
                    tensor.copy_(uniform(tensor, low, high))
            if isinstance(module, Bottleneck):
                module.bn3.weight.mul_(0.2)
            if isinstance(module, (Bottleneck, ResNet)):
                for bn in (getattr(module, "bn1"), getattr(module, "bn2", None)):
                    if bn is not None:
                        bn.bias.add_(2.0)
        for tensor in net.state_dict().values():  # what an f32 can hold
            if tensor.is_floating_point():
                tensor.copy_(tensor.float())


def smooth_images(generator):
    """Images u8 whose samples and regions differ: white noise would average out before the deeper batch norms."""
    coarse = torch.rand(BATCH, 3, 5, 5, generator=generator)
    return (F.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear") * 255).to(torch.uint8)


class KerasAdam:
    """keras.optimizers.Adam's update_step: epsilon is added to the square root of the uncorrected moment."""

    def __init__(self, net):
        self.params = dict(net.named_parameters())
        self.m = {k: np.zeros(p.shape) for k, p in self.params.items()}
        self.v = {k: np.zeros(p.shape) for k, p in self.params.items()}
        self.t = 0

    def step(self, factor, beta1=0.9, beta2=0.999, epsilon=1e-7):
        self.t += 1
        alpha = LEARNING_RATE * np.sqrt(1 - beta2**self.t) / (1 - beta1**self.t)
        for k, p in self.params.items():
            g = factor * p.grad.numpy()
            self.m[k] += (g - self.m[k]) * (1 - beta1)
            self.v[k] += (g * g - self.v[k]) * (1 - beta2)
            p.data -= torch.from_numpy(alpha * self.m[k] / (np.sqrt(self.v[k]) + epsilon))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", nargs="?", type=pathlib.Path, default=pathlib.Path(__file__).parents[1] / "worker/model/tests/reference")
    parser.add_argument("--count", action="store_true")
    args = parser.parse_args()
    if args.count:
        for width in (1.0, 0.25):
            print(width, *(sum(p.numel() for p in UNet(width, keras).parameters()) for keras in (False, True)))
        return
    args.out.mkdir(parents=True, exist_ok=True)

    def save(name, data, dtype=torch.float32):
        data = {k: v.to(dtype).contiguous() if v.is_floating_point() and v.ndim else v.contiguous() for k, v in data.items()}
        save_file(data, args.out / f"{name}.safetensors")

    generator = torch.Generator().manual_seed(SEED)
    net = UNet(WIDTH).double()
    randomise(net, generator)
    weights = tensors(net)
    save("weights", weights)
    pixels = smooth_images(generator)
    masks = torch.randint(0, CLASSES, (BATCH, SIZE // 2, SIZE // 2), generator=generator)
    images = (pixels.float() / 255).double()
    numbered = lambda taps: {f"tap.{i}": tap for i, tap in enumerate(taps)}

    reference = {"pixels": pixels, "masks": masks.to(torch.uint8)}
    net.eval()
    with torch.no_grad():
        reference |= numbered(net.taps(images)) | {"logits.eval": net(images)}
    net.train()
    logits = net(images)
    loss = F.cross_entropy(logits, masks, reduction="sum")
    (loss / masks.numel()).backward()
    reference |= {"logits.train": logits.detach(), "loss.train": loss.detach()}
    reference |= {f"grad.{musher_name(k)}": p.grad for k, p in net.named_parameters()}
    reference |= {f"after.{k}": v for k, v in tensors(net).items() if ".running_" in k}
    save("torchvision", reference)

    optimizer, after = KerasAdam(net), {}
    for step, factor in enumerate(FACTORS, 1):
        optimizer.step(factor)
        if step in (1, 3):
            after |= {f"{step}.{musher_name(k)}": p.detach().clone() for k, p in net.named_parameters()}
    save("adam", after)

    net = UNet(WIDTH, keras=True).double()
    randomise(net, generator)
    biases = {k: v for k, v in tensors(net).items() if k not in weights}
    net.load_state_dict({("" if k.startswith(("decoder.", "head.")) else "encoder.") + k: v for k, v in (weights | biases).items()}, strict=False)
    net.eval()
    with torch.no_grad():
        keras = {f"weights.{k}": v for k, v in biases.items()} | numbered(net.taps(images)) | {"logits.eval": net(images)}
    save("keras", keras)


main()
