//! The GGUF container, versions 2 and 3: metadata and where each tensor lies.
//! It reads no tensor data and knows no model; every count is checked against the file before memory is taken.

mod reader;
mod value;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use reader::Reader;
pub use value::{Array, Value};

/// Most dimensions that a tensor may have.
const MAX_DIMENSIONS: u32 = 4;
/// Longest name of a tensor, in bytes. The format says 64; longer ones exist.
const MAX_NAME: usize = 256;
/// Alignment of the tensor data when the file does not name one.
const DEFAULT_ALIGNMENT: u64 = 32;
/// The fewest bytes that one metadata entry can take: key length, type, one byte of value.
const MIN_ENTRY: usize = 13;
/// The fewest bytes that one tensor's description can take.
const MIN_TENSOR: usize = 24;
/// Most files that one model may be split into.
const MAX_SPLITS: usize = 4096;

/// Why a GGUF file is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GgufError {
    #[error("the file does not begin with the GGUF magic")]
    Magic,
    #[error("GGUF version {0} is not supported, wanted 2 or 3")]
    Version(u32),
    #[error("the file is written for big-endian machines, which is not supported")]
    BigEndian,
    #[error(
        "the file ends at byte {len} in the middle of {what}, wanted {wanted} bytes from byte {at}"
    )]
    CutShort { what: &'static str, at: usize, wanted: u64, len: usize },
    #[error("{what} is not valid UTF-8 at byte {at}")]
    Utf8 { what: &'static str, at: usize },
    #[error("metadata {key:?} has the unknown value type {code}")]
    ValueType { key: String, code: u32 },
    #[error("metadata {key:?} is a boolean of value {got}, wanted 0 or 1")]
    Boolean { key: String, got: u8 },
    #[error("metadata {key:?} nests arrays, which is not supported")]
    NestedArray { key: String },
    #[error("metadata {0:?} is there twice")]
    DuplicateKey(String),
    #[error("metadata {0:?} is missing")]
    MissingKey(String),
    #[error("metadata {key:?} is {got}, wanted {wanted}")]
    KeyType { key: String, wanted: &'static str, got: String },
    #[error("general.alignment is {0}, wanted a power of two up to 1 GiB")]
    Alignment(u64),
    #[error("tensor name of {0} bytes is too long, wanted at most {MAX_NAME}")]
    NameTooLong(u64),
    #[error("tensor {0:?} is there twice")]
    DuplicateTensor(String),
    #[error("tensor {name:?} has {got} dimensions, wanted 1 to {MAX_DIMENSIONS}")]
    Dimensions { name: String, got: u32 },
    #[error("tensor {name:?} of shape {shape:?} has an impossible size")]
    Shape { name: String, shape: Vec<u64> },
    #[error(
        "tensor {name:?} has rows of {columns} elements, wanted a multiple of {block} for {dtype}"
    )]
    Columns { name: String, columns: usize, block: usize, dtype: GgmlType },
    #[error(
        "tensor {name:?} starts at data offset {offset}, which is not a multiple of the alignment {alignment}"
    )]
    Unaligned { name: String, offset: u64, alignment: u64 },
    #[error("tensor {name:?} wants bytes {start} to {end}, the file has {len}")]
    OutOfBounds { name: String, start: u64, end: u64, len: usize },
    #[error("tensors {first:?} and {second:?} overlap")]
    Overlap { first: String, second: String },
    #[error("a model of {got} files is not supported, wanted 1 to {MAX_SPLITS}")]
    SplitFiles { got: usize },
    #[error("file {file} of the split has {key} {got}, wanted {wanted}")]
    Split { file: usize, key: &'static str, got: u64, wanted: u64 },
}

/// How the elements of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GgmlType(pub u32);

/// Elements per block and bytes per block of a stored type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockShape {
    pub elements: usize,
    pub bytes: usize,
}

impl GgmlType {
    pub const F32: Self = Self(0);
    pub const F16: Self = Self(1);
    pub const Q4_0: Self = Self(2);
    pub const Q4_1: Self = Self(3);
    pub const Q5_0: Self = Self(6);
    pub const Q5_1: Self = Self(7);
    pub const Q8_0: Self = Self(8);
    pub const Q8_1: Self = Self(9);
    pub const Q2_K: Self = Self(10);
    pub const Q3_K: Self = Self(11);
    pub const Q4_K: Self = Self(12);
    pub const Q5_K: Self = Self(13);
    pub const Q6_K: Self = Self(14);
    pub const Q8_K: Self = Self(15);
    pub const BF16: Self = Self(30);

    /// The format's name of the type, with the size of its blocks; `None` for a code that is not known.
    fn known(self) -> Option<(&'static str, BlockShape)> {
        let (name, elements, bytes) = match self.0 {
            0 => ("F32", 1, 4),
            1 => ("F16", 1, 2),
            2 => ("Q4_0", 32, 18),
            3 => ("Q4_1", 32, 20),
            6 => ("Q5_0", 32, 22),
            7 => ("Q5_1", 32, 24),
            8 => ("Q8_0", 32, 34),
            9 => ("Q8_1", 32, 36),
            10 => ("Q2_K", 256, 84),
            11 => ("Q3_K", 256, 110),
            12 => ("Q4_K", 256, 144),
            13 => ("Q5_K", 256, 176),
            14 => ("Q6_K", 256, 210),
            15 => ("Q8_K", 256, 292),
            16 => ("IQ2_XXS", 256, 66),
            17 => ("IQ2_XS", 256, 74),
            18 => ("IQ3_XXS", 256, 98),
            19 => ("IQ1_S", 256, 50),
            20 => ("IQ4_NL", 32, 18),
            21 => ("IQ3_S", 256, 110),
            22 => ("IQ2_S", 256, 82),
            23 => ("IQ4_XS", 256, 136),
            24 => ("I8", 1, 1),
            25 => ("I16", 1, 2),
            26 => ("I32", 1, 4),
            27 => ("I64", 1, 8),
            28 => ("F64", 1, 8),
            29 => ("IQ1_M", 256, 56),
            30 => ("BF16", 1, 2),
            34 => ("TQ1_0", 256, 54),
            35 => ("TQ2_0", 256, 66),
            39 => ("MXFP4", 32, 17),
            _ => return None,
        };
        Some((name, BlockShape { elements, bytes }))
    }

    /// The size of its blocks; `None` for a type that is not known.
    pub fn block(self) -> Option<BlockShape> {
        self.known().map(|(_, block)| block)
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.known() {
            Some((name, _)) => f.write_str(name),
            None => write!(f, "unknown type {}", self.0),
        }
    }
}

/// Where one tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    /// Outermost dimension first: `[rows, columns]` for a matrix, `columns` being contiguous.
    pub shape: Vec<usize>,
    pub dtype: GgmlType,
    /// Index of the file that holds it; 0 unless the model is split.
    pub file: usize,
    /// Its bytes in that file, inside it. Empty for a type that is not known, whose size cannot be told.
    pub range: Range<usize>,
}

impl TensorInfo {
    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The metadata and the tensors' places of one model, from one file or several.
#[derive(Debug, Clone, PartialEq)]
pub struct Gguf {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, TensorInfo>,
}

impl Gguf {
    /// Reads a model that is one file.
    ///
    /// # Errors
    /// What is wrong with the file; a file that is one of several is refused.
    pub fn parse(bytes: &[u8]) -> Result<Self, GgufError> {
        Self::parse_split(&[bytes])
    }

    /// Reads a model from its files, in the order of their numbers. The metadata is the first file's.
    ///
    /// # Errors
    /// What is wrong with a file, or with the files as a set.
    pub fn parse_split(files: &[&[u8]]) -> Result<Self, GgufError> {
        if files.is_empty() || files.len() > MAX_SPLITS {
            return Err(GgufError::SplitFiles { got: files.len() });
        }
        let mut whole: Option<Self> = None;
        for (file, bytes) in files.iter().enumerate() {
            let part = parse_file(bytes, file)?;
            check_split(&part, file, files.len())?;
            match &mut whole {
                None => whole = Some(part),
                Some(whole) => whole.take_tensors(part)?,
            }
        }
        let whole = whole.ok_or(GgufError::SplitFiles { got: 0 })?;
        whole.check_tensor_count()?;
        Ok(whole)
    }

    fn take_tensors(&mut self, part: Self) -> Result<(), GgufError> {
        for (name, tensor) in part.tensors {
            if self.tensors.insert(name.clone(), tensor).is_some() {
                return Err(GgufError::DuplicateTensor(name));
            }
        }
        Ok(())
    }

    fn check_tensor_count(&self) -> Result<(), GgufError> {
        let Some(wanted) = self.get_u64_opt("split.tensors.count")? else { return Ok(()) };
        let got = u64::try_from(self.tensors.len()).unwrap_or(u64::MAX);
        if got == wanted {
            return Ok(());
        }
        Err(GgufError::Split { file: 0, key: "split.tensors.count", got, wanted })
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// A number of any integer type that fits.
    ///
    /// # Errors
    /// The key is missing or is not such a number.
    pub fn get_u32(&self, key: &str) -> Result<u32, GgufError> {
        required(key, self.get_u32_opt(key)?)
    }

    /// As [`Gguf::get_u32`]; `None` when the key is missing.
    ///
    /// # Errors
    /// The key is there and is not such a number.
    pub fn get_u32_opt(&self, key: &str) -> Result<Option<u32>, GgufError> {
        self.typed(key, "a 32-bit unsigned integer", |value| {
            value.as_u64().and_then(|wide| u32::try_from(wide).ok())
        })
    }

    /// A number of any integer type that is not negative.
    ///
    /// # Errors
    /// The key is missing or is not such a number.
    pub fn get_u64(&self, key: &str) -> Result<u64, GgufError> {
        required(key, self.get_u64_opt(key)?)
    }

    /// As [`Gguf::get_u64`]; `None` when the key is missing.
    ///
    /// # Errors
    /// The key is there and is not such a number.
    pub fn get_u64_opt(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.typed(key, "an unsigned integer", Value::as_u64)
    }

    /// A 32-bit float.
    ///
    /// # Errors
    /// The key is missing or is not one.
    pub fn get_f32(&self, key: &str) -> Result<f32, GgufError> {
        required(key, self.get_f32_opt(key)?)
    }

    /// As [`Gguf::get_f32`]; `None` when the key is missing.
    ///
    /// # Errors
    /// The key is there and is not a 32-bit float.
    pub fn get_f32_opt(&self, key: &str) -> Result<Option<f32>, GgufError> {
        self.typed(key, "a 32-bit float", |value| match value {
            Value::F32(number) => Some(*number),
            _ => None,
        })
    }

    /// A string.
    ///
    /// # Errors
    /// The key is missing or is not one.
    pub fn get_str(&self, key: &str) -> Result<&str, GgufError> {
        required(key, self.get_str_opt(key)?)
    }

    /// As [`Gguf::get_str`]; `None` when the key is missing.
    ///
    /// # Errors
    /// The key is there and is not a string.
    pub fn get_str_opt(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "a string", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A boolean.
    ///
    /// # Errors
    /// The key is missing or is not one.
    pub fn get_bool(&self, key: &str) -> Result<bool, GgufError> {
        required(key, self.get_bool_opt(key)?)
    }

    /// As [`Gguf::get_bool`]; `None` when the key is missing.
    ///
    /// # Errors
    /// The key is there and is not a boolean.
    pub fn get_bool_opt(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "a boolean", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    /// An array of strings.
    ///
    /// # Errors
    /// The key is missing or is not one.
    pub fn get_strings(&self, key: &str) -> Result<&[String], GgufError> {
        required(key, self.get_strings_opt(key)?)
    }

    /// As [`Gguf::get_strings`]; `None` when the key is missing.
    ///
    /// # Errors
    /// The key is there and is not an array of strings.
    pub fn get_strings_opt(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Array(Array::Strings(strings)) => Some(strings.as_slice()),
            _ => None,
        })
    }

    /// An array of any type.
    ///
    /// # Errors
    /// The key is missing or is not one.
    pub fn get_array(&self, key: &str) -> Result<&Array, GgufError> {
        required(key, self.get_array_opt(key)?)
    }

    /// As [`Gguf::get_array`]; `None` when the key is missing.
    ///
    /// # Errors
    /// The key is there and is not an array.
    pub fn get_array_opt(&self, key: &str) -> Result<Option<&Array>, GgufError> {
        self.typed(key, "an array", |value| match value {
            Value::Array(array) => Some(array),
            _ => None,
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(GgufError::KeyType { key: key.to_owned(), wanted, got: value.describe() }),
        }
    }
}

fn required<T>(key: &str, value: Option<T>) -> Result<T, GgufError> {
    value.ok_or_else(|| GgufError::MissingKey(key.to_owned()))
}

fn parse_file(bytes: &[u8], file: usize) -> Result<Gguf, GgufError> {
    let mut reader = Reader::new(bytes);
    check_header(&mut reader)?;
    let n_tensors = reader.count("the tensor count", MIN_TENSOR)?;
    let n_entries = reader.count("the metadata count", MIN_ENTRY)?;
    let mut metadata = BTreeMap::new();
    for _ in 0..n_entries {
        let key = reader.string("a metadata key")?;
        let value = Value::read(&mut reader, &key)?;
        if metadata.contains_key(&key) {
            return Err(GgufError::DuplicateKey(key));
        }
        metadata.insert(key, value);
    }
    let mut gguf = Gguf { metadata, tensors: BTreeMap::new() };
    gguf.tensors = read_tensors(&mut reader, &gguf, n_tensors, file)?;
    Ok(gguf)
}

fn check_header(reader: &mut Reader<'_>) -> Result<(), GgufError> {
    if reader.bytes("the magic", 4).map_err(|_| GgufError::Magic)? != b"GGUF" {
        return Err(GgufError::Magic);
    }
    match reader.u32("the version")? {
        2 | 3 => Ok(()),
        swapped if matches!(swapped.swap_bytes(), 1..=3) => Err(GgufError::BigEndian),
        other => Err(GgufError::Version(other)),
    }
}

/// A tensor as described, before its place is known to be real.
struct Described {
    name: String,
    shape: Vec<usize>,
    dtype: GgmlType,
    offset: u64,
    bytes: u64,
}

fn read_tensors(
    reader: &mut Reader<'_>,
    gguf: &Gguf,
    n_tensors: usize,
    file: usize,
) -> Result<BTreeMap<String, TensorInfo>, GgufError> {
    let alignment = gguf.get_u64_opt("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || alignment > 1 << 30 {
        return Err(GgufError::Alignment(alignment));
    }
    let described =
        (0..n_tensors).map(|_| read_description(reader)).collect::<Result<Vec<_>, _>>()?;
    let data = u64::try_from(reader.at()).unwrap_or(u64::MAX).next_multiple_of(alignment);
    let mut tensors = BTreeMap::new();
    for tensor in described {
        let info = place(tensor, alignment, data, reader.len(), file)?;
        let name = info.name.clone();
        if tensors.insert(name.clone(), info).is_some() {
            return Err(GgufError::DuplicateTensor(name));
        }
    }
    check_overlap(&tensors)?;
    Ok(tensors)
}

fn read_description(reader: &mut Reader<'_>) -> Result<Described, GgufError> {
    let name = reader.bounded_string("a tensor name", MAX_NAME)?;
    let n_dimensions = reader.u32("a tensor's dimensions")?;
    if n_dimensions == 0 || n_dimensions > MAX_DIMENSIONS {
        return Err(GgufError::Dimensions { name, got: n_dimensions });
    }
    let mut dimensions = Vec::new();
    for _ in 0..n_dimensions {
        dimensions.push(reader.u64("a tensor's shape")?);
    }
    // The file has the contiguous dimension first.
    dimensions.reverse();
    let dtype = GgmlType(reader.u32("a tensor's type")?);
    let offset = reader.u64("a tensor's offset")?;
    let (shape, bytes) = size(&name, &dimensions, dtype)?;
    Ok(Described { name, shape, dtype, offset, bytes })
}

/// The shape in `usize` and the bytes it takes, 0 for a type that is not known.
fn size(name: &str, dimensions: &[u64], dtype: GgmlType) -> Result<(Vec<usize>, u64), GgufError> {
    let impossible = || GgufError::Shape { name: name.to_owned(), shape: dimensions.to_vec() };
    let shape = dimensions
        .iter()
        .map(|&dimension| usize::try_from(dimension).map_err(|_| impossible()))
        .collect::<Result<Vec<_>, _>>()?;
    let elements = shape
        .iter()
        .try_fold(1_usize, |product, &dimension| product.checked_mul(dimension))
        .filter(|&elements| elements > 0)
        .ok_or_else(impossible)?;
    let Some(block) = dtype.block() else { return Ok((shape, 0)) };
    let columns = shape.last().copied().unwrap_or(0);
    if columns % block.elements != 0 {
        let name = name.to_owned();
        return Err(GgufError::Columns { name, columns, block: block.elements, dtype });
    }
    let bytes = (elements / block.elements).checked_mul(block.bytes).ok_or_else(impossible)?;
    Ok((shape, u64::try_from(bytes).map_err(|_| impossible())?))
}

fn place(
    tensor: Described,
    alignment: u64,
    data: u64,
    len: usize,
    file: usize,
) -> Result<TensorInfo, GgufError> {
    let Described { name, shape, dtype, offset, bytes } = tensor;
    if offset % alignment != 0 {
        return Err(GgufError::Unaligned { name, offset, alignment });
    }
    let start = data.saturating_add(offset);
    let end = start.saturating_add(bytes);
    match (usize::try_from(start), usize::try_from(end)) {
        (Ok(start), Ok(end)) if end <= len => {
            Ok(TensorInfo { name, shape, dtype, file, range: start..end })
        }
        _ => Err(GgufError::OutOfBounds { name, start, end, len }),
    }
}

fn check_overlap(tensors: &BTreeMap<String, TensorInfo>) -> Result<(), GgufError> {
    let mut places: Vec<&TensorInfo> = tensors.values().collect();
    places.sort_by_key(|tensor| (tensor.range.start, tensor.range.end));
    for pair in places.windows(2) {
        if let [first, second] = pair
            && first.range.end > second.range.start
        {
            let (first, second) = (first.name.clone(), second.name.clone());
            return Err(GgufError::Overlap { first, second });
        }
    }
    Ok(())
}

fn check_split(part: &Gguf, file: usize, n_files: usize) -> Result<(), GgufError> {
    for (key, wanted, single) in [("split.no", file, 0), ("split.count", n_files, 1)] {
        let wanted = u64::try_from(wanted).unwrap_or(u64::MAX);
        // A single file need not say that it is one; a count of 0 says the same.
        let got = match part.get_u64_opt(key)? {
            None | Some(0) => single,
            Some(got) => got,
        };
        if got != wanted {
            return Err(GgufError::Split { file, key, got, wanted });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
