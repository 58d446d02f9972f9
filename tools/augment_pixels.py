#!/usr/bin/env python3
"""Writes what albumentations makes of real images over many draws, for the tests of `dataset`.

    python3 tools/augment_pixels.py PETS        writes dataset/tests/reference/pixels.json

For each of a few images of Oxford-IIIT Pet: the quantiles, at every twentieth, of figures of the augmented image
(112 x 112) and of its mask (56 x 56); what each figure is, `figures` says. Rotate, flip and crop are those of the recipe.
Needs albumentations, opencv-python-headless and numpy.
"""
import json
import pathlib
import sys

import albumentations as A
import cv2
import numpy as np

DRAWS = 4_000
SIDE = 112
NAMES = "Abyssinian_1", "Abyssinian_101", "american_bulldog_10", "Bengal_100"


def figures(image, mask):
    """Of one draw: levels are 0..255, shares 0..1. All in float64."""
    image = image.astype(np.float64)
    grey = image.mean(2)
    half = SIDE // 2
    return {
        "red": image[..., 0].mean(),
        "green": image[..., 1].mean(),
        "blue": image[..., 2].mean(),
        "contrast": grey.std(),
        # How sharp it is: neighbours' mean difference.
        "detail": np.abs(np.diff(grey, axis=1)).mean(),
        # Where things are: left against right, top against bottom.
        "sideways": grey[:, :half].mean() - grey[:, half:].mean(),
        "upright": grey[:half].mean() - grey[half:].mean(),
        # How much of the mask is animal, how much its outline.
        "foreground": (mask == 0).mean(),
        "boundary": (mask == 2).mean(),
    }


def main():
    pets = pathlib.Path(sys.argv[1])
    transform = A.Compose([
        A.Rotate(30, border_mode=cv2.BORDER_REFLECT_101), A.HorizontalFlip(), A.RandomResizedCrop(size=(SIDE, SIDE), scale=(0.7, 1.0)),
    ], seed=7)
    out = {}
    for name in NAMES:
        image = cv2.imread(str(pets / f"images/{name}.jpg"), cv2.IMREAD_COLOR)[:, :, ::-1]
        trimap = cv2.imread(str(pets / f"annotations/trimaps/{name}.png"), cv2.IMREAD_GRAYSCALE)
        drawn = []
        for _ in range(DRAWS):
            augmented = transform(image=image, mask=trimap)
            mask = cv2.resize(augmented["mask"], (SIDE // 2, SIDE // 2), interpolation=cv2.INTER_NEAREST) - 1
            drawn.append(figures(augmented["image"], mask))
        out[name] = {key: [round(float(q), 5) for q in np.quantile([d[key] for d in drawn], np.linspace(0, 1, 21))] for key in drawn[0]}
    path = pathlib.Path(__file__).parents[1] / "dataset/tests/reference/pixels.json"
    rows = lambda of: ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in of.items())
    path.write_text("{\n" + ",\n".join(f'"{name}": {{\n{rows(of)}\n}}' for name, of in out.items()) + "\n}\n")


main()
