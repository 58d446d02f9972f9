//! What happens to a training sample: turned, mirrored, cropped and resized, as albumentations
//! 1.3.0 does by Rotate, HorizontalFlip and RandomResizedCrop in this order, but as one affine map,
//! so that each pixel is interpolated once. How pixels are sampled is `resample`'s.

use rand::RngExt;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::Affine;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AugmentOptions {
    /// Half of the images are turned by up to this angle either way; 0 turns none.
    pub rotate_degrees: f64,
    /// Half of the images are mirrored.
    pub horizontal_flip: bool,
    /// The crop's share of the image's *area*, lowest and highest; `[1, 1]` crops nothing.
    pub scale: [f64; 2],
}

impl Default for AugmentOptions {
    fn default() -> Self {
        Self { rotate_degrees: 30.0, horizontal_flip: true, scale: [0.7, 1.0] }
    }
}

/// What was drawn for one sample in one epoch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Counter-clockwise on the screen, about the image's centre; 0 half of the time.
    pub turn_degrees: f64,
    pub mirrored: bool,
    /// Of the image already turned and mirrored.
    pub crop: Crop,
}

/// In pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crop {
    pub left: u32,
    pub top: u32,
    pub width: u32,
    pub height: u32,
}

impl Draw {
    /// Depends on nothing but the arguments: not on the batch, the rank or the thread.
    pub fn of(
        seed: u64,
        epoch: u32,
        sample_id: u64,
        (width, height): (u32, u32),
        options: &AugmentOptions,
    ) -> Self {
        let mut rng = rng_of(seed, epoch, sample_id);
        // All coins and angles are drawn, used or not: switching one option off leaves the others'
        // draws alone.
        let turned = rng.random_bool(0.5);
        let turn = rng.random_range(-1.0..=1.0) * options.rotate_degrees;
        let mirrored = rng.random_bool(0.5);
        Self {
            turn_degrees: if turned { turn } else { 0.0 },
            mirrored: mirrored && options.horizontal_flip,
            crop: Crop::random(&mut rng, width, height, options.scale),
        }
    }

    /// From the output's unit square to the source image of that size.
    pub fn affine(&self, (width, height): (u32, u32)) -> Affine {
        let centre = [f64::from(width) / 2.0, f64::from(height) / 2.0];
        let mut map = self.crop.affine();
        if self.mirrored {
            map = map.then_mirrored_at(centre[0]);
        }
        // An image turned counter-clockwise finds its source clockwise.
        map.then_turned(self.turn_degrees, centre)
    }
}

impl Crop {
    fn whole(width: u32, height: u32) -> Self {
        Self { left: 0, top: 0, width, height }
    }

    fn random(rng: &mut ChaCha8Rng, width: u32, height: u32, scale: [f64; 2]) -> Self {
        if scale == [1.0, 1.0] {
            return Self::whole(width, height);
        }
        let area = f64::from(width) * f64::from(height);
        for _ in 0..CROP_TRIES {
            let target = area * rng.random_range(scale[0]..=scale[1]);
            let aspect = rng.random_range(MIN_ASPECT.ln()..=MAX_ASPECT.ln()).exp();
            // Halves to even, as Python's `round`.
            let crop_width = (target * aspect).sqrt().round_ties_even() as u32;
            let crop_height = (target / aspect).sqrt().round_ties_even() as u32;
            if (1..=width).contains(&crop_width) && (1..=height).contains(&crop_height) {
                return Self {
                    left: rng.random_range(0..=width - crop_width),
                    top: rng.random_range(0..=height - crop_height),
                    width: crop_width,
                    height: crop_height,
                };
            }
        }
        Self::central(width, height)
    }

    /// The largest crop of an allowed aspect, in the middle.
    fn central(width: u32, height: u32) -> Self {
        let (w, h) = (f64::from(width), f64::from(height));
        let (crop_width, crop_height) = if w / h < MIN_ASPECT {
            (w, (w / MIN_ASPECT).round_ties_even())
        } else if w / h > MAX_ASPECT {
            ((h * MAX_ASPECT).round_ties_even(), h)
        } else {
            (w, h)
        };
        let (crop_width, crop_height) = (crop_width.max(1.0) as u32, crop_height.max(1.0) as u32);
        Self {
            left: (width - crop_width) / 2,
            top: (height - crop_height) / 2,
            width: crop_width,
            height: crop_height,
        }
    }

    fn affine(&self) -> Affine {
        let [left, top, width, height] = [self.left, self.top, self.width, self.height].map(f64::from);
        Affine::rectangle(left, top, width, height)
    }
}

/// Width over height.
const MIN_ASPECT: f64 = 3.0 / 4.0;
const MAX_ASPECT: f64 = 4.0 / 3.0;
const CROP_TRIES: usize = 10;

/// ChaCha's key is the hash of what the draw may depend on.
fn rng_of(seed: u64, epoch: u32, sample_id: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..12].copy_from_slice(&epoch.to_le_bytes());
    key[12..20].copy_from_slice(&sample_id.to_le_bytes());
    key[20..27].copy_from_slice(b"augment");
    ChaCha8Rng::from_seed(key)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: (u32, u32) = (500, 375);

    fn draws(options: &AugmentOptions) -> Vec<Draw> {
        (0..4_000).map(|id| Draw::of(44, 0, id, SIZE, options)).collect()
    }

    fn share(draws: &[Draw], is: impl Fn(&Draw) -> bool) -> f64 {
        draws.iter().filter(|draw| is(draw)).count() as f64 / draws.len() as f64
    }

    #[test]
    fn half_are_turned_and_half_are_mirrored_independently() {
        let draws = draws(&AugmentOptions::default());
        for (share, expected) in [
            (share(&draws, |d| d.turn_degrees != 0.0), 0.5),
            (share(&draws, |d| d.mirrored), 0.5),
            (share(&draws, |d| d.mirrored && d.turn_degrees != 0.0), 0.25),
            (share(&draws, |d| d.turn_degrees > 15.0), 0.125),
            (share(&draws, |d| d.turn_degrees < -15.0), 0.125),
        ] {
            assert!((share - expected).abs() < 0.03, "{share} is not {expected}");
        }
        assert!(draws.iter().all(|draw| draw.turn_degrees.abs() <= 30.0));
    }

    #[test]
    fn crop_areas_and_aspects_fill_their_ranges() {
        let crops: Vec<_> = draws(&AugmentOptions::default()).iter().map(|d| d.crop).collect();
        let area = |c: &Crop| f64::from(c.width * c.height) / f64::from(SIZE.0 * SIZE.1);
        let aspect = |c: &Crop| f64::from(c.width) / f64::from(c.height);
        let range = |of: &dyn Fn(&Crop) -> f64| {
            let values = crops.iter().map(of);
            (values.clone().fold(f64::MAX, f64::min), values.fold(f64::MIN, f64::max))
        };
        let (least, most) = range(&area);
        assert!((0.695..0.705).contains(&least) && (0.98..=1.0).contains(&most), "{least} {most}");
        let (least, most) = range(&aspect);
        assert!((0.745..0.95).contains(&least) && (1.32..1.34).contains(&most), "{least} {most}");
    }

    #[test]
    fn switching_one_option_off_leaves_the_other_draws_alone() {
        let on = draws(&AugmentOptions::default());
        let still = draws(&AugmentOptions { rotate_degrees: 0.0, ..AugmentOptions::default() });
        for (on, still) in on.iter().zip(&still) {
            assert_eq!(still.turn_degrees, 0.0);
            assert_eq!((on.mirrored, on.crop), (still.mirrored, still.crop));
        }
        let plain = AugmentOptions { rotate_degrees: 0.0, horizontal_flip: false, scale: [1.0, 1.0] };
        let map = Draw::of(1, 2, 3, SIZE, &plain).affine(SIZE);
        assert_eq!(map, Affine::stretch(SIZE.0, SIZE.1));
    }

    #[test]
    fn a_panorama_falls_back_to_its_centre() {
        let draw = Draw::of(1, 1, 1, (1_000, 100), &AugmentOptions::default());
        let central = Crop { left: 433, top: 0, width: 133, height: 100 };
        assert_eq!(draw.crop, central);
    }

    proptest! {
        #[test]
        fn crops_stay_inside(seed: u64, epoch: u32, id: u64, width in 1u32..900, height in 1u32..900) {
            let draw = Draw::of(seed, epoch, id, (width, height), &AugmentOptions::default());
            let Crop { left, top, width: w, height: h } = draw.crop;
            prop_assert!(w > 0 && h > 0 && left + w <= width && top + h <= height);
            prop_assert_eq!(draw, Draw::of(seed, epoch, id, (width, height), &AugmentOptions::default()));
        }

        #[test]
        fn each_part_of_the_key_counts(seed: u64, epoch: u32, id: u64) {
            // Two draws may be equal by chance: many leave the image whole.
            let draws = |seed, epoch: u32, id: u64| -> Vec<_> {
                let key = |k: u32| (seed, epoch.wrapping_add(2 * k), id.wrapping_add(2 * u64::from(k)));
                (0..16).map(key).map(|(s, e, i)| Draw::of(s, e, i, SIZE, &AugmentOptions::default())).collect()
            };
            let some = draws(seed, epoch, id);
            prop_assert_ne!(&some, &draws(seed ^ 1, epoch, id));
            prop_assert_ne!(&some, &draws(seed, epoch ^ 1, id));
            prop_assert_ne!(&some, &draws(seed, epoch, id ^ 1));
        }
    }
}
