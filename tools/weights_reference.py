#!/usr/bin/env python3
"""Writes the reference data of musher-weights' tests: weights/tests/reference/.

    python3 tools/weights_reference.py [OUT]

- names.txt: each array of torchvision's and of Keras' ResNet50, with its shape. Nothing of Musher is used.
- tiny.*: one small state dict in every format, written by torch.save, safetensors and Keras' own writer.
- *.pkl: pickles that would do something if anybody ran them.

Needs torch, torchvision, safetensors, keras (on torch) and h5py.
"""
import os
import pathlib
import pickle
import sys

os.environ["KERAS_BACKEND"] = "torch"

import h5py
import keras
import numpy as np
import torch
import torchvision
from keras.src.legacy.saving import legacy_h5_format
from safetensors.torch import save_file


def write_names(out):
    lines = []
    for name, tensor in torchvision.models.resnet50().state_dict().items():
        lines.append(f"torchvision {name} {','.join(map(str, tensor.shape)) or '-'}")
    model = keras.applications.ResNet50(include_top=False, weights=None, input_shape=(64, 64, 3))
    file = out / "names.h5"
    with h5py.File(file, "w") as h5:
        legacy_h5_format.save_weights_to_hdf5_group(h5, model)
        h5.visititems(lambda path, item: lines.append(f"keras {path} {','.join(map(str, item.shape))}") if isinstance(item, h5py.Dataset) else None)
    file.unlink()
    (out / "names.txt").write_text("\n".join(lines) + "\n")


def tiny_state_dict():
    """Two layers of a ResNet50 by name; the values are the elements' numbers, divided by eight."""
    counted = lambda *shape: (torch.arange(np.prod(shape, dtype=int)).float() / 8).reshape(shape)
    state = torch.nn.Module().state_dict()  # an ordered dictionary with its hidden attribute
    state["conv1.weight"] = counted(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    state["bn1.weight"] = torch.nn.Parameter(counted(4))
    state["bn1.running_mean"] = counted(9)[2:6]  # a view into a larger storage
    state["bn1.num_batches_tracked"] = torch.tensor(3)
    state["fc.weight"] = counted(2, 3).half()
    state["fc.bias"] = counted(2).bfloat16()
    return state


def write_tiny(out):
    state = tiny_state_dict()
    torch.save(state, out / "tiny.pth")
    torch.save(state, out / "tiny_legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}, "optimizer": {"lr": 0.1}}, out / "tiny_wrapped.pth")
    save_file({k: v.detach().clone().contiguous() for k, v in state.items()}, out / "tiny.safetensors", {"format": "pt"})

    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 2, name="conv1_conv")(inputs)
    model = keras.Model(inputs, keras.layers.BatchNormalization(name="conv1_bn")(x))
    for weight in model.weights:
        weight.assign(np.arange(np.prod(weight.shape), dtype=np.float32).reshape(weight.shape) / 8)
    with h5py.File(out / "tiny.h5", "w") as h5:
        legacy_h5_format.save_weights_to_hdf5_group(h5, model)
    with h5py.File(out / "tiny_chunked.h5", "w") as h5:
        h5.create_dataset("conv1_conv/kernel", data=np.zeros((4, 4), np.float32), chunks=(2, 2))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/it-was-run",)


def write_hostile(out):
    torch.save({"conv1.weight": Hostile()}, out / "hostile.pth")
    torch.save({"conv1.weight": Hostile()}, out / "hostile_legacy.pth", _use_new_zipfile_serialization=False)
    (out / "hostile.pkl").write_bytes(pickle.dumps(Hostile(), protocol=2))


def main():
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parents[1] / "weights/tests/reference")
    out.mkdir(parents=True, exist_ok=True)
    write_names(out)
    write_tiny(out)
    write_hostile(out)


main()
