//! A cursor over foreign bytes that says what was cut short. It takes no memory beyond what the bytes back.

use super::GgufError;

/// Reads little-endian values one after the other.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// Bytes of the whole file.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    fn cut_short(&self, what: &'static str, wanted: u64) -> GgufError {
        GgufError::CutShort { what, at: self.at, wanted, len: self.bytes.len() }
    }

    pub(super) fn bytes(
        &mut self,
        what: &'static str,
        n_bytes: usize,
    ) -> Result<&'a [u8], GgufError> {
        let end = self.at.checked_add(n_bytes);
        let read = end.and_then(|end| self.bytes.get(self.at..end));
        let Some(read) = read else {
            return Err(self.cut_short(what, u64::try_from(n_bytes).unwrap_or(u64::MAX)));
        };
        self.at += n_bytes;
        Ok(read)
    }

    pub(super) fn array<const N: usize>(
        &mut self,
        what: &'static str,
    ) -> Result<[u8; N], GgufError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(what, N)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, GgufError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, GgufError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of items that take at least `item_bytes` each: refused when the rest of the file cannot hold them.
    pub(super) fn count(
        &mut self,
        what: &'static str,
        item_bytes: usize,
    ) -> Result<usize, GgufError> {
        let count = self.u64(what)?;
        let item_bytes = u64::try_from(item_bytes).unwrap_or(u64::MAX);
        let wanted = count.saturating_mul(item_bytes);
        let left = u64::try_from(self.bytes.len() - self.at).unwrap_or(u64::MAX);
        match usize::try_from(count) {
            Ok(count) if wanted <= left => Ok(count),
            _ => Err(self.cut_short(what, wanted)),
        }
    }

    pub(super) fn string(&mut self, what: &'static str) -> Result<String, GgufError> {
        let n_bytes = self.count(what, 1)?;
        let at = self.at;
        let bytes = self.bytes(what, n_bytes)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => Err(GgufError::Utf8 { what, at: at + error.valid_up_to() }),
        }
    }

    pub(super) fn bounded_string(
        &mut self,
        what: &'static str,
        most: usize,
    ) -> Result<String, GgufError> {
        let text = self.string(what)?;
        if text.len() > most {
            return Err(GgufError::NameTooLong(u64::try_from(text.len()).unwrap_or(u64::MAX)));
        }
        Ok(text)
    }
}
