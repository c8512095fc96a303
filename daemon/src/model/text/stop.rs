//! Stop strings in text that arrives in pieces. No part of one is ever let out, wherever the pieces are cut.

/// Whether the text that is let out ends with the stop string.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IncludeStop {
    Yes,
    No,
}

/// What a piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Held {
    /// This may be sent; it may be empty.
    Text(String),
    /// A stop string was found. `text` may still be sent, nothing after it.
    Stopped { text: String, stop: String },
}

/// Holds back what may become a stop string.
///
/// The stop string that *ends* first wins, and among those the longest, so that the answer does not depend on
/// how the text is cut into pieces.
#[derive(Debug, Clone)]
pub struct StopStrings {
    stops: Vec<String>,
    include: IncludeStop,
    /// Text that is not let out: a proper prefix of some stop string.
    held: String,
    found: Option<String>,
}

impl StopStrings {
    /// Looks for `stops`; empty ones are ignored.
    pub fn new(stops: Vec<String>, include: IncludeStop) -> Self {
        let stops = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        Self { stops, include, held: String::new(), found: None }
    }

    /// Takes the next piece. After a stop string was found everything is dropped.
    pub fn push(&mut self, text: &str) -> Held {
        if let Some(stop) = &self.found {
            return Held::Stopped { text: String::new(), stop: stop.clone() };
        }
        if self.stops.is_empty() {
            return Held::Text(text.to_owned());
        }
        self.held.push_str(text);
        if let Some((start, stop)) = self.first_to_end() {
            return self.stopped(start, stop);
        }
        let keep = self.longest_beginning();
        let rest = self.held.split_off(self.held.len() - keep);
        Held::Text(std::mem::replace(&mut self.held, rest))
    }

    /// What is still held when the output ended without a stop string.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    fn stopped(&mut self, start: usize, stop: String) -> Held {
        let mut text = std::mem::take(&mut self.held);
        text.truncate(match self.include {
            IncludeStop::Yes => start + stop.len(),
            IncludeStop::No => start,
        });
        self.found = Some(stop.clone());
        Held::Stopped { text, stop }
    }

    /// Start and text of the stop string that ends first.
    fn first_to_end(&self) -> Option<(usize, String)> {
        let found = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start, stop))
        });
        found
            .min_by_key(|&(end, start, _)| (end, start))
            .map(|(_, start, stop)| (start, stop.clone()))
    }

    /// The length of the longest end of the held text that begins a stop string.
    fn longest_beginning(&self) -> usize {
        let longest = self.stops.iter().map(|stop| beginning_at_end(&self.held, stop)).max();
        longest.unwrap_or(0)
    }
}

/// The length of the longest end of `text` with which `stop` begins.
fn beginning_at_end(text: &str, stop: &str) -> usize {
    let most = text.len().min(stop.len() - 1);
    let from = (text.len() - most..text.len())
        .find(|&from| text.get(from..).is_some_and(|end| stop.starts_with(end)));
    from.map_or(0, |from| text.len() - from)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{Just, Strategy, prop_assert_eq, prop_oneof, proptest};

    use super::{Held, IncludeStop, StopStrings};

    /// The text let out, and the stop string found, for the given pieces.
    fn run(stops: &[String], include: IncludeStop, pieces: &[String]) -> (String, Option<String>) {
        let mut strings = StopStrings::new(stops.to_vec(), include);
        let mut out = String::new();
        for piece in pieces {
            match strings.push(piece) {
                Held::Text(text) => out.push_str(&text),
                Held::Stopped { text, stop } => {
                    out.push_str(&text);
                    return (out, Some(stop));
                }
            }
        }
        out.push_str(&strings.flush());
        (out, None)
    }

    fn check(stops: &[&str], pieces: &[&str], text: &str, stop: Option<&str>) {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let pieces: Vec<String> = pieces.iter().map(|&piece| piece.to_owned()).collect();
        let wanted = (text.to_owned(), stop.map(str::to_owned));
        assert_eq!(run(&stops, IncludeStop::No, &pieces), wanted);
    }

    #[test]
    fn a_stop_string_across_pieces_is_found_and_no_part_of_it_is_sent() {
        check(&["END"], &["one E", "N", "D two"], "one ", Some("END"));
        check(&["END"], &["one E", "N", "X"], "one ENX", None);
        check(&["END"], &["one EN"], "one EN", None);
        check(&["aab"], &["aa", "ab"], "a", Some("aab"));
    }

    #[test]
    fn characters_of_several_bytes_are_not_split() {
        check(&["é!"], &["caf", "é", "?"], "café?", None);
        check(&["é!"], &["caf", "é", "!"], "caf", Some("é!"));
        check(&["→→"], &["a→", "b→→"], "a→b", Some("→→"));
    }

    #[test]
    fn the_stop_string_that_ends_first_wins_however_the_text_is_cut() {
        check(&["abcd", "bc"], &["abcd"], "a", Some("bc"));
        check(&["abcd", "bc"], &["a", "b", "c", "d"], "a", Some("bc"));
        check(&["bc", "abc"], &["xabc"], "x", Some("abc"));
    }

    #[test]
    fn the_stop_string_is_part_of_the_text_when_asked() {
        let pieces = ["one E".to_owned(), "ND two".to_owned()];
        let (text, _) = run(&["END".to_owned()], IncludeStop::Yes, &pieces);
        assert_eq!(text, "one END");
    }

    #[test]
    fn text_is_not_held_longer_than_it_may_become_a_stop_string() {
        let mut strings = StopStrings::new(vec!["END".to_owned()], IncludeStop::No);
        assert_eq!(strings.push("an E"), Held::Text("an ".to_owned()));
        assert_eq!(strings.push("x"), Held::Text("Ex".to_owned()));
    }

    #[test]
    fn without_stop_strings_everything_is_let_out() {
        check(&[], &["a", "b"], "ab", None);
        check(&[""], &["a", "b"], "ab", None);
    }

    fn letters(most: usize) -> impl Strategy<Value = String> {
        let letter = prop_oneof![Just('a'), Just('b'), Just('é')];
        proptest::collection::vec(letter, 0..=most)
            .prop_map(|letters| letters.into_iter().collect())
    }

    proptest! {
        #![proptest_config(proptest::test_runner::Config { failure_persistence: None, ..Default::default() })]
        #[test]
        fn the_answer_does_not_depend_on_how_the_text_is_cut(
            stops in proptest::collection::vec(letters(4), 0..4),
            pieces in proptest::collection::vec(letters(5), 0..6),
        ) {
            let letter_by_letter: Vec<String> = pieces.concat().chars().map(String::from).collect();
            let whole = run(&stops, IncludeStop::No, &pieces);
            prop_assert_eq!(&whole, &run(&stops, IncludeStop::No, &letter_by_letter));
            let (text, stop) = whole;
            let joined = pieces.concat();
            prop_assert_eq!(&joined[..text.len()], text.as_str());
            let any = stops.iter().any(|stop| !stop.is_empty() && joined.contains(stop.as_str()));
            prop_assert_eq!(any, stop.is_some());
        }
    }
}
