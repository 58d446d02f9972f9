//! The interpolation itself: four neighbours and their weights to one pixel, alone or a row at a time. Which
//! pixels have all four inside the source is `resample`'s business.

use super::{Line, weight, whole};
use crate::Raster;
use crate::grid::Fixed;

/// Of an interpolation weight, as in OpenCV's `resize`: two of them and a byte fit an i32.
pub const WEIGHT_BITS: u32 = 11;
const UNIT: i32 = 1 << WEIGHT_BITS;

/// The four neighbours of one place, weighted; the weights' products sum to `UNIT * UNIT`.
#[inline(always)]
pub(super) fn blend<const C: usize>(
    upper: [&[u8; C]; 2],
    lower: [&[u8; C]; 2],
    weights: [i32; 2],
    bias: i32,
) -> [u8; C] {
    std::array::from_fn(|channel| {
        let value = |neighbour: &[u8; C]| i32::from(neighbour[channel]);
        blend_values([upper[0], upper[1], lower[0], lower[1]].map(value), weights, bias)
    })
}

/// Exact up to the last shift, in whatever order it is summed.
#[inline(always)]
fn blend_values(
    [upper_left, upper_right, lower_left, lower_right]: [i32; 4],
    [wx, wy]: [i32; 2],
    bias: i32,
) -> u8 {
    let upper = upper_left * (UNIT - wx) + upper_right * wx;
    let lower = lower_left * (UNIT - wx) + lower_right * wx;
    ((upper * (UNIT - wy) + lower * wy + bias) >> (2 * WEIGHT_BITS)) as u8
}

/// As many i32 as the widest vector unit takes.
const LANES: usize = 16;

/// Blends row after row; owns the room for one.
pub(super) struct RowBlender {
    blocks: Vec<Block>,
}

impl RowBlender {
    /// For rows of up to `side` pixels.
    pub fn new(side: usize) -> Self {
        Self { blocks: vec![Block::default(); side.div_ceil(LANES)] }
    }

    /// As [`blend`], of the pixels of `line` from column `first` on, whose neighbours all lie inside.
    ///
    /// Each step is taken for the whole row before the next one: all but the look-up compile to vector
    /// instructions, none waits for what has just been written, and many look-ups are under way at once.
    #[inline(always)]
    pub fn blend<const C: usize>(
        &mut self,
        source: &Raster<C>,
        line: &Line,
        first: usize,
        bias: i32,
        row: &mut [[u8; C]],
    ) {
        if row.is_empty() {
            return;
        }
        let blocks = &mut self.blocks[..row.len().div_ceil(LANES)];
        let (mut places, stride) = (Places::of(line, first), line.step.map(|step| step * LANES as Fixed));
        for block in &mut *blocks {
            block.place(source, &places);
            places.advance(stride);
        }
        for block in &mut *blocks {
            block.look_up(source);
        }
        for (block, pixels) in blocks.iter().zip(row.chunks_mut(LANES)) {
            write_pixels::<C>(block.blended::<C>(bias), pixels);
        }
    }
}

/// Where a block's pixels lie in the source: x and y.
struct Places([[Fixed; LANES]; 2]);

impl Places {
    #[inline(always)]
    fn of(line: &Line, first: usize) -> Self {
        let (x, y) = line.at(first);
        let along = |start, step| std::array::from_fn(|lane| start + lane as Fixed * step);
        Self([along(x, line.step[0]), along(y, line.step[1])])
    }

    #[inline(always)]
    fn advance(&mut self, [dx, dy]: [Fixed; 2]) {
        let [xs, ys] = self.0;
        self.0 = [xs.map(|x| x + dx), ys.map(|y| y + dy)];
    }
}

/// Some pixels of a row on their way.
#[derive(Clone, Default)]
struct Block {
    /// Of the upper left neighbour's first byte; pictures have sides of at most 2^14.
    at: [u32; LANES],
    /// Along x and y; i16 lets the compiler multiply and add two of them at once.
    weights: [[i16; LANES]; 2],
    /// Above left and right, below left and right; a byte for each channel, the first one lowest.
    neighbours: [[u32; LANES]; 4],
}

impl Block {
    #[inline(always)]
    fn place<const C: usize>(&mut self, source: &Raster<C>, Places([xs, ys]): &Places) {
        // Behind the row's end a place may be anywhere, and nobody asks what is there.
        let last = (source.data.len() - (source.width as usize + 2) * C) as u32;
        self.at = std::array::from_fn(|lane| {
            let pixel =
                (whole(ys[lane]) as u32).wrapping_mul(source.width).wrapping_add(whole(xs[lane]) as u32);
            pixel.wrapping_mul(C as u32).min(last)
        });
        self.weights = [xs, ys].map(|places| places.map(|place| weight(place) as i16));
    }

    #[inline(always)]
    fn look_up<const C: usize>(&mut self, source: &Raster<C>) {
        let below = source.width as usize * C;
        for (lane, &at) in self.at.iter().enumerate() {
            for (row, at) in [at as usize, at as usize + below].into_iter().enumerate() {
                let both = eight_bytes(&source.data, at);
                self.neighbours[2 * row][lane] = both as u32;
                self.neighbours[2 * row + 1][lane] = (both >> (8 * C)) as u32;
            }
        }
    }

    /// A byte for each channel, the first one lowest.
    #[inline(always)]
    fn blended<const C: usize>(&self, bias: i32) -> [u32; LANES] {
        std::array::from_fn(|lane| {
            let weights = self.weights.each_ref().map(|weights| i32::from(weights[lane]));
            (0..C).fold(0, |pixel, channel| {
                let value = |of: &[u32; LANES]| (of[lane] >> (8 * channel) & 0xFF) as i32;
                let value = blend_values(self.neighbours.each_ref().map(value), weights, bias);
                pixel | u32::from(value) << (8 * channel)
            })
        })
    }
}

/// Writes four bytes at once: those too many are the next pixel's, which comes after.
#[inline(always)]
fn write_pixels<const C: usize>(blended: [u32; LANES], pixels: &mut [[u8; C]]) {
    let out = pixels.as_flattened_mut();
    for (at, blended) in (0..out.len()).step_by(C).zip(blended) {
        let bytes = blended.to_le_bytes();
        match out.get_mut(at..at + 4) {
            Some(four) => four.copy_from_slice(&bytes),
            None => out[at..at + C].copy_from_slice(&bytes[..C]),
        }
    }
}

/// The bytes from `at` on, the first one lowest; zeros behind the end.
#[inline(always)]
fn eight_bytes(data: &[u8], at: usize) -> u64 {
    match data.get(at..at + 8) {
        Some(bytes) => u64::from_le_bytes(bytes.try_into().expect("there are eight")),
        None => last_bytes(data, at),
    }
}

#[cold]
#[inline(never)]
fn last_bytes(data: &[u8], at: usize) -> u64 {
    data[at..].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}
