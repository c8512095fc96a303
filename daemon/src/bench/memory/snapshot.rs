//! The memory at one moment: every user at the end of its answer, sum over sum.

use std::num::NonZeroU32;

use anyhow::{Context, Result};

use super::first_fit::FirstFit;
use super::held::{Held, Method};
use super::users::{ANSWERS, Lengths, MAX_LENGTH, Users};
use crate::bench::made_up::MadeUp;
use crate::bench::stepped::{Room, Stepping};

/// What all users hold when each has its whole answer, in a memory that takes them all by any method.
pub(super) fn snapshot(method: Method, users: Users, block_size: NonZeroU32) -> Result<Held> {
    // A few more, since the engine keeps a hundredth of its blocks free.
    let sequences = u32::try_from(users.count).context("count the users")? + 4;
    let slots = sequences * MAX_LENGTH;
    match method {
        Method::ExactSize | Method::PowersOfTwo => {
            let lengths: Vec<Lengths> =
                (0..users.count).map(|user| users.lengths(user, 0)).collect();
            Ok(FirstFit::at_ends(method, slots as usize, &lengths))
        }
        Method::MaxLength => at_ends(method, users, Room::of_slots(slots, max_length_block()?)),
        Method::Paged => at_ends(method, users, Room::of_slots(slots, block_size)),
    }
}

/// The block that holds a sequence of any length.
pub(super) fn max_length_block() -> Result<NonZeroU32> {
    NonZeroU32::new(MAX_LENGTH).context("a sequence has tokens")
}

/// On the engine: each user asks so early that all are at their ends in one step. One more token than the answer is
/// asked for, so that the memory is seen before it is given back.
fn at_ends(method: Method, users: Users, room: Room) -> Result<Held> {
    let mut engine = Stepping::new(MadeUp::new(1), room);
    let mut held = Held::default();
    for left in (1..=ANSWERS[1]).rev() {
        for user in (0..users.count).filter(|&user| users.lengths(user, 0).answer == left) {
            let mut ask = users.ask(user, 0);
            ask.output_tokens += 1;
            engine.ask(&ask)?;
        }
        if let Some(step) = engine.step()? {
            held = Held::of_blocks(method, &step.stats.blocks, step.stats.running);
        }
    }
    Ok(held)
}

/// The share of its room that a sequence of `tokens` computed tokens fills, in blocks of `block_size`.
pub(super) fn filled_after(tokens: u32, block_size: NonZeroU32) -> Result<f64> {
    let room = Room { blocks: 64, ..Room::of_slots(0, block_size) };
    let mut engine = Stepping::new(MadeUp::new(1), room);
    let mut random = crate::bench::load::random::Random::new(0);
    engine.ask(&Lengths { prompt: tokens, answer: 2 }.ask(0, u32::MAX, &mut random))?;
    let step = engine.step()?.context("compute the prompt")?;
    Ok(Held::of_blocks(Method::Paged, &step.stats.blocks, 1).filled_share())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block_size(tokens: u32) -> NonZeroU32 {
        NonZeroU32::new(tokens).unwrap()
    }

    fn filled(method: Method, count: usize) -> Held {
        snapshot(method, Users::new(count, 0), block_size(16)).unwrap()
    }

    #[test]
    fn paging_fills_its_slots_at_the_end_and_contiguous_room_a_quarter() {
        let (paged, contiguous) = (filled(Method::Paged, 200), filled(Method::MaxLength, 200));
        assert_eq!((paged.users, contiguous.users), (200, 200));
        assert_eq!(paged.filled, contiguous.filled);
        assert!(paged.filled_share() >= 0.985, "{}", paged.filled_share());
        assert!((0.25..0.27).contains(&contiguous.filled_share()));
        let times = contiguous.allocated() as f64 / paged.allocated() as f64;
        assert!((3.6..4.0).contains(&times), "{times}");
    }

    #[test]
    fn the_simulations_hold_the_same_tokens_as_the_engine() {
        let paged = filled(Method::Paged, 50);
        let exact = filled(Method::ExactSize, 50);
        assert_eq!(exact.filled, paged.filled);
        assert_eq!(exact.filled_share(), 1.0);
        assert!(filled(Method::PowersOfTwo, 50).filled_share() < 0.8);
    }

    #[test]
    fn ten_tokens_fill_three_in_ten_thousand_of_32000() {
        assert_eq!(filled_after(10, block_size(32_000)).unwrap(), 10.0 / 32_000.0);
        assert_eq!(filled_after(10, block_size(16)).unwrap(), 10.0 / 16.0);
    }
}
