//! What each part of the data's way costs: samples for a second of CPU time, of decoding, of augmentation, and of the
//! whole pipeline with and without decoded samples in memory, ending in floats as a network takes them.
//!
//! `cargo run --release -p musher-dataset --example rate -- ROOT [SIZE] [EPOCHS]` prints JSON.

use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::time::{ClockId, clock_gettime};

use musher_dataset::{
    AugmentOptions, BatchPlan, Dataset, ImageCache, Loader, LoaderOptions, MaskResize, Pair, Sample, Source,
    Split, Transform, View, Warnings, decode_mask, decode_pair, decode_picture,
};

/// A step's, as in the article.
const BATCH: usize = 32;

/// Of an epoch and a sample.
type Work<'a> = Box<dyn FnMut(u32, usize) -> Result<(), Box<dyn Error>> + 'a>;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let root: PathBuf = arguments.next().ok_or("name the data set's root")?.into();
    let size: u32 = arguments.next().map_or(Ok(224), |size| size.parse())?;
    let epochs: u32 = arguments.next().map_or(Ok(2), |epochs| epochs.parse())?;
    let dataset = Dataset::open(&Source::at(root))?;
    let split = dataset.train();
    let view = View {
        transform: Transform::Augment(AugmentOptions::default()),
        mask_resize: MaskResize::Nearest,
        image_size: size,
        seed: 44,
    };

    let pairs: Vec<Pair> =
        split.samples.iter().map(|sample| decode_pair(sample, &mut |_| {})).collect::<Result<_, _>>()?;
    let each = |mut work: Work| {
        let started = cpu_seconds();
        for epoch in 0..epochs {
            (0..split.len()).try_for_each(|index| work(epoch, index))?;
        }
        Ok::<_, Box<dyn Error>>(split.len() as f64 * f64::from(epochs) / (cpu_seconds() - started))
    };
    // The parts alone are measured of files.
    let samples = if split.samples[0].image.is_file() { &split.samples[..] } else { &[] };
    let part = |measure: fn(&Sample) -> Result<(), Box<dyn Error>>| {
        each(Box::new(move |_, index| samples.get(index).map_or(Ok(()), measure)))
    };
    let read = part(|sample| {
        fs::read(&sample.image)?;
        fs::read(&sample.mask)?;
        Ok(())
    })?;
    let images = part(|sample| {
        decode_picture(&sample.image, &mut |_| {})?;
        Ok(())
    })?;
    let masks = part(|sample| {
        decode_mask(&sample.mask, &mut |_| {})?;
        Ok(())
    })?;
    let decode = each(Box::new(|_, index| {
        decode_pair(&split.samples[index], &mut |_| {})?;
        Ok(())
    }))?;
    let (mut image, mut mask) = (vec![0; view.image_bytes()], vec![0; view.mask_bytes()]);
    let augment = each(Box::new(|epoch, index| {
        view.render(&pairs[index], epoch, index as u64, &mut image, &mut mask);
        Ok(())
    }))?;
    drop(pairs);

    let cold = pipeline(&split, view, Arc::new(ImageCache::new(0)), 0..epochs)?;
    let cache = Arc::new(ImageCache::new(usize::MAX));
    pipeline(&split, view, cache.clone(), 0..1)?;
    let cached = pipeline(&split, view, cache, 1..1 + 4 * epochs)?;
    println!(
        "{{\"read\":{read:.1},\"images\":{images:.1},\"masks\":{masks:.1},\"decode\":{decode:.1},\
         \"augment\":{augment:.1},\"cold\":{cold:.1},\"cached\":{cached:.1}}}"
    );
    Ok(())
}

/// Of all threads.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Samples for a second of CPU time with one loader thread, floats included.
fn pipeline(
    split: &Arc<Split>,
    view: View,
    cache: Arc<ImageCache>,
    epochs: std::ops::Range<u32>,
) -> Result<f64, Box<dyn Error>> {
    let (samples, warnings) = (split.len(), Arc::new(Warnings::new(|_| {})));
    let options =
        LoaderOptions { split: split.clone(), view, threads: 1, ahead: 4, read_ahead: 64, cache, warnings };
    let plan = epochs.clone().flat_map(move |epoch| {
        (0..samples).step_by(BATCH).map(move |start| BatchPlan {
            key: start as u64,
            epoch,
            sample_ids: (start as u64..samples.min(start + BATCH) as u64).collect(),
        })
    });
    let started = cpu_seconds();
    let mut loader = Loader::start(options, plan);
    let (mut images, mut masks) = (Vec::new(), Vec::new());
    while let Some(batch) = loader.next() {
        let batch = batch?;
        images.clear();
        images.extend(batch.images.iter().map(|&value| f32::from(value) / 255.0));
        masks.clear();
        masks.extend(batch.masks.iter().map(|&class| i64::from(class)));
        std::hint::black_box((&images, &masks));
    }
    Ok((samples * epochs.len()) as f64 / (cpu_seconds() - started))
}
