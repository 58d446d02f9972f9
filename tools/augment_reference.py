#!/usr/bin/env python3
"""Writes what OpenCV makes of a small image under given draws, for the tests of `dataset`.

    python tools/augment_reference.py dataset/tests/reference

Needs numpy, opencv-python, Pillow and torch. Rotation, flip and crop follow albumentations 1.3.0
(`Rotate`, `HorizontalFlip`, `RandomResizedCrop`), but joined into one map, so that each pixel is
interpolated once: in float64 with NumPy, which is checked here against cv2.warpAffine and against
PyTorch's grid_sample.
"""

import pathlib
import sys

import cv2
import numpy as np
import torch
from PIL import Image

WIDTH, HEIGHT, SIDE = 61, 47, 32

# turn in degrees counter-clockwise, mirrored, (left, top, width, height) of the crop
DRAWS = [
    (0.0, False, (0, 0, WIDTH, HEIGHT)),
    (0.0, True, (0, 0, WIDTH, HEIGHT)),
    (30.0, False, (0, 0, WIDTH, HEIGHT)),
    (-30.0, True, (0, 0, WIDTH, HEIGHT)),
    (0.0, False, (7, 3, 40, 41)),
    (12.5, True, (10, 2, 50, 38)),
    (-23.0, False, (1, 8, 43, 39)),
]


def test_image():
    """Smooth colours, an edge and some noise."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    noise = np.random.default_rng(7).integers(0, 60, (HEIGHT, WIDTH, 3))
    waves = np.stack([np.sin(x / 5), np.cos(y / 4), np.sin((x + y) / 7)], axis=-1)
    image = 90 + 60 * waves + noise + 40 * (x > y)[..., None]
    return np.clip(image, 0, 255).astype(np.uint8)


def test_mask():
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    away = np.hypot((x - 28) / 1.3, y - 22)
    return np.select([away < 12, away < 16], [0, 2], 1).astype(np.uint8)


def rotation(degrees):
    """albumentations 1.3.0's, which turns about the middle of the pixels' centres; 3 x 3."""
    centre = (WIDTH / 2 - 0.5, HEIGHT / 2 - 0.5)
    return np.vstack([cv2.getRotationMatrix2D(centre, degrees, 1.0), [0, 0, 1]])


def source_coordinates(draw, side):
    """Of each output pixel's centre, in the index coordinates of the source (first centre at 0)."""
    degrees, mirrored, (left, top, width, height) = draw
    i = (np.arange(side) + 0.5) / side
    x, y = np.meshgrid(left + i * width - 0.5, top + i * height - 0.5)
    if mirrored:
        x = WIDTH - 1 - x
    points = np.stack([x, y, np.ones_like(x)], axis=-1) @ np.linalg.inv(rotation(degrees)).T
    return points[..., 0], points[..., 1]


def reflect101(index, length):
    index = np.mod(index, 2 * (length - 1))
    return np.minimum(index, 2 * (length - 1) - index)


def bilinear(image, x, y):
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]

    def at(dx, dy):
        return image[reflect101(y0 + dy, HEIGHT), reflect101(x0 + dx, WIDTH)].astype(np.float64)

    upper = at(0, 0) * (1 - fx) + at(1, 0) * fx
    lower = at(0, 1) * (1 - fx) + at(1, 1) * fx
    return upper * (1 - fy) + lower * fy


def nearest(mask, x, y):
    column, row = np.floor(x + 0.5).astype(int), np.floor(y + 0.5).astype(int)
    return mask[reflect101(row, HEIGHT), reflect101(column, WIDTH)]


def check_against_opencv(image):
    """The functions above give what OpenCV gives, up to its 1/32 pixel steps."""
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    for degrees in (30.0, -17.0):
        ours = np.stack([x, y, np.ones_like(x)], axis=-1) @ np.linalg.inv(rotation(degrees)).T
        theirs = cv2.warpAffine(
            image, rotation(degrees)[:2], (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        gap = np.abs(bilinear(image, ours[..., 0], ours[..., 1]) - theirs)
        assert gap.mean() < 0.8 and gap.max() < 8, (gap.mean(), gap.max())


def check_against_grid_sample(image, mask):
    """The functions above are PyTorch's batched affine `grid_sample`, reflected at the outermost centres."""
    def grid_sample(source, x, y, mode):
        grid = np.stack([2 * x / (WIDTH - 1) - 1, 2 * y / (HEIGHT - 1) - 1], axis=-1)
        source = torch.from_numpy(source.astype(np.float64)).reshape(HEIGHT, WIDTH, -1).permute(2, 0, 1)
        sampled = torch.nn.functional.grid_sample(
            source[None], torch.from_numpy(grid)[None], mode=mode, padding_mode="reflection", align_corners=True
        )
        return sampled[0].permute(1, 2, 0).numpy()

    for draw in DRAWS:
        x, y = source_coordinates(draw, SIDE)
        gap = np.abs(bilinear(image, x, y) - grid_sample(image, x, y, "bilinear"))
        assert gap.max() < 1e-9, gap.max()
        x, y = source_coordinates(draw, SIDE // 2)
        assert (nearest(mask, x, y) == grid_sample(mask, x, y, "nearest")[..., 0]).all()


def write_cmyk(file):
    """Orange on the left, blue on the right, in Adobe's inverted CMYK."""
    rgb = np.zeros((16, 32, 3), np.uint8)
    rgb[:, :16], rgb[:, 16:] = (230, 159, 0), (24, 52, 92)
    black = np.zeros((16, 32, 1), np.uint8)
    Image.fromarray(np.concatenate([255 - rgb, black], axis=-1), "CMYK").save(file, quality=95)


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    image, mask = test_image(), test_mask()
    check_against_opencv(image)
    check_against_grid_sample(image, mask)
    write_cmyk(folder / "cmyk.jpg")

    blobs, cases = [image.tobytes(), mask.tobytes()], []
    for degrees, mirrored, crop in DRAWS:
        draw = (degrees, mirrored, crop)
        x, y = source_coordinates(draw, SIDE)
        blobs.append(np.floor(bilinear(image, x, y) + 0.5).astype(np.uint8).tobytes())
        blobs.append(nearest(mask, *source_coordinates(draw, SIDE // 2)).tobytes())
        cases.append(" ".join(map(str, (degrees, int(mirrored), *crop))))

    # Validation: OpenCV's own stretch, down and up.
    for side in (SIDE, 96):
        stretched = cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)
        blobs.append(stretched.tobytes())

    # The article's masks: bilinear between the class numbers, truncated.
    full = nearest(mask, *source_coordinates(DRAWS[5], SIDE)).astype(np.float32)
    for source in (full, mask.astype(np.float32)):
        half = cv2.resize(source, (SIDE // 2, SIDE // 2), interpolation=cv2.INTER_LINEAR)
        blobs.append(np.floor(half + 1e-4).astype(np.uint8).tobytes())

    (folder / "augment.bin").write_bytes(b"".join(blobs))
    (folder / "augment.txt").write_text(
        "# width height side, then a draw a line: degrees, mirrored, left top width height\n"
        f"{WIDTH} {HEIGHT} {SIDE}\n" + "\n".join(cases) + "\n"
    )


if __name__ == "__main__":
    main()
