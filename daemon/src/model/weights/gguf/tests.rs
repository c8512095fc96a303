//! Files built by hand, right and wrong.

use super::{Array, GgmlType, Gguf, GgufError, Value};

/// Writes a GGUF file piece by piece.
struct File {
    version: u32,
    entries: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: Vec<u8>,
}

fn text(text: &str) -> Vec<u8> {
    let mut bytes = u64::try_from(text.len()).unwrap().to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

impl File {
    fn new() -> Self {
        Self { version: 3, entries: Vec::new(), tensors: Vec::new(), data: vec![0; 4096] }
    }

    fn raw(mut self, key: &str, code: u32, value: &[u8]) -> Self {
        let mut entry = text(key);
        entry.extend(code.to_le_bytes());
        entry.extend(value);
        self.entries.push(entry);
        self
    }

    fn number(self, key: &str, number: u32) -> Self {
        self.raw(key, 4, &number.to_le_bytes())
    }

    fn tensor(mut self, name: &str, dimensions: &[u64], dtype: u32, offset: u64) -> Self {
        let mut tensor = text(name);
        tensor.extend(u32::try_from(dimensions.len()).unwrap().to_le_bytes());
        dimensions.iter().for_each(|dimension| tensor.extend(dimension.to_le_bytes()));
        tensor.extend(dtype.to_le_bytes());
        tensor.extend(offset.to_le_bytes());
        self.tensors.push(tensor);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(u64::try_from(self.tensors.len()).unwrap().to_le_bytes());
        bytes.extend(u64::try_from(self.entries.len()).unwrap().to_le_bytes());
        bytes.extend(self.entries.concat());
        bytes.extend(self.tensors.concat());
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(&self.data);
        bytes
    }

    fn parse(&self) -> Result<Gguf, GgufError> {
        Gguf::parse(&self.bytes())
    }
}

fn two_tensors() -> File {
    File::new()
        .number("general.file_type", 7)
        .raw("name", 8, &text("tiny"))
        .tensor("a", &[32, 2], 8, 0)
        .tensor("b", &[4], 0, 96)
}

#[test]
fn shape_is_outermost_first_and_the_range_lies_in_the_file() {
    let file = two_tensors();
    let gguf = file.parse().unwrap();
    let a = gguf.tensor("a").unwrap();
    assert_eq!((a.shape.as_slice(), a.dtype, a.range.len()), (&[2, 32][..], GgmlType::Q8_0, 68));
    let b = gguf.tensor("b").unwrap();
    assert_eq!(b.range.start - a.range.start, 96);
    assert_eq!(b.range.len(), 16);
    assert!(b.range.end <= file.bytes().len());
}

#[test]
fn version_2_is_read_like_version_3() {
    let file = File { version: 2, ..two_tensors() };
    assert_eq!(file.parse().unwrap(), two_tensors().parse().unwrap());
}

#[test]
fn a_missing_key_is_named_and_a_wrong_type_says_both_types() {
    let gguf = two_tensors().parse().unwrap();
    assert_eq!(gguf.get_u32("nothing"), Err(GgufError::MissingKey("nothing".to_owned())));
    assert_eq!(gguf.get_u32_opt("nothing"), Ok(None));
    assert_eq!(
        gguf.get_str("general.file_type").unwrap_err().to_string(),
        "metadata \"general.file_type\" is the u32 7, wanted a string"
    );
    assert_eq!(gguf.get_u32("general.file_type"), Ok(7));
    assert_eq!(gguf.get_str("name"), Ok("tiny"));
}

#[test]
fn arrays_keep_their_type() {
    let mut strings = 8_u32.to_le_bytes().to_vec();
    strings.extend(2_u64.to_le_bytes());
    strings.extend(text("x"));
    strings.extend(text("yy"));
    let mut floats = 6_u32.to_le_bytes().to_vec();
    floats.extend(1_u64.to_le_bytes());
    floats.extend(1.5_f32.to_le_bytes());
    let gguf = File::new().raw("s", 9, &strings).raw("f", 9, &floats).parse().unwrap();
    assert_eq!(gguf.get_strings("s").unwrap(), ["x".to_owned(), "yy".to_owned()]);
    assert_eq!(gguf.metadata.get("f"), Some(&Value::Array(Array::F32s(vec![1.5]))));
}

#[test]
fn counts_larger_than_the_file_are_refused_before_memory_is_taken() {
    for place in [8, 16] {
        let mut bytes = two_tensors().bytes();
        bytes[place..place + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(Gguf::parse(&bytes), Err(GgufError::CutShort { .. })));
    }
    for kind in [0_u32, 8, 12] {
        let mut array = kind.to_le_bytes().to_vec();
        array.extend((1_u64 << 40).to_le_bytes());
        let refused = File::new().raw("huge", 9, &array).parse();
        assert!(matches!(refused, Err(GgufError::CutShort { what: "an array's length", .. })));
    }
}

#[test]
fn a_file_cut_anywhere_before_its_data_ends_is_refused() {
    let bytes = File { data: vec![0; 112], ..two_tensors() }.bytes();
    assert!(Gguf::parse(&bytes).is_ok());
    for len in 0..bytes.len() {
        assert!(Gguf::parse(&bytes[..len]).is_err(), "cut to {len} bytes was taken");
    }
}

#[test]
fn overlapping_tensors_are_refused() {
    for length in [4, 32] {
        let file = File::new().tensor("a", &[32], 0, 0).tensor("b", &[length], 0, 96);
        assert!(matches!(file.parse(), Err(GgufError::Overlap { .. })), "{length}");
    }
}

#[test]
fn unaligned_and_out_of_bounds_tensors_are_refused() {
    let refused = File::new().tensor("a", &[4], 0, 4).parse();
    assert!(matches!(refused, Err(GgufError::Unaligned { .. })));
    for offset in [4096, u64::MAX - 31] {
        let refused = File::new().tensor("a", &[4], 0, offset).parse();
        assert!(matches!(refused, Err(GgufError::OutOfBounds { .. })), "{refused:?}");
    }
}

#[test]
fn impossible_shapes_are_refused() {
    let shapes: [&[u64]; 4] = [&[u64::MAX, 2], &[1 << 40, 1 << 40], &[0], &[1 << 62]];
    for shape in shapes {
        let refused = File::new().tensor("a", shape, 0, 0).parse();
        assert!(matches!(refused, Err(GgufError::Shape { .. })), "{refused:?}");
    }
    let refused = File::new().tensor("a", &[1; 5], 0, 0).parse();
    assert!(matches!(refused, Err(GgufError::Dimensions { .. })));
    let refused = File::new().tensor("a", &[33], 8, 0).parse();
    assert!(matches!(refused, Err(GgufError::Columns { .. })));
}

#[test]
fn duplicates_and_bad_alignment_are_refused() {
    let refused = File::new().number("k", 1).number("k", 2).parse();
    assert_eq!(refused, Err(GgufError::DuplicateKey("k".to_owned())));
    let refused = File::new().tensor("a", &[4], 0, 0).tensor("a", &[4], 0, 32).parse();
    assert_eq!(refused, Err(GgufError::DuplicateTensor("a".to_owned())));
    for alignment in [0, 33, 1 << 31] {
        let refused = File::new().number("general.alignment", alignment).parse();
        assert_eq!(refused, Err(GgufError::Alignment(u64::from(alignment))));
    }
}

#[test]
fn an_unknown_tensor_type_is_left_to_the_one_who_loads_it() {
    let gguf = File::new().tensor("a", &[4], 99, 0).parse().unwrap();
    assert_eq!(gguf.tensor("a").unwrap().dtype.to_string(), "unknown type 99");
}

#[test]
fn foreign_magic_versions_and_byte_orders_are_refused() {
    assert_eq!(Gguf::parse(b"PK\x03\x04rest"), Err(GgufError::Magic));
    assert_eq!(Gguf::parse(b""), Err(GgufError::Magic));
    let refuse = |version| File { version, ..File::new() }.parse();
    assert_eq!(refuse(1), Err(GgufError::Version(1)));
    assert_eq!(refuse(3_u32.swap_bytes()), Err(GgufError::BigEndian));
}

fn split(number: u32, count: u32, tensor: &str) -> Vec<u8> {
    File::new()
        .number("split.no", number)
        .number("split.count", count)
        .number("split.tensors.count", 2)
        .tensor(tensor, &[4], 0, 0)
        .bytes()
}

#[test]
fn a_split_model_has_all_tensors_and_each_knows_its_file() {
    let (first, second) = (split(0, 2, "a"), split(1, 2, "b"));
    let gguf = Gguf::parse_split(&[&first, &second]).unwrap();
    assert_eq!(gguf.tensor("a").unwrap().file, 0);
    assert_eq!(gguf.tensor("b").unwrap().file, 1);
}

#[test]
fn a_split_in_disorder_or_with_a_file_missing_is_refused() {
    let (first, second) = (split(0, 2, "a"), split(1, 2, "b"));
    assert!(matches!(
        Gguf::parse_split(&[&second, &first]),
        Err(GgufError::Split { key: "split.no", .. })
    ));
    assert!(matches!(Gguf::parse(&first), Err(GgufError::Split { key: "split.count", .. })));
    let twin = split(1, 2, "a");
    let refused = Gguf::parse_split(&[&first, &twin]);
    assert_eq!(refused, Err(GgufError::DuplicateTensor("a".to_owned())));
}

#[test]
fn a_split_with_fewer_tensors_than_said_is_refused() {
    let first = File::new().number("split.count", 1).number("split.tensors.count", 3).tensor(
        "a",
        &[4],
        0,
        0,
    );
    assert!(matches!(
        first.parse(),
        Err(GgufError::Split { key: "split.tensors.count", got: 1, wanted: 3, .. })
    ));
}
