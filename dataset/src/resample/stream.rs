//! Brings the rows that are about to be sampled nearer to the processor, in their order. A kept sample lies in
//! no cache, and rows that are turned are read in an order that no hardware foresees.

use std::hint::black_box;
use std::ops::Range;

use crate::Raster;
use crate::grid::{FRACTION_BITS, Fixed, Grid};

/// Bytes that memory hands out at once.
const LINE_BYTES: usize = 64;

/// Reads the rows between the output's corners once, if most of them will be wanted: if they are fewer lines of
/// memory than `side * side` output pixels.
pub(super) fn stream_in<const C: usize>(source: &Raster<C>, grid: &Grid, side: u32) {
    let rows = rows_between_corners(grid, side, source.height);
    let row_bytes = source.width as usize * C;
    let bytes = &source.data[rows.start * row_bytes..rows.end * row_bytes];
    if bytes.len() / LINE_BYTES < side as usize * side as usize {
        black_box(bytes.iter().step_by(LINE_BYTES).fold(0, |all, byte| all | byte));
    }
}

/// Of a source of that height; the neighbours of the outermost pixels may lie one outside.
fn rows_between_corners(grid: &Grid, side: u32, height: u32) -> Range<usize> {
    let last = Fixed::from(side.saturating_sub(1));
    let across = [0, last].map(|i| i * grid.across[1]);
    let corners = across.map(|across| [0, last].map(|j| grid.start[1] + across + j * grid.down[1]));
    let row = |place: Fixed| (place >> FRACTION_BITS).clamp(0, Fixed::from(height) - 1) as usize;
    let rows = corners.as_flattened().iter().map(|&place| row(place));
    rows.clone().min().map_or(0, |first| first)..rows.max().map_or(0, |last| last + 1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::Affine;
    use crate::resample::{Line, TO_PIXEL, whole};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_row_that_is_sampled_is_among_them(
            side in 1u32..40, height in 1u32..60,
            origin in [-20.0f64..60.0, -20.0..60.0],
            along_u in [-90.0f64..90.0, -90.0..90.0],
            along_v in [-90.0f64..90.0, -90.0..90.0],
        ) {
            let grid = Grid::new(&Affine { origin, along_u, along_v }, side);
            let rows = rows_between_corners(&grid, side, height);
            prop_assert!(!rows.is_empty() && rows.end <= height as usize);
            for j in 0..side {
                let line = Line::of(&grid, j, TO_PIXEL);
                for row in (0..side as usize).map(|i| whole(line.at(i).1)).filter(|row| (0..height as isize).contains(row)) {
                    prop_assert!(rows.contains(&(row as usize)), "row {row} is not in {rows:?}");
                }
            }
        }
    }

    #[test]
    fn a_crop_wants_its_own_rows_alone() {
        let crop = Grid::new(&Affine::rectangle(10.0, 20.0, 50.0, 30.0), 30);
        assert_eq!(rows_between_corners(&crop, 30, 100), 20..50);
    }
}
