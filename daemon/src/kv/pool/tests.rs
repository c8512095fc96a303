//! The pool alone: what a block costs, who may be copied from, and that forgetting one is cheap.

use std::num::NonZeroU32;

use super::*;
use crate::kv::PrefixHasher;
use crate::request::Salt;

const SIZE: usize = 4;

fn pool(blocks: u32) -> BlockPool {
    BlockPool::new(BlockSize(NonZeroU32::new(4).unwrap()), blocks)
}

fn table(pool: &mut BlockPool, tokens: usize) -> BlockTable {
    let mut table = BlockTable::default();
    assert_eq!(pool.extend(&mut table, 0, tokens), Ok(None));
    table
}

/// Publishes the table's first block below `parent` with the tokens `first, 0, 0, 0`.
fn publish(pool: &mut BlockPool, table: &BlockTable, parent: BlockKey, first: u32, step: u64) {
    let tokens = || [first, 0, 0, 0].map(TokenId).into_iter();
    let key = PrefixHasher::new([0; 32]).child(parent, tokens());
    pool.publish(table.blocks()[0], ChainedKey { parent, key }, tokens(), StepId(step));
}

fn root() -> BlockKey {
    PrefixHasher::new([0; 32]).root(Salt::default())
}

#[test]
fn owners_of_a_shared_tail_copy_it_but_for_the_last() {
    let mut pool = pool(20);
    let first = table(&mut pool, 6);
    let forks = [pool.fork(&first, 6), pool.fork(&first, 6)];
    let write = |table, tokens| Write { table, computed: 6, tokens };
    let all = || [&first, &forks[0], &forks[1]].into_iter();
    assert_eq!(pool.blocks_to_write(all().map(|table| write(table, 7))), 2, "all three write");
    assert_eq!(pool.blocks_to_write(all().take(2).map(|table| write(table, 7))), 2, "one reads on");
    assert_eq!(pool.blocks_to_write(all().map(|table| write(table, 6))), 0, "nobody writes");
    assert_eq!(pool.blocks_to_write(all().map(|table| write(table, 9))), 2 + 3);
}

#[test]
fn a_partial_copy_is_found_behind_many_blocks_of_the_planned_step() {
    let mut pool = pool(200);
    let old = table(&mut pool, SIZE);
    publish(&mut pool, &old, root(), 7, 1);
    for first in 0..100 {
        let table = table(&mut pool, SIZE);
        publish(&mut pool, &table, root(), 100 + first, 2);
    }
    let found = pool.longest_prefix(root(), &[TokenId(7)], StepId(2));
    assert_eq!(found, Some(SharedPrefix { block: old.blocks()[0], slots: 1 }));
}

#[test]
fn forgetting_children_in_any_order_keeps_their_chain() {
    let mut pool = pool(6);
    let tables: Vec<BlockTable> = (0..6).map(|_| table(&mut pool, SIZE)).collect();
    (0..).zip(&tables).for_each(|(first, table)| publish(&mut pool, table, root(), first, 1));
    pool.check(tables.iter());
    for index in [2, 5, 0, 3, 1, 4] {
        pool.evict(tables[index].blocks()[0]);
        pool.check(tables.iter());
    }
    assert!(pool.newest_child.is_empty());
}

/// With a walk over the siblings this takes minutes.
#[test]
fn reusing_blocks_does_not_walk_over_their_siblings() {
    const BLOCKS: u32 = 200_000;
    let mut pool = pool(BLOCKS);
    for first in 0..BLOCKS {
        let table = table(&mut pool, SIZE);
        publish(&mut pool, &table, root(), first, 1);
        pool.release(table, None);
    }
    assert_eq!(pool.usage().cached, BLOCKS as usize);
    let all = table(&mut pool, SIZE * BLOCKS as usize);
    assert!(pool.by_key.is_empty() && pool.newest_child.is_empty());
    pool.check(std::iter::once(&all));
}
