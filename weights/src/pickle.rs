//! Python's pickles as data. A pickle is a program for a stack machine whose calls can be anything; here a call
//! becomes an [`Object`] that says what was to be called, with what, and nothing ever is.
//!
//! Which objects mean a tensor is `torch`'s. Opcodes that neither `torch.save` nor a pickle of plain data uses are
//! refused.

use std::collections::HashMap;
use std::io::Read;

use crate::Error;

/// Longest pickle that is read; that of a ResNet50's state dict has 30 kB.
pub(crate) const MOST_BYTES: u64 = 64 << 20;
/// Most values of one; a state dict's has some thousands.
const MOST_VALUES: usize = 1 << 20;

/// One value of a [`Pickle`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Id(usize);

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    /// None, a float, bytes: nothing that a state dict's shape depends on.
    Other,
    Bool(bool),
    Int(i128),
    Text(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A class or function, by module and name.
    Global(String, String),
    /// What a call would have made.
    Object(Object),
    /// Something outside of the pickle, by what is known of it.
    Persistent(Id),
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Object {
    pub callable: Id,
    pub arguments: Id,
    /// Items set on it later, as on a dictionary.
    pub items: Vec<(Id, Id)>,
}

/// All values of a pickle; they refer to each other, also in circles.
#[derive(Debug)]
pub(crate) struct Pickle {
    values: Vec<Value>,
    top: Id,
}

impl Pickle {
    /// Reads one pickle from where `reader` is to its end, and no further.
    pub fn read(reader: impl Read) -> Result<Self, Error> {
        let mut machine = Machine {
            input: reader.take(MOST_BYTES),
            values: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        let top = machine.run()?;
        Ok(Self { values: machine.values, top })
    }

    pub fn top(&self) -> &Value {
        self.value(self.top)
    }

    pub fn value(&self, id: Id) -> &Value {
        &self.values[id.0]
    }

    pub fn values(&self) -> &[Value] {
        &self.values
    }
}

struct Machine<R> {
    input: std::io::Take<R>,
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<R: Read> Machine<R> {
    fn run(&mut self) -> Result<Id, Error> {
        loop {
            let [opcode] = self.bytes()?;
            if opcode == b'.' {
                return self.pop();
            }
            self.step(opcode)?;
        }
    }

    fn step(&mut self, opcode: u8) -> Result<(), Error> {
        match opcode {
            0x80 => drop(self.bytes::<1>()?), // the protocol
            0x95 => drop(self.bytes::<8>()?), // a frame's length
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'N' => self.push(Value::Other)?,
            0x88 => self.push(Value::Bool(true))?,
            0x89 => self.push(Value::Bool(false))?,
            b'K' => self.push_number::<1>()?,
            b'M' => self.push_number::<2>()?,
            b'J' => {
                let number = i32::from_le_bytes(self.bytes()?);
                self.push(Value::Int(number.into()))?;
            }
            0x8a => self.push_long()?,
            b'G' => {
                self.bytes::<8>()?;
                self.push(Value::Other)?;
            }
            b'X' | b'T' => self.push_text::<4>()?,
            0x8c | b'U' => self.push_text::<1>()?,
            b'B' => self.push_bytes::<4>()?,
            b'C' => self.push_bytes::<1>()?,
            b')' => self.push(Value::Tuple(Vec::new()))?,
            0x85 => self.push_tuple(1)?,
            0x86 => self.push_tuple(2)?,
            0x87 => self.push_tuple(3)?,
            b't' => {
                let items = self.since_mark()?;
                self.push(Value::Tuple(items))?;
            }
            b']' => self.push(Value::List(Vec::new()))?,
            b'l' => {
                let items = self.since_mark()?;
                self.push(Value::List(items))?;
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' => {
                let items = self.since_mark()?;
                self.append(items)?;
            }
            b'}' => self.push(Value::Dict(Vec::new()))?,
            b'd' => {
                let items = pairs(&self.since_mark()?)?;
                self.push(Value::Dict(items))?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(vec![(key, value)])?;
            }
            b'u' => {
                let items = pairs(&self.since_mark()?)?;
                self.set_items(items)?;
            }
            b'q' => self.memorise::<1>()?,
            b'r' => self.memorise::<4>()?,
            0x94 => {
                let place = self.memo.len() as u32;
                self.memo.insert(place, self.peek()?);
            }
            b'h' => self.recall::<1>()?,
            b'j' => self.recall::<4>()?,
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Value::Global(module, name))?;
            }
            0x93 => {
                let (name, module) = (self.pop_text()?, self.pop_text()?);
                self.push(Value::Global(module, name))?;
            }
            // A call, and a new object of a class.
            b'R' | 0x81 => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                self.push(Value::Object(Object { callable, arguments, items: Vec::new() }))?;
            }
            b'b' => drop(self.pop()?), // an object's other attributes
            b'Q' => {
                let id = self.pop()?;
                self.push(Value::Persistent(id))?;
            }
            other => {
                let what = format!("a pickle with opcode {other:#04x}");
                return Err(Error::unsupported(what, "save the state dict alone, by torch.save"));
            }
        }
        Ok(())
    }

    fn push(&mut self, value: Value) -> Result<(), Error> {
        if self.values.len() == MOST_VALUES {
            return Err(damaged("more values than any state dict has"));
        }
        self.values.push(value);
        self.stack.push(Id(self.values.len() - 1));
        Ok(())
    }

    fn pop(&mut self) -> Result<Id, Error> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len() > floor {
            true => self.stack.pop().ok_or_else(underflow),
            false => Err(underflow()),
        }
    }

    fn peek(&self) -> Result<Id, Error> {
        self.stack.last().copied().ok_or_else(underflow)
    }

    fn since_mark(&mut self) -> Result<Vec<Id>, Error> {
        let mark = self.marks.pop().ok_or_else(underflow)?;
        Ok(self.stack.split_off(mark))
    }

    fn push_tuple(&mut self, len: usize) -> Result<(), Error> {
        let mut items = (0..len).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
        items.reverse();
        self.push(Value::Tuple(items))
    }

    fn append(&mut self, new: Vec<Id>) -> Result<(), Error> {
        let Id(top) = self.peek()?;
        match &mut self.values[top] {
            Value::List(items) => items.extend(new),
            Value::Object(_) => {} // a collection of a class of its own
            _ => return Err(damaged("items for what is no list")),
        }
        Ok(())
    }

    fn set_items(&mut self, new: Vec<(Id, Id)>) -> Result<(), Error> {
        let Id(top) = self.peek()?;
        match &mut self.values[top] {
            Value::Dict(items) | Value::Object(Object { items, .. }) => items.extend(new),
            _ => return Err(damaged("items for what is no dictionary")),
        }
        Ok(())
    }

    fn memorise<const N: usize>(&mut self) -> Result<(), Error> {
        let place = self.number::<N>()? as u32;
        self.memo.insert(place, self.peek()?);
        Ok(())
    }

    fn recall<const N: usize>(&mut self) -> Result<(), Error> {
        let place = self.number::<N>()? as u32;
        let id = self.memo.get(&place).ok_or_else(|| damaged("a reference to nothing"))?;
        if self.stack.len() == MOST_VALUES {
            return Err(damaged("more values than any state dict has"));
        }
        self.stack.push(*id);
        Ok(())
    }

    fn push_number<const N: usize>(&mut self) -> Result<(), Error> {
        let number = self.number::<N>()?;
        self.push(Value::Int(number.into()))
    }

    fn push_long(&mut self) -> Result<(), Error> {
        let length = self.number::<1>()? as usize;
        let mut word = [0; 16];
        if length > word.len() {
            return Err(damaged("a number of more than 128 bits"));
        }
        self.read_exact(&mut word[..length])?;
        let negative = length > 0 && word[length - 1] & 0x80 != 0;
        if negative {
            word[length..].fill(0xff);
        }
        self.push(Value::Int(i128::from_le_bytes(word)))
    }

    fn push_text<const N: usize>(&mut self) -> Result<(), Error> {
        let bytes = self.counted::<N>()?;
        let text = String::from_utf8(bytes).map_err(|_| damaged("a text that is not UTF-8"))?;
        self.push(Value::Text(text))
    }

    fn push_bytes<const N: usize>(&mut self) -> Result<(), Error> {
        self.counted::<N>()?;
        self.push(Value::Other)
    }

    fn pop_text(&mut self) -> Result<String, Error> {
        let Id(id) = self.pop()?;
        match &self.values[id] {
            Value::Text(text) => Ok(text.clone()),
            _ => Err(damaged("a class whose name is no text")),
        }
    }

    /// Bytes after their count. Memory is taken as they come, not as they are claimed.
    fn counted<const N: usize>(&mut self) -> Result<Vec<u8>, Error> {
        let length = self.number::<N>()?;
        let mut bytes = Vec::new();
        let read = self.input.by_ref().take(length).read_to_end(&mut bytes)?;
        match read as u64 == length {
            true => Ok(bytes),
            false => Err(cut()),
        }
    }

    fn line(&mut self) -> Result<String, Error> {
        let mut bytes = Vec::new();
        loop {
            match self.bytes()? {
                [b'\n'] => break,
                [byte] => bytes.push(byte),
            }
        }
        String::from_utf8(bytes).map_err(|_| damaged("a name that is not UTF-8"))
    }

    /// A little-endian number of `N` bytes, at most eight.
    fn number<const N: usize>(&mut self) -> Result<u64, Error> {
        let bytes: [u8; N] = self.bytes()?;
        Ok(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn read_exact(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        self.input.read_exact(bytes).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => cut(),
            _ => error.into(),
        })
    }
}

fn pairs(items: &[Id]) -> Result<Vec<(Id, Id)>, Error> {
    let (pairs, rest) = items.as_chunks();
    match rest {
        [] => Ok(pairs.iter().map(|&[key, value]| (key, value)).collect()),
        _ => Err(damaged("a key without a value")),
    }
}

fn damaged(what: &str) -> Error {
    Error::damaged(format!("its pickle has {what}"))
}

fn underflow() -> Error {
    damaged("an operation on nothing")
}

fn cut() -> Error {
    Error::damaged("its pickle ends too soon, or is longer than any state dict's")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_data() {
        let pickle = Pickle::read(&b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00rm\x85R."[..]).unwrap();
        let Value::Object(object) = pickle.top() else { panic!("{:?}", pickle.top()) };
        assert_eq!(*pickle.value(object.callable), Value::Global("posix".into(), "system".into()));
    }

    #[test]
    fn numbers_have_their_signs() {
        for (bytes, number) in [
            (&b"K\xff."[..], 255),
            (b"J\xff\xff\xff\xff.", -1),
            (b"\x8a\x00.", 0),
            (b"\x8a\x01\xff.", -1),
            (b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", 0x1950_a86a_20f9_469c_fc6c),
        ] {
            assert_eq!(*Pickle::read(bytes).unwrap().top(), Value::Int(number));
        }
    }

    #[test]
    fn what_is_claimed_must_be_there() {
        for bytes in [
            &b""[..],
            b".",
            b"X\xff\xff\xff\xffabc.",
            b"(K\x01u.",
            b"\x85.",
            b"h\x07.",
            b"\x8a\xff.",
            b"(0.",
            b"K\x01K\x02s.",
            b"i.",
        ] {
            assert!(Pickle::read(bytes).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn values_are_counted() {
        let endless = std::iter::repeat_n(b'N', 2 * MOST_VALUES).collect::<Vec<_>>();
        assert!(Pickle::read(endless.as_slice()).unwrap_err().to_string().contains("more values"));
        let echoes = [b"Nq\x01".to_vec(), b"h\x01".repeat(2 * MOST_VALUES)].concat();
        assert!(Pickle::read(echoes.as_slice()).unwrap_err().to_string().contains("more values"));
    }
}
