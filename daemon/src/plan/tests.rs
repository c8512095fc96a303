//! Tests of the memory plan: every way to size the pool, and every refusal with its figure.

use super::*;
use crate::config::{Command, Environment, parse};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
/// Weights, workspace and overhead of [`DEMAND`].
const FIXED: u64 = GIB + PROCESS_OVERHEAD_BYTES;
/// A token takes 64 KiB, so a block of 16 tokens takes 1 MiB.
const DEMAND: Demand = Demand {
    weights: GIB - 64 * MIB,
    workspace: 64 * MIB,
    kv_per_token: 64 << 10,
    max_position: 4096,
    sliding_layers: 0,
};
const MACHINE: Machine = Machine { total: 64 * GIB, free: 32 * GIB };

fn plan_on(flags: &str, machine: Machine) -> Result<MemoryPlan, PlanError> {
    let words = ["bindery", "serve", "m"].into_iter().chain(flags.split_whitespace());
    match parse(words.map(Into::into), &Environment::default()).unwrap() {
        Command::Serve(config) => MemoryPlan::new(&config, DEMAND, machine),
        other => panic!("wanted serve, got {other:?}"),
    }
}

/// The pool holds `blocks`, and the parts of the plan add up.
#[track_caller]
fn check_blocks(flags: &str, machine: Machine, blocks: u64) -> MemoryPlan {
    let plan = plan_on(flags, machine).unwrap();
    assert_eq!(u64::from(plan.blocks), blocks, "{flags}");
    assert_eq!(
        plan.kv_bytes,
        (blocks + 1) * plan.kv_bytes_per_block,
        "{flags}: with the null block"
    );
    assert_eq!(plan.total_bytes, FIXED + plan.kv_bytes, "{flags}");
    plan
}

#[track_caller]
fn check_refused(flags: &str, wanted: PlanError, figure: &str) {
    let error = plan_on(flags, MACHINE).unwrap_err();
    assert_eq!(error, wanted, "{flags}");
    assert!(error.to_string().contains(figure), "{flags}: {error}");
}

#[test]
fn the_default_pool_is_the_least_of_the_need_four_gib_and_a_share_of_what_is_free() {
    let need = check_blocks("--max-num-seqs 3 --max-model-len 100", MACHINE, 21);
    assert_eq!(need.sequences_at_full_length, 3, "seven blocks each, the last one not full");
    check_blocks("", MACHINE, 4095);
    // 40 % of 5 GiB, in whole hundredths.
    check_blocks("", Machine { free: 5 * GIB, ..MACHINE }, 2046);
}

#[test]
fn a_stated_size_decides_alone() {
    check_blocks("--memory-bytes 3GiB", MACHINE, 2048 - 96 - 1);
    check_blocks("--gpu-memory-utilization 0.25", Machine { total: 12 * GIB, free: 0 }, 1950);
    check_blocks("--kv-cache-memory-bytes 512MiB", MACHINE, 511);
    check_blocks("--num-gpu-blocks-override 300", MACHINE, 300);
}

#[test]
fn a_grant_is_the_total_whichever_flag_sizes_the_pool() {
    let (limit, fixed) = (2 * GIB, FIXED);
    for (size, blocks) in
        [("--num-gpu-blocks-override", "927"), ("--kv-cache-memory-bytes", "928MiB")]
    {
        check_blocks(&format!("--memory-bytes 2GiB {size} {blocks}"), MACHINE, 927);
    }
    for (size, blocks) in
        [("--num-gpu-blocks-override", "930"), ("--kv-cache-memory-bytes", "931MiB")]
    {
        let flags = format!("--memory-bytes 2GiB {size} {blocks}");
        let wanted = PlanError::NoRoomForWeights {
            parts: "weights, workspace, process and KV blocks",
            needed: fixed + 931 * MIB,
            limit,
        };
        check_refused(&flags, wanted, "3145728 bytes (3 MiB) are missing");
    }
}

#[test]
fn an_unset_length_is_lowered_to_what_fits_and_a_stated_one_is_not() {
    let plan = check_blocks("--num-gpu-blocks-override 10", MACHINE, 10);
    assert_eq!((plan.max_model_len, plan.max_model_len_lowered), (160, true));
    assert_eq!(plan.sequences_at_full_length, 1);
    let plan = check_blocks("--num-gpu-blocks-override 10 --max-model-len 160", MACHINE, 10);
    assert!(!plan.max_model_len_lowered);
    let missing = PlanError::SequenceDoesNotFit {
        len: 161,
        needed: 11,
        blocks: 10,
        missing_bytes: MIB,
        fits: 160,
    };
    check_refused("--num-gpu-blocks-override 10 --max-model-len 161", missing, "at most 160");
}

#[test]
fn what_does_not_fit_is_refused_with_what_is_missing() {
    let limit = GIB;
    check_refused(
        "--memory-bytes 1GiB",
        PlanError::NoRoomForWeights {
            parts: "weights, workspace and process",
            needed: FIXED,
            limit,
        },
        "100663296 bytes (96 MiB) are missing",
    );
    check_refused(
        "--max-model-len 4097",
        PlanError::TooLong { flag: "max-model-len", wanted: 4097, limit: 4096 },
        "4096 positions",
    );
    let wanted = PlanError::LargerThanMachine { needed: FIXED + 70_001 * MIB, total: 64 * GIB };
    check_refused("--num-gpu-blocks-override 70000", wanted, "has 68719476736 bytes (65536 MiB)");
}

#[test]
fn a_block_longer_than_any_sequence_is_refused_with_what_is_allowed() {
    check_blocks("--block-size 4096 --num-gpu-blocks-override 1", MACHINE, 1);
    let wanted = PlanError::TooLong { flag: "block-size", wanted: 4097, limit: 4096 };
    check_refused("--block-size 4097", wanted, "the 4096 positions");
}
