//! Image and mask go through an augmentation together.
#![allow(clippy::unwrap_used)]

use musher_dataset::{AugmentOptions, Draw, Mask, MaskResize, Pair, Picture, Transform, View, stretch};
use proptest::prelude::*;

const SIDE: u32 = 64;

fn view(options: AugmentOptions) -> View {
    View {
        transform: Transform::Augment(options),
        mask_resize: MaskResize::Nearest,
        image_size: SIDE,
        seed: 44,
    }
}

fn render(view: &View, pair: &Pair, id: u64) -> (Vec<u8>, Vec<u8>) {
    let (mut image, mut mask) = (vec![0; view.image_bytes()], vec![0; view.mask_bytes()]);
    view.render(pair, 0, id, &mut image, &mut mask);
    (image, mask)
}

/// The image encodes coordinates (red: x, green: y), the mask is a function of them.
fn coordinates(width: u32, height: u32) -> Pair {
    let value = |at: u32, of: u32| (at as f64 * 240.0 / f64::from(of)) as u8;
    Pair {
        picture: Picture::from_fn(width, height, |x, y| [value(x, width), value(y, height), 9]),
        mask: Mask::from_fn(width, height, |x, y| [class(value(x, width), value(y, height))]),
    }
}

fn class(red: u8, green: u8) -> u8 {
    match (red, green) {
        (0..120, _) => 0,
        (_, 0..120) => 1,
        _ => 2,
    }
}

proptest! {
    #[test]
    fn the_mask_moves_with_the_image(id: u64, width in 90u32..240, height in 90u32..240) {
        let pair = coordinates(width, height);
        let (image, mask) = render(&view(AugmentOptions::default()), &pair, id);
        let side = SIDE as usize;
        let mut compared = 0;
        for (at, &seen) in mask.iter().enumerate() {
            // The mask's pixel covers four of the image's; next to an edge between classes they
            // may rightly differ.
            let (x, y) = (at % (side / 2) * 2, at / (side / 2) * 2);
            let classes = [(0, 0), (1, 0), (0, 1), (1, 1)].map(|(dx, dy)| {
                let pixel = ((y + dy) * side + x + dx) * 3;
                class(image[pixel], image[pixel + 1])
            });
            if classes == [classes[0]; 4] && !near_an_edge(&image, x, y) {
                prop_assert_eq!(seen, classes[0], "at {} {}", x, y);
                compared += 1;
            }
        }
        prop_assert!(compared > mask.len() / 2);
    }

    #[test]
    fn each_pixel_comes_from_where_the_map_says(id: u64) {
        let pair = coordinates(200, 150);
        let (image, _) = render(&view(AugmentOptions::default()), &pair, id);
        let map = Draw::of(44, 0, id, (200, 150), &AugmentOptions::default()).affine((200, 150));
        for (at, pixel) in image.chunks(3).enumerate() {
            let centre = |i: usize| (i as f64 + 0.5) / f64::from(SIDE);
            let [x, y] = map.at(centre(at % SIDE as usize), centre(at / SIDE as usize));
            if (1.0..199.0).contains(&x) && (1.0..149.0).contains(&y) {
                prop_assert!((f64::from(pixel[0]) - (x - 0.5) * 240.0 / 200.0).abs() < 2.0);
                prop_assert!((f64::from(pixel[1]) - (y - 0.5) * 240.0 / 150.0).abs() < 2.0);
            }
        }
    }
}

/// Within what one mask pixel spans of a class's edge.
fn near_an_edge(image: &[u8], x: usize, y: usize) -> bool {
    let pixel = (y * SIDE as usize + x) * 3;
    [image[pixel], image[pixel + 1]].iter().any(|value| value.abs_diff(120) < 14)
}

const NOTHING: AugmentOptions =
    AugmentOptions { rotate_degrees: 0.0, horizontal_flip: false, scale: [1.0, 1.0] };

#[test]
fn without_augmentation_training_sees_what_validation_sees() {
    let pair = coordinates(150, 110);
    let stretch_view = View { transform: Transform::Stretch, ..view(NOTHING) };
    let validation = render(&stretch_view, &pair, 3);
    assert_eq!(render(&view(NOTHING), &pair, 3), validation);
    assert_eq!(stretch(&pair.picture, SIDE), validation.0);
}

#[test]
fn a_flip_is_the_mirror_image() {
    let pair = coordinates(128, 128);
    let flip = AugmentOptions { horizontal_flip: true, ..NOTHING };
    let (plain_image, plain_mask) = render(&view(NOTHING), &pair, 0);
    let id = (0..64).find(|&id| Draw::of(44, 0, id, (128, 128), &flip).mirrored).unwrap();
    let (image, mask) = render(&view(flip), &pair, id);
    let side = SIDE as usize;
    for (row, plain) in image.chunks(side * 3).zip(plain_image.chunks(side * 3)) {
        assert!(row.chunks(3).eq(plain.chunks(3).rev()));
    }
    for (row, plain) in mask.chunks(side / 2).zip(plain_mask.chunks(side / 2)) {
        assert!(row.iter().eq(plain.iter().rev()));
    }
}
