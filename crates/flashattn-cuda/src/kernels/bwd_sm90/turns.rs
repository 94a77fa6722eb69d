//! Blocks of keys that take turns to add to dQ', so that its bits do not depend on which of them comes first.
//!
//! To each tile of queries the first block of keys adds first, the last one that it sees last: each follows the one before it, which tells
//! how far it has come. Items are taken from the first keys on, too, so that one only waits for items that were taken before it. A
//! reduction takes longer to end than a block's products, and what is told as long to be seen, so that this is no work for a consumer.
//! For each warpgroup there is a thread beside the producers:
//!
//! ```text
//! for each block of queries of each item:
//!     until the item before is known to have come by: look
//!     wait until the warpgroup has put dQ' into shared memory;  add it;  let go of shared memory
//!     wait until it has been added;  tell
//! ```
//!
//! To wait for that a block later, and to tell every other time, takes less of the thread's time, but the items of a head then follow
//! each other at a larger distance, which costs more.

use ptx::build::Reg;
use ptx::instr::{Cache, Order};

use super::work::Work;
use super::{CONSUMERS, Shared};

/// Bytes of an item's numbers: for each warpgroup a u32 in a sector of its own. It has added to all blocks of queries below that number.
pub(crate) const BYTES: u32 = CONSUMERS * SECTOR;

const SECTOR: u32 = 32;

impl<'k> Work<'_, 'k> {
    /// Adds what consumer warpgroup `group` puts to `sums`, by turns that are told in `numbers`. By one thread.
    pub(super) fn add_in_turn(
        &self,
        shared: &Shared<'k>,
        [sums, numbers]: [Reg<'k, u64>; 2],
        group: Reg<'k, u32>,
    ) {
        let (k, config, params) = (self.k, self.config, self.params);
        let (items, state) = (shared.item_pipeline, shared.item_pipeline.start(k));
        let (puts, put) = (shared.dq_pipeline, shared.dq_pipeline.start(k));
        let part = group * config.dq_part_bytes();
        // Of the two stages each is one warpgroup's.
        put.index.set(group);
        let let_go = || {
            puts.full(put).arrive(k);
            put.phase.set(put.phase ^ 1);
        };
        let_go();
        // How far the item before has come, as far as is known.
        let seen = k.var(0u32);
        k.loop_(|| {
            items.consumer_wait(k, state);
            let item = self.told(shared, state.index);
            k.break_if(item.exists.eq(0));
            items.consumer_release(k, state.index, k.var(0u32));
            state.advance();
            let number = (item.batch * params.heads_kv + item.head_kv) * self.n_blocks() + item.n_block;
            let own = k.var(number * BYTES + group * SECTOR);
            let at = |offset: Reg<'k, u32>| (offset.to_u64() + numbers).address();
            let follows = item.n_block.ne(0);
            seen.set(0u32);
            self.each_block(&item, |block| {
                // Of all query heads of the group, one after the other.
                let here = block.head * self.m_blocks() + block.m_block;
                k.if_(follows & seen.le(here), || {
                    k.loop_(|| {
                        let [far] = at(own - BYTES).load_as::<u32, 1>(Order::Acquire, Cache::Default);
                        seen.set(far);
                        k.break_if(seen.gt(here));
                    });
                    // What was added was seen by a load; the reduction goes another way.
                    k.fence_proxy_async();
                });
                puts.producer_wait(k, put);
                let tile = self.tile(&item.sequence, block.head, block.m_block);
                let to = tile.mad_wide(config.dq_sum_bytes(), sums) + part.to_u64();
                k.bulk_reduce_add_f32(to.address(), shared.dq + part, config.dq_part_bytes());
                k.bulk_commit();
                k.bulk_wait(0, true);
                let_go();
                k.bulk_wait(0, false);
                at(own).store_as([here + 1], Order::Release);
            });
        });
    }

    /// Blocks of queries of the longest sequence.
    fn m_blocks(&self) -> Reg<'k, u32> {
        (self.params.seqlen_q + (self.config.tile_m - 1)) / self.config.tile_m
    }
}
