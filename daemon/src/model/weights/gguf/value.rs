//! The typed values of GGUF metadata.

use super::GgufError;
use super::reader::Reader;

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    U64(u64),
    I64(i64),
    F64(f64),
    Array(Array),
}

/// An array of one type. The file's length bounds its memory.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    U8s(Vec<u8>),
    I8s(Vec<i8>),
    U16s(Vec<u16>),
    I16s(Vec<i16>),
    U32s(Vec<u32>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Bools(Vec<bool>),
    Strings(Vec<String>),
    U64s(Vec<u64>),
    I64s(Vec<i64>),
    F64s(Vec<f64>),
}

const ARRAY: u32 = 9;

impl Value {
    /// Reads a type code and its value.
    pub(super) fn read(reader: &mut Reader<'_>, key: &str) -> Result<Self, GgufError> {
        const WHAT: &str = "a metadata value";
        let code = reader.u32("a metadata type")?;
        Ok(match code {
            0 => Self::U8(u8::from_le_bytes(reader.array(WHAT)?)),
            1 => Self::I8(i8::from_le_bytes(reader.array(WHAT)?)),
            2 => Self::U16(u16::from_le_bytes(reader.array(WHAT)?)),
            3 => Self::I16(i16::from_le_bytes(reader.array(WHAT)?)),
            4 => Self::U32(u32::from_le_bytes(reader.array(WHAT)?)),
            5 => Self::I32(i32::from_le_bytes(reader.array(WHAT)?)),
            6 => Self::F32(f32::from_le_bytes(reader.array(WHAT)?)),
            7 => Self::Bool(boolean(u8::from_le_bytes(reader.array(WHAT)?), key)?),
            8 => Self::String(reader.string("a metadata string")?),
            ARRAY => Self::Array(Array::read(reader, key)?),
            10 => Self::U64(u64::from_le_bytes(reader.array(WHAT)?)),
            11 => Self::I64(i64::from_le_bytes(reader.array(WHAT)?)),
            12 => Self::F64(f64::from_le_bytes(reader.array(WHAT)?)),
            code => return Err(GgufError::ValueType { key: key.to_owned(), code }),
        })
    }

    /// The value as an unsigned integer, from any integer type that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::U8(number) => Some(u64::from(*number)),
            Self::U16(number) => Some(u64::from(*number)),
            Self::U32(number) => Some(u64::from(*number)),
            Self::U64(number) => Some(*number),
            Self::I8(number) => u64::try_from(*number).ok(),
            Self::I16(number) => u64::try_from(*number).ok(),
            Self::I32(number) => u64::try_from(*number).ok(),
            Self::I64(number) => u64::try_from(*number).ok(),
            Self::F32(_) | Self::Bool(_) | Self::String(_) | Self::F64(_) | Self::Array(_) => None,
        }
    }

    /// The type, and the value where it is one number, for messages.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::U8(number) => format!("the u8 {number}"),
            Self::I8(number) => format!("the i8 {number}"),
            Self::U16(number) => format!("the u16 {number}"),
            Self::I16(number) => format!("the i16 {number}"),
            Self::U32(number) => format!("the u32 {number}"),
            Self::I32(number) => format!("the i32 {number}"),
            Self::F32(number) => format!("the f32 {number}"),
            Self::Bool(flag) => format!("the boolean {flag}"),
            Self::String(_) => "a string".to_owned(),
            Self::U64(number) => format!("the u64 {number}"),
            Self::I64(number) => format!("the i64 {number}"),
            Self::F64(number) => format!("the f64 {number}"),
            Self::Array(array) => format!("an array of {} {}", array.len(), array.kind()),
        }
    }
}

impl Array {
    fn read(reader: &mut Reader<'_>, key: &str) -> Result<Self, GgufError> {
        let code = reader.u32("an array's type")?;
        Ok(match code {
            0 => Self::U8s(numbers(reader, u8::from_le_bytes)?),
            1 => Self::I8s(numbers(reader, i8::from_le_bytes)?),
            2 => Self::U16s(numbers(reader, u16::from_le_bytes)?),
            3 => Self::I16s(numbers(reader, i16::from_le_bytes)?),
            4 => Self::U32s(numbers(reader, u32::from_le_bytes)?),
            5 => Self::I32s(numbers(reader, i32::from_le_bytes)?),
            6 => Self::F32s(numbers(reader, f32::from_le_bytes)?),
            7 => {
                let bytes = numbers(reader, u8::from_le_bytes)?;
                let flags = bytes.into_iter().map(|byte| boolean(byte, key));
                Self::Bools(flags.collect::<Result<_, _>>()?)
            }
            8 => Self::Strings(strings(reader)?),
            ARRAY => return Err(GgufError::NestedArray { key: key.to_owned() }),
            10 => Self::U64s(numbers(reader, u64::from_le_bytes)?),
            11 => Self::I64s(numbers(reader, i64::from_le_bytes)?),
            12 => Self::F64s(numbers(reader, f64::from_le_bytes)?),
            code => return Err(GgufError::ValueType { key: key.to_owned(), code }),
        })
    }

    /// The number of items.
    pub fn len(&self) -> usize {
        match self {
            Self::U8s(items) => items.len(),
            Self::I8s(items) => items.len(),
            Self::U16s(items) => items.len(),
            Self::I16s(items) => items.len(),
            Self::U32s(items) => items.len(),
            Self::I32s(items) => items.len(),
            Self::F32s(items) => items.len(),
            Self::Bools(items) => items.len(),
            Self::Strings(items) => items.len(),
            Self::U64s(items) => items.len(),
            Self::I64s(items) => items.len(),
            Self::F64s(items) => items.len(),
        }
    }

    /// Whether there is no item.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::U8s(_) => "u8",
            Self::I8s(_) => "i8",
            Self::U16s(_) => "u16",
            Self::I16s(_) => "i16",
            Self::U32s(_) => "u32",
            Self::I32s(_) => "i32",
            Self::F32s(_) => "f32",
            Self::Bools(_) => "booleans",
            Self::Strings(_) => "strings",
            Self::U64s(_) => "u64",
            Self::I64s(_) => "i64",
            Self::F64s(_) => "f64",
        }
    }
}

fn boolean(byte: u8, key: &str) -> Result<bool, GgufError> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        got => Err(GgufError::Boolean { key: key.to_owned(), got }),
    }
}

fn numbers<T, const N: usize>(
    reader: &mut Reader<'_>,
    read: fn([u8; N]) -> T,
) -> Result<Vec<T>, GgufError> {
    let n_items = reader.count("an array's length", N)?;
    let mut items = Vec::with_capacity(n_items);
    for _ in 0..n_items {
        items.push(read(reader.array("an array")?));
    }
    Ok(items)
}

/// A string takes at least its 8 bytes of length in the file, and 24 of memory: no more than three times the file.
fn strings(reader: &mut Reader<'_>) -> Result<Vec<String>, GgufError> {
    let n_items = reader.count("an array's length", 8)?;
    let mut items = Vec::with_capacity(n_items);
    for _ in 0..n_items {
        items.push(reader.string("an array's string")?);
    }
    Ok(items)
}
