//! An affine map in the pixels of one output, in whole numbers: every device that adds them up comes
//! to the same coordinates, and so to the same bytes.

use crate::Affine;

/// 32.32 fixed point; sides of 2^14 leave ample room for what lies outside.
pub type Fixed = i64;
pub const FRACTION_BITS: u32 = 32;
pub(crate) const ONE: Fixed = 1 << FRACTION_BITS;

/// The centre of the output's pixel (i, j) lies at `start + i * across + j * down` of the source,
/// x and y in its pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    pub start: [Fixed; 2],
    pub across: [Fixed; 2],
    pub down: [Fixed; 2],
}

impl Grid {
    /// For an output of `side` x `side` pixels.
    pub fn new(map: &Affine, side: u32) -> Self {
        let pixel = 1.0 / f64::from(side);
        Self {
            start: map.at(0.5 * pixel, 0.5 * pixel).map(fixed),
            across: map.along_u.map(|along| fixed(along * pixel)),
            down: map.along_v.map(|along| fixed(along * pixel)),
        }
    }
}

fn fixed(value: f64) -> Fixed {
    (value * ONE as f64).round() as Fixed
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_the_map(
            side in 1u32..600,
            origin in [-900.0f64..900.0, -900.0..900.0],
            along_u in [-900.0f64..900.0, -900.0..900.0],
            along_v in [-900.0f64..900.0, -900.0..900.0],
            at in [0.0f64..1.0, 0.0..1.0],
        ) {
            let map = Affine { origin, along_u, along_v };
            let grid = Grid::new(&map, side);
            let [i, j] = at.map(|at| (at * f64::from(side)) as u32);
            let [u, v] = [i, j].map(|i| (f64::from(i) + 0.5) / f64::from(side));
            for (axis, expected) in map.at(u, v).into_iter().enumerate() {
                let found = grid.start[axis] + i64::from(i) * grid.across[axis] + i64::from(j) * grid.down[axis];
                prop_assert!((found as f64 / ONE as f64 - expected).abs() < 1.0 / f64::from(1 << 20));
            }
        }
    }
}
