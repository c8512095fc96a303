//! One prompt of 32,000 tokens among 63 short streams: do they go on, and does memory stay flat?

use std::time::Instant;

use anyhow::{Context, Result};

use super::Found;
use super::occupancy::block_of;
use super::users::Lengths;
use crate::backend::Backend;
use crate::bench::load::random::Random;
use crate::bench::model::BenchModel;
use crate::bench::percentile::{Percentile, milliseconds, sorted};
use crate::bench::stepped::{Room, Stepping};
use crate::bench::table::{Cell, Table};

const STREAMS: usize = 63;
/// What each stream asks, again and again.
const SHORT: Lengths = Lengths { prompt: 32, answer: 64 };
const LONG: Lengths = Lengths { prompt: 32_000, answer: 16 };
/// The one that asks for it.
const LONG_USER: usize = STREAMS;
/// Steps without the long prompt: five answers of each stream.
const STEPS_WITHOUT: usize = 320;

/// What the streams saw.
#[derive(Debug, Default)]
struct Seen {
    /// Times between tokens of the short streams, in ascending order.
    gaps_ms: Vec<f64>,
    steps: usize,
    seconds: f64,
    long_ttft_ms: Option<f64>,
    resident_before: Option<u64>,
    resident_after: Option<u64>,
    most_blocks: usize,
}

/// Short streams that ask again as soon as they are answered.
struct Streams<'a, B: Backend> {
    engine: &'a mut Stepping<B>,
    vocabulary: u32,
    random: Random,
}

impl<B: Backend> Streams<'_, B> {
    fn ask(&mut self, user: usize, lengths: Lengths) -> Result<()> {
        self.engine.ask(&lengths.ask(user, self.vocabulary, &mut self.random))
    }

    /// Runs until `steps` are over, or, with the long prompt, until that is answered.
    fn run(&mut self, steps: Option<usize>) -> Result<Seen> {
        let mut seen = Seen { resident_before: resident_bytes(), ..Seen::default() };
        let started = Instant::now();
        let mut gaps = Vec::new();
        while steps.is_none_or(|steps| seen.steps < steps) && seen.long_ttft_ms.is_none() {
            let step = self.engine.step()?.context("the streams ask again and again")?;
            seen.steps += 1;
            seen.most_blocks = seen.most_blocks.max(step.stats.blocks.used);
            for answer in step.ended {
                match answer.user {
                    LONG_USER => seen.long_ttft_ms = Some(answer.ttft.as_secs_f64() * 1e3),
                    user => {
                        gaps.extend(answer.gaps);
                        self.ask(user, SHORT)?;
                    }
                }
            }
        }
        seen.seconds = started.elapsed().as_secs_f64();
        seen.resident_after = resident_bytes();
        seen.gaps_ms = sorted(milliseconds(gaps.into_iter()));
        Ok(seen)
    }
}

/// Resident memory of this process.
fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

pub(super) fn table(model: &BenchModel) -> Result<Found> {
    let room = Room {
        max_num_seqs: 64,
        max_num_batched_tokens: 256,
        ..Room::of_slots(48 << 10, block_of(16)?)
    };
    let mut engine = model.engine(room)?;
    let vocabulary = model.vocabulary()?;
    let mut streams = Streams { engine: &mut engine, vocabulary, random: Random::new(5) };
    (0..STREAMS).try_for_each(|user| streams.ask(user, SHORT))?;
    // The first answers are left out: caches fill and threads start.
    streams.run(Some(SHORT.answer as usize * 2))?;
    let without = streams.run(Some(STEPS_WITHOUT))?;
    streams.ask(LONG_USER, LONG)?;
    let with = streams.run(None)?;
    let columns = [
        "streams",
        "ITL p50, ms",
        "ITL p99, ms",
        "times",
        "long TTFT, ms",
        "blocks at most",
        "resident, MiB",
        "grown, MiB",
        "steps",
    ];
    let mut table = Table::new("Long context", columns);
    table.note(format!(
        "{}: {STREAMS} streams (32 in, 64 out, again and again), and beside them one prompt of 32,000 tokens. The KV memory is\n\
         resident from the start. ITL: of the short streams; times: its p99 over that without the long prompt (goal: at most 2).",
        model.name
    ));
    let base = Percentile::P99.of(&without.gaps_ms);
    table.push(row("63 short", &without, base));
    table.push(row("63 short and one of 32,000", &with, base));
    Ok(table.into())
}

fn row(name: &str, seen: &Seen, base: Option<f64>) -> Vec<Cell> {
    let p99 = Percentile::P99.of(&seen.gaps_ms);
    let times = p99.zip(base).map_or(Cell::Empty, |(p99, base)| Cell::Real(p99 / base, 2));
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let after = seen.resident_after.map(|bytes| mib(bytes as f64));
    let before = seen.resident_before.map(|bytes| mib(bytes as f64));
    vec![
        Cell::text(name),
        Cell::milliseconds(Percentile::MEDIAN.of(&seen.gaps_ms)),
        Cell::milliseconds(p99),
        times,
        Cell::milliseconds(seen.long_ttft_ms),
        Cell::Count(seen.most_blocks),
        after.map_or(Cell::Empty, |after| Cell::Real(after, 0)),
        after.zip(before).map_or(Cell::Empty, |(after, before)| Cell::Real(after - before, 1)),
        Cell::Count(seen.steps),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::made_up::{MadeUp, VOCABULARY};

    #[test]
    fn short_streams_get_a_token_in_every_step_beside_a_long_prompt() {
        let room = Room {
            max_num_seqs: 64,
            max_num_batched_tokens: 256,
            ..Room::of_slots(48 << 10, block_of(16).unwrap())
        };
        let mut engine = Stepping::new(MadeUp::new(1), room);
        let mut streams =
            Streams { engine: &mut engine, vocabulary: VOCABULARY, random: Random::new(5) };
        (0..STREAMS).try_for_each(|user| streams.ask(user, SHORT)).unwrap();
        streams.run(Some(64)).unwrap();
        streams.ask(LONG_USER, LONG).unwrap();
        let seen = streams.run(None).unwrap();
        assert!(seen.long_ttft_ms.is_some() && seen.most_blocks >= 2000);
        // An answer of 64 tokens takes 64 steps, and 63 gaps of it are seen when it ends.
        let wanted = STREAMS * 63 * (seen.steps / 66);
        assert!(seen.gaps_ms.len() >= wanted, "{} of {wanted}", seen.gaps_ms.len());
    }
}
