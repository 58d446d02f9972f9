//! Pictures for people: an image, its true mask and the predicted one side by side, a row a
//! sample. It does not choose the samples nor where the PNG goes.

use std::io::Cursor;

use image::{ImageFormat, Rgb, RgbImage, imageops};

use crate::resample::{Border, nearest};
use crate::{Affine, CLASSES, Mask};

/// One sample, for an image side of S.
#[derive(Clone, Debug)]
pub struct StripRow {
    /// [S, S, 3], RGB.
    pub image: Vec<u8>,
    /// [S/2, S/2], class indices.
    pub truth: Vec<u8>,
    /// [S/2, S/2], class indices.
    pub predicted: Vec<u8>,
}

/// A PNG with a row a sample under a line of titles; small images are shown enlarged.
///
/// # Panics
/// If a row's bytes do not fit `image_size`.
pub fn render(rows: &[StripRow], image_size: u32) -> Vec<u8> {
    let zoom = MIN_SIDE.div_ceil(image_size.max(1)).max(1);
    let side = image_size * zoom;
    let (columns, lines) = (TITLES.len() as u32, rows.len() as u32);
    let width = GUTTER + columns * (side + GUTTER);
    let mut canvas = RgbImage::from_pixel(width, TITLE_HEIGHT + lines * (side + GUTTER), PAPER);

    for (column, title) in (0..).zip(TITLES) {
        write(&mut canvas, title, GUTTER + column * (side + GUTTER), GUTTER);
    }
    for (line, row) in (0..).zip(rows) {
        let image = RgbImage::from_raw(image_size, image_size, row.image.clone())
            .expect("a row's image is [S, S, 3]");
        let tiles = [
            imageops::resize(&image, side, side, imageops::FilterType::Nearest),
            colour(&row.truth, image_size / 2, side),
            colour(&row.predicted, image_size / 2, side),
        ];
        for (column, tile) in (0..).zip(&tiles) {
            let x = GUTTER + column * (side + GUTTER);
            let y = TITLE_HEIGHT + line * (side + GUTTER);
            imageops::replace(&mut canvas, tile, i64::from(x), i64::from(y));
        }
    }
    png(&canvas)
}

/// Of each row the image, the truth and the prediction, each a PNG.
pub type Tiles = Vec<[Vec<u8>; TITLES.len()]>;

/// Takes a picture of [`render`] apart; `None` if it is none.
pub fn tiles(strip: &[u8]) -> Option<Tiles> {
    let strip = image::load_from_memory_with_format(strip, ImageFormat::Png).ok()?.into_rgb8();
    let columns = TITLES.len() as u32;
    let side = (strip.width().checked_sub(GUTTER)? / columns).checked_sub(GUTTER)?;
    let rows = strip.height().checked_sub(TITLE_HEIGHT)? / (side + GUTTER);
    let tile = |row: u32, column: u32| {
        let (x, y) = (GUTTER + column * (side + GUTTER), TITLE_HEIGHT + row * (side + GUTTER));
        png(&imageops::crop_imm(&strip, x, y, side, side).to_image())
    };
    Some((0..rows).map(|row| std::array::from_fn(|column| tile(row, column as u32))).collect())
}

/// A PNG of RGB pixels, row by row.
///
/// # Panics
/// If there are not width x height pixels.
pub fn encode(width: u32, height: u32, rgb: Vec<u8>) -> Vec<u8> {
    png(&RgbImage::from_raw(width, height, rgb).expect("there are as many bytes as pixels need"))
}

fn png(canvas: &RgbImage) -> Vec<u8> {
    let mut png = Cursor::new(Vec::new());
    canvas.write_to(&mut png, ImageFormat::Png).expect("memory takes any PNG");
    png.into_inner()
}

const TITLES: [&str; 3] = ["image", "truth", "prediction"];
const MIN_SIDE: u32 = 128;
const GUTTER: u32 = 6;
const TITLE_HEIGHT: u32 = 2 * GUTTER + GLYPH_HEIGHT * TEXT_ZOOM;
const PAPER: Rgb<u8> = Rgb([250, 250, 248]);
const INK: Rgb<u8> = Rgb([60, 60, 64]);

/// Foreground, background, boundary: orange, deep blue and white differ in lightness too, so they
/// are told apart with any colour vision and in grey.
pub const CLASS_COLOURS: [[u8; 3]; CLASSES] = [[230, 159, 0], [24, 52, 92], [245, 245, 240]];

/// What is no class of a trimap.
const UNKNOWN_COLOUR: [u8; 3] = [204, 51, 153];

/// Red, green and blue for a class.
pub fn class_colour(class: u8) -> [u8; 3] {
    *CLASS_COLOURS.get(usize::from(class)).unwrap_or(&UNKNOWN_COLOUR)
}

fn colour(classes: &[u8], mask_side: u32, side: u32) -> RgbImage {
    let mask = Mask::new(mask_side, mask_side, classes.to_vec());
    let mut scaled = vec![0; side as usize * side as usize];
    let map = Affine::stretch(mask_side, mask_side);
    nearest(&mask, &map, Border::Replicate, side, &mut scaled);
    RgbImage::from_fn(side, side, |x, y| Rgb(class_colour(scaled[(y * side + x) as usize])))
}

fn write(canvas: &mut RgbImage, text: &str, left: u32, top: u32) {
    for (at, letter) in (0..).zip(text.chars()) {
        for (y, bits) in (0..).zip(glyph(letter)) {
            for x in (0..GLYPH_WIDTH).filter(|x| bits >> (GLYPH_WIDTH - 1 - x) & 1 == 1) {
                let x = left + (at * (GLYPH_WIDTH + 1) + x) * TEXT_ZOOM;
                fill(canvas, x, top + y * TEXT_ZOOM);
            }
        }
    }
}

fn fill(canvas: &mut RgbImage, left: u32, top: u32) {
    for (x, y) in (0..TEXT_ZOOM).flat_map(|y| (0..TEXT_ZOOM).map(move |x| (x, y))) {
        if let Some(pixel) = canvas.get_pixel_mut_checked(left + x, top + y) {
            *pixel = INK;
        }
    }
}

const GLYPH_WIDTH: u32 = 5;
const GLYPH_HEIGHT: u32 = 9;
const TEXT_ZOOM: u32 = 2;

/// The letters of the titles, 5 x 9; the lowest two rows hold the descenders.
#[rustfmt::skip]
fn glyph(letter: char) -> [u8; GLYPH_HEIGHT as usize] {
    match letter {
        'a' => [0, 0, 0b01110, 0b00001, 0b01111, 0b10001, 0b01111, 0, 0],
        'c' => [0, 0, 0b01110, 0b10001, 0b10000, 0b10001, 0b01110, 0, 0],
        'd' => [0b00001, 0b00001, 0b01101, 0b10011, 0b10001, 0b10011, 0b01101, 0, 0],
        'e' => [0, 0, 0b01110, 0b10001, 0b11111, 0b10000, 0b01110, 0, 0],
        'g' => [0, 0, 0b01111, 0b10001, 0b10001, 0b10001, 0b01111, 0b00001, 0b01110],
        'h' => [0b10000, 0b10000, 0b10110, 0b11001, 0b10001, 0b10001, 0b10001, 0, 0],
        'i' => [0b00100, 0, 0b01100, 0b00100, 0b00100, 0b00100, 0b01110, 0, 0],
        'm' => [0, 0, 0b11010, 0b10101, 0b10101, 0b10101, 0b10101, 0, 0],
        'n' => [0, 0, 0b10110, 0b11001, 0b10001, 0b10001, 0b10001, 0, 0],
        'o' => [0, 0, 0b01110, 0b10001, 0b10001, 0b10001, 0b01110, 0, 0],
        'p' => [0, 0, 0b10110, 0b11001, 0b10001, 0b11001, 0b10110, 0b10000, 0b10000],
        'r' => [0, 0, 0b10110, 0b11001, 0b10000, 0b10000, 0b10000, 0, 0],
        't' => [0b01000, 0b01000, 0b11100, 0b01000, 0b01000, 0b01001, 0b00110, 0, 0],
        'u' => [0, 0, 0b10001, 0b10001, 0b10001, 0b10011, 0b01101, 0, 0],
        _ => [0; GLYPH_HEIGHT as usize],
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_letter_of_the_titles_has_a_glyph() {
        assert!(TITLES.concat().chars().all(|letter| glyph(letter) != [0; 9]));
    }

    #[test]
    fn a_row_shows_the_image_and_both_masks() {
        let row =
            StripRow { image: vec![7; 64 * 64 * 3], truth: vec![0; 32 * 32], predicted: vec![1; 32 * 32] };
        let png = image::load_from_memory(&render(&[row.clone(), row], 64)).unwrap().into_rgb8();
        assert_eq!(png.width(), 3 * 128 + 4 * GUTTER);
        let shown = [64, 200, 330].map(|x| png.get_pixel(x, png.height() - 50).0);
        assert_eq!(shown, [[7; 3], CLASS_COLOURS[0], CLASS_COLOURS[1]]);
    }

    #[test]
    fn a_strip_is_taken_apart() {
        let row =
            StripRow { image: vec![7; 64 * 64 * 3], truth: vec![0; 32 * 32], predicted: vec![1; 32 * 32] };
        let tiles = tiles(&render(&[row.clone(), row], 64)).unwrap();
        let colours = [[7; 3], CLASS_COLOURS[0], CLASS_COLOURS[1]];
        assert_eq!(tiles.len(), 2);
        for (tile, colour) in tiles.iter().flat_map(|row| row.iter().zip(colours)) {
            let tile = image::load_from_memory(tile).unwrap().into_rgb8();
            assert_eq!(tile.dimensions(), (128, 128));
            assert!(tile.pixels().all(|pixel| pixel.0 == colour));
        }
        assert_eq!(super::tiles(b"no picture"), None);
    }
}
