//! Cat- and dog-like figures as sets of simple shapes with a signed distance. No colours here, and
//! no pixels: a figure is built in its own units and then placed.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::texture::Point;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Species {
    Cat,
    Dog,
}

/// In its own units the trunk is about 1 long; x points where the figure looks, y down.
#[derive(Clone, Debug, Default)]
pub struct Figure {
    pub parts: Vec<Part>,
    pub spots: Vec<Spot>,
}

#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub shape: Shape,
    /// Its fur's brightness against the trunk's.
    pub tone: f32,
}

#[derive(Clone, Copy, Debug)]
pub enum Shape {
    /// A thick line from `a` to `b` whose radius changes evenly.
    Limb { a: Point, b: Point, radii: [f32; 2] },
    /// A triangle with rounded corners.
    Ear { corners: [Point; 3], radius: f32 },
}

/// An eye or a nose: painted on, of no consequence to the contour.
#[derive(Clone, Copy, Debug)]
pub struct Spot {
    pub at: Point,
    pub radius: f32,
    pub kind: SpotKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpotKind {
    Eye,
    Nose,
}

/// Turned, scaled, perhaps mirrored, moved.
#[derive(Clone, Copy, Debug)]
pub struct Placement {
    pub scale: f32,
    pub radians: f32,
    pub mirrored: bool,
    pub offset: Point,
}

/// Left, top, right, bottom.
pub type Bounds = [f32; 4];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pose {
    Standing,
    Sitting,
    Lying,
    /// Head and shoulders, cut by the picture's lower edge.
    Portrait,
}

impl Figure {
    pub fn random(rng: &mut ChaCha8Rng, species: Species, pose: Pose) -> Self {
        let mut builder = Builder {
            girth: rng.random_range(0.85..1.2),
            legs: match species {
                Species::Cat => rng.random_range(0.75..1.0),
                Species::Dog => rng.random_range(0.7..1.25),
            },
            species,
            rng,
            figure: Self::default(),
        };
        match pose {
            Pose::Standing => builder.stand(),
            Pose::Sitting => builder.sit(),
            Pose::Lying => builder.lie(),
            Pose::Portrait => builder.pose_for_portrait(),
        }
        builder.figure
    }

    /// The signed distance to the contour, negative inside, and the nearest part's tone.
    /// `blend` is the width over which neighbouring parts flow into one another.
    pub fn distance(&self, at: Point, blend: f32) -> (f32, f32) {
        let mut distance = f32::MAX;
        let mut nearest = (f32::MAX, 1.0);
        for part in &self.parts {
            let own = part.shape.distance(at);
            if own < nearest.0 {
                nearest = (own, part.tone);
            }
            let overlap = (blend - (distance - own).abs()).max(0.0) / blend;
            distance = distance.min(own) - overlap * overlap * blend * 0.25;
        }
        (distance, nearest.1)
    }

    pub fn bounds(&self) -> Bounds {
        let points = self.parts.iter().flat_map(|part| part.shape.outline());
        points.fold([f32::MAX, f32::MAX, f32::MIN, f32::MIN], |[l, t, r, b], ([x, y], radius)| {
            [l.min(x - radius), t.min(y - radius), r.max(x + radius), b.max(y + radius)]
        })
    }

    pub fn placed(&self, placement: &Placement) -> Self {
        let place = |at| placement.apply(at);
        let scale = placement.scale;
        let parts = self.parts.iter().map(|part| Part {
            shape: match part.shape {
                Shape::Limb { a, b, radii } => {
                    Shape::Limb { a: place(a), b: place(b), radii: radii.map(|radius| radius * scale) }
                }
                Shape::Ear { corners, radius } => {
                    Shape::Ear { corners: corners.map(place), radius: radius * scale }
                }
            },
            tone: part.tone,
        });
        let spots = self.spots.iter().map(|spot| Spot {
            at: place(spot.at),
            radius: spot.radius * scale,
            kind: spot.kind,
        });
        Self { parts: parts.collect(), spots: spots.collect() }
    }
}

impl Placement {
    fn apply(&self, [x, y]: Point) -> Point {
        let x = if self.mirrored { -x } else { x };
        let (sin, cos) = self.radians.sin_cos();
        [self.offset[0] + self.scale * (cos * x - sin * y), self.offset[1] + self.scale * (sin * x + cos * y)]
    }
}

impl Shape {
    pub fn distance(&self, at: Point) -> f32 {
        match self {
            Self::Limb { a, b, radii } => {
                let (share, away) = to_segment(at, *a, *b);
                away - (radii[0] + (radii[1] - radii[0]) * share)
            }
            Self::Ear { corners: [a, b, c], radius } => {
                let sides = [(*a, *b), (*b, *c), (*c, *a)];
                let away = sides.map(|(a, b)| to_segment(at, a, b).1).into_iter().fold(f32::MAX, f32::min);
                let left_of = |(a, b): (Point, Point)| {
                    (b[0] - a[0]) * (at[1] - a[1]) - (b[1] - a[1]) * (at[0] - a[0]) > 0.0
                };
                let [first, second, third] = sides.map(left_of);
                let is_inside = first == second && second == third;
                if is_inside { -away - radius } else { away - radius }
            }
        }
    }

    fn outline(&self) -> Vec<(Point, f32)> {
        match *self {
            Self::Limb { a, b, radii } => vec![(a, radii[0]), (b, radii[1])],
            Self::Ear { corners, radius } => corners.map(|corner| (corner, radius)).to_vec(),
        }
    }
}

/// Where along the segment the nearest point lies, 0..=1, and how far away it is.
fn to_segment(at: Point, a: Point, b: Point) -> (f32, f32) {
    let along = [b[0] - a[0], b[1] - a[1]];
    let from_a = [at[0] - a[0], at[1] - a[1]];
    let length_squared = (along[0] * along[0] + along[1] * along[1]).max(1e-9);
    let share = ((from_a[0] * along[0] + from_a[1] * along[1]) / length_squared).clamp(0.0, 1.0);
    let away = [from_a[0] - share * along[0], from_a[1] - share * along[1]];
    (share, away[0].hypot(away[1]))
}

struct Builder<'a> {
    rng: &'a mut ChaCha8Rng,
    species: Species,
    figure: Figure,
    girth: f32,
    legs: f32,
}

/// On the side that is turned away there is less light.
const FAR: f32 = 0.72;

impl Builder<'_> {
    fn stand(&mut self) {
        let feet = 0.15 + 0.6 * self.legs;
        let chest = [0.42, -0.03 + self.jitter(0.05)];
        for (hip, tone) in [(-0.36, FAR), (0.52, FAR), (-0.5, 1.0), (0.38, 1.0)] {
            let stride = self.jitter(0.16);
            let knee = [hip + stride * 0.6 - 0.03, 0.12 + (feet - 0.12) * 0.45];
            let foot = [hip + stride, feet];
            self.limb([hip, 0.08], knee, [0.15 * self.girth, 0.085], tone);
            self.limb(knee, foot, [0.085, 0.06], tone);
            self.limb(foot, [foot[0] + 0.08, feet + 0.01], [0.06, 0.055], tone);
        }
        self.tail([-0.66, -0.1]);
        self.limb([-0.45, -0.02], chest, [0.25 * self.girth, 0.28 * self.girth], 1.0);
        let head = [0.74 + self.jitter(0.08), -0.42 + self.jitter(0.14)];
        self.limb([0.5, -0.12], head, [0.2 * self.girth, 0.17], 1.0);
        self.head(head, 0.58);
    }

    fn sit(&mut self) {
        let lean = self.jitter(0.1);
        self.tail([-0.34, 0.7]);
        for side in [-1.0, 1.0] {
            let haunch = [side * 0.3 * self.girth, 0.56];
            self.limb(haunch, [side * 0.36, 0.74], [0.22, 0.14], 0.92);
            self.limb([side * 0.34, 0.82], [side * 0.42, 0.84], [0.08, 0.07], 0.95);
        }
        self.limb([lean, -0.15], [0.0, 0.46], [0.25 * self.girth, 0.38 * self.girth], 1.0);
        for side in [-1.0, 1.0] {
            let foot = [side * 0.13 + self.jitter(0.05), 0.84];
            self.limb([lean + side * 0.15, 0.1], foot, [0.12, 0.08], 1.06);
            self.limb(foot, [foot[0] + side * 0.02, 0.87], [0.085, 0.075], 1.06);
        }
        let head = [lean * 1.6 + self.jitter(0.06), -0.55 + self.jitter(0.05)];
        self.limb([lean, -0.15], head, [0.22, 0.2], 1.0);
        self.head(head, 0.68);
    }

    fn lie(&mut self) {
        self.tail([-0.74, 0.2]);
        self.limb([-0.5, 0.06], [0.42, 0.02], [0.28 * self.girth, 0.25 * self.girth], 1.0);
        self.limb([-0.46, 0.16], [-0.3, 0.22], [0.22, 0.16], 0.94);
        self.limb([-0.3, 0.34], [-0.08, 0.36], [0.08, 0.07], 0.98);
        for (up, tone) in [(0.0, FAR), (0.07, 1.0)] {
            let reach = 0.8 + self.jitter(0.15);
            self.limb([0.4, 0.18], [reach, 0.26 + up], [0.12, 0.075], tone);
        }
        let head = [0.6 + self.jitter(0.12), -0.24 + self.jitter(0.16)];
        self.limb([0.42, 0.0], head, [0.2, 0.18], 1.0);
        self.head(head, 0.6);
    }

    fn pose_for_portrait(&mut self) {
        let lean = self.jitter(0.15);
        self.limb([lean, 1.0], [lean * 0.5, 0.4], [0.56 * self.girth, 0.34 * self.girth], 0.95);
        self.limb([lean * 0.5, 0.4], [0.0, 0.0], [0.32, 0.3], 1.0);
        self.head([0.0, 0.0], 1.0);
    }

    /// Seen from the front or half from the side, tilted a little.
    fn head(&mut self, centre: Point, size: f32) {
        let size = size * self.rng.random_range(0.88..1.15);
        let look = self.jitter(0.12);
        let tilt = Placement { scale: size, radians: self.jitter(0.25), mirrored: false, offset: centre };
        let head = match self.species {
            Species::Cat => self.cat_head(look),
            Species::Dog => self.dog_head(look),
        };
        let head = head.placed(&tilt);
        self.figure.parts.extend(head.parts);
        self.figure.spots.extend(head.spots);
    }

    fn cat_head(&mut self, look: f32) -> Figure {
        let mut head = Figure::default();
        let spread = self.rng.random_range(0.4..0.52);
        let rise = self.rng.random_range(0.62..0.85);
        for side in [-1.0, 1.0] {
            head.ear([[side * 0.12, -0.3], [side * 0.42, -0.14], [side * spread, -rise]], 0.03, 0.9);
        }
        head.limb([-0.13, 0.0], [0.13, 0.0], [0.36, 0.36], 1.0);
        head.limb([look - 0.1, 0.17], [look + 0.1, 0.17], [0.17, 0.17], 1.1);
        head.face(look, 0.17, -0.05, 0.085, 0.1, 0.05);
        head
    }

    fn dog_head(&mut self, look: f32) -> Figure {
        let mut head = Figure::default();
        let muzzle = self.rng.random_range(0.3..0.52);
        if self.rng.random_bool(0.65) {
            let drop = self.rng.random_range(0.1..0.5);
            let wide = self.rng.random_range(0.46..0.62);
            for side in [-1.0, 1.0] {
                head.limb([side * 0.3, -0.24], [side * wide, drop], [0.11, 0.17], 0.78);
            }
        } else {
            let rise = self.rng.random_range(0.55..0.8);
            for side in [-1.0, 1.0] {
                head.ear([[side * 0.1, -0.28], [side * 0.36, -0.16], [side * 0.34, -rise]], 0.04, 0.85);
            }
        }
        head.limb([-0.08, -0.05], [0.08, -0.05], [0.34, 0.34], 1.0);
        head.limb([look, 0.1], [look * 1.5, muzzle], [0.25, 0.17], 1.08);
        head.face(look, 0.16, -0.1, 0.065, muzzle - 0.02, 0.085);
        head
    }

    /// A cat's is long and thin, a dog's shorter and often up.
    fn tail(&mut self, root: Point) {
        let (length, thickness) = match self.species {
            Species::Cat => (self.rng.random_range(0.6..0.9), 0.06),
            Species::Dog => (self.rng.random_range(0.25..0.65), 0.08),
        };
        const JOINTS: usize = 5;
        let mut heading: f32 = std::f32::consts::PI + self.rng.random_range(-0.4..0.9);
        let bend = self.jitter(0.5);
        let mut from = root;
        for joint in 0..JOINTS {
            let step = length / JOINTS as f32;
            let to = [from[0] + step * heading.cos(), from[1] + step * heading.sin()];
            let radius = |joint: usize| thickness * (1.0 - 0.09 * joint as f32);
            self.limb(from, to, [radius(joint), radius(joint + 1)], 0.9);
            heading += bend;
            from = to;
        }
    }

    fn limb(&mut self, a: Point, b: Point, radii: [f32; 2], tone: f32) {
        self.figure.limb(a, b, radii, tone);
    }

    fn jitter(&mut self, by: f32) -> f32 {
        self.rng.random_range(-by..=by)
    }
}

impl Figure {
    fn limb(&mut self, a: Point, b: Point, radii: [f32; 2], tone: f32) {
        self.parts.push(Part { shape: Shape::Limb { a, b, radii }, tone });
    }

    fn ear(&mut self, corners: [Point; 3], radius: f32, tone: f32) {
        self.parts.push(Part { shape: Shape::Ear { corners, radius }, tone });
    }

    /// Two eyes `apart` from the middle at `eyes_y`, the nose at `nose_y`, with their radii.
    fn face(&mut self, look: f32, apart: f32, eyes_y: f32, eye: f32, nose_y: f32, nose: f32) {
        for side in [-1.0, 1.0] {
            self.spots.push(Spot { at: [look + side * apart, eyes_y], radius: eye, kind: SpotKind::Eye });
        }
        self.spots.push(Spot { at: [look * 1.5, nose_y], radius: nose, kind: SpotKind::Nose });
    }
}
