//! A picture: a background with clutter, a figure before it, and the figure's trimap. The clutter
//! is lit and textured like the figure, and the fur is often near the background's colour, so that
//! neither colour nor shading alone gives the figure away.

use std::ops::Range;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::figure::{Figure, Placement, Pose, Shape, Species, Spot, SpotKind};
use super::texture::{Colour, Noise, Point, Texture, fur_colour, mix, scene_colour, shade, step, vary};
use crate::Picture;

pub struct Drawing {
    pub picture: Picture,
    /// [H, W], 1 figure, 2 background, 3 the band along the contour.
    pub trimap: Vec<u8>,
}

pub fn draw(rng: &mut ChaCha8Rng, (width, height): (u32, u32), species: Species) -> Drawing {
    let size = [width as f32, height as f32];
    let backdrop = Backdrop::random(rng, size);
    let animal = Animal::random(rng, size, species, &backdrop);
    let exposure = Exposure::random(rng);

    let field = Field::of(width, height, |at| animal.distance(at));
    let picture = Picture::from_fn(width, height, |x, y| {
        let at = centre(x, y);
        let (distance, tone) = field.at(x, y);
        let colour = blend(
            (0.5 - distance).clamp(0.0, 1.0),
            || shade(backdrop.at(at), animal.shadow(at, size[1])),
            || animal.colour(at, tone, field.relief(x, y)),
        );
        exposure.develop(colour, at)
    });
    let trimap = trimap(&field, rng.random_range(2..=3));
    Drawing { picture, trimap }
}

/// Asks only for the colours that show.
fn blend(cover: f32, under: impl FnOnce() -> Colour, over: impl FnOnce() -> Colour) -> Colour {
    if cover <= 0.0 {
        under()
    } else if cover >= 1.0 {
        over()
    } else {
        mix(under(), over(), cover)
    }
}

fn centre(x: u32, y: u32) -> Point {
    [x as f32 + 0.5, y as f32 + 0.5]
}

/// Marks each pixel nearer than `radius` to the other side of the contour.
fn trimap(field: &Field, radius: i64) -> Vec<u8> {
    const FIGURE: u8 = 1;
    const BACKGROUND: u8 = 2;
    const BOUNDARY: u8 = 3;
    let (width, height) = (i64::from(field.width), i64::from(field.height));
    let is_figure = |x: i64, y: i64| field.at(x as u32, y as u32).0 < 0.0;
    let within = |x: i64, y: i64| (0..width).contains(&x) && (0..height).contains(&y);
    let disc: Vec<_> = (-radius..=radius)
        .flat_map(|dy| (-radius..=radius).map(move |dx| (dx, dy)))
        .filter(|(dx, dy)| dx * dx + dy * dy <= radius * radius)
        .collect();

    let mut trimap: Vec<u8> = (0..height)
        .flat_map(|y| (0..width).map(move |x| (x, y)))
        .map(|(x, y)| if is_figure(x, y) { FIGURE } else { BACKGROUND })
        .collect();
    for (x, y) in (0..height).flat_map(|y| (0..width).map(move |x| (x, y))) {
        let here = is_figure(x, y);
        let at_contour = [(1, 0), (-1, 0), (0, 1), (0, -1)]
            .iter()
            .any(|(dx, dy)| within(x + dx, y + dy) && is_figure(x + dx, y + dy) != here);
        if at_contour {
            for (x, y) in disc.iter().map(|(dx, dy)| (x + dx, y + dy)).filter(|&(x, y)| within(x, y)) {
                trimap[(y * width + x) as usize] = BOUNDARY;
            }
        }
    }
    trimap
}

/// The figure's signed distance and tone at each pixel's centre.
struct Field {
    width: u32,
    height: u32,
    values: Vec<(f32, f32)>,
}

impl Field {
    fn of(width: u32, height: u32, value: impl Fn(Point) -> (f32, f32)) -> Self {
        let values = (0..height).flat_map(|y| (0..width).map(move |x| centre(x, y))).map(value);
        Self { width, height, values: values.collect() }
    }

    fn at(&self, x: u32, y: u32) -> (f32, f32) {
        self.values[(y * self.width + x) as usize]
    }

    /// How deep inside the pixel is, and the direction outwards.
    fn relief(&self, x: u32, y: u32) -> (f32, Point) {
        let distance = |x: u32, y: u32| self.at(x.min(self.width - 1), y.min(self.height - 1)).0;
        let outwards = [
            distance(x + 1, y) - distance(x.saturating_sub(1), y),
            distance(x, y + 1) - distance(x, y.saturating_sub(1)),
        ];
        let length = outwards[0].hypot(outwards[1]).max(1e-3);
        (-self.at(x, y).0, outwards.map(|component| component / length))
    }
}

/// The figure in the picture, with its fur.
struct Animal {
    figure: Figure,
    /// Pixels to the figure's unit.
    scale: f32,
    fur: Texture,
    /// The contour's roughness, in pixels.
    shag: f32,
    noise: Noise,
    eye_colour: Colour,
    light: Light,
    /// Left, top, right, bottom, in pixels.
    bounds: [f32; 4],
}

impl Animal {
    fn random(rng: &mut ChaCha8Rng, size: Point, species: Species, backdrop: &Backdrop) -> Self {
        let pose = match rng.random_range(0..10) {
            0..3 => Pose::Standing,
            3..5 => Pose::Sitting,
            5..7 => Pose::Lying,
            _ => Pose::Portrait,
        };
        let figure = Figure::random(rng, species, pose);
        let placement = place(rng, &figure, size, pose);
        let figure = figure.placed(&placement);
        let colour = if rng.random_bool(0.4) { vary(rng, backdrop.colour(), 0.07) } else { fur_colour(rng) };
        Self {
            bounds: figure.bounds(),
            figure,
            scale: placement.scale,
            fur: Texture::fur(rng, colour, placement.scale),
            shag: placement.scale * rng.random_range(0.005..0.03),
            noise: Noise::random(rng),
            eye_colour: [rng.random_range(0.3..0.8), rng.random_range(0.3..0.7), rng.random_range(0.1..0.5)],
            light: backdrop.light,
        }
    }

    fn distance(&self, at: Point) -> (f32, f32) {
        let [left, top, right, bottom] = self.bounds;
        let outside = (left - at[0]).max(at[0] - right).max(top - at[1]).max(at[1] - bottom);
        // The contour is at most its shag away; so far out only the sign matters.
        if outside > 2.0 + 2.0 * self.shag {
            return (outside, 1.0);
        }
        let (distance, tone) = self.figure.distance(at, 0.1 * self.scale);
        let tuft = self.noise.fractal(at.map(|axis| axis / (0.035 * self.scale).max(1.5))) - 0.5;
        (distance + 2.0 * self.shag * tuft, tone)
    }

    fn colour(&self, at: Point, tone: f32, (depth, outwards): (f32, Point)) -> Colour {
        let lit = self.light.on(depth / (0.22 * self.scale), outwards);
        let fur = shade(self.fur.at(at), tone * lit);
        self.figure.spots.iter().fold(fur, |colour, spot| self.paint_spot(spot, at, colour))
    }

    fn paint_spot(&self, spot: &Spot, at: Point, colour: Colour) -> Colour {
        let away = (at[0] - spot.at[0]).hypot(at[1] - spot.at[1]);
        let cover = step(0.5, -0.5, away - spot.radius);
        if cover == 0.0 {
            return colour;
        }
        let dark = [0.07, 0.06, 0.06];
        let own = match spot.kind {
            SpotKind::Nose => dark,
            SpotKind::Eye => {
                let glint =
                    (at[0] - spot.at[0] + 0.3 * spot.radius).hypot(at[1] - spot.at[1] + 0.3 * spot.radius);
                let iris = mix(dark, self.eye_colour, step(0.4, 0.6, away / spot.radius));
                mix(iris, [1.0; 3], step(0.35, 0.2, glint / spot.radius))
            }
        };
        mix(colour, own, cover)
    }

    /// The factor by which the figure darkens the ground beneath it.
    fn shadow(&self, at: Point, picture_height: f32) -> f32 {
        let [left, _, right, bottom] = self.bounds;
        if bottom > picture_height {
            return 1.0;
        }
        let x = (at[0] - (left + right) / 2.0) / ((right - left) / 2.0).max(1.0);
        let y = (at[1] - bottom) / (0.12 * self.scale);
        1.0 - 0.45 * step(1.0, 0.3, x.hypot(y))
    }
}

/// Somewhere in the picture, at times cut by its edge.
fn place(rng: &mut ChaCha8Rng, figure: &Figure, size: Point, pose: Pose) -> Placement {
    let mut placement = Placement {
        scale: 1.0,
        radians: rng.random_range(-0.12..0.12),
        mirrored: rng.random_bool(0.5),
        offset: [0.0, 0.0],
    };
    let [left, top, right, bottom] = figure.placed(&placement).bounds();
    let own = [right - left, bottom - top];
    let fitting = (size[0] / own[0]).min(size[1] / own[1]);
    let (share, overhang) = match pose {
        Pose::Portrait => (0.9..1.3, 0.1),
        _ => (0.7..1.15, 0.08),
    };
    placement.scale = fitting * rng.random_range(share);
    let own = own.map(|side| side * placement.scale);
    let free = |axis: usize| within(-overhang * own[axis], size[axis] - (1.0 - overhang) * own[axis]);
    let x = rng.random_range(free(0));
    let y = match pose {
        Pose::Portrait => size[1] - own[1] * rng.random_range(0.7..0.95),
        _ => rng.random_range(free(1)),
    };
    placement.offset = [x - left * placement.scale, y - top * placement.scale];
    placement
}

fn within(a: f32, b: f32) -> Range<f32> {
    let low = a.min(b);
    low..a.max(b).max(low + 1.0)
}

#[derive(Clone, Copy)]
struct Light {
    /// Towards the light.
    direction: Point,
    /// Of the bright side over the dark one.
    contrast: f32,
}

impl Light {
    fn random(rng: &mut ChaCha8Rng) -> Self {
        let (sin, cos) = rng.random_range(-2.6f32..-0.5).sin_cos();
        Self { direction: [cos, sin], contrast: rng.random_range(0.15..0.45) }
    }

    /// The brightness of a rounded body at `depth` (1 and more: its flat middle).
    fn on(&self, depth: f32, outwards: Point) -> f32 {
        let slope = 1.0 - depth.clamp(0.0, 1.0);
        let facing = outwards[0] * self.direction[0] + outwards[1] * self.direction[1];
        1.0 + self.contrast * slope * slope * (facing - 0.35)
    }
}

/// A wall, a ground, and things on them.
struct Backdrop {
    wall: Texture,
    ground: Texture,
    wall_colour: Colour,
    ground_colour: Colour,
    /// The ground's upper edge at the left and at the right, in pixels.
    horizon: [f32; 2],
    /// The brightness from one end of the picture to the other.
    falloff: Point,
    size: Point,
    clutter: Vec<Thing>,
    light: Light,
}

struct Thing {
    shapes: Vec<Shape>,
    texture: Texture,
    /// Its thickness, in pixels.
    radius: f32,
}

impl Backdrop {
    fn random(rng: &mut ChaCha8Rng, size: Point) -> Self {
        let extent = size[0].max(size[1]);
        let (wall_colour, ground_colour) = (scene_colour(rng), scene_colour(rng));
        let level = size[1] * rng.random_range(0.25..1.1);
        let slant = size[1] * rng.random_range(-0.08..0.08);
        let things = rng.random_range(2..10);
        Self {
            wall: Texture::scenery(rng, wall_colour, extent),
            ground: Texture::scenery(rng, ground_colour, extent),
            wall_colour,
            ground_colour,
            horizon: [level - slant, level + slant],
            falloff: [rng.random_range(-0.35..0.35), rng.random_range(-0.35..0.35)],
            size,
            clutter: (0..things).map(|_| Thing::random(rng, size)).collect(),
            light: Light::random(rng),
        }
    }

    /// That of the larger part.
    fn colour(&self) -> Colour {
        if self.horizon[0] > self.size[1] / 2.0 { self.wall_colour } else { self.ground_colour }
    }

    fn at(&self, at: Point) -> Colour {
        let [u, v] = [at[0] / self.size[0], at[1] / self.size[1]];
        let edge = self.horizon[0] + (self.horizon[1] - self.horizon[0]) * u;
        let behind = blend(step(-1.5, 1.5, at[1] - edge), || self.wall.at(at), || self.ground.at(at));
        let falloff = 1.0 + self.falloff[0] * (u - 0.5) + self.falloff[1] * (v - 0.5);
        let colour = self.clutter.iter().fold(behind, |colour, thing| thing.over(colour, at, self.light));
        shade(colour, falloff)
    }
}

impl Thing {
    /// A rod, a cushion, a wedge, or a few of them: shapes as the figure has, but in no order.
    fn random(rng: &mut ChaCha8Rng, size: Point) -> Self {
        let extent = size[0].min(size[1]);
        let radius = extent * rng.random_range(0.02f32..0.16);
        let around = [rng.random_range(0.0..size[0]), rng.random_range(0.0..size[1])];
        let mut near = |by: f32| around.map(|axis| axis + extent * rng.random_range(-by..by));
        let shapes: Vec<_> = [near(0.1), near(0.25), near(0.25)]
            .windows(2)
            .map(|ends| Shape::Limb { a: ends[0], b: ends[1], radii: [radius, radius * 0.8] })
            .chain([Shape::Ear { corners: [near(0.2), near(0.2), near(0.2)], radius: radius * 0.2 }])
            .collect();
        let colour = scene_colour(rng);
        let texture = if rng.random_bool(0.5) {
            Texture::fur(rng, colour, extent)
        } else {
            Texture::scenery(rng, colour, extent)
        };
        let shapes = match rng.random_range(0..4) {
            0 => shapes[..1].to_vec(),
            1 => shapes[..2].to_vec(),
            2 => shapes[2..].to_vec(),
            _ => shapes,
        };
        Self { shapes, texture, radius }
    }

    fn over(&self, behind: Colour, at: Point, light: Light) -> Colour {
        let distance =
            |at: Point| self.shapes.iter().map(|shape| shape.distance(at)).fold(f32::MAX, f32::min);
        let here = distance(at);
        let cover = (0.5 - here).clamp(0.0, 1.0);
        if cover == 0.0 {
            return behind;
        }
        let outwards = [distance([at[0] + 0.5, at[1]]) - here, distance([at[0], at[1] + 0.5]) - here];
        let length = outwards[0].hypot(outwards[1]).max(1e-3);
        let lit = light.on(-here / self.radius, outwards.map(|component| component / length));
        mix(behind, shade(self.texture.at(at), lit), cover)
    }
}

/// The camera: brightness, tint, and the sensor's noise.
struct Exposure {
    gain: Colour,
    lift: f32,
    grain: f32,
    noise: [Noise; 3],
}

impl Exposure {
    fn random(rng: &mut ChaCha8Rng) -> Self {
        let gain = rng.random_range(0.75..1.2);
        Self {
            gain: vary(rng, [0.95; 3], 0.05).map(|tint| tint * gain),
            lift: rng.random_range(0.0..0.08),
            grain: rng.random_range(0.01..0.06),
            noise: std::array::from_fn(|_| Noise::random(rng)),
        }
    }

    fn develop(&self, colour: Colour, at: Point) -> [u8; 3] {
        std::array::from_fn(|channel| {
            let grain = self.grain * (self.noise[channel].smooth(at) - 0.5);
            let value = self.lift + colour[channel] * self.gain[channel] + grain;
            (value.clamp(0.0, 1.0) * 255.0).round() as u8
        })
    }
}
