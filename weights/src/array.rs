//! An array in a file: where its elements lie, of which type they are, and how they become f32.

use std::io::{Read, Seek};
use std::ops::Range;

use half::{bf16, f16};

use crate::Error;
use crate::input::Input;

/// More than any weight has.
const MOST_AXES: usize = 8;

/// What an element is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    F16,
    Bf16,
    F32,
    F64,
    /// No floating-point number; so many bytes of it. Never read.
    Other(u8),
}

impl Dtype {
    pub(crate) fn bytes(self) -> u64 {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
            Self::Other(bytes) => u64::from(bytes),
        }
    }

    /// Little-endian elements.
    fn decode(self, bytes: &[u8]) -> Option<Vec<f32>> {
        Some(match self {
            Self::F16 => bytes.as_chunks().0.iter().map(|&word| f16::from_le_bytes(word).to_f32()).collect(),
            Self::Bf16 => {
                bytes.as_chunks().0.iter().map(|&word| bf16::from_le_bytes(word).to_f32()).collect()
            }
            Self::F32 => bytes.as_chunks().0.iter().map(|&word| f32::from_le_bytes(word)).collect(),
            Self::F64 => bytes.as_chunks().0.iter().map(|&word| f64::from_le_bytes(word) as f32).collect(),
            Self::Other(_) => return None,
        })
    }
}

/// An array's place in its file: it lies within the file, and has no more elements than are stored there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    shape: Vec<usize>,
    /// In elements, one an axis.
    strides: Vec<usize>,
    dtype: Dtype,
    /// Bytes of the file from the first element to the last.
    span: Range<u64>,
}

impl Stored {
    /// An array at element `first` of what is stored in the bytes `storage` of a file.
    pub(crate) fn new(
        dtype: Dtype,
        shape: Vec<usize>,
        strides: Vec<usize>,
        storage: Range<u64>,
        first: u64,
    ) -> Result<Self, Error> {
        let elements = storage.end.saturating_sub(storage.start) / dtype.bytes().max(1);
        let misfit = || {
            let (shape, strides) = (&shape, &strides);
            Error::damaged(format!(
                "an array of shape {shape:?} and strides {strides:?} from element {first} does not fit its {elements} stored elements"
            ))
        };
        if shape.len() != strides.len() || shape.len() > MOST_AXES {
            return Err(misfit());
        }
        let count = product(&shape).filter(|&count| count <= elements).ok_or_else(misfit)?;
        let last = match count {
            0 => Some(first),
            _ => shape.iter().zip(&strides).try_fold(first, |at, (&len, &stride)| {
                at.checked_add((len as u64 - 1).checked_mul(stride as u64)?)
            }),
        };
        let end = last.and_then(|last| last.checked_add(u64::from(count > 0))).filter(|&end| end <= elements);
        let end = end.ok_or_else(misfit)?;
        let place = |element: u64| storage.start + element * dtype.bytes();
        let span = place(first)..place(end);
        Ok(Self { shape, strides, dtype, span })
    }

    /// An array whose elements lie one behind the other, the last axis fastest.
    pub(crate) fn row_major(dtype: Dtype, shape: Vec<usize>, storage: Range<u64>) -> Result<Self, Error> {
        let strides = row_major_strides(&shape);
        Self::new(dtype, shape, strides, storage, 0)
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The same elements with their axes in another order: axis `i` of the result is axis `axes[i]` of this.
    ///
    /// # Panics
    /// If `axes` is no permutation of this array's axes.
    pub fn permuted(&self, axes: &[usize]) -> Self {
        assert_eq!(axes.len(), self.shape.len(), "one number an axis");
        let pick = |of: &[usize]| axes.iter().map(|&axis| of[axis]).collect();
        Self { shape: pick(&self.shape), strides: pick(&self.strides), ..self.clone() }
    }

    /// Its elements, the last axis fastest.
    pub(crate) fn read<R: Read + Seek>(&self, input: &mut Input<R>) -> Result<Vec<f32>, Error> {
        let bytes = input.read(self.span.clone(), "an array")?;
        let elements = self.dtype.decode(&bytes).ok_or_else(|| {
            Error::unsupported("an array of whole numbers", "weights are floating-point numbers")
        })?;
        if elements.is_empty() || self.strides == row_major_strides(&self.shape) {
            return Ok(elements);
        }
        let mut gathered = Vec::with_capacity(elements.len());
        gather(&elements, &self.shape, &self.strides, &mut gathered);
        Ok(gathered)
    }
}

fn gather(elements: &[f32], shape: &[usize], strides: &[usize], into: &mut Vec<f32>) {
    match (shape, strides) {
        ([], _) | (_, []) => into.extend(elements.first()),
        ([len], [stride]) => into.extend((0..*len).map(|i| elements[i * stride])),
        ([len, shape @ ..], [stride, strides @ ..]) => {
            for i in 0..*len {
                gather(&elements[i * stride..], shape, strides, into);
            }
        }
    }
}

fn product(shape: &[usize]) -> Option<u64> {
    shape.iter().try_fold(1u64, |count, &len| count.checked_mul(len as u64))
}

fn row_major_strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = shape[axis].max(1).saturating_mul(strides[axis]);
    }
    strides
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn input(values: &[f32]) -> Input<Cursor<Vec<u8>>> {
        Input::new(Cursor::new(values.iter().flat_map(|value| value.to_le_bytes()).collect())).unwrap()
    }

    #[test]
    fn axes_are_read_in_any_order() {
        let mut input = input(&[9.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let stored = Stored::new(Dtype::F32, vec![2, 3], vec![3, 1], 0..28, 1).unwrap();
        assert_eq!(stored.read(&mut input).unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let turned = stored.permuted(&[1, 0]);
        assert_eq!(turned.shape(), [3, 2]);
        assert_eq!(turned.read(&mut input).unwrap(), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    }

    #[test]
    fn scalars_and_empty_arrays_are_arrays() {
        let mut input = input(&[7.0]);
        let scalar = Stored::row_major(Dtype::F32, vec![], 0..4).unwrap();
        assert_eq!(scalar.read(&mut input).unwrap(), [7.0]);
        let empty = Stored::row_major(Dtype::F32, vec![3, 0], 0..4).unwrap();
        assert_eq!(empty.read(&mut input).unwrap(), [0.0; 0]);
    }

    #[test]
    fn half_precision_widens_exactly() {
        let bytes = [f16::from_f32(1.5).to_le_bytes(), f16::from_f32(-2.0).to_le_bytes()].concat();
        assert_eq!(Dtype::F16.decode(&bytes).unwrap(), [1.5, -2.0]);
        let bytes = [bf16::from_f32(1.5).to_le_bytes(), bf16::from_f32(-2.0).to_le_bytes()].concat();
        assert_eq!(Dtype::Bf16.decode(&bytes).unwrap(), [1.5, -2.0]);
        assert_eq!(Dtype::F64.decode(&0.1f64.to_le_bytes()).unwrap(), [0.1]);
    }

    #[test]
    fn nothing_reaches_beyond_what_is_stored() {
        let claim = |shape: &[usize], strides: &[usize], first| {
            Stored::new(Dtype::F32, shape.to_vec(), strides.to_vec(), 0..24, first)
        };
        assert!(claim(&[2, 3], &[3, 1], 0).is_ok());
        for (shape, strides, first) in [
            (vec![2, 3], vec![3, 1], 1),
            (vec![2, 3], vec![4, 1], 0),
            (vec![7], vec![0], 0),
            (vec![usize::MAX, 2], vec![1, 1], 0),
            (vec![2], vec![usize::MAX], u64::MAX),
            (vec![2, 3], vec![1], 0),
            (vec![0], vec![1], 7),
        ] {
            assert!(claim(&shape, &strides, first).is_err(), "{shape:?} {strides:?} {first}");
        }
    }
}
