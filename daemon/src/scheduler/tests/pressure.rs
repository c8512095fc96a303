//! Named cases of memory that just suffices, or just does not.

use super::*;

fn endless(id: u64, prompt: std::ops::Range<u32>, max_tokens: u32) -> Request {
    Request { stop_tokens: tokens([]), ..sample(id, tokens(prompt), max_tokens, 1) }
}

fn uncached(blocks: u32, block_size: u32) -> Limits {
    Limits { prefix_caching: PrefixCaching::Disabled, ..limits(blocks, block_size) }
}

#[test]
fn copies_of_choices_that_fork_in_this_step_are_kept_from_the_next_prompt() {
    for depth in [1, 2] {
        let limits = Limits { max_num_batched_tokens: 4096, ..limits(16, 16) };
        let mut bench = Bench::new(limits, depth);
        let wide = Request {
            stop_tokens: tokens([]),
            ..sample(1, tokens((0..200).map(|i| i % 50)), 6, 4)
        };
        let small = endless(2, 100..140, 2);
        bench.submit(wide.clone());
        bench.submit(small.clone());
        bench.turn();
        assert_eq!(bench.scheduler.n_waiting(), 1, "three blocks are left for three copies");
        bench.run();
        assert_eq!(bench.totals.preemptions, 0);
        bench.expect(&wide);
        bench.expect(&small);
    }
}

#[test]
fn beams_that_share_their_last_block_take_one_copy_less_than_they_are() {
    let mut bench = Bench::new(uncached(6, 4), 1);
    let mut search = endless(1, 4..9, 3);
    search.decoding = Decoding::Beam(beam(2));
    let other = endless(2, 20..30, 3);
    bench.submit(search.clone());
    bench.submit(other.clone());
    bench.run();
    assert_eq!(bench.totals.preemptions, 0, "the sixth block is enough");
    bench.expect(&search);
    bench.expect(&other);
}

/// A favoured prompt runs short at its last chunk, because decodes grew, and waits for a victim's blocks: the other
/// decode may not take of them.
#[test]
fn a_sequence_that_waits_for_blocks_in_flight_has_them_in_the_next_step() {
    let mut deferred = 0;
    for (blocks, own) in (70..78).flat_map(|blocks| (1..4).map(move |own| (blocks, own))) {
        let limits = Limits { max_num_batched_tokens: 12, ..uncached(blocks, 1) };
        let mut bench = Bench::new(limits, 2);
        bench.submit(endless(1, 4..8, 40));
        bench.turns(4);
        bench.submit(endless(3, 50..50 + own, 40));
        bench.turns(1);
        bench.submit(Request { priority: -1, ..endless(2, 100..160, 2) });
        bench.run();
        assert_eq!(bench.waited_again, 0, "{blocks} blocks, {own} tokens of the victim");
        deferred += bench.totals.deferred;
    }
    assert!(deferred > 0);
}

/// What one beam goes on with is cached: copying that part would take a block that the other beam was promised.
#[test]
fn beams_come_back_into_memory_that_just_holds_them() {
    let mut bench = Bench::new(limits(4, 8), 1);
    let mut search = endless(1, 4..6, 6);
    search.decoding = Decoding::Beam(beam(2));
    bench.submit(search.clone());
    bench.turns(3);
    let favoured = |request| Request { priority: -1, ..request };
    bench.submit(favoured(endless(2, 20..27, 10)));
    bench.submit(favoured(endless(3, 30..37, 4)));
    while bench.totals.preemptions == 0 {
        assert!(bench.turn(), "both grow into the beams' memory");
    }
    let best = beams_alone(&search, beam(2)).remove(0).tokens;
    let prompt = [&search.prompt[..], &best].concat();
    bench.submit(favoured(Request { prompt: prompt.into(), ..endless(4, 0..1, 1) }));
    bench.run();
    assert_eq!(bench.totals.preemptions, 2, "the beams went once");
    bench.expect(&search);
}

#[test]
fn a_prompt_without_a_free_block_is_not_looked_up() {
    let mut bench = Bench::new(limits(4, 4), 1);
    bench.submit(endless(1, 4..17, 3));
    bench.submit(endless(2, 20..34, 2));
    bench.turn();
    let head = bench.scheduler.waiting.values().next().unwrap();
    assert_eq!(head.sequence.n_keys(), 0);
    bench.run();
}

#[test]
fn a_prompt_waits_below_the_watermark_while_another_runs() {
    for (watermark_blocks, waiting) in [(2, 0), (3, 1)] {
        let mut bench = Bench::new(Limits { watermark_blocks, ..limits(8, 4) }, 1);
        bench.submit(endless(1, 4..15, 2));
        bench.submit(endless(2, 20..31, 2));
        bench.turn();
        assert_eq!(bench.scheduler.n_waiting(), waiting, "3 + 3 of 8 blocks leave 2");
        bench.run();
    }
}

#[test]
fn a_prompt_alone_is_admitted_below_the_watermark() {
    let mut bench = Bench::new(Limits { watermark_blocks: 7, ..limits(8, 4) }, 1);
    bench.submit(endless(1, 4..34, 2));
    bench.turn();
    assert_eq!((bench.scheduler.n_running(), bench.scheduler.n_waiting()), (1, 0));
    bench.run();
}

#[test]
fn a_prompt_waits_until_all_of_it_fits_not_only_its_first_chunk() {
    let limits = Limits { max_num_batched_tokens: 16, ..uncached(10, 4) };
    let mut bench = Bench::new(limits, 1);
    bench.submit(endless(1, 4..15, 5));
    bench.turn();
    bench.submit(endless(2, 20..52, 2));
    bench.turn();
    assert_eq!(bench.scheduler.n_waiting(), 1, "four blocks of its eight would do for the chunk");
    bench.run();
    assert_eq!(bench.totals.preemptions, 0);
}

#[test]
fn requests_that_may_not_hit_count_no_queries() {
    let scored = Request { prompt_logprobs: Some(1), ..endless(1, 4..15, 2) };
    for (limits, request) in [(uncached(8, 4), endless(1, 4..15, 2)), (limits(8, 4), scored)] {
        let mut bench = Bench::new(limits, 1);
        bench.submit(request);
        bench.run();
        assert_eq!((bench.totals.prefix_queries, bench.totals.unqueried_tokens), (0, 11));
    }
}

#[test]
fn the_last_token_of_a_request_needs_no_block() {
    let mut bench = Bench::new(limits(3, 4), 1);
    let request = endless(1, 4..14, 3);
    assert_eq!(blocks_needed(&request, bench.size), 3);
    bench.submit(request.clone());
    bench.run();
    bench.expect(&request);
}
