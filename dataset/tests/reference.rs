//! Augmentation, stretching and the article's masks against OpenCV; the files are written by
//! `tools/augment_reference.py`.
#![allow(clippy::unwrap_used)]

use musher_dataset::resample::{Border, Rounding, bilinear, nearest};
use musher_dataset::{Affine, Crop, Draw, Mask, MaskResize, Pair, Picture, Transform, View, stretch};

const BYTES: &[u8] = include_bytes!("reference/augment.bin");
const CASES: &str = include_str!("reference/augment.txt");

struct Reference {
    pair: Pair,
    side: u32,
    draws: Vec<DrawCase>,
    /// Side and [side, side, 3].
    stretched: Vec<(u32, Vec<u8>)>,
    article_train: Vec<u8>,
    article_val: Vec<u8>,
}

struct DrawCase {
    draw: Draw,
    image: Vec<u8>,
    mask: Vec<u8>,
}

impl Reference {
    fn read() -> Self {
        let mut lines = CASES.lines().filter(|line| !line.starts_with('#'));
        let mut numbers = lines.next().unwrap().split(' ').map(|number| number.parse().unwrap());
        let (width, height, side): (u32, u32, u32) =
            (numbers.next().unwrap(), numbers.next().unwrap(), numbers.next().unwrap());
        let mut bytes = BYTES.iter().copied();
        let mut take = |count: u32| bytes.by_ref().take(count as usize).collect::<Vec<u8>>();
        let pair = Pair {
            picture: Picture::new(width, height, take(width * height * 3)),
            mask: Mask::new(width, height, take(width * height)),
        };
        let draws = lines
            .map(|line| DrawCase {
                draw: parse_draw(line),
                image: take(side * side * 3),
                mask: take(side * side / 4),
            })
            .collect();
        let stretched = [side, 96].map(|side| (side, take(side * side * 3))).to_vec();
        let (article_train, article_val) = (take(side * side / 4), take(side * side / 4));
        assert!(bytes.next().is_none());
        Self { pair, side, draws, stretched, article_train, article_val }
    }
}

fn parse_draw(line: &str) -> Draw {
    let numbers: Vec<f64> = line.split(' ').map(|number| number.parse().unwrap()).collect();
    let whole = |at: usize| numbers[at] as u32;
    Draw {
        turn_degrees: numbers[0],
        mirrored: numbers[1] != 0.0,
        crop: Crop { left: whole(2), top: whole(3), width: whole(4), height: whole(5) },
    }
}

fn largest_gap(ours: &[u8], theirs: &[u8]) -> u8 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

#[test]
fn draws_give_what_opencv_gives() {
    let reference = Reference::read();
    let size = reference.pair.picture.size();
    let side = reference.side;
    assert_eq!(reference.draws.len(), 7);
    for DrawCase { draw, image, mask } in &reference.draws {
        let map = draw.affine(size);
        let mut ours = vec![0; image.len()];
        bilinear(&reference.pair.picture, &map, Border::Reflect101, Rounding::Nearest, side, &mut ours);
        assert!(largest_gap(&ours, image) <= 1, "{draw:?}");

        let mut ours = vec![0; mask.len()];
        nearest(&reference.pair.mask, &map, Border::Reflect101, side / 2, &mut ours);
        assert_eq!(&ours, mask, "{draw:?}");
    }
}

#[test]
fn stretching_gives_what_opencv_resize_gives() {
    let reference = Reference::read();
    for (side, theirs) in &reference.stretched {
        let ours = stretch(&reference.pair.picture, *side);
        assert!(largest_gap(&ours, theirs) <= 1, "to {side}");
    }
}

#[test]
fn article_masks_are_interpolated_and_truncated() {
    let reference = Reference::read();
    let (width, height) = reference.pair.picture.size();
    let side = reference.side;

    let view =
        View { transform: Transform::Stretch, mask_resize: MaskResize::Article, image_size: side, seed: 0 };
    let mut image = vec![0; view.image_bytes()];
    let mut mask = vec![0; view.mask_bytes()];
    view.render(&reference.pair, 0, 0, &mut image, &mut mask);
    assert_eq!(mask, reference.article_val);

    let map = reference.draws[5].draw.affine((width, height));
    let mut full = Mask::new(side, side, vec![0; (side * side) as usize]);
    nearest(&reference.pair.mask, &map, Border::Reflect101, side, &mut full.data);
    let halve = Affine::stretch(side, side);
    bilinear(&full, &halve, Border::Replicate, Rounding::Truncate, side / 2, &mut mask);
    assert_eq!(mask, reference.article_train);
}
