//! `musher-worker predict`: which images, where to, and what is said about each.

use std::{
    collections::HashMap,
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, anyhow};
use clap::Args;
use musher_dataset::{CLASS_NAMES, DatasetError, Picture, decode_picture, is_named_as_picture, is_picture};
use rayon::prelude::*;

use super::{Failure, compute_threads, find, usage};
use crate::{
    device::Choice,
    predict::{Prediction, Predictor},
    trained::Trained,
};

#[derive(Debug, Args)]
pub struct Predict {
    /// Images of any size, or directories of images
    #[arg(required = true, value_name = "IMAGE|DIR")]
    images: Vec<PathBuf>,
    /// Weights that a run wrote, such as runs/pets/best.safetensors
    #[arg(long, value_name = "FILE")]
    weights: PathBuf,
    /// Where NAME.mask.png and NAME.overlay.png go; a mask's palette index is the class, 0 foreground, 1 background,
    /// 2 boundary
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Write NAME.probabilities.npy too: f32, [classes, height, width]
    #[arg(long)]
    probabilities: bool,
    /// Images computed at once
    #[arg(long, value_name = "N", default_value_t = NonZeroUsize::new(8).expect("8 is not 0"))]
    batch: NonZeroUsize,
    /// What to compute on: auto, cpu, cuda or cuda:K
    #[arg(long, value_name = "DEVICE", default_value_t = Choice::Auto)]
    device: Choice,
    /// Threads to compute with [default: the cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

/// An image and the start of the names of what is written for it.
struct Target {
    image: PathBuf,
    stem: String,
}

impl Predict {
    /// # Errors
    /// Before anything is computed: the user can mend it. Later: how many images could not be predicted; the others
    /// are written.
    pub(super) fn run(self) -> Result<(), Failure> {
        tch::set_num_threads(compute_threads(self.threads) as i32);
        let targets = targets(&self.images, &self.out).map_err(usage)?;
        let device = find(self.device)?;
        let trained = Trained::open(&self.weights, device).map_err(usage)?;
        let predictor = Predictor::new(trained, device)?;
        fs::create_dir_all(&self.out)
            .with_context(|| format!("cannot create {}", self.out.display()))
            .map_err(usage)?;
        let started = Instant::now();
        let mut failed = 0;
        for targets in targets.chunks(self.batch.get()) {
            failed += self.predict(&predictor, targets)?;
        }
        let (all, out) = (targets.len(), self.out.display());
        let (done, seconds) = (all - failed, started.elapsed().as_secs_f64());
        println!("{done} {} in {seconds:.1} s, into {out}", if done == 1 { "image" } else { "images" });
        match failed {
            0 => Ok(()),
            _ => Err(anyhow!("{failed} of {all} images could not be predicted").into()),
        }
    }

    /// One batch; returns how many images of it failed.
    fn predict(&self, predictor: &Predictor, targets: &[Target]) -> anyhow::Result<usize> {
        let decoded: Vec<_> = targets.par_iter().map(|target| decode(&target.image)).collect();
        let (mut good, mut pictures, mut failed) = (Vec::new(), Vec::new(), 0);
        for (target, picture) in targets.iter().zip(decoded) {
            match picture {
                Ok(picture) => {
                    good.push(target);
                    pictures.push(picture);
                }
                Err(reason) => {
                    eprintln!("musher-worker: {reason}");
                    failed += 1;
                }
            }
        }
        let predictions = predictor.predict(&pictures)?;
        for (target, (picture, prediction)) in good.iter().zip(pictures.iter().zip(predictions)) {
            self.write(target, picture, &prediction)?;
            println!("{}", line(target, &prediction));
        }
        Ok(failed)
    }

    fn write(&self, target: &Target, picture: &Picture, prediction: &Prediction) -> anyhow::Result<()> {
        let put = |kind: &str, png: Vec<u8>| {
            let file = self.out.join(format!("{}.{kind}.png", target.stem));
            fs::write(&file, png).with_context(|| format!("cannot write {}", file.display()))
        };
        put("mask", prediction.mask_png()?)?;
        put("overlay", prediction.overlay_png(picture)?)?;
        if self.probabilities {
            let file = self.out.join(format!("{}.probabilities.npy", target.stem));
            let written = prediction.probabilities.write_npy(&file);
            written.with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(())
    }
}

fn decode(file: &Path) -> Result<Picture, String> {
    let mut warn = |warning| eprintln!("musher-worker: {warning}");
    decode_picture(file, &mut warn).map_err(|error| match error {
        DatasetError::Undecodable { file, reason } => format!("cannot decode {}: {reason}", file.display()),
        other => other.to_string(),
    })
}

/// `beagle_4.jpg  500x333  foreground 31.0 %  background 58.2 %  boundary 10.8 %`
fn line(target: &Target, prediction: &Prediction) -> String {
    let name = target.image.file_name().unwrap_or_default().to_string_lossy();
    let mut line = format!("{name}  {}x{}", prediction.width, prediction.height);
    for (class, share) in prediction.shares().iter().enumerate() {
        let name = CLASS_NAMES.get(class).map_or_else(|| format!("class {class}"), |name| (*name).into());
        line += &format!("  {name} {:.1} %", 100.0 * share);
    }
    line
}

/// All images that are meant. Of a directory, those files that are images by their content; the others are counted.
fn targets(paths: &[PathBuf], out: &Path) -> anyhow::Result<Vec<Target>> {
    let mut images = Vec::new();
    for path in paths {
        let kind = fs::metadata(path).with_context(|| format!("there is no image at {}", path.display()))?;
        if !kind.is_dir() {
            images.push(path.clone());
            continue;
        }
        if is_same(path, out) {
            return Err(anyhow!(
                "--out {} is the directory of the images: name another, as predictions are images too",
                out.display()
            ));
        }
        images.extend(images_of(path)?);
    }
    let mut by_stem: HashMap<String, &Path> = HashMap::new();
    images
        .iter()
        .map(|image| {
            let stem = image.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            match by_stem.insert(stem.clone(), image) {
                None => Ok(Target { image: image.clone(), stem }),
                Some(other) => Err(anyhow!(
                    "{} and {} would both be written to {}: predict them into directories of their own",
                    other.display(),
                    image.display(),
                    out.join(format!("{stem}.mask.png")).display()
                )),
            }
        })
        .collect()
}

fn images_of(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let unreadable = || format!("cannot read the directory {}", directory.display());
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).with_context(unreadable)? {
        let path = entry.with_context(unreadable)?.path();
        if path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    // One that its name promises and its content is not is damaged, and worth a word of its own.
    let (images, others): (Vec<_>, Vec<_>) =
        files.into_iter().partition(|file| is_picture(file) || is_named_as_picture(file));
    if images.is_empty() {
        return Err(anyhow!("there is no image in {}: name a directory of images", directory.display()));
    }
    if !others.is_empty() {
        let (count, first) = (others.len(), others[0].display());
        eprintln!("musher-worker: {count} files that are no images are left out, such as {first}");
    }
    Ok(images)
}

fn is_same(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}
