#!/usr/bin/env python3
"""Writes how albumentations' draws are distributed, for the tests of `dataset`: dataset/tests/reference/draws.json.

    python3 tools/augment_distribution.py

Of RandomResizedCrop(scale=(0.7, 1), ratio=(3/4, 4/3)) on images of several sizes: the quantiles, at every hundredth, of
the crop's share of the area, of its aspect, and of where it lies within the room it has; of Rotate(30), those of the
angle in degrees. Needs albumentations and numpy.
"""
import json
import pathlib

import albumentations as A
import numpy as np

DRAWS = 40_000
SIZES = (500, 375), (333, 500), (224, 224), (500, 300)


def crops(width, height):
    transform = A.RandomResizedCrop(size=(224, 224), scale=(0.7, 1.0), ratio=(3 / 4, 4 / 3), p=1)
    transform.set_random_seed(7)
    draw = lambda: transform.get_params_dependent_on_data({"shape": (height, width, 3)}, {})["crop_coords"]
    left, top, right, bottom = np.array([draw() for _ in range(DRAWS)]).T
    w, h = right - left, bottom - top
    within = lambda at, room: at[room > 0] / room[room > 0]
    return {
        "area": w * h / (width * height),
        "aspect": w / h,
        "left": within(left, width - w),
        "top": within(top, height - h),
    }


def angles():
    transform = A.Rotate(limit=30, p=1)
    transform.set_random_seed(7)
    draw = lambda: transform.get_params_dependent_on_data({"shape": (375, 500, 3)}, {})["matrix"]
    return np.array([np.degrees(np.arctan2(m[1, 0], m[0, 0])) for m in (draw() for _ in range(DRAWS))])


def quantiles(values):
    return [round(float(q), 5) for q in np.quantile(values, np.linspace(0, 1, 101))]


def main():
    out = {f"{w}x{h}": {name: quantiles(values) for name, values in crops(w, h).items()} for w, h in SIZES}
    out["angle"] = quantiles(angles())
    path = pathlib.Path(__file__).parents[1] / "dataset/tests/reference/draws.json"
    path.write_text("{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in out.items()) + "\n}\n")


main()
