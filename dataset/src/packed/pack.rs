//! Writes a data set's listed samples into tar shards, with their index. The same data set gives the same bytes.

use std::collections::HashSet;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::crc_of;
use super::index::{BLOCK, Entry, INDEX_FILE, Index, Member, Shard};
use super::target::{NewDirectory, Output, Target};
use crate::sample::PairBytes;
use crate::{Dataset, DatasetError, Sample, Source, Split};

#[derive(Clone, Copy, Debug)]
pub struct PackOptions {
    /// A shard ends before the sample that would make it longer.
    pub shard_bytes: u64,
}

/// What was packed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packing {
    pub shards: usize,
    pub samples: usize,
    /// Of all shards.
    pub bytes: u64,
    /// The data set's, before and after.
    pub digest: String,
}

/// Packs the samples of both lists into `out`, a directory that is empty or does not exist, or an object store's URL
/// below which nothing is. Contents are copied as
/// they are; a sample of both lists is packed once. The index comes last, so what was interrupted has none.
///
/// # Errors
/// Names what is missing, can't be read or written, or can't be packed.
pub fn pack(source: &Source, out: &Path, options: PackOptions) -> Result<Packing, DatasetError> {
    let dataset = Dataset::open(source)?;
    let out = &Out::open(out)?;
    if !out.target.is_empty().map_err(unwritable(&out.root))? {
        return Err(DatasetError::NotEmpty { root: out.root.clone() });
    }

    let (mut shards, mut packed) = (Vec::new(), HashSet::new());
    let splits = [dataset.train(), dataset.val()];
    let splits = if splits[0].list == splits[1].list { &splits[..1] } else { &splits[..] };
    for (split, stem) in splits.iter().zip(stems(splits.iter().map(|split| &**split))) {
        let samples = split.samples.iter().filter(|sample| packed.insert(sample.name.clone()));
        shards.extend(write_shards(out, &stem, samples, options)?);
    }
    for split in splits {
        out.write(&split.list, split.text.as_bytes())?;
    }

    let packing = Packing {
        shards: shards.len(),
        samples: packed.len(),
        bytes: shards.iter().map(|shard| shard.bytes).sum(),
        digest: dataset.digest().to_owned(),
    };
    out.write(INDEX_FILE, &Index::new(shards).to_json())?;
    Ok(packing)
}

/// Where it is packed to.
struct Out {
    /// For messages.
    root: PathBuf,
    target: Box<dyn Target>,
}

impl Out {
    fn open(root: &Path) -> Result<Self, DatasetError> {
        #[cfg(feature = "stores")]
        if let Some(remote) = super::remote::open_to_write(root) {
            return Ok(Self { root: root.into(), target: Box::new(remote?) });
        }
        Ok(Self { root: root.into(), target: Box::new(NewDirectory(root.into())) })
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), DatasetError> {
        let written = self.target.create(name).and_then(|mut output| {
            output.write_all(bytes)?;
            output.finish()
        });
        written.map_err(unwritable(&self.root.join(name)))
    }
}

/// As [`super::unreadable`], for what is written.
fn unwritable(file: &Path) -> impl FnOnce(io::Error) -> DatasetError {
    move |source| match source.kind() {
        io::ErrorKind::Other => DatasetError::Store { reason: source.to_string() },
        _ => DatasetError::write(file)(source),
    }
}

/// What the shards of each list are called: as the list is, told apart where two would be called the same.
fn stems<'a>(splits: impl Iterator<Item = &'a Split>) -> Vec<String> {
    let mut stems: Vec<String> = Vec::new();
    for split in splits {
        let stem = Path::new(&split.list).file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let is_taken = stems.contains(&stem);
        stems.push(if is_taken { format!("{stem}-val") } else { stem });
    }
    stems
}

fn write_shards<'a>(
    out: &Out,
    stem: &str,
    samples: impl Iterator<Item = &'a Sample>,
    options: PackOptions,
) -> Result<Vec<Shard>, DatasetError> {
    let mut shards: Vec<Shard> = Vec::new();
    let mut open: Option<ShardWriter> = None;
    for sample in samples {
        let member_names = member_names(sample)?;
        let pair = sample.read(&mut |_| {})?;
        let bytes = tar_bytes(&pair);
        if let Some(full) = open.take_if(|shard| shard.bytes() + bytes + END_BYTES > options.shard_bytes) {
            shards.push(full.finish()?);
        }
        let shard = match &mut open {
            Some(shard) => shard,
            None => open.insert(ShardWriter::create(out, format!("{stem}-{:06}.tar", shards.len()))?),
        };
        shard.add(&sample.name, member_names, &pair)?;
    }
    shards.extend(open.map(ShardWriter::finish).transpose()?);
    Ok(shards)
}

/// Image and mask: of one sample by WebDataset's rule, by which a sample's name ends at its first dot.
fn member_names(sample: &Sample) -> Result<[String; 2], DatasetError> {
    let name = &sample.name;
    if name.contains('.') {
        let reason = "it has a dot, where WebDataset takes the name to end".to_owned();
        return Err(DatasetError::NotPackable { name: name.clone(), reason });
    }
    let extension = sample.image.extension().unwrap_or_default().to_string_lossy().into_owned();
    let mask = if extension == "png" { format!("{name}.mask.png") } else { format!("{name}.png") };
    Ok([format!("{name}.{extension}"), mask])
}

/// What a pair takes in a tar, but for names over 100 bytes.
fn tar_bytes(pair: &PairBytes) -> u64 {
    [&pair.image, &pair.mask]
        .iter()
        .map(|content| BLOCK + (content.len() as u64).next_multiple_of(BLOCK))
        .sum()
}

/// Two empty blocks.
const END_BYTES: u64 = 2 * BLOCK;

struct ShardWriter {
    path: PathBuf,
    shard: Shard,
    tar: tar::Builder<Counting<BufWriter<Box<dyn Output>>>>,
}

impl ShardWriter {
    fn create(out: &Out, file: String) -> Result<Self, DatasetError> {
        let path = out.root.join(&file);
        let output = out.target.create(&file).map_err(unwritable(&path))?;
        let tar = tar::Builder::new(Counting { inner: BufWriter::new(output), bytes: 0 });
        Ok(Self { path, shard: Shard { file, bytes: 0, samples: Vec::new() }, tar })
    }

    fn bytes(&self) -> u64 {
        self.tar.get_ref().bytes
    }

    fn add(&mut self, name: &str, [image, mask]: [String; 2], pair: &PairBytes) -> Result<(), DatasetError> {
        let image = self.append(image, &pair.image)?;
        let mask = self.append(mask, &pair.mask)?;
        self.shard.samples.push(Entry {
            name: name.to_owned(),
            image,
            mask,
            crc32c: crc_of(&pair.image, &pair.mask),
        });
        Ok(())
    }

    /// Owner, time and rights are the same for all, so that the bytes follow from the contents alone.
    fn append(&mut self, file: String, content: &[u8]) -> Result<Member, DatasetError> {
        let bytes = content.len() as u64;
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_entry_type(tar::EntryType::Regular);
        self.tar.append_data(&mut header, &file, content).map_err(unwritable(&self.path))?;
        Ok(Member { file, at: self.bytes() - bytes.next_multiple_of(BLOCK), bytes })
    }

    fn finish(self) -> Result<Shard, DatasetError> {
        let Self { path, mut shard, tar } = self;
        let written = tar.into_inner().and_then(|counting| {
            let output = counting.inner.into_inner().map_err(io::IntoInnerError::into_error)?;
            output.finish()?;
            Ok(counting.bytes)
        });
        shard.bytes = written.map_err(unwritable(&path))?;
        Ok(shard)
    }
}

struct Counting<W> {
    inner: W,
    bytes: u64,
}

impl<W: Write> Write for Counting<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(buffer)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
