//! What the network gets of a pair: the image at S x S and its mask at S/2 x S/2. This is where
//! training and validation differ; pixels are sampled by `resample`.

use crate::resample::{Border, Rounding, bilinear, nearest};
use crate::{Affine, AugmentOptions, Draw, Mask, Pair, Picture};

/// How pairs become network inputs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct View {
    pub transform: Transform,
    pub mask_resize: MaskResize,
    /// S, the image's side in pixels; even.
    pub image_size: u32,
    /// The run's seed, for the augmentation.
    pub seed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Transform {
    /// Training: drawn anew for each sample and epoch.
    Augment(AugmentOptions),
    /// Validation: the whole image, its aspect ignored.
    Stretch,
}

/// How a mask comes to S/2 x S/2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaskResize {
    /// The class under each pixel's centre.
    Nearest,
    /// The article's: interpolated between class numbers and truncated. Training: nearest to
    /// S x S, then bilinear; validation: bilinear from the original.
    Article,
}

impl View {
    /// Bytes of one image, [S, S, 3].
    pub fn image_bytes(&self) -> usize {
        3 * self.image_size as usize * self.image_size as usize
    }

    /// Bytes of one mask, [S/2, S/2].
    pub fn mask_bytes(&self) -> usize {
        self.mask_side() as usize * self.mask_side() as usize
    }

    /// Where the output lies in a sample of that size.
    pub fn map(&self, size: (u32, u32), epoch: u32, sample_id: u64) -> Affine {
        match &self.transform {
            Transform::Augment(options) => Draw::of(self.seed, epoch, sample_id, size, options).affine(size),
            Transform::Stretch => Affine::stretch(size.0, size.1),
        }
    }

    /// What is seen outside of the sample.
    pub fn border(&self) -> Border {
        match self.transform {
            Transform::Augment(_) => Border::Reflect101,
            Transform::Stretch => Border::Replicate,
        }
    }

    /// Writes the pair's image, [S, S, 3] u8, and its mask, [S/2, S/2] classes.
    ///
    /// # Panics
    /// If a buffer is not of that length.
    pub fn render(&self, pair: &Pair, epoch: u32, sample_id: u64, image: &mut [u8], mask: &mut [u8]) {
        let (map, border) = (self.map(pair.picture.size(), epoch, sample_id), self.border());
        bilinear(&pair.picture, &map, border, Rounding::Nearest, self.image_size, image);
        match (self.mask_resize, self.transform) {
            (MaskResize::Nearest, _) => nearest(&pair.mask, &map, border, self.mask_side(), mask),
            (MaskResize::Article, Transform::Stretch) => {
                bilinear(&pair.mask, &map, border, Rounding::Truncate, self.mask_side(), mask);
            }
            (MaskResize::Article, Transform::Augment(_)) => {
                self.render_article_mask(&pair.mask, &map, mask);
            }
        }
    }

    fn render_article_mask(&self, source: &Mask, map: &Affine, mask: &mut [u8]) {
        let side = self.image_size;
        let mut full = Mask::new(side, side, vec![0; side as usize * side as usize]);
        nearest(source, map, Border::Reflect101, side, &mut full.data);
        let halve = Affine::stretch(side, side);
        bilinear(&full, &halve, Border::Replicate, Rounding::Truncate, self.mask_side(), mask);
    }

    /// The mask's side in pixels.
    pub fn mask_side(&self) -> u32 {
        self.image_size / 2
    }
}

/// The whole picture at S x S, as validation sees it: [S, S, 3].
pub fn stretch(picture: &Picture, image_size: u32) -> Vec<u8> {
    let mut image = vec![0; 3 * image_size as usize * image_size as usize];
    let map = Affine::stretch(picture.width, picture.height);
    bilinear(picture, &map, Border::Replicate, Rounding::Nearest, image_size, &mut image);
    image
}
