//! The tables of how the memory is filled: at the users' ends, over time, and by block size.

use std::num::NonZeroU32;
use std::time::Instant;

use anyhow::{Context, Result};

use super::Found;
use super::held::{Held, Method, share};
use super::live::{Live, Span, expected_share, live, live_on};
use super::snapshot::{filled_after, max_length_block, snapshot};
use super::users::{MAX_LENGTH, PROMPT, Users};
use crate::bench::model::BenchModel;
use crate::bench::plot::{Line, Plot, Point};
use crate::bench::stepped::Room;
use crate::bench::table::{Cell, Table};

/// Concurrent users of the rows.
const USERS: [usize; 6] = [10, 25, 50, 100, 150, 200];
/// Most of them: these saturate the memory over time.
const MOST_USERS: usize = 200;
/// The memory of the runs over time: so many sequences of the maximum length.
const LIVE_SLOTS: u32 = 16 * MAX_LENGTH;

pub(super) fn block_of(tokens: u32) -> Result<NonZeroU32> {
    NonZeroU32::new(tokens).context("a block holds tokens")
}

/// The cells of the parts of a memory.
fn parts(held: &Held) -> [Cell; 4] {
    let Held { reserved, internal, external, .. } = *held;
    let part = |slots| Cell::Share(held.part(slots));
    [Cell::Share(held.filled_share()), part(reserved), part(internal), part(external)]
}

/// Every user at its end, in a memory for 200 sequences of the maximum length.
pub(super) fn snapshots(seed: u64) -> Result<Found> {
    let columns = [
        "users",
        "method",
        "filled",
        "reserved",
        "internal",
        "external",
        "answers alone",
        "times the users",
    ];
    let mut table = Table::new("Snapshot", columns);
    table.note(format!(
        "Every user at the end of its answer, sum over sum: prompts of {PROMPT}, answers of 250 to 750, at most {MAX_LENGTH} tokens.\n\
         Filled: slots with a token, of those given to sequences. Reserved: room for tokens that have not come. Internal: empty slots of\n\
         last blocks (of 16). External: holes that no waiting request fits. Times the users: how many fit where one of the first row fits.\n\
         (engine): the engine's own scheduler and block pool; (simulated): first fit over the same lengths."
    ));
    let mut lines =
        Method::ALL.map(|method| Line { name: method.name().into(), points: Vec::new() });
    for count in USERS {
        let users = Users::new(count, seed);
        let largest = snapshot(Method::MaxLength, users, block_of(16)?)?.allocated();
        for (method, line) in Method::ALL.into_iter().zip(&mut lines) {
            let held = snapshot(method, users, block_of(16)?)?;
            let mut row = vec![Cell::Count(count), Cell::text(method.name())];
            row.extend(parts(&held));
            let answers = held.filled - count * PROMPT as usize;
            row.push(Cell::Share(share(answers, held.allocated())));
            row.push(Cell::Real(largest as f64 / held.allocated() as f64, 2));
            table.push(row);
            line.points.push(Point { x: held.filled as f64, y: held.allocated() as f64 });
        }
    }
    let plot = Plot {
        key: "memory-against-tokens",
        title: "Memory taken against tokens held, 10 to 200 users at their ends",
        x_label: "tokens held",
        y_label: "slots taken",
        lines: lines.into(),
    };
    Ok(Found { tables: vec![table], plots: vec![plot] })
}

/// Users that come and go in one fixed memory, and the same on a named model.
pub(super) fn lives(seed: u64, model: Option<&BenchModel>) -> Result<Found> {
    let mut table = Table::new("Live", LIVE_COLUMNS);
    table.note(live_note());
    let mut lines = Vec::new();
    for count in USERS {
        let users = Users::new(count, seed);
        let run = |method| live(method, users, LIVE_SLOTS, block_of(16)?, Span::USUAL);
        let base = run(Method::MaxLength)?.users();
        for method in Method::ALL {
            let run = run(method)?;
            table.push(live_row(count, method, &run, base));
            if count == MOST_USERS {
                lines.push(course(method, &run));
            }
        }
    }
    let plot = Plot {
        key: "blocks-over-time",
        title: "Blocks of 16 that sequences hold, 200 users in a memory of 2,048",
        x_label: "steps",
        y_label: "blocks",
        lines,
    };
    let mut tables = vec![table];
    tables.extend(model.map(|model| on_model(model, seed)).transpose()?);
    Ok(Found { tables, plots: vec![plot] })
}

const LIVE_COLUMNS: [&str; 12] = [
    "users",
    "method",
    "filled",
    "reserved",
    "internal",
    "external",
    "mean length",
    "L / (L + 7.5)",
    "users with memory",
    "empty at first refusal",
    "times the users",
    "answers a 1000 steps",
];

fn live_note() -> String {
    let Span { arrivals, warm_up, counted } = Span::USUAL;
    format!(
        "Users that ask again as soon as they are answered, in a memory of {LIVE_SLOTS} slots (16 sequences of {MAX_LENGTH}); they come\n\
         over {arrivals} steps, {counted} steps count after {warm_up}. Sums over steps; columns as in the snapshot. Mean length: L, tokens held a\n\
         sequence. Empty at first refusal: slots without a token, of all, when a request first waited or was preempted."
    )
}

/// `base`: the users with memory to compare with.
fn live_row(count: usize, method: Method, run: &Live, base: f64) -> Vec<Cell> {
    let mut row = vec![Cell::Count(count), Cell::text(method.name())];
    row.extend(parts(&run.sum));
    let length = run.sum.mean_length();
    let expected = match method {
        Method::Paged => Cell::Share(expected_share(length, NonZeroU32::MIN.saturating_add(15))),
        Method::MaxLength | Method::ExactSize | Method::PowersOfTwo => Cell::Empty,
    };
    row.extend([Cell::Real(length, 1), expected, Cell::Real(run.users(), 1)]);
    row.push(Cell::share(run.empty_at_refusal));
    row.push(Cell::Real(run.users() / base, 2));
    row.push(Cell::Real(share(run.ended * 1000, run.steps), 0));
    row
}

fn course(method: Method, run: &Live) -> Line {
    let point = |(step, held): (u32, &Held)| Point {
        x: f64::from(step),
        y: held.allocated() as f64 / 16.0,
    };
    Line { name: method.name().into(), points: (0..).zip(&run.course).map(point).collect() }
}

/// The pair of rows that a model computes: fewer users, in a memory of two sequences of the maximum length.
fn on_model(model: &BenchModel, seed: u64) -> Result<Table> {
    const SLOTS: u32 = 2 * MAX_LENGTH;
    // The users come over most of an answer, so that their lengths are mixed when the count begins.
    let span = Span { arrivals: 400, warm_up: 600, counted: 400 };
    let mut columns = LIVE_COLUMNS.to_vec();
    columns.push("steps a second");
    columns.push("tok/s");
    let mut table = Table::new("Live on a model", columns);
    table.note(format!(
        "{}: 24 users in {SLOTS} slots (2 sequences of {MAX_LENGTH}), 400 steps count after 600. Columns as above.",
        model.name
    ));
    let users = Users { vocabulary: model.vocabulary()?, ..Users::new(24, seed) };
    let mut base = None;
    for (method, block_size) in
        [(Method::MaxLength, max_length_block()?), (Method::Paged, block_of(16)?)]
    {
        let room = Room {
            max_num_seqs: 32,
            max_num_batched_tokens: 256,
            ..Room::of_slots(SLOTS, block_size)
        };
        let engine = model.engine(room)?;
        let started = Instant::now();
        let run = live_on(method, engine, users, span)?;
        let rate = run.course.len() as f64 / started.elapsed().as_secs_f64();
        let base = *base.get_or_insert(run.users());
        let mut row = live_row(users.count, method, &run, base);
        row.extend([Cell::Real(rate, 1), Cell::Real(rate * run.users(), 0)]);
        table.push(row);
    }
    Ok(table)
}

/// Paging by block size, and what a sequence of 10 tokens fills at a maximum length of 32,000.
pub(super) fn block_sizes(seed: u64) -> Result<Found> {
    let columns = [
        "block size",
        "snapshot filled",
        "live filled",
        "mean length",
        "expected live",
        "users with memory",
    ];
    let mut table = Table::new("By block size", columns);
    table.note(
        "200 users; snapshot and live as above. Expected live: L / (L + half of block size - 1).",
    );
    for tokens in [8, 16, 32, 64] {
        let (block_size, users) = (block_of(tokens)?, Users::new(MOST_USERS, seed));
        let at_ends = snapshot(Method::Paged, users, block_size)?;
        let run = live(Method::Paged, users, LIVE_SLOTS, block_size, Span::USUAL)?;
        let length = run.sum.mean_length();
        table.push(vec![
            Cell::Count(tokens as usize),
            Cell::Share(at_ends.filled_share()),
            Cell::Share(run.sum.filled_share()),
            Cell::Real(length, 1),
            Cell::Share(expected_share(length, block_size)),
            Cell::Real(run.users(), 1),
        ]);
    }
    Ok(Found { tables: vec![table, longest()?], plots: Vec::new() })
}

fn longest() -> Result<Table> {
    let mut table =
        Table::new("At a maximum length of 32,000", ["method", "filled after 10 tokens"]);
    let mut row = |method: Method, tokens: u32| {
        let filled = Cell::Share(filled_after(10, block_of(tokens)?)?);
        table.push(vec![Cell::text(method.name()), filled]);
        anyhow::Ok(())
    };
    row(Method::MaxLength, 32_000)?;
    row(Method::Paged, 16)?;
    Ok(table)
}
