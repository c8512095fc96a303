// The KV arena: [blocks][layers][kv heads][K, V][block size / 8][panels][8 rows][a panel's bytes].
// A panel is 128 bytes of a row (64 where rows are no multiple of 128). Within an atom of 8 rows the 16-byte chunks of a row are
// permuted as shared memory wants it for matrix loads, so that one bulk copy takes a head's block there ready to use.
// Block-major: one block is one piece. `layout.rs` says the same for the host.
#pragma once
#include "common.cuh"

constexpr int ATOM_ROWS = 8;

struct KvArena {
    uint8_t* data;
    uint32_t blocks;
    uint32_t block_size;
    uint32_t layers;
    uint32_t kv_heads;
};

template <typename KV, int D> struct Layout {
    static constexpr int ROW = D * static_cast<int>(sizeof(KV));
    static constexpr int PANEL = ROW % 128 == 0 ? 128 : 64;
    static_assert(ROW % PANEL == 0);
    static constexpr int CHUNKS = PANEL / 16;
    static constexpr int ATOM = ATOM_ROWS * PANEL;
    // Bytes of 8 rows.
    static constexpr int GROUP = ATOM_ROWS * ROW;

    // Where a 16-byte chunk of a row is, from a row that is a multiple of 8.
    static __device__ __forceinline__ uint32_t chunk(uint32_t row, uint32_t chunk) {
        uint32_t r = row % ATOM_ROWS, mixed = CHUNKS == 8 ? r : r / 2 % 4;
        return row / ATOM_ROWS * GROUP + chunk / CHUNKS * ATOM + r * PANEL + ((chunk % CHUNKS) ^ mixed) * 16;
    }
    // Where a head's K (which = 0) or V (which = 1) of a block begins.
    static __device__ __forceinline__ size_t head(const KvArena& arena, uint32_t block, uint32_t layer, uint32_t which, uint32_t head) {
        size_t index = ((static_cast<size_t>(block) * arena.layers + layer) * arena.kv_heads + head) * 2 + which;
        return index * (arena.block_size / ATOM_ROWS) * GROUP;
    }
};
