//! What reading ahead brings where each read takes its time: batches a second of a packed data set whose every read is
//! delayed, with nothing kept in memory, by samples read ahead.
//!
//! `cargo run --release -p musher-dataset --example read_ahead -- PACKED [LATENCY_MS]`

use std::error::Error;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use musher_dataset::{
    AugmentOptions, BatchPlan, Dataset, Directory, ImageCache, Loader, LoaderOptions, MaskResize, Source,
    Store, Transform, View, Warnings,
};

/// A directory as far away as an object store.
#[derive(Debug)]
struct Far {
    near: Directory,
    latency: Duration,
}

impl Store for Far {
    fn size(&self, name: &str) -> io::Result<u64> {
        self.near.size(name)
    }

    fn read_all(&self, name: &str) -> io::Result<Vec<u8>> {
        self.near.read_all(name)
    }

    fn read(&self, name: &str, range: Range<u64>) -> io::Result<Vec<u8>> {
        thread::sleep(self.latency);
        self.near.read(name, range)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let root: PathBuf = arguments.next().ok_or("name a packed data set")?.into();
    let latency_ms: u64 = arguments.next().map_or(Ok(30), |latency| latency.parse())?;
    let far = Far { near: Directory(root.clone()), latency: Duration::from_millis(latency_ms) };
    let dataset = Dataset::open(&Source { store: Some(Arc::new(far)), ..Source::at(root) })?;
    println!("{} samples, {latency_ms} ms a read, 64 pixels, two loader threads", dataset.train().len());
    for read_ahead in [0, 1, 4, 16, 64, 256] {
        println!("read ahead {read_ahead:>3}: {:>6.0} samples/s", rate(&dataset, read_ahead)?);
    }
    Ok(())
}

fn rate(dataset: &Dataset, read_ahead: usize) -> Result<f64, Box<dyn Error>> {
    let samples = dataset.train().len() as u64;
    let options = LoaderOptions {
        split: dataset.train(),
        view: View {
            transform: Transform::Augment(AugmentOptions::default()),
            mask_resize: MaskResize::Nearest,
            image_size: 64,
            seed: 44,
        },
        threads: 2,
        ahead: 4,
        read_ahead,
        cache: Arc::new(ImageCache::new(0)),
        warnings: Arc::new(Warnings::new(|_| {})),
    };
    let plan = (0..samples).step_by(8).map(move |start| BatchPlan {
        key: start,
        epoch: 0,
        sample_ids: (start..samples.min(start + 8)).collect(),
    });
    let started = Instant::now();
    let mut loader = Loader::start(options, plan);
    while let Some(batch) = loader.next() {
        batch?;
    }
    Ok(samples as f64 / started.elapsed().as_secs_f64())
}
