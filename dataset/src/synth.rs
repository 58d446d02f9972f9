//! A drawn data set in the Pet layout, for trials and tests where the real one is not at hand:
//! cat- and dog-like figures with exact trimaps before cluttered backgrounds. It stands in for the
//! real data's format and roughly for its difficulty, not for its statistics.

mod figure;
mod scene;
mod texture;

use std::fs;
use std::io::{self, Cursor};
use std::path::Path;

use image::codecs::jpeg::JpegEncoder;
use image::{GrayImage, ImageFormat, RgbImage};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::DatasetError;
use crate::layout::{images_folder, masks_folder};
use figure::Species;
use scene::Drawing;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SynthOptions {
    /// Images in `annotations/trainval.txt`.
    pub train: usize,
    /// Images in `annotations/test.txt`.
    pub val: usize,
    pub seed: u64,
    /// The shortest and the longest side that an image may have, in pixels; at least 64.
    pub sides: [u32; 2],
}

impl Default for SynthOptions {
    fn default() -> Self {
        Self { train: 400, val: 100, seed: 44, sides: [128, 256] }
    }
}

/// Draws a data set into a directory that is empty or does not exist yet. The same options give
/// the same files.
///
/// # Errors
/// If the directory holds anything, cannot be written, or a split would be empty.
pub fn draw(root: &Path, options: &SynthOptions) -> Result<(), DatasetError> {
    for (split, images) in [("training", options.train), ("validation", options.val)] {
        if images == 0 {
            return Err(DatasetError::NothingToDraw { split });
        }
    }
    refuse_if_filled(root)?;
    for folder in [images_folder(root), masks_folder(root)] {
        fs::create_dir_all(&folder).map_err(DatasetError::write(&folder))?;
    }
    let pets: Vec<_> = (0..options.train + options.val).map(Pet::numbered).collect();
    (0..).zip(&pets).collect::<Vec<(u64, _)>>().par_iter().try_for_each(|&(index, pet)| {
        let mut rng = rng_of(options.seed, index);
        let size = random_size(&mut rng, options.sides);
        let drawing = scene::draw(&mut rng, size, pet.breed.species);
        write_pair(root, &pet.name, drawing, Encoding::random(&mut rng))
    })?;

    let (train, val) = pets.split_at(options.train);
    write_list(root, "trainval", train)?;
    write_list(root, "test", val)?;
    write_list(root, "list", &pets)?;
    let readme = root.join("README");
    fs::write(&readme, README).map_err(DatasetError::write(&readme))
}

const README: &str = "\
A drawn data set in the layout of Oxford-IIIT Pet, made by `musher data synth`.

images/NAME.jpg or .png       RGB
annotations/trimaps/NAME.png  1 figure, 2 background, 3 the band along the contour
annotations/trainval.txt      name, class, species (1 cat, 2 dog), breed; for training
annotations/test.txt          the same, for validation
annotations/list.txt          both
";

/// One image to draw.
struct Pet {
    name: String,
    breed: &'static Breed,
    class: usize,
}

struct Breed {
    name: &'static str,
    species: Species,
    /// Among its species, from 1.
    number: usize,
}

/// As in the real lists: cats with a capital, dogs without.
const BREEDS: [Breed; 8] = [
    breed("Tabby", Species::Cat, 1),
    breed("hound", Species::Dog, 1),
    breed("Shorthair", Species::Cat, 2),
    breed("shepherd", Species::Dog, 2),
    breed("Calico", Species::Cat, 3),
    breed("spaniel", Species::Dog, 3),
    breed("Smoke", Species::Cat, 4),
    breed("terrier", Species::Dog, 4),
];

const fn breed(name: &'static str, species: Species, number: usize) -> Breed {
    Breed { name, species, number }
}

impl Pet {
    /// Breeds take turns, so that each split has all of them.
    fn numbered(index: usize) -> Self {
        let class = index % BREEDS.len();
        let breed = &BREEDS[class];
        Self { name: format!("{}_{}", breed.name, index / BREEDS.len() + 1), breed, class: class + 1 }
    }
}

#[derive(Clone, Copy)]
enum Encoding {
    Jpeg { quality: u8 },
    Png,
}

impl Encoding {
    fn random(rng: &mut ChaCha8Rng) -> Self {
        let quality = rng.random_range(75..=95);
        if rng.random_bool(0.05) { Self::Png } else { Self::Jpeg { quality } }
    }
}

fn refuse_if_filled(root: &Path) -> Result<(), DatasetError> {
    match fs::read_dir(root) {
        Ok(mut entries) => match entries.next() {
            Some(_) => Err(DatasetError::NotEmpty { root: root.into() }),
            None => Ok(()),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(DatasetError::read(root)(error)),
    }
}

fn rng_of(seed: u64, index: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&index.to_le_bytes());
    key[16..21].copy_from_slice(b"synth");
    ChaCha8Rng::from_seed(key)
}

/// Mostly landscape, as photographs are.
fn random_size(rng: &mut ChaCha8Rng, sides: [u32; 2]) -> (u32, u32) {
    const SHORTEST: u32 = 64;
    let [low, high] = sides.map(|side| side.max(SHORTEST));
    let [low, high] = [low.min(high), low.max(high)];
    let long = rng.random_range(low + (high - low) / 2..=high);
    let short = ((f64::from(long) * rng.random_range(0.66..1.0)) as u32).max(low);
    if rng.random_bool(0.7) { (long, short) } else { (short, long) }
}

fn write_pair(root: &Path, name: &str, drawing: Drawing, encoding: Encoding) -> Result<(), DatasetError> {
    let (width, height) = drawing.picture.size();
    let picture =
        RgbImage::from_raw(width, height, drawing.picture.data).expect("a picture has width x height pixels");
    let trimap = GrayImage::from_raw(width, height, drawing.trimap).expect("a trimap has its picture's size");

    let mut bytes = Cursor::new(Vec::new());
    let (extension, encoded) = match encoding {
        Encoding::Jpeg { quality } => {
            let encoder = JpegEncoder::new_with_quality(&mut bytes, quality);
            ("jpg", picture.write_with_encoder(encoder))
        }
        Encoding::Png => ("png", picture.write_to(&mut bytes, ImageFormat::Png)),
    };
    encoded.expect("memory takes any image");
    let file = images_folder(root).join(format!("{name}.{extension}"));
    fs::write(&file, bytes.into_inner()).map_err(DatasetError::write(&file))?;

    let mut bytes = Cursor::new(Vec::new());
    trimap.write_to(&mut bytes, ImageFormat::Png).expect("memory takes any image");
    let file = masks_folder(root).join(format!("{name}.png"));
    fs::write(&file, bytes.into_inner()).map_err(DatasetError::write(&file))
}

fn write_list(root: &Path, list: &str, pets: &[Pet]) -> Result<(), DatasetError> {
    let file = root.join("annotations").join(format!("{list}.txt"));
    let mut text = String::from("#Image CLASS-ID SPECIES BREED-ID\n");
    for Pet { name, breed, class } in pets {
        let species = match breed.species {
            Species::Cat => 1,
            Species::Dog => 2,
        };
        text += &format!("{name} {class} {species} {}\n", breed.number);
    }
    fs::write(&file, text).map_err(DatasetError::write(&file))
}
