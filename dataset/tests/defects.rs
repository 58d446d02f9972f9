//! Damaged and mislabelled files: what is survived with a warning, and what is refused.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;

use image::{DynamicImage, GrayImage, ImageFormat, Luma, Rgb, RgbImage};
use musher_dataset::check::check;
use musher_dataset::{
    DataWarning, Dataset, DatasetError, ImageCache, Picture, Sample, Source, Warnings, decode_mask,
    decode_pair, decode_picture,
};

const SIZE: (u32, u32) = (96, 64);

fn photo() -> RgbImage {
    RgbImage::from_fn(SIZE.0, SIZE.1, |x, y| Rgb([(x * 2) as u8, (y * 3) as u8, (x + y) as u8]))
}

fn trimap() -> GrayImage {
    GrayImage::from_fn(SIZE.0, SIZE.1, |x, _| Luma([(x * 3 / SIZE.0) as u8 + 1]))
}

fn encode(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }
}

fn picture_and_warnings(file: &Path) -> (Picture, Vec<String>) {
    let mut warnings = Vec::new();
    let picture = decode_picture(file, &mut |warning| warnings.push(warning.problem)).unwrap();
    (picture, warnings)
}

fn mean_gap(a: &[u8], b: &[u8]) -> f64 {
    let sum: u64 = a.iter().zip(b).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
    sum as f64 / a.len() as f64
}

#[test]
fn the_content_decides_the_format() {
    let folder = Folder::new();
    for (format, name) in [(ImageFormat::Gif, "GIF"), (ImageFormat::Png, "PNG"), (ImageFormat::Bmp, "BMP")] {
        let file = folder.write("a.jpg", encode(photo(), format));
        let (picture, warnings) = picture_and_warnings(&file);
        assert_eq!(picture.size(), SIZE);
        assert!(mean_gap(&picture.data, photo().as_raw()) < 8.0);
        assert_eq!(warnings, [format!("is a {name} file by its content, decoded as that")]);
    }
    let (_, warnings) = picture_and_warnings(&folder.write("a.png", encode(photo(), ImageFormat::Png)));
    assert!(warnings.is_empty());
}

#[test]
fn the_rows_of_a_truncated_jpeg_are_used() {
    let folder = Folder::new();
    let whole = encode(photo(), ImageFormat::Jpeg);
    let file = folder.write("a.jpg", &whole[..whole.len() * 3 / 4]);
    let (picture, warnings) = picture_and_warnings(&file);
    assert_eq!(picture.size(), SIZE);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("damaged"), "{warnings:?}");
    let upper_third = picture.data.len() / 3;
    assert!(mean_gap(&picture.data[..upper_third], &photo().as_raw()[..upper_third]) < 4.0);
}

#[test]
fn bytes_behind_a_jpeg_and_a_missing_end_marker_are_survived() {
    let folder = Folder::new();
    let whole = encode(photo(), ImageFormat::Jpeg);
    let (undamaged, none) = picture_and_warnings(&folder.write("a.jpg", &whole));
    assert!(none.is_empty());

    let trailing = folder.write("b.jpg", [&whole[..], b"\0\0junk"].concat());
    let (picture, warnings) = picture_and_warnings(&trailing);
    assert_eq!((picture, warnings.len()), (undamaged.clone(), 1));
    assert!(warnings[0].contains("6 bytes after"), "{warnings:?}");

    let endless = folder.write("c.jpg", &whole[..whole.len() - 2]);
    let (picture, warnings) = picture_and_warnings(&endless);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(mean_gap(&picture.data, &undamaged.data) < 4.0);
}

#[test]
fn gray_and_cmyk_jpegs_become_rgb() {
    let folder = Folder::new();
    let gray = folder.write("gray.jpg", encode(DynamicImage::from(photo()).to_luma8(), ImageFormat::Jpeg));
    let (picture, warnings) = picture_and_warnings(&gray);
    assert!(warnings.is_empty());
    assert!(picture.data.chunks(3).all(|pixel| pixel[0] == pixel[1] && pixel[1] == pixel[2]));

    // Orange on the left, blue on the right, written by Pillow as Adobe's inverted CMYK.
    let cmyk = folder.write("cmyk.jpg", include_bytes!("reference/cmyk.jpg"));
    let (picture, warnings) = picture_and_warnings(&cmyk);
    assert!(warnings.is_empty(), "{warnings:?}");
    assert!(mean_gap(&picture.pixel(4, 8), &[230, 159, 0]) < 8.0, "{:?}", picture.pixel(4, 8));
    assert!(mean_gap(&picture.pixel(27, 8), &[24, 52, 92]) < 8.0, "{:?}", picture.pixel(27, 8));
}

/// The EXIF tag says "turned by 90 degrees"; the pixels stay as they are stored.
#[test]
fn an_orientation_tag_is_not_applied() {
    let folder = Folder::new();
    let plain = encode(photo(), ImageFormat::Jpeg);
    let exif = [
        &[0xFF, 0xE1, 0, 34][..],
        b"Exif\0\0MM\0\x2A\0\0\0\x08",
        &[0, 1, 0x01, 0x12, 0, 3, 0, 0, 0, 1, 0, 6, 0, 0, 0, 0, 0, 0],
    ]
    .concat();
    let file = folder.write("a.jpg", [&plain[..2], &exif, &plain[2..]].concat());
    let (picture, warnings) = picture_and_warnings(&file);
    assert_eq!((picture.size(), warnings.len()), (SIZE, 0));
}

#[test]
fn what_is_no_image_is_refused() {
    let folder = Folder::new();
    let jpeg_header = encode(photo(), ImageFormat::Jpeg)[..40].to_vec();
    for bytes in [b"MATLAB 5.0 MAT-file".to_vec(), Vec::new(), jpeg_header] {
        let file = folder.write("a.jpg", bytes);
        let error = decode_picture(&file, &mut |_| {}).expect_err("this is no image");
        assert!(matches!(error, DatasetError::Undecodable { .. }));
        assert!(error.to_string().contains("a.jpg"));
    }
}

#[test]
fn masks_are_read_by_value() {
    let folder = Folder::new();
    let mask = decode_mask(&folder.write("a.png", encode(trimap(), ImageFormat::Png)), &mut |_| {}).unwrap();
    assert_eq!((mask.pixel(0, 0), mask.pixel(40, 5), mask.pixel(95, 63)), ([0], [1], [2]));

    let mut wrong = trimap();
    wrong.put_pixel(7, 9, Luma([4]));
    let error =
        decode_mask(&folder.write("b.png", encode(wrong, ImageFormat::Png)), &mut |_| {}).unwrap_err();
    assert!(matches!(error, DatasetError::MaskValue { value: 4, x: 7, y: 9, .. }));

    let colourful = folder.write("c.png", encode(photo(), ImageFormat::Png));
    assert!(matches!(decode_mask(&colourful, &mut |_| {}), Err(DatasetError::Undecodable { .. })));

    let mut told = Vec::new();
    let blank = GrayImage::from_pixel(9, 9, Luma([2]));
    let blank = folder.write("d.png", encode(blank, ImageFormat::Png));
    decode_mask(&blank, &mut |warning: DataWarning| told.push(warning.to_string())).unwrap();
    assert!(told[0].contains("d.png: is all background"), "{told:?}");
}

/// Colours would lose the values: the palette's index is the class.
#[test]
fn a_palette_mask_is_read_by_index_at_any_depth() {
    let folder = Folder::new();
    for (depth, rows) in [
        (png::BitDepth::Two, vec![0b01_10_11_01, 0b01_00_00_00]),
        (png::BitDepth::Eight, vec![1, 2, 3, 1, 1]),
    ] {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 5, 1);
        encoder.set_color(png::ColorType::Indexed);
        encoder.set_depth(depth);
        encoder.set_palette(vec![0, 0, 0, 230, 159, 0, 24, 52, 92, 245, 245, 240]);
        encoder.write_header().unwrap().write_image_data(&rows).unwrap();
        let mask = decode_mask(&folder.write("a.png", bytes), &mut |_| {}).unwrap();
        assert_eq!(mask.data, [0, 1, 2, 0, 0]);
    }
}

#[test]
fn a_mask_of_another_size_is_refused() {
    let folder = Folder::new();
    let sample = Sample::of_files(
        "a",
        folder.write("a.jpg", encode(photo(), ImageFormat::Jpeg)),
        folder.write("a.png", encode(GrayImage::from_pixel(9, 9, Luma([1])), ImageFormat::Png)),
    );
    let error = decode_pair(&sample, &mut |_| {}).expect_err("the sizes differ");
    assert!(error.to_string().contains("a.png is 9x9, but its image is 96x64"), "{error}");
}

#[test]
fn a_warning_is_told_once_however_often_the_file_is_decoded() {
    let folder = Folder::new();
    let sample = Sample::of_files(
        "a",
        folder.write("a.jpg", encode(photo(), ImageFormat::Gif)),
        folder.write("a.png", encode(trimap(), ImageFormat::Png)),
    );
    let (sender, told) = channel();
    let warnings = Warnings::new(move |warning| sender.send(warning).unwrap());
    let cache = ImageCache::new(0);
    for _ in 0..3 {
        cache.get(&sample, &warnings).unwrap();
    }
    drop(warnings);
    assert_eq!(told.iter().count(), 1);
    assert_eq!(cache.counters().misses, 3);
}

#[test]
fn a_check_goes_on_past_every_defect() {
    let folder = Folder::new();
    let good = (encode(photo(), ImageFormat::Jpeg), encode(trimap(), ImageFormat::Png));
    let small = encode(GrayImage::from_pixel(9, 9, Luma([1])), ImageFormat::Png);
    let gif = encode(photo(), ImageFormat::Gif);
    for (name, image, mask) in [
        ("good", Some(&good.0), Some(&good.1)),
        ("gif", Some(&gif), Some(&good.1)),
        ("small", Some(&good.0), Some(&small)),
        ("maskless", Some(&good.0), None),
        ("imageless", None, Some(&good.1)),
        ("unlisted", Some(&good.0), Some(&good.1)),
    ] {
        image.map(|bytes| folder.write(&format!("images/{name}.jpg"), bytes));
        mask.map(|bytes| folder.write(&format!("annotations/trimaps/{name}.png"), bytes));
    }
    folder.write("images/good.mat", b"MATLAB 5.0 MAT-file");
    folder.write("annotations/trainval.txt", "good\nsmall\nmaskless\nimageless\n");
    folder.write("annotations/test.txt", "gif\ngood\n");
    let source = Source::at(folder.0.path());
    let report = check(&source).unwrap();
    assert_eq!((report.errors(), report.warnings()), (3, 1), "{report}");
    assert_eq!((report.train.usable, report.val.usable), (1, 2));
    assert_eq!((report.unlisted.len(), report.not_images.len()), (1, 1));
    assert_eq!(report.in_both, ["good"]);
    assert_eq!(report.val.majority().map(|(_, share)| (share * 3.0).round()), Some(1.0));
    assert!(matches!(Dataset::open(&source), Err(DatasetError::AbsentImages { count: 1, line: 4, .. })));
}
