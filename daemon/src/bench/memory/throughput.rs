//! The same requests under three policies: waves, continuous batching with contiguous room, continuous and paged.

use std::num::NonZeroU32;
use std::time::Instant;

use anyhow::{Context, Result};

use super::Found;
use super::occupancy::block_of;
use super::snapshot::max_length_block;
use super::users::{Lengths, MAX_LENGTH, Users};
use crate::backend::Backend;
use crate::bench::load::random::Random;
use crate::bench::made_up::{MadeUp, VOCABULARY};
use crate::bench::model::BenchModel;
use crate::bench::percentile::{Percentile, mean, milliseconds, sorted};
use crate::bench::stepped::{Answer, Ask, Room, Stepped, Stepping};
use crate::bench::table::{Cell, Table};

/// Sequences of the maximum length that the memory holds.
const SLOTS: u32 = 16;
const REQUESTS: usize = 64;

/// When a request may start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    /// So many together, and the next ones when the last of them has ended.
    Waves { size: usize },
    /// As soon as there is room.
    Continuous,
}

/// What a policy made of the requests.
#[derive(Debug, Default)]
struct Served {
    answers: Vec<Answer>,
    /// For each answer: how long its request waited before the engine was asked.
    held_back_ms: Vec<f64>,
    steps: usize,
    tokens: usize,
    /// Sequences computed, over all steps.
    sequences: usize,
    /// Of [`SLOTS`] a step, those in which no sequence was computed although a request waited.
    idle_slot_steps: usize,
    seconds: f64,
}

impl Policy {
    /// Serves all of `asks`, which are there from the start.
    fn serve<B: Backend>(self, engine: &mut Stepping<B>, asks: &[Ask]) -> Result<Served> {
        let started = Instant::now();
        let size = match self {
            Self::Waves { size } => size,
            Self::Continuous => asks.len(),
        };
        let mut served = Served::default();
        let mut left = asks.len();
        for wave in asks.chunks(size.max(1)) {
            left -= wave.len();
            let held_back_ms = started.elapsed().as_secs_f64() * 1e3;
            wave.iter().try_for_each(|ask| engine.ask(ask))?;
            let mut computed = engine.computed_sequences();
            while let Some(Stepped { stats, ended }) = engine.step()? {
                let sequences = engine.computed_sequences() - computed;
                computed += sequences;
                served.steps += 1;
                served.sequences += sequences;
                served.tokens += stats.generated_tokens;
                if left + stats.waiting > 0 {
                    served.idle_slot_steps += (SLOTS as usize).saturating_sub(sequences);
                }
                served.held_back_ms.extend(ended.iter().map(|_| held_back_ms));
                served.answers.extend(ended);
            }
        }
        served.seconds = started.elapsed().as_secs_f64();
        Ok(served)
    }
}

/// The engine's memory for [`SLOTS`] sequences of the maximum length, in blocks of `block_size`.
fn room(block_size: NonZeroU32, max_num_seqs: u32) -> Room {
    Room { max_num_seqs, ..Room::of_slots(SLOTS * MAX_LENGTH, block_size) }
}

/// Three policies on a model, and one long answer among short ones.
pub(super) fn tables(model: &BenchModel, seed: u64) -> Result<Found> {
    let columns = [
        "policy",
        "tok/s",
        "TTFT mean, ms",
        "TTFT p99, ms",
        "idle slot-steps",
        "steps",
        "sequences a step",
    ];
    let mut table = Table::new("Throughput", columns);
    table.note(format!(
        "{REQUESTS} requests (prompts of 32, answers of 250 to 750) that are all there at the start, in the memory of {SLOTS} sequences of\n\
         {MAX_LENGTH}; {}. Idle slot-steps: of {SLOTS} slots a step, those unused while requests wait; paging has no slots.",
        model.name
    ));
    let asks = Users { vocabulary: model.vocabulary()?, ..Users::new(REQUESTS, seed) }.first_asks();
    let contiguous = room(max_length_block()?, SLOTS);
    let waves = Policy::Waves { size: SLOTS as usize };
    let policies = [
        ("static waves, contiguous", waves, contiguous),
        ("continuous, contiguous", Policy::Continuous, contiguous),
        ("continuous, paged", Policy::Continuous, room(block_of(16)?, 256)),
    ];
    for (name, policy, room) in policies {
        let mut engine = model.engine(Room { max_num_batched_tokens: 256, ..room })?;
        let served = policy.serve(&mut engine, &asks)?;
        let idle = match room.block_size.get() {
            MAX_LENGTH => Cell::Count(served.idle_slot_steps),
            _ => Cell::Empty,
        };
        table.push(row(name, &served, idle));
    }
    Ok(Found { tables: vec![table, long_among_short()?], plots: Vec::new() })
}

fn row(name: &str, served: &Served, idle: Cell) -> Vec<Cell> {
    let since_asked = milliseconds(served.answers.iter().map(|answer| answer.ttft));
    let ttfts = since_asked.zip(&served.held_back_ms).map(|(ttft, held_back)| ttft + held_back);
    let ttfts = sorted(ttfts);
    vec![
        Cell::text(name),
        Cell::Real(served.tokens as f64 / served.seconds, 0),
        Cell::milliseconds(mean(&ttfts)),
        Cell::milliseconds(Percentile::P99.of(&ttfts)),
        idle,
        Cell::Count(served.steps),
        Cell::Real(served.sequences as f64 / served.steps.max(1) as f64, 1),
    ]
}

/// Fifteen requests of 10 tokens and one of 500, and behind them so many of 10 that the queue is never empty.
fn long_among_short_asks() -> Vec<Ask> {
    let mut random = Random::new(0);
    let answer = |index| if index == 15 { 500 } else { 10 };
    let ask =
        |index| Lengths { prompt: 32, answer: answer(index) }.ask(index, VOCABULARY, &mut random);
    (0..16 + 15 * 60).map(ask).collect()
}

/// Slot-steps that are idle until the long answer ends. At `depth` 2 a step is launched before the last is known.
fn idle_slot_steps(policy: Policy, depth: usize) -> Result<Idle> {
    let mut engine = Stepping::new(MadeUp::new(depth), room(max_length_block()?, SLOTS));
    let asks = long_among_short_asks();
    let asked = match policy {
        Policy::Waves { size } => &asks[..size],
        Policy::Continuous => &asks[..],
    };
    asked.iter().try_for_each(|ask| engine.ask(ask))?;
    let mut idle = Idle { slot_steps: 0, short_answers: 0 };
    loop {
        let step = engine.step()?.context("the long answer ends")?;
        idle.short_answers += step.ended.iter().filter(|answer| answer.user != 15).count();
        if step.ended.iter().any(|answer| answer.user == 15) {
            let slot_steps = SLOTS as usize * engine.launches();
            idle.slot_steps = slot_steps - engine.computed_sequences();
            return Ok(idle);
        }
    }
}

/// What was idle, and how many short answers ended meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Idle {
    slot_steps: usize,
    short_answers: usize,
}

fn long_among_short() -> Result<Table> {
    let columns = ["policy", "idle slot-steps", "short answers meanwhile"];
    let mut table = Table::new("A long answer among short ones", columns);
    table.note(
        "15 requests of 10 tokens and one of 500 in 16 slots, and a full queue of requests of 10, until the long one ends.\n\
         At depth 1 (CPU) a slot is used again in the next step; at depth 2 in the next but one.",
    );
    let waves = Policy::Waves { size: SLOTS as usize };
    let rows = [
        ("static waves", waves, 1),
        ("continuous, depth 1", Policy::Continuous, 1),
        ("continuous, depth 2", Policy::Continuous, 2),
    ];
    for (name, policy, depth) in rows {
        let Idle { slot_steps, short_answers } = idle_slot_steps(policy, depth)?;
        table.push(vec![Cell::text(name), Cell::Count(slot_steps), Cell::Count(short_answers)]);
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_static_wave_wastes_the_slots_of_its_short_answers() {
        let idle = idle_slot_steps(Policy::Waves { size: 16 }, 1).unwrap();
        assert_eq!(idle, Idle { slot_steps: 15 * (500 - 10), short_answers: 15 });
        assert_eq!(idle.slot_steps, 7350);
    }

    #[test]
    fn a_slot_and_its_block_are_used_again_in_the_next_step() {
        let idle = idle_slot_steps(Policy::Continuous, 1).unwrap();
        assert_eq!(idle, Idle { slot_steps: 0, short_answers: 15 * 50 });
    }

    #[test]
    fn at_depth_2_they_are_used_again_in_the_next_step_but_one() {
        let Idle { slot_steps, short_answers } = idle_slot_steps(Policy::Continuous, 2).unwrap();
        // Eleven steps an answer, and the step that was launched before the long answer was known to end.
        assert_eq!((short_answers, slot_steps), (15 * (500 / 11), 15 * (500 / 11) + 1));
    }

    #[test]
    fn all_policies_serve_all_tokens_and_waves_leave_slots_idle() {
        let asks = Users::new(40, 1).first_asks();
        let wanted: usize = asks.iter().map(|ask| ask.output_tokens as usize).sum();
        let contiguous = room(max_length_block().unwrap(), SLOTS);
        let serve = |policy: Policy, room| {
            let mut engine = Stepping::new(MadeUp::new(1), room);
            let served = policy.serve(&mut engine, &asks).unwrap();
            assert_eq!((served.tokens, served.answers.len()), (wanted, 40));
            served
        };
        let waves = serve(Policy::Waves { size: 16 }, contiguous);
        let continuous = serve(Policy::Continuous, contiguous);
        let paged = serve(Policy::Continuous, room(block_of(16).unwrap(), 256));
        assert!(waves.idle_slot_steps > 4000 && continuous.idle_slot_steps == 0);
        assert!(waves.steps > continuous.steps && continuous.steps > paged.steps);
    }
}
