//! Decoded images and masks in memory. Not how they are read (`decode`) nor resized (`resample`).

/// `C` interleaved channels of u8, row by row: `data` is [height, width, C].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Raster<const C: usize> {
    pub width: u32,
    pub height: u32,
    pub data: Vec<u8>,
}

/// An RGB image, [H, W, 3], 0..=255.
pub type Picture = Raster<3>;

/// Class indices, [H, W], 0..=2 (see [`CLASS_NAMES`](crate::CLASS_NAMES)).
pub type Mask = Raster<1>;

/// An image and its mask, of one size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    pub picture: Picture,
    pub mask: Mask,
}

impl<const C: usize> Raster<C> {
    /// # Panics
    /// If either side is 0, or `data` is not `height * width * C` long.
    pub fn new(width: u32, height: u32, data: Vec<u8>) -> Self {
        assert!(width > 0 && height > 0, "an image has at least one pixel");
        assert_eq!(data.len(), width as usize * height as usize * C);
        Self { width, height, data }
    }

    /// Builds a raster from a function of (x, y).
    pub fn from_fn(width: u32, height: u32, mut pixel: impl FnMut(u32, u32) -> [u8; C]) -> Self {
        let data = (0..height)
            .flat_map(|y| (0..width).map(move |x| (x, y)))
            .flat_map(|(x, y)| pixel(x, y))
            .collect();
        Self::new(width, height, data)
    }

    pub fn size(&self) -> (u32, u32) {
        (self.width, self.height)
    }

    /// Row by row.
    pub fn pixels(&self) -> &[[u8; C]] {
        self.data.as_chunks().0
    }

    pub fn pixel(&self, x: u32, y: u32) -> [u8; C] {
        self.pixels()[y as usize * self.width as usize + x as usize]
    }
}

impl Pair {
    /// Both in one raster of red, green, blue and class: four bytes a pixel, read at once.
    pub fn interleaved(&self) -> Raster<4> {
        let pixels = self.picture.pixels().iter().zip(&self.mask.data);
        let data = pixels.flat_map(|(&[red, green, blue], &class)| [red, green, blue, class]).collect();
        Raster::new(self.picture.width, self.picture.height, data)
    }

    /// Memory that the decoded bytes take.
    pub fn bytes(&self) -> usize {
        self.picture.data.len() + self.mask.data.len()
    }
}
