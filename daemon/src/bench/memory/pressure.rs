//! What happens as memory shrinks: preemptions, tokens computed again, and how long streams stand still.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::Found;
use super::occupancy::block_of;
use super::users::Users;
use crate::backend::Backend;
use crate::bench::model::BenchModel;
use crate::bench::percentile::milliseconds;
use crate::bench::stepped::{Answer, Ask, Room, Stepped, Stepping};
use crate::bench::table::{Cell, Table};

const USERS: usize = 24;
/// Of the blocks that all need at their ends.
const SHARES_PERCENT: [usize; 6] = [100, 75, 60, 45, 30, 15];

/// What a run under pressure showed.
#[derive(Debug, Default)]
struct Pressed {
    preemptions: usize,
    recomputed_tokens: usize,
    generated_tokens: usize,
    answers: Vec<Answer>,
    seconds: f64,
}

impl Pressed {
    fn run<B: Backend>(engine: &mut Stepping<B>, asks: &[Ask]) -> Result<Self> {
        let started = Instant::now();
        asks.iter().try_for_each(|ask| engine.ask(ask))?;
        let mut pressed = Self::default();
        while let Some(Stepped { stats, ended }) = engine.step()? {
            pressed.preemptions += stats.preemptions;
            pressed.recomputed_tokens += stats.recomputed_tokens;
            pressed.generated_tokens += stats.generated_tokens;
            pressed.answers.extend(ended);
        }
        pressed.seconds = started.elapsed().as_secs_f64();
        Ok(pressed)
    }

    /// The longest time between two tokens of the answers that `wanted` picks.
    fn longest_gap(&self, wanted: impl Fn(&Answer) -> bool) -> Option<f64> {
        let answers = self.answers.iter().filter(|answer| wanted(answer));
        let longest: Option<Duration> = answers.flat_map(|answer| &answer.gaps).max().copied();
        milliseconds(longest.into_iter()).next()
    }
}

/// The blocks of a memory that holds `percent` of what all users need at their ends.
fn blocks_of(percent: usize, users: Users, block_size: u32) -> Result<u32> {
    let longest = (0..users.count).map(|user| users.lengths(user, 0).longest());
    let needed: usize = longest.map(|tokens| tokens.div_ceil(block_size as usize)).sum();
    u32::try_from(needed * percent / 100).context("count the blocks")
}

fn room(percent: usize, users: Users) -> Result<Room> {
    Ok(Room {
        blocks: blocks_of(percent, users, 16)?,
        max_num_seqs: 32,
        max_num_batched_tokens: 256,
        ..Room::of_slots(0, block_of(16)?)
    })
}

pub(super) fn table(model: &BenchModel, seed: u64) -> Result<Found> {
    let columns = [
        "memory",
        "blocks",
        "preemptions",
        "tokens computed again",
        "longest gap, preempted, ms",
        "longest gap, others, ms",
        "tok/s",
    ];
    let mut table = Table::new("Pressure", columns);
    table.note(format!(
        "{}: {USERS} users at once, prompts of 32, answers of 250 to 750. Memory: of the blocks that all need at their ends.",
        model.name
    ));
    let users = Users { vocabulary: model.vocabulary()?, ..Users::new(USERS, seed) };
    for percent in SHARES_PERCENT {
        let room = room(percent, users)?;
        let pressed = Pressed::run(&mut model.engine(room)?, &users.first_asks())?;
        table.push(vec![
            Cell::text(format!("{percent} %")),
            Cell::Count(room.blocks as usize),
            Cell::Count(pressed.preemptions),
            Cell::Count(pressed.recomputed_tokens),
            Cell::milliseconds(pressed.longest_gap(|answer| answer.preemptions > 0)),
            Cell::milliseconds(pressed.longest_gap(|answer| answer.preemptions == 0)),
            Cell::Real(pressed.generated_tokens as f64 / pressed.seconds, 0),
        ]);
    }
    Ok(table.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::made_up::MadeUp;

    fn pressed(percent: usize) -> Pressed {
        let users = Users::new(USERS, 0);
        let mut engine = Stepping::new(MadeUp::new(1), room(percent, users).unwrap());
        Pressed::run(&mut engine, &users.first_asks()).unwrap()
    }

    #[test]
    fn enough_memory_preempts_nobody_and_less_memory_loses_no_token() {
        let (enough, less) = (pressed(102), pressed(50));
        assert_eq!((enough.preemptions, enough.recomputed_tokens), (0, 0));
        assert!(enough.longest_gap(|answer| answer.preemptions > 0).is_none());
        assert!(less.preemptions > 0 && less.recomputed_tokens > 0);
        assert!(less.longest_gap(|answer| answer.preemptions > 0).is_some());
        assert_eq!(enough.generated_tokens, less.generated_tokens);
        assert_eq!((enough.answers.len(), less.answers.len()), (USERS, USERS));
    }
}
