//! Server-sent events out of a stream of bytes, cut anywhere. An event has a largest size.
//! https://html.spec.whatwg.org/multipage/server-sent-events.html

/// The largest event that is read.
const LARGEST_EVENT: usize = 4 << 20;

/// Collects bytes until an event is whole.
#[derive(Debug, Default)]
pub(super) struct Events {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    after_carriage_return: bool,
}

/// The stream is no stream of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an event is larger than {LARGEST_EVENT} bytes")]
pub(super) struct TooLarge;

impl Events {
    /// Takes more bytes and gives the data of the events that they complete.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, TooLarge> {
        let mut events = Vec::new();
        for &byte in bytes {
            let ends_pair = byte == b'\n' && std::mem::take(&mut self.after_carriage_return);
            if ends_pair {
                continue;
            }
            match byte {
                b'\n' | b'\r' => {
                    self.after_carriage_return = byte == b'\r';
                    events.extend(self.end_line());
                }
                _ => {
                    self.after_carriage_return = false;
                    if self.line.len() + self.data.len() >= LARGEST_EVENT {
                        return Err(TooLarge);
                    }
                    self.line.push(byte);
                }
            }
        }
        Ok(events)
    }

    fn end_line(&mut self) -> Option<Vec<u8>> {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            let whole = std::mem::take(&mut self.data);
            return std::mem::take(&mut self.has_data).then_some(whole);
        }
        if let Some(value) = line.strip_prefix(b"data:") {
            if self.has_data {
                self.data.push(b'\n');
            }
            self.has_data = true;
            self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] =
        b": hello\n\ndata: one\n\nevent: x\ndata:two\r\ndata: lines\r\n\r\ndata: [DONE]\n\n";

    #[test]
    fn events_are_the_same_however_the_stream_is_cut() {
        let wanted: Vec<Vec<u8>> =
            vec![b"one".to_vec(), b"two\nlines".to_vec(), b"[DONE]".to_vec()];
        for size in 1..=STREAM.len() {
            let mut events = Events::default();
            let pieces = STREAM.chunks(size).map(|piece| events.push(piece).unwrap());
            assert_eq!(pieces.flatten().collect::<Vec<_>>(), wanted, "{size}");
        }
    }

    #[test]
    fn an_event_without_an_end_is_bounded() {
        let mut events = Events::default();
        let piece = vec![b'x'; 1 << 20];
        assert!((0..6).any(|_| events.push(&piece) == Err(TooLarge)));
    }
}
