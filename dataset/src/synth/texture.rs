//! Colours and textures as functions of the place: value noise and what is made of it.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// Linear enough for drawings: RGB, 0..=1.
pub type Colour = [f32; 3];

/// A place in pixels, y down.
pub type Point = [f32; 2];

pub fn mix(a: Colour, b: Colour, share_of_b: f32) -> Colour {
    std::array::from_fn(|channel| a[channel] + (b[channel] - a[channel]) * share_of_b)
}

pub fn shade(colour: Colour, factor: f32) -> Colour {
    colour.map(|channel| channel * factor)
}

/// A colour that fur may have.
pub fn fur_colour(rng: &mut ChaCha8Rng) -> Colour {
    const FURS: [Colour; 9] = [
        [0.13, 0.12, 0.12],
        [0.36, 0.36, 0.38],
        [0.58, 0.58, 0.60],
        [0.88, 0.86, 0.82],
        [0.84, 0.73, 0.56],
        [0.76, 0.48, 0.24],
        [0.47, 0.30, 0.18],
        [0.28, 0.19, 0.14],
        [0.66, 0.54, 0.40],
    ];
    let colour = FURS[rng.random_range(0..FURS.len())];
    vary(rng, colour, 0.08)
}

/// A colour that a room, a garden or the things in it may have; often one of fur, too.
pub fn scene_colour(rng: &mut ChaCha8Rng) -> Colour {
    const SCENES: [Colour; 8] = [
        [0.34, 0.46, 0.22],
        [0.52, 0.60, 0.34],
        [0.44, 0.56, 0.70],
        [0.70, 0.24, 0.22],
        [0.80, 0.78, 0.74],
        [0.22, 0.26, 0.40],
        [0.60, 0.50, 0.62],
        [0.86, 0.70, 0.34],
    ];
    if rng.random_bool(0.5) {
        return fur_colour(rng);
    }
    let colour = SCENES[rng.random_range(0..SCENES.len())];
    vary(rng, colour, 0.12)
}

/// The colour, moved by up to `by` in each channel.
pub fn vary(rng: &mut ChaCha8Rng, colour: Colour, by: f32) -> Colour {
    colour.map(|channel| (channel + rng.random_range(-by..=by)).clamp(0.0, 1.0))
}

/// A pattern in two colours.
#[derive(Clone, Copy, Debug)]
pub struct Texture {
    colours: [Colour; 2],
    pattern: Pattern,
    noise: Noise,
    /// Pixels a period.
    scale: f32,
    /// Unit vector across stripes and strands.
    across: Point,
    /// Of the fine grain, in brightness.
    grain: f32,
}

#[derive(Clone, Copy, Debug)]
enum Pattern {
    Plain,
    Clouds,
    Patches,
    Stripes,
    Strands,
    Checks,
}

impl Texture {
    /// Fur around that colour: plain, tabby, patched or streaky. `scale` is the figure's size.
    pub fn fur(rng: &mut ChaCha8Rng, colour: Colour, scale: f32) -> Self {
        let (pattern, second, period) = match rng.random_range(0..10) {
            0..3 => (Pattern::Strands, vary(rng, colour, 0.1), 0.05),
            3..6 => (Pattern::Stripes, shade(colour, rng.random_range(0.45..0.75)), 0.14),
            6..8 => (Pattern::Patches, fur_colour(rng), 0.35),
            _ => (Pattern::Clouds, shade(colour, rng.random_range(0.7..1.2)), 0.25),
        };
        Self {
            colours: [colour, second],
            pattern,
            noise: Noise::random(rng),
            scale: scale * period * rng.random_range(0.8..1.3),
            across: random_direction(rng),
            grain: rng.random_range(0.1..0.3),
        }
    }

    /// Anything else around that colour; `scale` is the picture's size.
    pub fn scenery(rng: &mut ChaCha8Rng, colour: Colour, scale: f32) -> Self {
        let (pattern, contrast): (_, f32) = match rng.random_range(0..12) {
            0..2 => (Pattern::Plain, 0.0),
            2..5 => (Pattern::Clouds, 0.5),
            5..7 => (Pattern::Patches, 0.4),
            7..9 => (Pattern::Stripes, 0.35),
            9..11 => (Pattern::Strands, 0.5),
            _ => (Pattern::Checks, 0.4),
        };
        Self {
            colours: [colour, shade(vary(rng, colour, 0.08), 1.0 + rng.random_range(-contrast..=contrast))],
            pattern,
            noise: Noise::random(rng),
            scale: scale * rng.random_range(0.04..0.25),
            across: random_direction(rng),
            grain: rng.random_range(0.03..0.3),
        }
    }

    pub fn at(&self, [x, y]: Point) -> Colour {
        let (u, v) = (
            (x * self.across[0] + y * self.across[1]) / self.scale,
            (y * self.across[0] - x * self.across[1]) / self.scale,
        );
        let share = match self.pattern {
            Pattern::Plain => 0.0,
            Pattern::Clouds => self.noise.fractal([u, v]),
            Pattern::Patches => step(0.46, 0.54, self.noise.fractal([u * 0.7, v * 0.7])),
            Pattern::Stripes => {
                let bent = u + 1.6 * self.noise.smooth([u * 0.35, v * 0.35]);
                step(0.35, 0.65, 0.5 + 0.5 * (bent * std::f32::consts::TAU).sin())
            }
            Pattern::Strands => self.noise.smooth([u * 3.0, v * 0.5]),
            Pattern::Checks => f32::from((u.floor() + v.floor()).rem_euclid(2.0) >= 1.0),
        };
        let grain = 1.0 + self.grain * (self.noise.smooth([u * 0.3 + x * 0.5, v * 0.3 + y * 0.5]) - 0.5);
        shade(mix(self.colours[0], self.colours[1], share), grain)
    }
}

/// Value noise: random values on the integer lattice, smoothly joined.
#[derive(Clone, Copy, Debug)]
pub struct Noise {
    salt: u32,
}

impl Noise {
    pub fn random(rng: &mut ChaCha8Rng) -> Self {
        Self { salt: rng.random() }
    }

    /// 0..=1, one bump a unit.
    pub fn smooth(&self, [x, y]: Point) -> f32 {
        let (left, top) = (x.floor(), y.floor());
        let ease = |t: f32| t * t * (3.0 - 2.0 * t);
        let (fx, fy) = (ease(x - left), ease(y - top));
        let (left, top) = (left as i32, top as i32);
        let row = |y: i32| {
            let (a, b) = (self.lattice(left, y), self.lattice(left.wrapping_add(1), y));
            a + (b - a) * fx
        };
        let (upper, lower) = (row(top), row(top.wrapping_add(1)));
        upper + (lower - upper) * fy
    }

    /// 0..=1, three octaves.
    pub fn fractal(&self, [x, y]: Point) -> f32 {
        let octave = |factor: f32| self.smooth([x * factor, y * factor]) / factor;
        (octave(1.0) + octave(2.0) + octave(4.0)) / 1.75
    }

    fn lattice(&self, x: i32, y: i32) -> f32 {
        let mut bits =
            self.salt ^ (x as u32).wrapping_mul(0x9E37_79B1) ^ (y as u32).wrapping_mul(0x85EB_CA77);
        bits = (bits ^ (bits >> 15)).wrapping_mul(0x2C1B_3C6D);
        bits = (bits ^ (bits >> 12)).wrapping_mul(0x297A_2D39);
        (bits ^ (bits >> 15)) as f32 / u32::MAX as f32
    }
}

/// 0 below `low`, 1 above `high`, straight between.
pub fn step(low: f32, high: f32, value: f32) -> f32 {
    ((value - low) / (high - low)).clamp(0.0, 1.0)
}

fn random_direction(rng: &mut ChaCha8Rng) -> Point {
    let (sin, cos) = rng.random_range(0.0..std::f32::consts::TAU).sin_cos();
    [cos, sin]
}
