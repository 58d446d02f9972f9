//! PyTorch's state dicts, in both containers of `torch.save`: which objects of a pickle are tensors, and where their
//! storages lie.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::ops::Range;

use zip::{CompressionMethod, ZipArchive, result::ZipError};

use crate::file::Index;
use crate::input::Input;
use crate::pickle::{Id, MOST_BYTES as MOST_PICKLE_BYTES, Object, Pickle, Value};
use crate::{Dtype, Error, Stored};

/// What the legacy container begins with, and the one version of it there is.
const LEGACY_MAGIC: i128 = 0x1950_a86a_20f9_469c_fc6c;
const LEGACY_VERSION: i128 = 1001;
/// Keys under which training scripts keep the state dict, beside their optimizer's and more.
const WRAPPERS: [&str; 2] = ["state_dict", "model"];
/// What `torch.nn.DataParallel` puts before every name.
const PARALLEL: &str = "module.";
const SAVE_ALONE: &str = "save the state dict alone, by torch.save(model.state_dict(), FILE)";
const SAVE_HERE: &str = "save it on a little-endian machine";

/// Each storage's bytes in the file, by its key.
type Places = HashMap<String, Range<u64>>;

/// An archive of `data.pkl` and, uncompressed, a `data/KEY` for each storage.
pub(crate) fn index_zip<R: Read + Seek>(input: &mut Input<R>) -> Result<Index, Error> {
    let mut archive = Archive::open(input)?;
    if archive.has("constants.pkl") {
        return Err(Error::unsupported("a TorchScript program", SAVE_ALONE));
    }
    if !archive.has("data.pkl") {
        return Err(Error::unsupported("a zip archive that torch.save did not write", SAVE_ALONE));
    }
    if archive.has("byteorder") && archive.read("byteorder")? != b"little" {
        return Err(Error::unsupported("a big-endian file", SAVE_HERE));
    }
    let pickle = Pickle::read(archive.read("data.pkl")?.as_slice())?;
    let mut places = Places::new();
    for key in storage_types(&pickle)?.into_keys() {
        places.insert(key.to_owned(), archive.place(&format!("data/{key}"))?);
    }
    index(&pickle, &places)
}

/// Five pickles (magic number, version, the machine's sizes, the object, the keys of its storages), then each
/// storage: its length in elements, its bytes.
pub(crate) fn index_legacy<R: Read + Seek>(input: &mut Input<R>) -> Result<Index, Error> {
    input.reader.seek(SeekFrom::Start(0))?;
    let mut reader = BufReader::new(&mut input.reader);
    let mut next = || Pickle::read(&mut reader);
    let magic = next()?;
    if *magic.top() != Value::Int(LEGACY_MAGIC) {
        let what = format!("a pickle that torch.save did not write, of {},", magic.describe(magic.top()));
        return Err(Error::unsupported(what, SAVE_ALONE));
    }
    if *next()?.top() != Value::Int(LEGACY_VERSION) {
        return Err(Error::unsupported("a file of an unknown version of torch.save", SAVE_ALONE));
    }
    let machine = next()?;
    let little_endian = machine.items(machine.top()).into_iter().flatten().any(|(key, value)| {
        machine.text(key) == Some("little_endian") && *machine.value(value) == Value::Bool(true)
    });
    if !little_endian {
        return Err(Error::unsupported("a big-endian file", SAVE_HERE));
    }
    let (pickle, keys) = (next()?, next()?);
    let mut at = reader.stream_position()?;

    let dtypes = storage_types(&pickle)?;
    let mut places = Places::new();
    let Value::List(listed) = keys.top() else { return Err(damaged("no list of storages")) };
    for &key in listed {
        let key = keys.text(key).ok_or_else(|| damaged("a storage without a key"))?;
        let dtype = dtypes.get(key).ok_or_else(|| damaged("a storage of no type"))?;
        let count = input.read_at(at, 8, "a storage's length")?;
        let count = count.iter().rev().fold(0u64, |count, &byte| count << 8 | u64::from(byte));
        let begin = at + 8;
        at = begin.saturating_add(count.saturating_mul(dtype.bytes()));
        places.insert(key.to_owned(), input.checked(begin..at, "a storage")?);
    }
    index(&pickle, &places)
}

/// All tensors of the state dict that the pickle is, or holds.
fn index(pickle: &Pickle, places: &Places) -> Result<Index, Error> {
    let top = pickle.items(pickle.top()).ok_or_else(|| {
        let what = format!("{} in place of a state dict", pickle.describe(pickle.top()));
        Error::unsupported(what, SAVE_ALONE)
    })?;
    let wrapped = top.iter().find(|(key, _)| pickle.text(*key).is_some_and(|key| WRAPPERS.contains(&key)));
    let wrapped = wrapped.and_then(|(_, value)| pickle.items(pickle.value(*value)));
    let mut tensors = BTreeMap::new();
    for (key, value) in wrapped.unwrap_or(top) {
        let name = pickle.text(key).ok_or_else(|| damaged("a tensor without a name"))?;
        tensors.insert(name.to_owned(), tensor(pickle, pickle.value(value), name, places)?);
    }
    if !tensors.is_empty() && tensors.keys().all(|name| name.starts_with(PARALLEL)) {
        tensors = tensors.into_iter().map(|(name, of)| (name[PARALLEL.len()..].to_owned(), of)).collect();
    }
    Ok(Index { tensors, metadata: BTreeMap::new() })
}

fn tensor(pickle: &Pickle, value: &Value, name: &str, places: &Places) -> Result<Stored, Error> {
    let no_tensor = || {
        let what = format!("`{name}`, which is {} and no tensor,", pickle.describe(value));
        Error::unsupported(what, SAVE_ALONE)
    };
    let Some((("torch._utils", function), arguments)) = pickle.call(value) else { return Err(no_tensor()) };
    match (function, arguments) {
        ("_rebuild_parameter", &[data, ..]) => match pickle.call(pickle.value(data)) {
            Some((("torch._utils", inner), _)) if inner != function => {
                tensor(pickle, pickle.value(data), name, places)
            }
            _ => Err(no_tensor()),
        },
        ("_rebuild_tensor" | "_rebuild_tensor_v2", &[storage, first, shape, strides, ..]) => {
            let (key, dtype) = storage_type(pickle, pickle.value(storage))?;
            let place = places.get(key).ok_or_else(|| damaged("a tensor without its storage"))?;
            let first = pickle.size(first).ok_or_else(no_tensor)?;
            let shape = pickle.sizes(shape).ok_or_else(no_tensor)?;
            let strides = pickle.sizes(strides).ok_or_else(no_tensor)?;
            Stored::new(dtype, shape, strides, place.clone(), first as u64)
                .map_err(|error| Error::damaged(format!("`{name}`: {error}")))
        }
        _ => Err(no_tensor()),
    }
}

/// All storages that the pickle refers to.
fn storage_types(pickle: &Pickle) -> Result<HashMap<&str, Dtype>, Error> {
    let storages = pickle.values().iter().filter(|value| matches!(value, Value::Persistent(_)));
    storages.map(|storage| storage_type(pickle, storage)).collect()
}

/// Key and type of `('storage', torch.FloatStorage, KEY, LOCATION, LENGTH)`.
fn storage_type<'a>(pickle: &'a Pickle, value: &Value) -> Result<(&'a str, Dtype), Error> {
    let Value::Persistent(id) = *value else { return Err(damaged("a tensor of no storage")) };
    let Value::Tuple(parts) = pickle.value(id) else { return Err(damaged("a storage of no known kind")) };
    let &[_, class, key, ..] = parts.as_slice() else { return Err(damaged("a storage without a key")) };
    let key = pickle.text(key).ok_or_else(|| damaged("a storage without a key"))?;
    let Value::Global(module, class) = pickle.value(class) else {
        return Err(damaged("a storage of no type"));
    };
    let dtype = match (module.as_str(), class.as_str()) {
        ("torch", "HalfStorage") => Dtype::F16,
        ("torch", "BFloat16Storage") => Dtype::Bf16,
        ("torch", "FloatStorage") => Dtype::F32,
        ("torch", "DoubleStorage") => Dtype::F64,
        ("torch", "LongStorage" | "ComplexFloatStorage") => Dtype::Other(8),
        ("torch", "IntStorage") => Dtype::Other(4),
        ("torch", "ShortStorage") => Dtype::Other(2),
        ("torch", "ByteStorage" | "CharStorage" | "BoolStorage") => Dtype::Other(1),
        _ => return Err(Error::unsupported(format!("a storage of type {module}.{class}"), SAVE_ALONE)),
    };
    Ok((key, dtype))
}

fn damaged(what: &str) -> Error {
    Error::damaged(format!("its state dict has {what}"))
}

/// What a state dict's parts are, of all that a pickle can hold.
impl Pickle {
    fn text(&self, id: Id) -> Option<&str> {
        match self.value(id) {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    fn size(&self, id: Id) -> Option<usize> {
        match *self.value(id) {
            Value::Int(number) => number.try_into().ok(),
            _ => None,
        }
    }

    fn sizes(&self, id: Id) -> Option<Vec<usize>> {
        match self.value(id) {
            Value::Tuple(sizes) => sizes.iter().map(|&size| self.size(size)).collect(),
            _ => None,
        }
    }

    /// Module, name and arguments of a call.
    fn call(&self, value: &Value) -> Option<((&str, &str), &[Id])> {
        let Value::Object(Object { callable, arguments, .. }) = value else { return None };
        let (Value::Global(module, name), Value::Tuple(arguments)) =
            (self.value(*callable), self.value(*arguments))
        else {
            return None;
        };
        Some(((module, name), arguments))
    }

    /// A dictionary's items, also an ordered one's, which Python 2 wrote as a call with a list of pairs.
    fn items(&self, value: &Value) -> Option<Vec<(Id, Id)>> {
        let pair = |&id: &Id| match self.value(id) {
            Value::Tuple(pair) | Value::List(pair) => match **pair {
                [key, value] => Some((key, value)),
                _ => None,
            },
            _ => None,
        };
        match value {
            Value::Dict(items) => Some(items.clone()),
            Value::Object(Object { items, .. }) => {
                let (("collections", "OrderedDict"), arguments) = self.call(value)? else { return None };
                let mut all = match arguments {
                    [] => Vec::new(),
                    [list] => match self.value(*list) {
                        Value::List(pairs) => pairs.iter().map(pair).collect::<Option<_>>()?,
                        _ => return None,
                    },
                    _ => return None,
                };
                all.extend(items);
                Some(all)
            }
            _ => None,
        }
    }

    fn describe(&self, value: &Value) -> String {
        match value {
            Value::Other => "None, a fraction or bytes".into(),
            Value::Bool(_) | Value::Int(_) => "a number".into(),
            Value::Text(_) => "a text".into(),
            Value::Tuple(_) | Value::List(_) => "a list".into(),
            Value::Dict(_) => "a dictionary".into(),
            Value::Global(module, name) => format!("{module}.{name}"),
            Value::Object(object) => match self.value(object.callable) {
                Value::Global(module, name) => format!("a call of {module}.{name} (which was not made)"),
                _ => "a call of something unknown (which was not made)".into(),
            },
            Value::Persistent(_) => "a bare storage".into(),
        }
    }
}

/// A zip archive whose entries share one directory.
struct Archive<'a, R> {
    zip: ZipArchive<&'a mut R>,
    len: u64,
    /// With its slash.
    directory: String,
}

impl<'a, R: Read + Seek> Archive<'a, R> {
    fn open(input: &'a mut Input<R>) -> Result<Self, Error> {
        let len = input.len;
        let zip = ZipArchive::new(&mut input.reader).map_err(damaged_archive)?;
        let mut names = zip.file_names().filter_map(Result::ok);
        let directory = names.find_map(|name| name.strip_suffix("data.pkl").map(str::to_owned));
        let directory = directory.unwrap_or_default();
        drop(names);
        Ok(Self { zip, len, directory })
    }

    fn has(&self, name: &str) -> bool {
        self.zip.index_for_name(&format!("{}{name}", self.directory)).is_some()
    }

    /// Where an entry's bytes lie, uncompressed.
    fn place(&mut self, name: &str) -> Result<Range<u64>, Error> {
        let index = self.zip.index_for_name(&format!("{}{name}", self.directory));
        let index = index.ok_or_else(|| Error::damaged(format!("its archive lacks {name}")))?;
        let entry = self.zip.by_index_raw(index).map_err(damaged_archive)?;
        if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
            return Err(Error::unsupported("a compressed or encrypted archive", "write it by torch.save"));
        }
        let begin = entry.data_start().unwrap_or(self.len);
        let end = begin.saturating_add(entry.size());
        match begin <= end && end <= self.len {
            true => Ok(begin..end),
            false => Err(Error::damaged(format!("its archive ends before {name} does"))),
        }
    }

    /// An entry's bytes, their checksum verified.
    fn read(&mut self, name: &str) -> Result<Vec<u8>, Error> {
        self.place(name)?;
        let entry = self.zip.by_name(&format!("{}{name}", self.directory)).map_err(damaged_archive)?;
        let mut bytes = Vec::new();
        entry.take(MOST_PICKLE_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

fn damaged_archive(error: ZipError) -> Error {
    match error {
        ZipError::Io(error) => error.into(),
        other => Error::damaged(format!("its zip archive: {other}")),
    }
}
