//! Reading a raster through an affine map. Bilinear as OpenCV's `resize` and `warpAffine`: pixel
//! centres at halves, four neighbours, no antialias.
//!
//! Coordinates run along a row in a grid's fixed point; the pixels whose neighbours all lie inside
//! the source are found before the row is walked, so that the inner loop knows no border. All of it
//! is arithmetic in whole numbers, which tensors can do too, to the same bytes; so can any vector unit,
//! and the one at hand is found at run time.

mod blend;
mod stream;

use std::ops::Range;

use fearless_simd::{Level, Simd, dispatch};

pub use blend::WEIGHT_BITS;
use blend::{RowBlender, blend};
use stream::stream_in;

use crate::grid::{FRACTION_BITS, Fixed, Grid, ONE};
use crate::{Affine, Mask, Raster};

/// What lies outside of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Border {
    /// Mirrored at the outermost pixels' centres: `c b | a b c | b a`.
    Reflect101,
    /// The outermost pixels go on: `a a | a b c | c c`.
    Replicate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    Nearest,
    /// Towards zero.
    Truncate,
}

/// Samples `source` through `map` into `out`, [side, side, C]; C is at most 4.
///
/// # Panics
/// If `out` is not `side * side * C` long.
pub fn bilinear<const C: usize>(
    source: &Raster<C>,
    map: &Affine,
    border: Border,
    rounding: Rounding,
    side: u32,
    out: &mut [u8],
) {
    let bias = match rounding {
        Rounding::Nearest => 1 << (2 * WEIGHT_BITS - 1),
        Rounding::Truncate => 0,
    };
    let grid = Grid::new(map, side);
    stream_in(source, &grid, side);
    dispatch!(Level::new(), simd => simd.vectorize(
        #[inline(always)]
        || bilinear_rows(source, &grid, border, bias, side, out),
    ));
}

#[inline(always)]
fn bilinear_rows<const C: usize>(
    source: &Raster<C>,
    grid: &Grid,
    border: Border,
    bias: i32,
    side: u32,
    out: &mut [u8],
) {
    let (width, height) = (source.width as usize, source.height as usize);
    let pixels = source.pixels();
    let mut blender = RowBlender::new(side as usize);

    for (j, row) in rows::<C>(side, out) {
        let line = Line::of(grid, j, TO_NEIGHBOUR);
        let inside = line.inside(width - 1, height - 1, side as usize);
        let near_border = |row: &mut [[u8; C]], columns: Range<usize>| {
            for i in columns {
                let (x, y) = line.at(i);
                let [left, right] = [whole(x), whole(x) + 1].map(|x| border.index(x, width));
                let [top, bottom] = [whole(y), whole(y) + 1].map(|y| border.index(y, height));
                let corner = |x, y| &pixels[y * width + x];
                row[i] = blend(
                    [corner(left, top), corner(right, top)],
                    [corner(left, bottom), corner(right, bottom)],
                    [weight(x), weight(y)],
                    bias,
                );
            }
        };
        near_border(row, 0..inside.start);
        near_border(row, inside.end..side as usize);

        blender.blend(source, &line, inside.start, bias, &mut row[inside]);
    }
}

/// Samples the class of the source pixel under each output pixel's centre into `out`, [side, side].
///
/// # Panics
/// If `out` is not `side * side` long.
pub fn nearest(source: &Mask, map: &Affine, border: Border, side: u32, out: &mut [u8]) {
    let (width, height) = (source.width as usize, source.height as usize);
    let pixels = source.pixels();
    let grid = Grid::new(map, side);
    stream_in(source, &grid, side);

    for (j, row) in rows::<1>(side, out) {
        let line = Line::of(&grid, j, TO_PIXEL);
        let inside = line.inside(width, height, side as usize);
        let near_border = |row: &mut [[u8; 1]], columns: Range<usize>| {
            for i in columns {
                let (x, y) = line.at(i);
                let (x, y) = (border.index(whole(x), width), border.index(whole(y), height));
                row[i] = pixels[y * width + x];
            }
        };
        near_border(row, 0..inside.start);
        near_border(row, inside.end..side as usize);

        let (mut x, mut y) = line.at(inside.start);
        for class in &mut row[inside] {
            *class = pixels[whole(y) as usize * width + whole(x) as usize];
            x += line.step[0];
            y += line.step[1];
        }
    }
}

/// From a place to the pixel that it lies in: more than what a grid's rounding adds up to on sides of 2^14, so
/// that a centre on the line between two pixels belongs to the later one, whatever was rounded.
pub const TO_PIXEL: Fixed = 1 << 16;

/// From a place to its upper left neighbour: half a pixel back to that one's centre, and half a
/// weight's unit on, to round the weights.
pub const TO_NEIGHBOUR: Fixed = -ONE / 2 + (1 << (FRACTION_BITS - WEIGHT_BITS - 1));

fn whole(value: Fixed) -> isize {
    (value >> FRACTION_BITS) as isize
}

fn weight(value: Fixed) -> i32 {
    (value >> (FRACTION_BITS - WEIGHT_BITS)) as i32 & ((1 << WEIGHT_BITS) - 1)
}

/// The output's rows, numbered.
fn rows<const C: usize>(side: u32, out: &mut [u8]) -> impl Iterator<Item = (u32, &mut [[u8; C]])> {
    assert_eq!(out.len(), side as usize * side as usize * C);
    let (pixels, _) = out.as_chunks_mut::<C>();
    (0..).zip(pixels.chunks_exact_mut(side.max(1) as usize))
}

impl Border {
    /// The pixel that stands for `at` among `len`.
    fn index(self, at: isize, len: usize) -> usize {
        let last = len as isize - 1;
        let index = match self {
            _ if (0..=last).contains(&at) => at,
            Self::Replicate => at.clamp(0, last),
            Self::Reflect101 if last == 0 => 0,
            Self::Reflect101 => {
                let folded = at.rem_euclid(2 * last);
                folded.min(2 * last - folded)
            }
        };
        index as usize
    }
}

/// The source coordinates of one output row's centres: `start + i * step`.
struct Line {
    start: [Fixed; 2],
    step: [Fixed; 2],
}

impl Line {
    fn of(grid: &Grid, j: u32, offset: Fixed) -> Self {
        let start = [0, 1].map(|axis| grid.start[axis] + Fixed::from(j) * grid.down[axis] + offset);
        Self { start, step: grid.across }
    }

    fn at(&self, i: usize) -> (Fixed, Fixed) {
        let [x, y] = [0, 1].map(|axis| self.start[axis] + i as Fixed * self.step[axis]);
        (x, y)
    }

    /// The columns below `side` whose coordinates lie in [0, width) and [0, height).
    fn inside(&self, width: usize, height: usize, side: usize) -> Range<usize> {
        let [x, y] = [(0, width), (1, height)].map(|(axis, limit)| {
            columns_within(self.start[axis], self.step[axis], limit as Fixed * ONE, side)
        });
        let start = x.start.max(y.start);
        start..x.end.min(y.end).max(start)
    }
}

/// The `i` below `count` with `0 <= start + i * step < limit`.
fn columns_within(start: Fixed, step: Fixed, limit: Fixed, count: usize) -> Range<usize> {
    let ceil_div = |a: Fixed, b: Fixed| -(-a).div_euclid(b);
    let clamp = |i: Fixed| i.clamp(0, count as Fixed) as usize;
    let range = match step {
        0 if (0..limit).contains(&start) => 0..count,
        0 => 0..0,
        1.. => clamp(ceil_div(-start, step))..clamp(ceil_div(limit - start, step)),
        // Walked backwards: `limit - 1 - coordinate` rises and has the same bounds.
        _ => return columns_within(limit - 1 - start, -step, limit, count),
    };
    range.start..range.end.max(range.start)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn borders_repeat_as_drawn() {
        let reflected: Vec<_> = (-5..8).map(|at| Border::Reflect101.index(at, 3)).collect();
        assert_eq!(reflected, [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1]);
        let replicated: Vec<_> = (-2..5).map(|at| Border::Replicate.index(at, 3)).collect();
        assert_eq!(replicated, [0, 0, 0, 1, 2, 2, 2]);
        assert_eq!(Border::Reflect101.index(-7, 1), 0);
    }

    #[test]
    fn the_identity_copies() {
        let source = Raster::<3>::from_fn(9, 9, |x, y| [x as u8, y as u8, (x * y) as u8]);
        let mut out = vec![0; 9 * 9 * 3];
        let map = Affine::stretch(9, 9);
        bilinear(&source, &map, Border::Reflect101, Rounding::Nearest, 9, &mut out);
        assert_eq!(out, source.data);
    }

    #[test]
    fn halving_averages_four() {
        let source = Raster::<1>::from_fn(4, 4, |x, y| [(x * 10 + y * 40) as u8]);
        let mut out = vec![0; 4];
        let map = Affine::stretch(4, 4);
        bilinear(&source, &map, Border::Replicate, Rounding::Nearest, 2, &mut out);
        assert_eq!(out, [25, 45, 105, 125]);
    }

    /// 22/7 of a pixel a step: no binary fraction, but every seventh centre is on a line, 11, 33 or 341 = 251 + 90.
    #[test]
    fn a_centre_on_a_line_belongs_to_the_later_pixel() {
        let source = Mask::from_fn(352, 352, |x, y| [(x.max(y) % 251) as u8]);
        let mut out = vec![0; 112 * 112];
        nearest(&source, &Affine::stretch(352, 352), Border::Replicate, 112, &mut out);
        for (i, expected) in [(3, 11), (10, 33), (108, 90)] {
            assert_eq!([out[i], out[i * 112]], [expected; 2]);
        }
    }

    /// A row's bytes are those of its pixels one by one, borders too.
    fn assert_rows_are_as_pixels<const C: usize>(
        seed: u32,
        (width, height): (u32, u32),
        side: u32,
        map: &Affine,
    ) {
        let noise = |x: u32, y: u32, channel: usize| {
            (seed.wrapping_mul((x * 31 + y * 17) * 4 + channel as u32 + 7) >> 24) as u8
        };
        let source = Raster::<C>::from_fn(width, height, |x, y| std::array::from_fn(|at| noise(x, y, at)));
        let pixels = source.pixels();
        let grid = Grid::new(map, side);
        for (rounding, bias) in [(Rounding::Nearest, 1 << (2 * WEIGHT_BITS - 1)), (Rounding::Truncate, 0)] {
            let mut out = vec![0; (side * side) as usize * C];
            bilinear(&source, map, Border::Reflect101, rounding, side, &mut out);
            for (j, row) in rows::<C>(side, &mut out) {
                let line = Line::of(&grid, j, TO_NEIGHBOUR);
                for (i, found) in row.iter().enumerate() {
                    let (x, y) = line.at(i);
                    let corner = |right, down| {
                        let x = Border::Reflect101.index(whole(x) + right, width as usize);
                        let y = Border::Reflect101.index(whole(y) + down, height as usize);
                        &pixels[y * width as usize + x]
                    };
                    let (upper, lower) = ([corner(0, 0), corner(1, 0)], [corner(0, 1), corner(1, 1)]);
                    let expected = blend(upper, lower, [weight(x), weight(y)], bias);
                    assert_eq!(*found, expected, "at ({i}, {j})");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn rows_are_as_pixels(
            size in (1u32..90, 1u32..90), side in 1u32..70, seed: u32,
            origin in [-20.0f64..60.0, -20.0..60.0],
            along_u in [-90.0f64..90.0, -90.0..90.0],
            along_v in [-90.0f64..90.0, -90.0..90.0],
        ) {
            let map = Affine { origin, along_u, along_v };
            assert_rows_are_as_pixels::<1>(seed, size, side, &map);
            assert_rows_are_as_pixels::<3>(seed, size, side, &map);
            assert_rows_are_as_pixels::<4>(seed, size, side, &map);
            assert_rows_are_as_pixels::<3>(seed, size, side, &Affine::stretch(size.0, size.1));
        }

        #[test]
        fn the_inner_range_is_exact(start in -50i64..50, step in -7i64..7, limit in 0i64..40, count in 0usize..30) {
            let range = columns_within(start, step, limit, count);
            for i in 0..count {
                let coordinate = start + i as i64 * step;
                prop_assert_eq!(range.contains(&i), (0..limit).contains(&coordinate));
            }
        }

        /// Against the definition in floats, borders and all.
        #[test]
        fn agrees_with_the_definition(
            width in 1u32..12, height in 1u32..12, side in 1u32..9, seed: u32,
            origin in [-20.0f64..20.0, -20.0..20.0],
            along_u in [-20.0f64..20.0, -20.0..20.0],
            along_v in [-20.0f64..20.0, -20.0..20.0],
        ) {
            let source = Raster::<1>::from_fn(width, height, |x, y| [(seed.wrapping_mul(x * 31 + y * 17 + 7) >> 24) as u8]);
            let map = Affine { origin, along_u, along_v };
            for border in [Border::Reflect101, Border::Replicate] {
                let mut out = vec![0; (side * side) as usize];
                bilinear(&source, &map, border, Rounding::Nearest, side, &mut out);
                for (at, &value) in out.iter().enumerate() {
                    let [u, v] = [at as u32 % side, at as u32 / side].map(|i| (f64::from(i) + 0.5) / f64::from(side));
                    let expected = interpolated(&source, map.at(u, v), border);
                    prop_assert!((f64::from(value) - expected).abs() < 0.76, "{value} is not {expected}");
                }
            }
        }
    }

    fn interpolated(source: &Raster<1>, at: [f64; 2], border: Border) -> f64 {
        let [x, y] = at.map(|coordinate| coordinate - 0.5);
        let value = |x: f64, y: f64| {
            let x = border.index(x as isize, source.width as usize);
            let y = border.index(y as isize, source.height as usize);
            f64::from(source.pixel(x as u32, y as u32)[0])
        };
        let (fx, fy) = (x - x.floor(), y - y.floor());
        let row = |y: f64| value(x.floor(), y) * (1.0 - fx) + value(x.floor() + 1.0, y) * fx;
        row(y.floor()) * (1.0 - fy) + row(y.floor() + 1.0) * fy
    }
}
