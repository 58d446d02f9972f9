//! An affine map from the output image to the source image. It knows no pixels of the output: one
//! map serves the image at its size and the mask at half of it.

/// From the output's unit square, (0, 0) top left to (1, 1) bottom right, to the source in pixels,
/// where the pixel (x, y) covers [x, x+1] x [y, y+1]:
/// `origin + u * along_u + v * along_v`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Affine {
    pub origin: [f64; 2],
    pub along_u: [f64; 2],
    pub along_v: [f64; 2],
}

impl Affine {
    /// The unit square onto the rectangle of that corner and size.
    pub fn rectangle(left: f64, top: f64, width: f64, height: f64) -> Self {
        Self { origin: [left, top], along_u: [width, 0.0], along_v: [0.0, height] }
    }

    /// The unit square onto a whole image of that size: a plain stretch.
    pub fn stretch(width: u32, height: u32) -> Self {
        Self::rectangle(0.0, 0.0, f64::from(width), f64::from(height))
    }

    /// This map, then a mirroring at the vertical line at `x`.
    #[must_use]
    pub fn then_mirrored_at(self, x: f64) -> Self {
        Self {
            origin: [2.0 * x - self.origin[0], self.origin[1]],
            along_u: [-self.along_u[0], self.along_u[1]],
            along_v: [-self.along_v[0], self.along_v[1]],
        }
    }

    /// This map, then a turn about `centre` by `degrees`, clockwise on the screen (y points down).
    #[must_use]
    pub fn then_turned(self, degrees: f64, centre: [f64; 2]) -> Self {
        let (sin, cos) = degrees.to_radians().sin_cos();
        let turn = |[x, y]: [f64; 2]| [cos * x - sin * y, sin * x + cos * y];
        let from_centre = [self.origin[0] - centre[0], self.origin[1] - centre[1]];
        let [x, y] = turn(from_centre);
        Self {
            origin: [centre[0] + x, centre[1] + y],
            along_u: turn(self.along_u),
            along_v: turn(self.along_v),
        }
    }

    pub fn at(&self, u: f64, v: f64) -> [f64; 2] {
        [0, 1].map(|axis| self.origin[axis] + u * self.along_u[axis] + v * self.along_v[axis])
    }
}
