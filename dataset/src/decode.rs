//! Files to rasters, with the real data's defects: the content decides the format, not the file's
//! name; a damaged JPEG gives what can be decoded of it.
//!
//! An EXIF orientation is deliberately not applied: the masks were drawn on the pixels as stored.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;

use image::ImageFormat;
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

use crate::sample::{PairBytes, Sample, read_file};
use crate::{CLASSES, DataWarning, DatasetError, Mask, Pair, Picture};

/// Reads a sample's image and mask.
///
/// # Errors
/// If one of the two cannot be decoded, or their sizes differ.
pub fn decode_pair(sample: &Sample, warn: &mut dyn FnMut(DataWarning)) -> Result<Pair, DatasetError> {
    decode_bytes(sample, &sample.read(warn)?, warn)
}

/// As [`decode_pair`], of bytes that were read before.
pub(crate) fn decode_bytes(
    sample: &Sample,
    bytes: &PairBytes,
    warn: &mut dyn FnMut(DataWarning),
) -> Result<Pair, DatasetError> {
    let picture = picture_of(&bytes.image, &sample.image, warn)?;
    let mask = mask_of(&bytes.mask, &sample.mask, warn)?;
    if picture.size() != mask.size() {
        return Err(DatasetError::SizeMismatch {
            mask: sample.mask.clone(),
            mask_width: mask.width,
            mask_height: mask.height,
            width: picture.width,
            height: picture.height,
        });
    }
    Ok(Pair { picture, mask })
}

/// Reads an image of any supported format as RGB; alpha is dropped, of an animation the first
/// frame is taken.
///
/// # Errors
/// If the file cannot be read, or nothing of it can be decoded.
pub fn decode_picture(file: &Path, warn: &mut dyn FnMut(DataWarning)) -> Result<Picture, DatasetError> {
    picture_of(&read_file(file)?, file, warn)
}

/// `file` is its name, for messages.
fn picture_of(bytes: &[u8], file: &Path, warn: &mut dyn FnMut(DataWarning)) -> Result<Picture, DatasetError> {
    let mut warn = |problem: String| {
        warn(DataWarning { file: file.to_owned(), problem });
    };
    let format = image::guess_format(bytes)
        .map_err(|_| DatasetError::undecodable(file, "it is no image of a known format"))?;
    if ImageFormat::from_path(file).is_ok_and(|named| named != format) {
        let name = format.extensions_str()[0].to_uppercase();
        warn(format!("is a {name} file by its content, decoded as that"));
    }
    let decoded = match format {
        ImageFormat::Jpeg => decode_jpeg(bytes, &mut warn),
        _ => decode_other(bytes, format),
    };
    decoded.map_err(|reason| DatasetError::undecodable(file, reason))
}

/// Whether a file begins like an image of a supported format; its name does not matter.
pub fn is_picture(file: &Path) -> bool {
    let mut start = Vec::new();
    let read = File::open(file).and_then(|file| file.take(LONGEST_MAGIC).read_to_end(&mut start));
    read.is_ok() && image::guess_format(&start).is_ok_and(|format| format.reading_enabled())
}

/// Whether a file is named like an image of a supported format; what is in it does not matter.
pub fn is_named_as_picture(file: &Path) -> bool {
    ImageFormat::from_path(file).is_ok_and(|format| format.reading_enabled())
}

/// More bytes than any format needs to be known.
const LONGEST_MAGIC: u64 = 64;

/// Reads a trimap (values 1, 2, 3: gray or palette PNG) as classes 0, 1, 2.
///
/// # Errors
/// If the file cannot be decoded, or a value is no trimap's.
pub fn decode_mask(file: &Path, warn: &mut dyn FnMut(DataWarning)) -> Result<Mask, DatasetError> {
    mask_of(&read_file(file)?, file, warn)
}

/// `file` is its name, for messages.
fn mask_of(bytes: &[u8], file: &Path, warn: &mut dyn FnMut(DataWarning)) -> Result<Mask, DatasetError> {
    let mut mask = decode_trimap(bytes).map_err(|reason| DatasetError::undecodable(file, reason))?;

    // One look at each pixel, without a branch, so that many are looked at in one instruction.
    let (mut largest, mut has_foreground, mut has_boundary) = (0, false, false);
    for value in &mut mask.data {
        *value = value.wrapping_sub(1);
        largest = largest.max(*value);
        has_foreground |= *value == 0;
        has_boundary |= *value == 2;
    }
    if usize::from(largest) >= CLASSES {
        let at = mask.data.iter().position(|&class| usize::from(class) >= CLASSES);
        let at = at.expect("the largest is among them");
        return Err(DatasetError::MaskValue {
            file: file.to_owned(),
            value: mask.data[at].wrapping_add(1),
            x: at as u32 % mask.width,
            y: at as u32 / mask.width,
        });
    }
    let problem = match (has_foreground, has_boundary) {
        (false, false) => Some("is all background, used as it is"),
        (false, true) => Some("has no foreground, only boundary, used as it is"),
        (true, _) => None,
    };
    if let Some(problem) = problem {
        warn(DataWarning { file: file.to_owned(), problem: problem.to_owned() });
    }
    Ok(mask)
}

/// Larger sides are refused before anything of that size is allocated.
const MAX_SIDE: u32 = 16_384;

/// Decodes strictly first: its error is the warning if the lenient decoder then gets through.
fn decode_jpeg(bytes: &[u8], warn: &mut dyn FnMut(String)) -> Result<Picture, String> {
    let picture = match run_jpeg_decoder(bytes, Strictness::Strict) {
        Ok(picture) => picture,
        Err(defect) => {
            let picture = run_jpeg_decoder(bytes, Strictness::Lenient)?;
            warn(format!("is a damaged JPEG, decoded as far as possible: {defect}"));
            return Ok(picture);
        }
    };
    match jpeg_tail(bytes) {
        JpegTail::Clean => {}
        JpegTail::NoEnd => warn("is a JPEG without an end marker, decoded without it".to_owned()),
        JpegTail::Trailing(n) => warn(format!("has {n} bytes after the JPEG's end, ignored")),
    }
    Ok(picture)
}

#[derive(Clone, Copy, PartialEq)]
enum Strictness {
    Strict,
    Lenient,
}

fn run_jpeg_decoder(bytes: &[u8], strictness: Strictness) -> Result<Picture, String> {
    let options = DecoderOptions::default()
        .set_strict_mode(strictness == Strictness::Strict)
        .set_max_width(MAX_SIDE as usize)
        .set_max_height(MAX_SIDE as usize)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    let data = decoder.decode().map_err(|error| one_line(&error))?;
    let info = decoder.info().ok_or("it has no header")?;
    let (width, height) = (u32::from(info.width), u32::from(info.height));
    if data.is_empty() || data.len() != width as usize * height as usize * 3 {
        return Err(format!("it gave {} bytes for {width}x{height} pixels", data.len()));
    }
    Ok(Picture::new(width, height, data))
}

fn one_line(error: &impl ToString) -> String {
    let text = error.to_string();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[derive(Debug, PartialEq)]
enum JpegTail {
    Clean,
    NoEnd,
    Trailing(usize),
}

/// Walks the markers up to the end-of-image marker (ITU T.81, annex B) to see what follows it.
/// A search for the last `FF D9` would be fooled by thumbnails and by the trailing bytes.
fn jpeg_tail(bytes: &[u8]) -> JpegTail {
    let mut at = 2; // behind the start-of-image marker
    loop {
        let Some(marker) = bytes.get(at..at + 2) else {
            return JpegTail::NoEnd;
        };
        match (marker[0], marker[1]) {
            (0xFF, 0xD9) => {
                return match bytes.len() - (at + 2) {
                    0 => JpegTail::Clean,
                    trailing => JpegTail::Trailing(trailing),
                };
            }
            // A fill byte, a stuffed zero, and restart markers stand alone, as do entropy-coded bytes.
            (0xFF, 0xFF) => at += 1,
            (0xFF, 0x00 | 0x01 | 0xD0..=0xD8) => at += 2,
            (0xFF, _) => {
                let Some(length) = bytes.get(at + 2..at + 4) else {
                    return JpegTail::NoEnd;
                };
                at += 2 + usize::from(u16::from_be_bytes([length[0], length[1]]));
            }
            _ => at += 1,
        }
    }
}

fn decode_other(bytes: &[u8], format: ImageFormat) -> Result<Picture, String> {
    let mut limits = image::Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    let mut reader = image::ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(limits);
    let rgb = reader.decode().map_err(|error| one_line(&error))?.into_rgb8();
    let (width, height) = rgb.dimensions();
    if width == 0 || height == 0 {
        return Err("it has no pixels".to_owned());
    }
    Ok(Picture::new(width, height, rgb.into_raw()))
}

/// The stored samples as they are: a palette's indices and a low bit depth's numbers are the
/// values, which an image library would turn into colours.
fn decode_trimap(bytes: &[u8]) -> Result<Mask, String> {
    let mut decoder = png::Decoder::new(Cursor::new(bytes));
    decoder.set_transformations(png::Transformations::IDENTITY);
    let mut reader = decoder.read_info().map_err(|error| one_line(&error))?;
    let info = reader.info();
    let (width, height) = info.size();
    let bits = info.bit_depth as usize;
    let is_single = matches!(info.color_type, png::ColorType::Grayscale | png::ColorType::Indexed);
    if !is_single || bits > 8 {
        return Err(format!(
            "a trimap is a gray or palette PNG of at most 8 bits, not {:?} of {bits}",
            info.color_type
        ));
    }
    if width.max(height) > MAX_SIDE {
        return Err(format!("{width}x{height} is larger than {MAX_SIDE} a side"));
    }
    let size = reader.output_buffer_size().ok_or("it is too large")?;
    let mut packed = vec![0; size];
    let frame = reader.next_frame(&mut packed).map_err(|error| one_line(&error))?;
    let data = if bits == 8 {
        packed
    } else {
        packed.chunks_exact(frame.line_size).flat_map(|row| unpack(row, bits).take(width as usize)).collect()
    };
    Ok(Mask::new(width, height, data))
}

/// Samples of 1, 2 or 4 bits, the leftmost in the high bits.
fn unpack(row: &[u8], bits: usize) -> impl Iterator<Item = u8> {
    let low_bits = (1u8 << bits) - 1;
    row.iter().flat_map(move |byte| (0..8 / bits).rev().map(move |at| (byte >> (at * bits)) & low_bits))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;

    #[test]
    fn unpacks_low_bit_depths() {
        assert_eq!(unpack(&[0b01_10_11_00], 2).collect::<Vec<_>>(), [1, 2, 3, 0]);
        assert_eq!(unpack(&[0x12], 4).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn tail_is_seen_behind_thumbnails_and_stuffing() {
        let with_thumbnail = [
            0xFF, 0xD8, 0xFF, 0xE1, 0, 6, 0xFF, 0xD9, 1, 2, // a segment holding an end marker
            0xFF, 0xDA, 0, 3, 0, 7, 0xFF, 0x00, 0xFF, 0xD0, 9, // a scan
        ];
        let tail = |more: &[u8]| jpeg_tail(&[&with_thumbnail, more].concat());
        assert_eq!(tail(&[]), JpegTail::NoEnd);
        assert_eq!(tail(&[0xFF, 0xD9]), JpegTail::Clean);
        assert_eq!(tail(&[0xFF, 0xD9, 0, 0, 0xFF, 0xD9]), JpegTail::Trailing(4));
    }

    proptest! {
        #[test]
        fn damage_never_panics(cut in 0usize..2_000, flips in prop::collection::vec((0usize..2_000, any::<u8>()), 0..6)) {
            let directory = tempfile::tempdir().unwrap();
            let picture = image::RgbImage::from_fn(40, 30, |x, y| image::Rgb([x as u8 * 6, y as u8 * 8, (x * y) as u8]));
            let mask = image::GrayImage::from_fn(40, 30, |x, _| image::Luma([x as u8 % 3 + 1]));
            for (name, whole) in [("a.jpg", encode(picture.clone(), ImageFormat::Jpeg)), ("a.png", encode(mask, ImageFormat::Png)), ("a.gif", encode(picture, ImageFormat::Gif))] {
                let mut bytes = whole[..cut.min(whole.len())].to_vec();
                for &(at, value) in &flips {
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte = value;
                    }
                }
                let file = directory.path().join(name);
                fs::write(&file, bytes).unwrap();
                let _ = decode_picture(&file, &mut |_| {});
                let _ = decode_mask(&file, &mut |_| {});
            }
        }
    }

    fn encode(image: impl Into<image::DynamicImage>, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.into().write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }
}
