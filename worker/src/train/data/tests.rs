//! The tensors against the CPU's own code, byte by byte, and against OpenCV's reference.

use musher_dataset::{
    AugmentOptions, Crop, Draw, Mask, MaskResize, Pair, Picture, Transform, View, resample::Border,
};
use tch::{Kind, Tensor};

use super::sampler::{Place, sample};

/// Noise: any pixel that is taken from a wrong place shows.
fn noise(width: u32, height: u32, seed: u64) -> Pair {
    let value = |x: u32, y: u32, channel: u64| {
        let at = u64::from(y * width + x) << 3 | channel;
        (musher_proto::shard::scramble(seed << 32 | at) >> 56) as u8
    };
    Pair {
        picture: Picture::from_fn(width, height, |x, y| [0, 1, 2].map(|channel| value(x, y, channel))),
        mask: Mask::from_fn(width, height, |x, y| [value(x, y, 3) % 3]),
    }
}

fn packed<'a>(pairs: impl IntoIterator<Item = &'a Pair>) -> Tensor {
    let bytes: Vec<u8> = pairs.into_iter().flat_map(|pair| pair.interleaved().data).collect();
    Tensor::from_data_size(&bytes, &[bytes.len() as i64 / 4], Kind::Int)
}

/// Images and masks by tensors, of samples numbered in order.
fn by_tensors(pairs: &[Pair], view: &View, epoch: u32) -> (Vec<u8>, Vec<u8>) {
    let mut offset = 0;
    let places: Vec<_> = (0..)
        .zip(pairs)
        .map(|(id, pair)| {
            let size = pair.picture.size();
            let place = Place { offset, size, map: view.map(size, epoch, id) };
            offset += i64::from(size.0) * i64::from(size.1);
            place
        })
        .collect();
    let (images, masks) = sample(&packed(pairs), &places, view).unwrap();
    let side = i64::from(view.image_size);
    assert_eq!(images.size(), [pairs.len() as i64, side, side, 3]);
    assert_eq!(masks.size(), [pairs.len() as i64, side / 2, side / 2]);
    (bytes(&images), bytes(&masks))
}

fn bytes(values: &Tensor) -> Vec<u8> {
    assert!(values.min().int64_value(&[]) >= 0 && values.max().int64_value(&[]) <= 255);
    Vec::try_from(values.to_kind(Kind::Uint8).flatten(0, -1)).unwrap()
}

fn by_loops(pairs: &[Pair], view: &View, epoch: u32) -> (Vec<u8>, Vec<u8>) {
    let (mut images, mut masks) = (Vec::new(), Vec::new());
    for (id, pair) in (0..).zip(pairs) {
        let (mut image, mut mask) = (vec![0; view.image_bytes()], vec![0; view.mask_bytes()]);
        view.render(pair, epoch, id, &mut image, &mut mask);
        images.extend(image);
        masks.extend(mask);
    }
    (images, masks)
}

fn views(image_size: u32) -> impl Iterator<Item = View> {
    let turned = AugmentOptions { rotate_degrees: 180.0, horizontal_flip: true, scale: [0.05, 1.0] };
    let transforms =
        [Transform::Stretch, Transform::Augment(AugmentOptions::default()), Transform::Augment(turned)];
    transforms.into_iter().flat_map(move |transform| {
        [MaskResize::Nearest, MaskResize::Article].map(|mask_resize| View {
            transform,
            mask_resize,
            image_size,
            seed: 44,
        })
    })
}

#[test]
fn every_size_gives_the_loaders_bytes() {
    let sizes = [
        (1, 1),
        (1, 9),
        (9, 1),
        (2, 2),
        (1, 300),
        (300, 2),
        (3, 5),
        (64, 64),
        (61, 47),
        (352, 352),
        (333, 500),
        (500, 375),
        (640, 33),
    ];
    let pairs: Vec<_> = (0..).zip(sizes).map(|(seed, (w, h))| noise(w, h, seed)).collect();
    for view in views(32).chain(views(64)).chain(views(96)) {
        for epoch in 0..2 {
            assert!(
                by_tensors(&pairs, &view, epoch) == by_loops(&pairs, &view, epoch),
                "epoch {epoch} of {view:?}"
            );
        }
    }
}

#[test]
fn a_sample_has_the_same_bytes_in_any_batch() {
    let pairs = [noise(70, 50, 1), noise(31, 90, 2), noise(5, 5, 3)];
    for view in views(64) {
        let (together, masks) = by_tensors(&pairs, &view, 7);
        let (first, mask) = by_tensors(&pairs[..1], &view, 7);
        assert!(together.starts_with(&first) && masks.starts_with(&mask));
    }
}

const REFERENCE: &[u8] = include_bytes!("../../../../dataset/tests/reference/augment.bin");
const DRAWS: &str = include_str!("../../../../dataset/tests/reference/augment.txt");

/// The same cases as in `dataset/tests/reference.rs`, written by `tools/augment_reference.py`.
#[test]
fn draws_and_stretching_give_what_opencv_gives() {
    let mut lines = DRAWS.lines().filter(|line| !line.starts_with('#'));
    let numbers = |line: &str| -> Vec<f64> { line.split(' ').map(|n| n.parse().unwrap()).collect() };
    let [width, height, side] = numbers(lines.next().unwrap())[..] else {
        panic!("a size has three numbers")
    };
    let [width, height, side] = [width, height, side].map(|n| n as u32);
    let mut reference = REFERENCE.iter().copied();
    let mut take = |count: u32| reference.by_ref().take(count as usize).collect::<Vec<u8>>();
    let pair = Pair {
        picture: Picture::new(width, height, take(width * height * 3)),
        mask: Mask::new(width, height, take(width * height)),
    };
    let draws: Vec<_> = lines
        .map(|line| {
            let n = numbers(line);
            let [left, top, width, height] = [n[2], n[3], n[4], n[5]].map(|n| n as u32);
            Draw { turn_degrees: n[0], mirrored: n[1] != 0.0, crop: Crop { left, top, width, height } }
        })
        .collect();

    let size = (width, height);
    let places: Vec<_> = draws.iter().map(|draw| Place { offset: 0, size, map: draw.affine(size) }).collect();
    let view =
        |transform, image_size| View { transform, mask_resize: MaskResize::Nearest, image_size, seed: 0 };
    let augmented = view(Transform::Augment(AugmentOptions::default()), side);
    assert_eq!(augmented.border(), Border::Reflect101);
    let (images, masks) = sample(&packed([&pair]), &places, &augmented).unwrap();
    let (mut gaps, mut largest, mut other_classes, mut pixels) = (0, 0, 0, 0);
    for index in 0..draws.len() as i64 {
        let (image, mask) = (take(side * side * 3), take(side * side / 4));
        let gap = |(a, b): (&u8, &u8)| u64::from(a.abs_diff(*b));
        let ours = bytes(&images.get(index));
        gaps += ours.iter().zip(&image).map(gap).sum::<u64>();
        largest = largest.max(ours.iter().zip(&image).map(gap).max().unwrap());
        other_classes += bytes(&masks.get(index)).iter().zip(&mask).filter(|(a, b)| a != b).count();
        pixels += image.len();
    }
    println!(
        "{} draws: values differ by {:.4} of 255 in the mean, by {largest} at most; {other_classes} classes differ",
        draws.len(),
        gaps as f64 / pixels as f64,
    );
    assert!(largest <= 1 && other_classes == 0);

    for side in [side, 96] {
        let (ours, _) = by_tensors(std::slice::from_ref(&pair), &view(Transform::Stretch, side), 0);
        assert!(ours.iter().zip(take(side * side * 3)).all(|(a, b)| a.abs_diff(b) <= 1), "to {side}");
    }
}
