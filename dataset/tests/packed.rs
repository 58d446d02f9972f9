//! A data set in tar shards: the same samples, digest and batches as unpacked, and what happens when its files are cut,
//! lost, mixed up or damaged.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex};

use musher_dataset::check::check;
use musher_dataset::synth::{self, SynthOptions};
use musher_dataset::{
    AugmentOptions, Batch, BatchPlan, DataWarning, Dataset, DatasetError, Decoder, DecoderOptions,
    DiskCacheOptions, HeldOut, ImageCache, Loader, LoaderOptions, MaskResize, PackOptions, Sample, Source,
    Transform, View, Warnings, pack,
};
use tempfile::TempDir;

const SHARD_BYTES: u64 = 64 << 10;

static DRAWN: LazyLock<TempDir> = LazyLock::new(|| {
    let root = tempfile::tempdir().unwrap();
    synth::draw(root.path(), &SynthOptions { train: 20, val: 6, seed: 1, sides: [64, 160] }).unwrap();
    root
});

fn packed() -> TempDir {
    let out = tempfile::tempdir().unwrap();
    pack(&Source::at(DRAWN.path()), out.path(), PackOptions { shard_bytes: SHARD_BYTES }).unwrap();
    out
}

/// By name.
fn files(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files.extend(self::files(&path)),
            false => drop(files.insert(path.clone(), fs::read(path).unwrap())),
        }
    }
    files
}

fn shards(root: &Path) -> Vec<PathBuf> {
    let is_tar = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "tar");
    files(root).into_keys().filter(is_tar).collect()
}

fn plan() -> impl Iterator<Item = BatchPlan> + Send + 'static {
    let sizes = [3u64, 1, 0, 7, 5, 2];
    (0u64..12).map(move |key| BatchPlan {
        key,
        epoch: key as u32 / 6,
        sample_ids: (0..sizes[key as usize % 6]).map(|i| (key * 5 + i * 3) % 20).collect(),
    })
}

fn quiet() -> Arc<Warnings> {
    Arc::new(Warnings::new(|_| {}))
}

fn loader(dataset: &Dataset, threads: usize, read_ahead: usize, cache_bytes: usize) -> Loader {
    let options = LoaderOptions {
        split: dataset.train(),
        view: View {
            transform: Transform::Augment(AugmentOptions::default()),
            mask_resize: MaskResize::Nearest,
            image_size: 32,
            seed: 44,
        },
        threads,
        ahead: 2,
        read_ahead,
        cache: Arc::new(ImageCache::new(cache_bytes)),
        warnings: quiet(),
    };
    Loader::start(options, plan())
}

fn all(mut loader: Loader) -> Vec<Batch> {
    std::iter::from_fn(|| loader.next()).map(Result::unwrap).collect()
}

fn first_error(mut loader: Loader) -> DatasetError {
    std::iter::from_fn(|| loader.next()).find_map(Result::err).expect("the data set is damaged")
}

/// The sentence of an error that must be.
fn sentence<T>(result: Result<T, DatasetError>) -> String {
    let text = result.err().expect("this data set must be refused").to_string();
    assert!(!text.contains('\n') && !text.ends_with('.'), "{text}");
    text
}

#[test]
fn packing_gives_the_same_bytes_each_time() {
    let (first, second) = (packed(), packed());
    let relative = |root: &Path| -> BTreeMap<PathBuf, Vec<u8>> {
        files(root)
            .into_iter()
            .map(|(path, bytes)| (path.strip_prefix(root).unwrap().into(), bytes))
            .collect()
    };
    assert_eq!(relative(first.path()), relative(second.path()));
    assert!(shards(first.path()).len() > 4, "{:?}", shards(first.path()));
}

#[test]
fn shards_hold_the_files_as_they_are_in_the_lists_order() {
    let out = packed();
    let mut found = Vec::new();
    for shard in shards(out.path()) {
        assert!(fs::metadata(&shard).unwrap().len() <= SHARD_BYTES);
        let mut archive = tar::Archive::new(File::open(&shard).unwrap());
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            found.push((name, bytes));
        }
    }
    let dataset = Dataset::open(&Source::at(DRAWN.path())).unwrap();
    // `test-*.tar` comes before `trainval-*.tar`.
    let samples = [dataset.val(), dataset.train()];
    let mut kinds = [0, 0];
    let mut expected = samples.iter().flat_map(|split| &split.samples).flat_map(|sample| {
        // An image that is a PNG leaves that name to itself.
        let is_png = sample.image.extension().is_some_and(|extension| extension == "png");
        kinds[usize::from(is_png)] += 1;
        let [image, mask] = if is_png { ["png", "mask.png"] } else { ["jpg", "png"] };
        let file = |path: &Path, extension| (format!("{}.{extension}", sample.name), fs::read(path).unwrap());
        [file(&sample.image, image), file(&sample.mask, mask)]
    });
    for (name, bytes) in found {
        let (expected, content) = expected.next().unwrap();
        assert!(name == expected && bytes == content, "{name} is not {expected}");
    }
    assert!(expected.next().is_none());
    drop(expected);
    assert!(kinds.iter().all(|&count| count > 0), "{kinds:?}");
}

#[test]
fn packed_and_unpacked_are_of_one_team_and_train_alike() {
    let (out, disk) = (packed(), tempfile::tempdir().unwrap());
    let unpacked = Dataset::open(&Source::at(DRAWN.path())).unwrap();
    let expected = all(loader(&unpacked, 1, 0, 0));
    let cache = DiskCacheOptions { directory: disk.path().into(), budget_bytes: 200_000 };
    for disk_cache in [None, Some(cache.clone()), Some(cache)] {
        let dataset = Dataset::open(&Source { disk_cache, ..Source::at(out.path()) }).unwrap();
        assert_eq!(dataset.digest(), unpacked.digest());
        for (threads, read_ahead, cache_bytes) in
            [(1, 0, 0), (1, 1, 0), (3, 1, 0), (4, 2, usize::MAX), (2, 64, 100_000)]
        {
            assert_eq!(all(loader(&dataset, threads, read_ahead, cache_bytes)), expected);
        }
    }
    let kept = files(disk.path()).values().map(Vec::len).sum::<usize>();
    assert!((100_000..=200_000).contains(&kept), "{kept}");
}

#[test]
fn a_decoder_reads_ahead_only_what_is_wanted() {
    let out = packed();
    let dataset = Dataset::open(&Source::at(out.path())).unwrap();
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let names = asked.clone();
    let options = DecoderOptions {
        split: dataset.train(),
        wanted: move |sample: &Sample| {
            names.lock().unwrap().push(sample.name.clone());
            !sample.name.ends_with('3')
        },
        threads: 2,
        ahead: 2,
        read_ahead: 3,
        warnings: quiet(),
    };
    let mut decoder = Decoder::start(options, plan());
    let unpacked = Dataset::open(&Source::at(DRAWN.path())).unwrap().train();
    while let Some(decoded) = decoder.next() {
        let decoded = decoded.unwrap();
        for (&id, raster) in decoded.plan.sample_ids.iter().zip(decoded.samples) {
            let sample = unpacked.sample(id).unwrap();
            let pair = musher_dataset::decode_pair(sample, &mut |_| {}).unwrap();
            assert_eq!(raster, (!sample.name.ends_with('3')).then(|| pair.interleaved()));
        }
    }
    assert!(!asked.lock().unwrap().is_empty());
}

#[test]
fn a_plan_that_panics_or_stops_is_no_end_in_silence() {
    let out = packed();
    let dataset = Dataset::open(&Source::at(out.path())).unwrap();
    let options = |read_ahead| LoaderOptions {
        split: dataset.train(),
        view: View {
            transform: Transform::Stretch,
            mask_resize: MaskResize::Nearest,
            image_size: 32,
            seed: 1,
        },
        threads: 2,
        ahead: 2,
        read_ahead,
        cache: Arc::new(ImageCache::new(0)),
        warnings: quiet(),
    };
    let failing = plan().map(|plan| if plan.key == 5 { panic!("the plan is lost") } else { plan });
    let mut running = Loader::start(options(4), failing);
    let results: Vec<_> = std::iter::from_fn(|| running.next()).collect();
    assert_eq!(results.len(), 6);
    assert!(
        matches!(&results[5], Err(DatasetError::LoaderPanicked { message, .. }) if message == "the plan is lost")
    );
    // An id that is not there costs its batch alone.
    let unknown = BatchPlan { key: 0, epoch: 0, sample_ids: vec![1, 99] };
    let mut running = Loader::start(options(4), [unknown].into_iter().chain(plan()));
    assert!(matches!(running.next(), Some(Err(DatasetError::UnknownSample { id: 99, .. }))));
    assert_eq!(std::iter::from_fn(|| running.next()).filter(Result::is_ok).count(), 12);
}

#[test]
fn a_sample_of_both_lists_is_packed_once() {
    let root = tempfile::tempdir().unwrap();
    synth::draw(root.path(), &SynthOptions { train: 3, val: 2, seed: 1, sides: [32, 48] }).unwrap();
    let lists = ["trainval", "test"].map(|name| root.path().join(format!("annotations/{name}.txt")));
    let both = lists.each_ref().map(|list| fs::read_to_string(list).unwrap()).concat();
    fs::write(&lists[1], both).unwrap();
    let out = tempfile::tempdir().unwrap();
    let packing = pack(&Source::at(root.path()), out.path(), PackOptions { shard_bytes: 1 }).unwrap();
    assert_eq!((packing.samples, packing.shards), (5, 5));
    let dataset = Dataset::open(&Source::at(out.path())).unwrap();
    assert_eq!((dataset.train().len(), dataset.val().len()), (3, 5));
    assert_eq!(dataset.digest(), Dataset::open(&Source::at(root.path())).unwrap().digest());
    // Another list of packed samples is a text file beside the others.
    fs::write(out.path().join("annotations/few.txt"), &dataset.train().samples[1].name).unwrap();
    let few = Source { train_split: "annotations/few.txt".into(), ..Source::at(out.path()) };
    assert_eq!(Dataset::open(&few).unwrap().train().len(), 1);
}

#[test]
fn what_cannot_be_packed_is_refused() {
    let root = tempfile::tempdir().unwrap();
    synth::draw(root.path(), &SynthOptions { train: 2, val: 1, seed: 1, sides: [32, 48] }).unwrap();
    let options = PackOptions { shard_bytes: SHARD_BYTES };
    assert!(sentence(pack(&Source::at(root.path()), root.path(), options)).contains("is not empty"));
    for (folder, extension) in [("images", "jpg"), ("annotations/trimaps", "png")] {
        let from = fs::read_dir(root.path().join(folder)).unwrap().next().unwrap().unwrap().path();
        fs::copy(from, root.path().join(folder).join(format!("a.b.{extension}"))).unwrap();
    }
    fs::write(root.path().join("annotations/test.txt"), "a.b\n").unwrap();
    let out = tempfile::tempdir().unwrap();
    assert!(sentence(pack(&Source::at(root.path()), out.path(), options)).contains("`a.b` can't be packed"));
    // It was interrupted, and says so.
    assert!(
        sentence(Dataset::open(&Source::at(out.path())))
            .contains("index.json does not exist, but tar shards do")
    );
}

#[test]
fn what_does_not_fit_is_found_before_it_is_trained_on() {
    let opened = |out: &TempDir| Dataset::open(&Source::at(out.path()));
    let out = packed();
    let shard = shards(out.path()).remove(1);
    let whole = fs::read(&shard).unwrap();

    fs::write(&shard, &whole[..whole.len() / 2]).unwrap();
    let text = sentence(opened(&out));
    assert!(text.contains(shard.to_str().unwrap()) && text.contains(&whole.len().to_string()), "{text}");
    assert!(sentence(check(&Source::at(out.path()))).contains("its index says"));

    fs::remove_file(&shard).unwrap();
    assert!(sentence(opened(&out)).contains("is gone"));
    fs::write(&shard, &whole).unwrap();
    assert!(opened(&out).is_ok());

    let list = out.path().join("annotations/test.txt");
    fs::write(&list, "nobody\n").unwrap();
    let text = sentence(opened(&out));
    assert!(text.contains("test.txt:1: `nobody` is in no shard"), "{text}");
    fs::remove_file(&list).unwrap();
    assert!(sentence(opened(&out)).contains("split list"));

    let index = out.path().join("index.json");
    let json = fs::read(&index).unwrap();
    fs::write(&index, &json[..json.len() / 3]).unwrap();
    assert!(sentence(opened(&out)).contains("is no index"));
    fs::remove_file(&index).unwrap();
    assert!(sentence(opened(&out)).contains("does not exist, but tar shards do"));
}

#[test]
fn damage_that_comes_later_ends_with_a_sentence() {
    for read_ahead in [0, 8] {
        let out = packed();
        let dataset = Dataset::open(&Source::at(out.path())).unwrap();
        let victim = out.path().join("trainval-000001.tar");
        let whole = fs::read(&victim).unwrap();
        let error = || first_error(loader(&dataset, 2, read_ahead, 0)).to_string();

        // One byte in the midst of a file.
        let file = OpenOptions::new().write(true).open(&victim).unwrap();
        file.write_all_at(&[whole[1000] ^ 1], 1000).unwrap();
        assert!(error().contains("is not what was packed"), "{}", error());
        assert!(check(&Source::at(out.path())).unwrap().errors() == 1);
        file.set_len(700).unwrap();
        assert!(error().contains("ends before its index says"), "{}", error());
        fs::remove_file(&victim).unwrap();
        assert!(error().contains("trainval-000001.tar is gone"), "{}", error());
        fs::write(&victim, &whole).unwrap();
        assert_eq!(all(loader(&dataset, 2, read_ahead, 0)).len(), 12);
    }
}

#[test]
fn check_compares_each_tar_with_the_index() {
    let out = packed();
    let report = check(&Source::at(out.path())).unwrap();
    assert_eq!((report.errors(), report.train.usable, report.val.usable), (0, 20, 6), "{report}");
    // Another header, the same contents: only a walk through the tar sees it.
    let shard = out.path().join("trainval-000000.tar");
    let file = OpenOptions::new().write(true).open(&shard).unwrap();
    file.write_all_at(b"x", 0).unwrap();
    let report = check(&Source::at(out.path())).unwrap();
    assert_eq!(report.errors(), 1, "{report}");
    assert!(report.problems[0].text.contains("does not fit its index"), "{report}");
}

#[test]
fn a_damaged_copy_in_the_disk_cache_is_read_again() {
    let (out, disk) = (packed(), tempfile::tempdir().unwrap());
    let cache = DiskCacheOptions { directory: disk.path().into(), budget_bytes: 1 << 30 };
    let opened =
        || Dataset::open(&Source { disk_cache: Some(cache.clone()), ..Source::at(out.path()) }).unwrap();
    let expected = all(loader(&opened(), 2, 4, 0));
    let copies = files(disk.path());
    assert_eq!(copies.len(), 20);
    for (at, (copy, bytes)) in copies.iter().enumerate() {
        let mut bytes = bytes.clone();
        match at % 3 {
            0 => bytes.truncate(at * 10),
            1 => bytes[at] ^= 1,
            _ => {}
        }
        fs::write(copy, bytes).unwrap();
    }
    assert_eq!(all(loader(&opened(), 2, 4, 0)), expected);
    assert_eq!(files(disk.path()), copies);
    // What is kept is not asked of the shards.
    let dataset = opened();
    shards(out.path()).into_iter().for_each(|shard| fs::remove_file(shard).unwrap());
    assert_eq!(all(loader(&dataset, 2, 4, 0)), expected);
}

/// Runs itself again where it may mount a disk of 100 KiB.
#[test]
fn a_full_disk_ends_the_keeping_and_not_the_training() {
    let Some(disk) = std::env::var_os("MUSHER_TEST_FULL_DISK").map(PathBuf::from) else {
        let directory = tempfile::tempdir().unwrap();
        let script =
            "mount -t tmpfs -o size=100k none \"$MUSHER_TEST_FULL_DISK\" || exit 99; exec \"$0\" \"$@\"";
        let mut unshare = Command::new("unshare");
        unshare.args(["--user", "--map-root-user", "--mount", "sh", "-c", script]);
        unshare.arg(std::env::current_exe().unwrap());
        unshare.args(["--exact", "a_full_disk_ends_the_keeping_and_not_the_training", "--nocapture"]);
        let output = unshare.env("MUSHER_TEST_FULL_DISK", directory.path()).output();
        match output {
            Ok(output) if output.status.success() => {
                assert!(String::from_utf8_lossy(&output.stdout).contains("it was full"));
            }
            Ok(output) if output.status.code() != Some(101) => {
                println!("skipped: no disk can be mounted here: {}", String::from_utf8_lossy(&output.stderr));
            }
            Ok(output) => panic!("{}", String::from_utf8_lossy(&output.stdout)),
            Err(error) => println!("skipped: {error}"),
        }
        return;
    };
    let out = packed();
    let cache = DiskCacheOptions { directory: disk.clone(), budget_bytes: 1 << 30 };
    let dataset = Dataset::open(&Source { disk_cache: Some(cache), ..Source::at(out.path()) }).unwrap();
    let told: Arc<Mutex<Vec<DataWarning>>> = Arc::default();
    let sink = told.clone();
    let warnings = Warnings::new(move |warning| sink.lock().unwrap().push(warning));
    let unpacked = Dataset::open(&Source::at(DRAWN.path())).unwrap();
    for _ in 0..2 {
        for (sample, expected) in dataset.train().samples.iter().zip(&unpacked.train().samples) {
            let pair = ImageCache::new(0).get(sample, &warnings).unwrap();
            assert_eq!(*pair, musher_dataset::decode_pair(expected, &mut |_| {}).unwrap());
        }
    }
    let told = told.lock().unwrap();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].to_string().contains("No space left on device"), "{told:?}");
    println!("it was full: {}", told[0]);
}

#[test]
fn validation_may_be_held_out_of_training() {
    let out = packed();
    let opened = |root: &Path, fraction, seed| {
        let held_out = Some(HeldOut { fraction, seed });
        Dataset::open(&Source { held_out, val_split: "annotations/none.txt".into(), ..Source::at(root) })
    };
    let names = |split: &musher_dataset::Split| -> Vec<String> {
        split.samples.iter().map(|sample| sample.name.clone()).collect()
    };
    let whole = names(&Dataset::open(&Source::at(DRAWN.path())).unwrap().train());
    let dataset = opened(DRAWN.path(), 0.25, 44).unwrap();
    let (train, val) = (names(&dataset.train()), names(&dataset.val()));
    assert_eq!((train.len(), val.len()), (15, 5));
    assert!(val.iter().all(|name| whole.contains(name) && !train.contains(name)));
    let mut both = [train, val.clone()].concat();
    both.sort_by_key(|name| whole.iter().position(|listed| listed == name));
    assert_eq!(both, whole);

    assert_eq!(opened(out.path(), 0.25, 44).unwrap().digest(), dataset.digest());
    assert_ne!(names(&opened(DRAWN.path(), 0.25, 45).unwrap().val()), val);
    for fraction in [0.001, 0.999] {
        let text = sentence(opened(DRAWN.path(), fraction, 44));
        assert!(text.contains("data.val_fraction"), "{text}");
    }
}
