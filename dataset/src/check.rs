//! A data set looked at file by file, before hours are spent on it. It changes nothing.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use crate::layout::{Root, find_image, find_mask, images_folder};
use crate::packed::Packed;
use crate::{CLASS_NAMES, CLASSES, DatasetError, Sample, Source, decode_pair, decode_picture};

/// What a data set holds and what is wrong with it.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub train: SplitReport,
    pub val: SplitReport,
    /// Names in both lists: validation then says nothing about unseen images.
    pub in_both: Vec<String>,
    /// Images that no list names.
    pub unlisted: Vec<PathBuf>,
    /// Files among the images that are none.
    pub not_images: Vec<PathBuf>,
    /// Of listed and of unlisted images, by file.
    pub problems: Vec<Problem>,
}

#[derive(Clone, Debug, Default)]
pub struct SplitReport {
    pub list: String,
    pub listed: usize,
    /// Pairs that can be used.
    pub usable: usize,
    /// Mask pixels of the usable pairs, by class.
    pub class_pixels: [u64; CLASSES],
    /// Smallest and largest image by area, width x height.
    pub smallest: Option<(u32, u32)>,
    pub largest: Option<(u32, u32)>,
}

/// One thing that is wrong with one file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    pub severity: Severity,
    /// One sentence that names the file.
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Training on this data set would fail.
    Error,
    /// Survived, or of no consequence to training.
    Warning,
}

/// Decodes every image and mask, on all cores.
///
/// # Errors
/// Only if folders or lists are missing or unusable; all else is in the report.
pub fn check(source: &Source) -> Result<Report, DatasetError> {
    let root = Root::open(source)?;
    let train = root.names(&source.train_split)?;
    let val = root.names(&source.val_split)?;
    let train_names: HashSet<_> = train.iter().collect();
    let in_both = val.iter().filter(|&name| train_names.contains(name)).cloned().collect();

    let mut problems = Vec::new();
    let listed: HashSet<&str> = train.iter().chain(&val).map(String::as_str).collect();
    let others = match &root {
        Root::Unpacked(root) => survey_others(root, &listed)?,
        Root::Packed(packed) => {
            let differing = (0..packed.shards()).into_par_iter();
            let differing = differing.filter_map(|shard| packed.check_shard(shard).err());
            problems.extend(differing.map(|error| error_of(&error)).collect::<Vec<_>>());
            Others::default()
        }
    };
    if let Root::Unpacked(root) = &root {
        let unlisted = others.unlisted.par_iter().flat_map_iter(|file| look_at_unlisted(root, file));
        problems.extend(unlisted.collect::<Vec<_>>());
    }
    let find = |name: &String| match &root {
        Root::Unpacked(root) => find_sample(root, name),
        Root::Packed(packed) => find_packed(packed, name),
    };

    let mut check_split = |list: &String, names: &[String]| {
        let findings: Vec<_> = names.par_iter().map(|name| look_at(find(name))).collect();
        let mut report = SplitReport { list: list.clone(), listed: names.len(), ..SplitReport::default() };
        for finding in findings {
            if let Some(pair) = finding.pair {
                report.add(&pair);
            }
            problems.extend(finding.problems);
        }
        report
    };
    let train = check_split(&source.train_split, &train);
    let val = check_split(&source.val_split, &val);
    problems.sort();
    problems.dedup();
    Ok(Report { train, val, in_both, unlisted: others.unlisted, not_images: others.not_images, problems })
}

impl Report {
    pub fn errors(&self) -> usize {
        self.of(Severity::Error).count()
    }

    pub fn warnings(&self) -> usize {
        self.of(Severity::Warning).count()
    }

    fn of(&self, severity: Severity) -> impl Iterator<Item = &Problem> {
        self.problems.iter().filter(move |problem| problem.severity == severity)
    }
}

impl SplitReport {
    /// The pixel accuracy of always answering the most frequent class, with that class: what a
    /// network must beat to have learned anything.
    pub fn majority(&self) -> Option<(usize, f64)> {
        let total: u64 = self.class_pixels.iter().sum();
        let (class, &pixels) = self.class_pixels.iter().enumerate().max_by_key(|(_, pixels)| **pixels)?;
        (total > 0).then(|| (class, pixels as f64 / total as f64))
    }

    fn add(&mut self, pair: &PairSummary) {
        let area = |(width, height): (u32, u32)| u64::from(width) * u64::from(height);
        self.usable += 1;
        for (total, pixels) in self.class_pixels.iter_mut().zip(pair.class_pixels) {
            *total += pixels;
        }
        let sizes = |known: Option<_>| [known.unwrap_or(pair.size), pair.size];
        self.smallest = sizes(self.smallest).into_iter().min_by_key(|size| area(*size));
        self.largest = sizes(self.largest).into_iter().max_by_key(|size| area(*size));
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (word, split) in [("training", &self.train), ("validation", &self.val)] {
            writeln!(f, "{word:<11} {split}")?;
        }
        if let Some((class, share)) = self.val.majority() {
            writeln!(
                f,
                "always answering `{}` has {:.1} % pixel accuracy in validation",
                CLASS_NAMES[class],
                100.0 * share
            )?;
        }
        list(f, "names in both lists", &self.in_both)?;
        list(f, "images in no list", &file_names(&self.unlisted))?;
        list(f, "files among the images that are none", &file_names(&self.not_images))?;
        for (title, severity) in [("errors", Severity::Error), ("warnings", Severity::Warning)] {
            let problems: Vec<_> = self.of(severity).collect();
            writeln!(f, "{title}: {}", problems.len())?;
            for problem in problems {
                writeln!(f, "  {}", problem.text)?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for SplitReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} listed, {} usable", self.list, self.listed, self.usable)?;
        if let (Some((w, h)), Some((wide, high))) = (self.smallest, self.largest) {
            write!(f, ", {w}x{h} to {wide}x{high}")?;
        }
        let total: u64 = self.class_pixels.iter().sum::<u64>().max(1);
        for (name, &pixels) in CLASS_NAMES.iter().zip(&self.class_pixels) {
            write!(f, ", {name} {:.1} %", 100.0 * pixels as f64 / total as f64)?;
        }
        Ok(())
    }
}

/// A long list is cut: the count says enough.
fn list(f: &mut fmt::Formatter<'_>, title: &str, names: &[String]) -> fmt::Result {
    const SHOWN: usize = 10;
    write!(f, "{title}: {}", names.len())?;
    if !names.is_empty() {
        write!(f, " ({}", names[..names.len().min(SHOWN)].join(", "))?;
        write!(f, "{})", if names.len() > SHOWN { ", ..." } else { "" })?;
    }
    writeln!(f)
}

fn file_names(files: &[PathBuf]) -> Vec<String> {
    let name = |file: &PathBuf| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    files.iter().map(name).collect()
}

struct Finding {
    pair: Option<PairSummary>,
    problems: Vec<Problem>,
}

struct PairSummary {
    size: (u32, u32),
    class_pixels: [u64; CLASSES],
}

/// Or a sentence on what is missing.
fn find_sample(root: &Path, name: &str) -> Result<Sample, String> {
    let (mask, mask_bytes) = find_mask(root, name);
    let Some((image, _)) = find_image(root, name) else {
        return Err(format!("there is no image for the listed name `{name}`"));
    };
    match mask_bytes {
        None => Err(format!("{} has no mask {}", image.display(), mask.display())),
        Some(_) => Ok(Sample::of_files(name, image, mask)),
    }
}

fn find_packed(packed: &Arc<Packed>, name: &str) -> Result<Sample, String> {
    let at = packed.find_sample(name);
    at.map(|at| Sample::of_shard(packed, at))
        .ok_or_else(|| format!("the listed name `{name}` is in no shard"))
}

fn look_at(found: Result<Sample, String>) -> Finding {
    let error = |text| Finding { pair: None, problems: vec![Problem { severity: Severity::Error, text }] };
    let sample = match found {
        Ok(sample) => sample,
        Err(absent) => return error(absent),
    };
    let mut problems = Vec::new();
    let pair = decode_pair(&sample, &mut |warning| problems.push(warning_of(&warning)));
    match pair {
        Ok(pair) => {
            let mut class_pixels = [0; CLASSES];
            for &class in &pair.mask.data {
                class_pixels[usize::from(class)] += 1;
            }
            let size = pair.picture.size();
            Finding { pair: Some(PairSummary { size, class_pixels }), problems }
        }
        Err(failure) => error(failure.to_string()),
    }
}

/// An unlisted image is not trained on, so nothing about it is an error.
fn look_at_unlisted(root: &Path, file: &Path) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut warn = |warning| problems.push(warning_of(&warning));
    let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let (mask, mask_bytes) = find_mask(root, &name);
    let image = file.to_owned();
    let looked_at = match mask_bytes {
        Some(_) => decode_pair(&Sample::of_files(name, image, mask), &mut warn).map(drop),
        None => decode_picture(file, &mut warn).map(drop),
    };
    problems.extend(
        looked_at.err().map(|failure| Problem { severity: Severity::Warning, text: failure.to_string() }),
    );
    problems
}

fn error_of(error: &DatasetError) -> Problem {
    Problem { severity: Severity::Error, text: error.to_string() }
}

fn warning_of(warning: &impl ToString) -> Problem {
    Problem { severity: Severity::Warning, text: warning.to_string() }
}

/// Files among the images that no list names.
#[derive(Default)]
struct Others {
    unlisted: Vec<PathBuf>,
    not_images: Vec<PathBuf>,
}

fn survey_others(root: &Path, listed: &HashSet<&str>) -> Result<Others, DatasetError> {
    let folder = images_folder(root);
    let entries = fs::read_dir(&folder).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let mut files: Vec<_> =
        entries.map_err(DatasetError::read(&folder))?.iter().map(fs::DirEntry::path).collect();
    files.sort();
    let is_used = |file: &PathBuf| {
        let stem = file.file_stem().and_then(OsStr::to_str).filter(|stem| listed.contains(stem));
        stem.and_then(|stem| find_image(root, stem)).is_some_and(|(used, _)| used == *file)
    };
    files.retain(|file| !is_used(file));
    let (unlisted, not_images) = files.into_iter().partition(|file| looks_like_an_image(file));
    Ok(Others { unlisted, not_images })
}

fn looks_like_an_image(file: &Path) -> bool {
    let mut start = Vec::new();
    let read = File::open(file).and_then(|file| file.take(64).read_to_end(&mut start));
    read.is_ok() && image::guess_format(&start).is_ok()
}
