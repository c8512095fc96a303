//! What sharing blocks saves: a system prompt, the choices of a prompt, beams, the turns of a conversation.

use std::num::NonZeroU32;

use anyhow::{Context, Result};

use super::Found;
use super::arithmetic::bytes_per_token;
use super::occupancy::block_of;
use super::users::{Lengths, random_tokens};
use crate::backend::Backend;
use crate::bench::load::random::Random;
use crate::bench::made_up::{MadeUp, VOCABULARY};
use crate::bench::model::BenchModel;
use crate::bench::percentile::{Percentile, mean, milliseconds, sorted};
use crate::bench::stepped::{Ask, AskKind, Room, Stepped, Stepping};
use crate::bench::table::{Cell, Table};
use crate::request::{BeamParams, EarlyStopping, TokenId};
use crate::scheduler::PrefixCaching;

const BLOCK: u32 = 16;
const CHOICES: NonZeroU32 = NonZeroU32::MIN.saturating_add(3);

/// What sharing did in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Shared {
    /// Blocks that were not needed because others had them.
    blocks_saved: usize,
    /// Blocks copied because one of several owners wrote into them.
    copies_on_write: usize,
    /// Slots copied from cached blocks that a prompt begins with in part.
    slots_copied: usize,
    prompt_tokens: usize,
    /// Of the prompts: not computed again.
    cached_tokens: usize,
}

impl Shared {
    /// Counts what all steps did; the blocks saved are those of the step before the first answer ended.
    fn of(steps: &[Stepped]) -> Self {
        let sum = |count: fn(&Stepped) -> usize| steps.iter().map(count).sum::<usize>();
        let open = steps.iter().take_while(|step| step.ended.is_empty()).last();
        Self {
            blocks_saved: open.map_or(0, |step| step.stats.blocks.saved),
            copies_on_write: sum(|step| step.stats.forked_blocks),
            slots_copied: sum(|step| step.stats.prefix_copied_slots),
            prompt_tokens: sum(|step| step.stats.prefix_queries + step.stats.unqueried_tokens),
            cached_tokens: sum(|step| step.stats.prefix_hits),
        }
    }
}

fn engine() -> Result<Stepping<MadeUp>> {
    Ok(Stepping::new(MadeUp::new(1), Room::of_slots(1 << 16, block_of(BLOCK)?)))
}

/// Ten users whose prompts begin with the same `shared` tokens; the first of them came a step earlier.
fn system_prompt(shared: u32) -> Result<Shared> {
    let mut engine = engine()?;
    let asks = common_prefix(shared, Lengths { prompt: 32, answer: 16 }, VOCABULARY);
    let (first, others) = asks.split_first().context("there are ten users")?;
    engine.ask(first)?;
    let mut steps = vec![engine.step()?.context("compute the first prompt")?];
    others.iter().try_for_each(|ask| engine.ask(ask))?;
    steps.extend(engine.run()?);
    Ok(Shared::of(&steps))
}

/// Ten requests that begin with the same `shared` tokens.
fn common_prefix(shared: u32, own: Lengths, vocabulary: u32) -> Vec<Ask> {
    let mut random = Random::new(1);
    let prefix = random_tokens(shared, vocabulary, &mut random);
    let ask = |user| {
        let ask = own.ask(user, vocabulary, &mut random);
        Ask { prompt: [&prefix[..], &ask.prompt].concat().into(), ..ask }
    };
    (0..10).map(ask).collect()
}

/// One prompt of `tokens` tokens, answered as `kind` says in 32 tokens.
fn one_prompt(tokens: u32, kind: AskKind) -> Result<Shared> {
    let mut engine = engine()?;
    let lengths = Lengths { prompt: tokens, answer: 32 };
    let ask = lengths.ask(0, VOCABULARY, &mut Random::new(2));
    engine.ask(&Ask { kind, ..ask })?;
    Ok(Shared::of(&engine.run()?))
}

/// A conversation: each prompt is all that was said before and 40 tokens more, each answer has 100.
fn conversation(turns: usize) -> Result<Shared> {
    let mut engine = engine()?;
    let mut random = Random::new(3);
    let mut said: Vec<TokenId> = Vec::new();
    let (mut steps, mut blocks_saved) = (Vec::new(), 0);
    for _ in 0..turns {
        said.extend(random_tokens(40, VOCABULARY, &mut random));
        let ask = Lengths { prompt: 1, answer: 100 }.ask(0, VOCABULARY, &mut random);
        engine.ask(&Ask { prompt: said.as_slice().into(), ..ask })?;
        let turn = engine.run()?;
        let answer = turn.iter().flat_map(|step| &step.ended).next();
        let answer = answer.context("each turn is answered")?;
        blocks_saved += answer.cached_tokens as usize / BLOCK as usize;
        said.extend_from_slice(&answer.tokens);
        steps.extend(turn);
    }
    Ok(Shared { blocks_saved, ..Shared::of(&steps) })
}

fn beams() -> AskKind {
    let early_stopping = EarlyStopping::Heuristic;
    AskKind::Beams(BeamParams { width: CHOICES, length_penalty: 1.0, early_stopping })
}

/// What is saved, and what the cache does to the first token.
pub(super) fn tables(made_up: &BenchModel, named: Option<&BenchModel>) -> Result<Found> {
    let mut tables = vec![saved()?];
    tables.extend(
        [Some(made_up), named].into_iter().flatten().map(caching).collect::<Result<Vec<_>>>()?,
    );
    Ok(Found { tables, plots: Vec::new() })
}

fn saved() -> Result<Table> {
    let columns = [
        "shared by",
        "blocks saved",
        "MiB saved",
        "copies on write",
        "slots copied",
        "prompt tokens",
        "computed",
    ];
    let mut table = Table::new("Sharing", columns);
    table.note(
        "Blocks of 16; saved: blocks that would be held a second time, in the step before the first answer ends (turns: cached\n\
         blocks used again), and their bytes for Llama-2-7B. Slots copied: from a cached block that a prompt begins with in part.",
    );
    let rows = [
        ("10 users, 200-token system prompt", system_prompt(200)?),
        ("n = 4, 200-token prompt, cold cache", one_prompt(200, AskKind::Choices(CHOICES))?),
        ("n = 4, 192-token prompt, cold cache", one_prompt(192, AskKind::Choices(CHOICES))?),
        ("4 beams, 200-token prompt, 32 tokens", one_prompt(200, beams())?),
        ("4 turns of a conversation, 40 in, 100 out", conversation(4)?),
    ];
    for (name, shared) in rows {
        let bytes = shared.blocks_saved * BLOCK as usize * bytes_per_token()?;
        table.push(vec![
            Cell::text(name),
            Cell::Count(shared.blocks_saved),
            Cell::Count(bytes >> 20),
            Cell::Count(shared.copies_on_write),
            Cell::Count(shared.slots_copied),
            Cell::Count(shared.prompt_tokens),
            Cell::Count(shared.prompt_tokens - shared.cached_tokens),
        ]);
    }
    Ok(table)
}

/// Tokens computed and time to the first token with the cache on and off.
fn caching(model: &BenchModel) -> Result<Table> {
    let columns = ["prefix cache", "tokens computed", "TTFT mean, ms", "TTFT p99, ms", "seconds"];
    let mut table = Table::new("Prefix cache on and off", columns);
    table.note(format!("{}: 10 users at once, 1,000 shared + 48 in, 64 out.", model.name));
    for (name, prefix_caching) in [("on", PrefixCaching::Enabled), ("off", PrefixCaching::Disabled)]
    {
        let room = Room {
            max_num_seqs: 16,
            max_num_batched_tokens: 256,
            prefix_caching,
            ..Room::of_slots(1 << 14, block_of(BLOCK)?)
        };
        let lengths = Lengths { prompt: 48, answer: 64 };
        let asks = common_prefix(1000, lengths, model.vocabulary()?);
        let mut row = vec![Cell::text(name)];
        row.extend(timed(&mut model.engine(room)?, &asks)?);
        table.push(row);
    }
    Ok(table)
}

fn timed<B: Backend>(engine: &mut Stepping<B>, asks: &[Ask]) -> Result<[Cell; 4]> {
    let started = std::time::Instant::now();
    asks.iter().try_for_each(|ask| engine.ask(ask))?;
    let steps = engine.run()?;
    let seconds = started.elapsed().as_secs_f64();
    let computed = |step: &Stepped| step.stats.prefill_tokens + step.stats.decode_tokens;
    let answers = steps.iter().flat_map(|step| &step.ended);
    let ttfts = sorted(milliseconds(answers.map(|answer| answer.ttft)));
    Ok([
        Cell::Count(steps.iter().map(computed).sum()),
        Cell::milliseconds(mean(&ttfts)),
        Cell::milliseconds(Percentile::P99.of(&ttfts)),
        Cell::Real(seconds, 2),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_users_of_a_200_token_system_prompt_save_108_blocks() {
        let shared = system_prompt(200).unwrap();
        assert_eq!(shared.blocks_saved, 9 * 12);
        // Eight more tokens of the prompt stand in a block that each user copies.
        assert_eq!((shared.slots_copied, shared.copies_on_write), (9 * 8, 0));
        assert_eq!((shared.prompt_tokens, shared.cached_tokens), (10 * 232, 9 * 200));
    }

    #[test]
    fn four_choices_copy_a_partly_filled_last_block_three_times_and_a_full_one_never() {
        let choices = |tokens| one_prompt(tokens, AskKind::Choices(CHOICES)).unwrap();
        let (partly, full) = (choices(200), choices(192));
        assert_eq!((partly.copies_on_write, partly.blocks_saved), (3, 3 * 12));
        assert_eq!((full.copies_on_write, full.blocks_saved), (0, 3 * 12));
    }

    #[test]
    fn beams_share_at_least_their_prompt() {
        let shared = one_prompt(200, beams()).unwrap();
        assert!(shared.blocks_saved >= 3 * 12, "{shared:?}");
        assert!(shared.copies_on_write >= 3, "{shared:?}");
    }

    #[test]
    fn a_turn_computes_what_is_new_and_the_last_token_before() {
        let shared = conversation(4).unwrap();
        assert_eq!(shared.prompt_tokens, 40 + 180 + 320 + 460);
        // Of what was said, the last token has no K and V, and a block that is not full is not cached.
        let blocks = (139 / 16) + (279 / 16) + (419 / 16);
        assert_eq!((shared.blocks_saved, shared.cached_tokens), (blocks, blocks * 16));
    }

    #[test]
    fn the_cache_saves_what_the_prompts_share() {
        let asks = common_prefix(1000, Lengths { prompt: 48, answer: 64 }, VOCABULARY);
        let computed = |prefix_caching| {
            let room = Room { prefix_caching, ..Room::of_slots(1 << 14, block_of(BLOCK).unwrap()) };
            let mut engine = Stepping::new(MadeUp::new(1), room);
            let [tokens, ..] = timed(&mut engine, &asks).unwrap();
            tokens
        };
        assert_eq!(computed(PrefixCaching::Disabled), Cell::Count(10 * (1048 + 63)));
        // All ten are admitted in one step, in which whole blocks alone are shared: 62 of them.
        assert_eq!(computed(PrefixCaching::Enabled), Cell::Count(10 * (1048 + 63) - 9 * 992));
    }
}
