//! HDF5 as Keras writes weights: old-style groups of contiguous, uncompressed arrays. The little of the format that
//! takes: superblock 0 or 1, object headers 1, symbol tables, and the messages of an array. Anything else is refused
//! by name.
//!
//! Section numbers are those of the HDF5 File Format Specification, version 3.0.

use std::io::{Read, Seek};

use crate::file::Index;
use crate::input::Input;
use crate::{Dtype, Error, Stored};

/// Most groups, arrays and tree nodes that are visited; a ResNet50's file has about a thousand.
const MOST_OBJECTS: usize = 1 << 16;
/// Most bytes of them that are read, however often; of a ResNet50's file it is half a megabyte.
const MOST_BYTES: u64 = 64 << 20;
/// Deepest group; Keras' lie three deep.
const DEEPEST: usize = 8;
const MOST_NAME_BYTES: u64 = 256;
/// "Undefined address".
const NOWHERE: u64 = u64::MAX;
const SAVE_BY_KERAS: &str = "save it by Keras as .h5";

/// All arrays by their paths, without the leading slash.
pub(crate) fn index<R: Read + Seek>(input: &mut Input<R>) -> Result<Index, Error> {
    let root = root_header(input)?;
    let mut walk = Walk { input, visited: 0, bytes: 0, index: Index::default() };
    walk.object(root, "", 0)?;
    Ok(walk.index)
}

/// Address of the root group's object header (II.A).
fn root_header<R: Read + Seek>(input: &mut Input<R>) -> Result<u64, Error> {
    let block = input.read_at(0, 100.min(input.len), "the superblock")?;
    let mut fields = Fields(&block[8..]);
    let version = fields.u8()?;
    let _other_versions = fields.take(4)?;
    let (offset_bytes, length_bytes) = (fields.u8()?, fields.u8()?);
    let indexed_storage = match version {
        0 => 0,
        1 => 4,
        newer => return Err(unsupported(format!("HDF5 with superblock version {newer}"))),
    };
    if (offset_bytes, length_bytes) != (8, 8) {
        return Err(unsupported(format!("HDF5 with addresses of {offset_bytes} bytes")));
    }
    // Reserved, the trees' fan-out (leaf, internal) and flags; then base, free space, end and driver.
    fields.take(1 + 2 + 2 + 4 + indexed_storage)?;
    if fields.u64()? != 0 {
        return Err(unsupported("HDF5 behind a user block"));
    }
    fields.take(3 * 8)?;
    let _name = fields.u64()?;
    fields.u64()
}

struct Walk<'a, R> {
    input: &'a mut Input<R>,
    visited: usize,
    /// Read so far.
    bytes: u64,
    index: Index,
}

/// An object header's messages that matter here.
#[derive(Default)]
struct Messages {
    shape: Option<Vec<usize>>,
    dtype: Option<Dtype>,
    /// Address and length.
    data: Option<(u64, u64)>,
    /// Addresses of a group's tree and of its names.
    group: Option<(u64, u64)>,
}

impl<R: Read + Seek> Walk<'_, R> {
    fn object(&mut self, header: u64, path: &str, depth: usize) -> Result<(), Error> {
        self.visit()?;
        if depth > DEEPEST {
            return Err(Error::damaged(format!("its groups are nested more than {DEEPEST} deep")));
        }
        let messages = self.messages(header, path)?;
        match messages {
            Messages { group: Some((tree, names)), .. } => {
                let names = self.names(names)?;
                self.group(tree, names, path, depth)
            }
            Messages { shape: Some(shape), dtype: Some(dtype), data: Some((address, length)), .. } => {
                let storage = match address {
                    NOWHERE => 0..0,
                    address => self.input.checked(address..address.saturating_add(length), path)?,
                };
                let stored = Stored::row_major(dtype, shape, storage)
                    .map_err(|error| Error::damaged(format!("`{path}`: {error}")))?;
                self.index.tensors.insert(path.to_owned(), stored);
                Ok(())
            }
            _ => Err(unsupported(format!("`{path}`, which is neither a group nor a contiguous array,"))),
        }
    }

    /// A header and its continuations (IV.A.1.a).
    fn messages(&mut self, header: u64, path: &str) -> Result<Messages, Error> {
        let prefix = self.read(header, 16, "an object's header")?;
        let mut fields = Fields(&prefix);
        if fields.u8()? != 1 {
            return Err(unsupported("HDF5 with object headers of another version"));
        }
        fields.take(7)?;
        let mut blocks = vec![(header.saturating_add(16), u64::from(fields.u32()?))];
        let mut messages = Messages::default();
        while let Some((address, length)) = blocks.pop() {
            self.visit()?;
            let block = self.read(address, length, "an object's header")?;
            let mut fields = Fields(&block);
            while fields.0.len() >= 8 {
                let (kind, length, flags) = (fields.u16()?, fields.u16()?, fields.u8()?);
                fields.take(3)?;
                let body = Fields(fields.take(usize::from(length))?);
                const SHARED: u8 = 2;
                match kind {
                    0x01 | 0x03 | 0x08 | 0x11 if flags & SHARED != 0 => {
                        return Err(unsupported(format!("`{path}`, whose header is shared,")));
                    }
                    0x01 => messages.shape = Some(dataspace(body)?),
                    0x03 => messages.dtype = Some(datatype(body)?),
                    0x08 => messages.data = Some(layout(body, path)?),
                    0x10 => blocks.push(pair(body)?),
                    0x11 => messages.group = Some(pair(body)?),
                    _ => {}
                }
            }
        }
        Ok(messages)
    }

    /// Address and length of the names of a group's members (III.D).
    fn names(&mut self, heap: u64) -> Result<(u64, u64), Error> {
        let heap = self.read(heap, 32, "a group's names")?;
        let mut fields = Fields(&heap);
        fields.signature(b"HEAP")?;
        fields.take(4)?;
        let length = fields.u64()?;
        let _free = fields.u64()?;
        Ok((fields.u64()?, length))
    }

    /// A group's tree, node by node (III.A.1), and the symbol tables at its leaves (III.B).
    fn group(&mut self, tree: u64, names: (u64, u64), path: &str, depth: usize) -> Result<(), Error> {
        let mut nodes = vec![tree];
        while let Some(node) = nodes.pop() {
            self.visit()?;
            let head = self.read(node, 8, "a group's tree")?;
            let mut fields = Fields(&head);
            match fields.take(4)? {
                b"TREE" => {
                    let (_kind, _level, used) = (fields.u8()?, fields.u8()?, fields.u16()?);
                    // Keys and children alternate, after the addresses of both siblings.
                    let children =
                        self.read(node.saturating_add(24), u64::from(used) * 16, "a group's tree")?;
                    let mut fields = Fields(&children);
                    for _ in 0..used {
                        let _key = fields.u64()?;
                        nodes.push(fields.u64()?);
                    }
                }
                b"SNOD" => {
                    fields.take(2)?;
                    let count = fields.u16()?;
                    let entries =
                        self.read(node.saturating_add(8), u64::from(count) * 40, "a group's members")?;
                    let mut fields = Fields(&entries);
                    for _ in 0..count {
                        let (name, header, cached) = (fields.u64()?, fields.u64()?, fields.u32()?);
                        fields.take(20)?;
                        let name = self.name(names, name)?;
                        let path = if path.is_empty() { name } else { format!("{path}/{name}") };
                        const SYMBOLIC_LINK: u32 = 2;
                        if cached == SYMBOLIC_LINK {
                            return Err(unsupported(format!("`{path}`, which is a link,")));
                        }
                        self.object(header, &path, depth + 1)?;
                    }
                }
                _ => return Err(Error::damaged("a group's tree has a node of no kind")),
            }
        }
        Ok(())
    }

    fn name(&mut self, (address, length): (u64, u64), offset: u64) -> Result<String, Error> {
        let most = length.saturating_sub(offset).min(MOST_NAME_BYTES);
        let bytes = self.read(address.saturating_add(offset), most, "a name")?;
        let end = bytes.iter().position(|&byte| byte == 0);
        let name = end.and_then(|end| String::from_utf8(bytes[..end].to_vec()).ok());
        name.ok_or_else(|| Error::damaged("a group's member has no name"))
    }

    fn visit(&mut self) -> Result<(), Error> {
        self.visited += 1;
        match self.visited <= MOST_OBJECTS {
            true => Ok(()),
            false => Err(endless()),
        }
    }

    fn read(&mut self, start: u64, length: u64, what: &str) -> Result<Vec<u8>, Error> {
        self.bytes = self.bytes.saturating_add(length);
        if self.bytes > MOST_BYTES {
            return Err(endless());
        }
        self.input.read_at(start, length, what)
    }
}

/// IV.A.2.b
fn dataspace(mut fields: Fields) -> Result<Vec<usize>, Error> {
    let (version, rank, _flags) = (fields.u8()?, fields.u8()?, fields.u8()?);
    fields.take(if version == 1 { 5 } else { 1 })?;
    (0..rank).map(|_| Ok(usize::try_from(fields.u64()?).unwrap_or(usize::MAX))).collect()
}

/// IV.A.2.d
fn datatype(mut fields: Fields) -> Result<Dtype, Error> {
    let class = fields.u8()? & 0x0f;
    let bits = fields.take(3)?;
    let size = fields.u32()?;
    const FLOATING_POINT: u8 = 1;
    if class != FLOATING_POINT {
        return Ok(Dtype::Other(size.clamp(1, 255) as u8));
    }
    if bits[0] & 0x41 != 0 {
        return Err(unsupported("HDF5 with big-endian numbers"));
    }
    let (_offset, _precision) = (fields.u16()?, fields.u16()?);
    let exponent_bits = (fields.u8()?, fields.u8()?).1;
    match (size, exponent_bits) {
        (2, 5) => Ok(Dtype::F16),
        (2, 8) => Ok(Dtype::Bf16),
        (4, 8) => Ok(Dtype::F32),
        (8, 11) => Ok(Dtype::F64),
        _ => Err(unsupported("HDF5 with floating-point numbers that are not IEEE's")),
    }
}

/// Address and length of a contiguous array (IV.A.2.i).
fn layout(mut fields: Fields, path: &str) -> Result<(u64, u64), Error> {
    const CONTIGUOUS: u8 = 1;
    match (fields.u8()?, fields.u8()?) {
        (3 | 4, CONTIGUOUS) => pair(fields),
        (3 | 4, _) => Err(unsupported(format!("`{path}`, which is stored in chunks or compressed,"))),
        _ => Err(unsupported("HDF5 with data layouts of another version")),
    }
}

fn pair(mut fields: Fields) -> Result<(u64, u64), Error> {
    Ok((fields.u64()?, fields.u64()?))
}

fn endless() -> Error {
    Error::damaged("its HDF5 describes more than any weights file has, or turns in circles")
}

fn unsupported(what: impl Into<String>) -> Error {
    Error::unsupported(what, SAVE_BY_KERAS)
}

/// Little-endian fields, one after the other.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Error> {
        let (taken, rest) = self
            .0
            .split_at_checked(count)
            .ok_or_else(|| Error::damaged("a structure of its HDF5 ends too soon"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn signature(&mut self, expected: &[u8; 4]) -> Result<(), Error> {
        match self.take(4)? == expected {
            true => Ok(()),
            false => Err(Error::damaged("a structure of its HDF5 is not where it should be")),
        }
    }

    fn number<const N: usize>(&mut self) -> Result<u64, Error> {
        Ok(self.take(N)?.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn u8(&mut self) -> Result<u8, Error> {
        Ok(self.number::<1>()? as u8)
    }

    fn u16(&mut self) -> Result<u16, Error> {
        Ok(self.number::<2>()? as u16)
    }

    fn u32(&mut self) -> Result<u32, Error> {
        Ok(self.number::<4>()? as u32)
    }

    fn u64(&mut self) -> Result<u64, Error> {
        self.number::<8>()
    }
}
