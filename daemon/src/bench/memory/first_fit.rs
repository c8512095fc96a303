//! A simulation of contiguous room: each sequence gets one piece of the memory when it starts and gives it back at its
//! end. The first hole that is large enough is taken, by requests in the order in which they came.

use std::collections::VecDeque;

use super::held::{Held, Method};
use super::users::Lengths;

/// One piece of the memory and the sequence in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    start: usize,
    slots: usize,
    user: usize,
    lengths: Lengths,
    /// Tokens of its answer so far.
    answered: u32,
}

/// A memory of `total` slots.
#[derive(Debug)]
pub(super) struct FirstFit {
    method: Method,
    total: usize,
    /// In the order of their place.
    pieces: Vec<Piece>,
    waiting: VecDeque<(usize, Lengths)>,
}

impl Piece {
    fn end(&self) -> usize {
        self.start + self.slots
    }

    /// Slots that hold a token: the newest token is not computed yet.
    fn filled(&self) -> usize {
        match self.answered {
            0 => 0,
            answered => self.lengths.prompt as usize + answered as usize - 1,
        }
    }
}

impl FirstFit {
    pub(super) fn new(method: Method, total: usize) -> Self {
        Self { method, total, pieces: Vec::new(), waiting: VecDeque::new() }
    }

    /// The slots that a sequence of these lengths is given.
    fn slots(&self, lengths: Lengths) -> usize {
        match self.method {
            Method::PowersOfTwo => lengths.longest().next_power_of_two(),
            Method::ExactSize | Method::MaxLength | Method::Paged => lengths.longest(),
        }
    }

    pub(super) fn ask(&mut self, user: usize, lengths: Lengths) {
        self.waiting.push_back((user, lengths));
    }

    /// Starts what fits, computes a token for each; gives the users whose sequences ended and gave their piece back.
    pub(super) fn step(&mut self) -> Vec<usize> {
        self.start_waiting();
        self.pieces.iter_mut().for_each(|piece| piece.answered += 1);
        let ended = |piece: &mut Piece| piece.answered == piece.lengths.answer;
        self.pieces.extract_if(.., ended).map(|piece| piece.user).collect()
    }

    /// Whether a request waits for room.
    pub(super) fn refuses(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(super) fn held(&self) -> Held {
        let allocated: usize = self.pieces.iter().map(|piece| piece.slots).sum();
        let filled: usize = self.pieces.iter().map(Piece::filled).sum();
        let rest = self.total - allocated;
        let (external, free) = if self.refuses() { (rest, 0) } else { (0, rest) };
        let (reserved, users) = (allocated - filled, self.pieces.len());
        Held { filled, reserved, internal: 0, external, free, users }
    }

    /// All of `lengths` at their ends, placed one after the other in an empty memory that has room for them.
    pub(super) fn at_ends(method: Method, total: usize, lengths: &[Lengths]) -> Held {
        let mut memory = Self::new(method, total);
        lengths.iter().enumerate().for_each(|(user, &lengths)| memory.ask(user, lengths));
        memory.start_waiting();
        memory.pieces.iter_mut().for_each(|piece| piece.answered = piece.lengths.answer);
        memory.held()
    }

    fn start_waiting(&mut self) {
        while let Some(&(user, lengths)) = self.waiting.front() {
            let slots = self.slots(lengths);
            let Some(index) = self.first_hole(slots) else { return };
            let start = index.checked_sub(1).map_or(0, |before| self.pieces[before].end());
            self.pieces.insert(index, Piece { start, slots, user, lengths, answered: 0 });
            self.waiting.pop_front();
        }
    }

    /// The index of the piece before which `slots` slots are free.
    fn first_hole(&self, slots: usize) -> Option<usize> {
        let mut end = 0;
        for (index, piece) in self.pieces.iter().enumerate() {
            if piece.start - end >= slots {
                return Some(index);
            }
            end = piece.end();
        }
        (self.total - end >= slots).then_some(self.pieces.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(prompt: u32, answer: u32) -> Lengths {
        Lengths { prompt, answer }
    }

    fn held(memory: &FirstFit) -> [usize; 5] {
        let Held { filled, reserved, external, free, users, .. } = memory.held();
        [filled, reserved, external, free, users]
    }

    #[test]
    fn a_hole_that_is_too_small_is_lost_while_a_request_waits() {
        // Pieces of 4, 4 and 2 in 10 slots.
        let mut memory = FirstFit::new(Method::ExactSize, 10);
        memory.ask(0, lengths(3, 2));
        memory.ask(1, lengths(1, 4));
        memory.ask(2, lengths(1, 2));
        assert!(memory.step().is_empty());
        assert_eq!(held(&memory), [5, 5, 0, 0, 3]);
        memory.ask(3, lengths(4, 2));
        // Users 0 and 2 end: 4 and 2 slots are free, and 5 in one piece are not.
        assert_eq!(memory.step(), [0, 2]);
        assert_eq!(held(&memory), [2, 2, 6, 0, 1]);
        assert!(memory.step().is_empty());
        assert_eq!(memory.step(), [1]);
        assert!(memory.step().is_empty());
        assert_eq!(held(&memory), [4, 1, 0, 5, 1]);
        assert_eq!(memory.step(), [3]);
    }

    #[test]
    fn the_first_hole_that_is_large_enough_is_taken() {
        let mut memory = FirstFit::new(Method::ExactSize, 20);
        for (user, answer) in [3, 9, 2, 9].into_iter().enumerate() {
            memory.ask(user, lengths(1, answer));
        }
        // Pieces of 3, 9 and 2; the fourth, of 9, waits.
        assert!(memory.step().is_empty());
        assert_eq!(memory.step(), [2]);
        assert_eq!(memory.step(), [0]);
        memory.waiting.clear();
        memory.ask(4, lengths(1, 3));
        memory.step();
        let places: Vec<_> = memory.pieces.iter().map(|piece| (piece.user, piece.start)).collect();
        assert_eq!(places, [(4, 0), (1, 3)]);
    }

    #[test]
    fn powers_of_two_are_rounded_up_from_the_length_at_the_end() {
        let ends = [lengths(1, 5), lengths(1, 8), lengths(4, 6)];
        let held = FirstFit::at_ends(Method::PowersOfTwo, 100, &ends);
        // 5, 8 and 9 slots in pieces of 8, 8 and 16.
        assert_eq!((held.filled, held.reserved, held.free), (22, 10, 68));
        let exact = FirstFit::at_ends(Method::ExactSize, 100, &ends);
        assert_eq!((exact.filled, exact.reserved, exact.filled_share()), (22, 0, 1.0));
    }
}
