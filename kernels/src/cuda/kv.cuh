// The KV arena: [blocks][layers][kv heads][K, V][block size / 8][panels][8 rows][a panel's bytes].
// A panel is 128 bytes of a row (64 or 32 where rows are no multiple of more). Within an atom of 8 rows the 16-byte chunks of a row
// are permuted as shared memory wants it for matrix loads, so that one bulk copy takes a head's block there ready to use.
// Block-major: one block is one piece. `arena.rs` says the same for the host.
#pragma once
#include "common.cuh"

constexpr int ATOM_ROWS = 8;

struct KvArena {
    uint8_t* data;
    const float* scales;  // [layers][kv heads][K, V], for numbers of 8 bits
    uint32_t blocks;
    uint32_t block_size;
    uint32_t layers;
    uint32_t kv_heads;
};

template <typename KV, int D> struct Layout {
    static constexpr int ROW = D * static_cast<int>(sizeof(KV));
    static constexpr int PANEL = ROW % 128 == 0 ? 128 : ROW % 64 == 0 ? 64 : 32;
    static_assert(ROW % PANEL == 0);
    static constexpr int CHUNKS = PANEL / 16;
    static constexpr int ATOM = ATOM_ROWS * PANEL;
    // Bytes of 8 rows.
    static constexpr int GROUP = ATOM_ROWS * ROW;

    // Where a 16-byte chunk of a row is, from a row that is a multiple of 8.
    static __device__ __forceinline__ uint32_t chunk(uint32_t row, uint32_t chunk) {
        uint32_t r = row % ATOM_ROWS, mixed = r / (ATOM_ROWS / CHUNKS) % CHUNKS;
        return row / ATOM_ROWS * GROUP + chunk / CHUNKS * ATOM + r * PANEL + ((chunk % CHUNKS) ^ mixed) * 16;
    }
    // Where a head's K (which = 0) or V (which = 1) of a block begins.
    static __device__ __forceinline__ size_t head(const KvArena& arena, uint32_t block, uint32_t layer, uint32_t which, uint32_t head) {
        size_t index = ((static_cast<size_t>(block) * arena.layers + layer) * arena.kv_heads + head) * 2 + which;
        return index * (arena.block_size / ATOM_ROWS) * GROUP;
    }
    // What a head's K or V is to be multiplied by.
    static __device__ __forceinline__ float scale(const KvArena& arena, uint32_t layer, uint32_t which, uint32_t head) {
        if constexpr (sizeof(KV) == 1) return arena.scales[(layer * arena.kv_heads + head) * 2 + which];
        else return 1;
    }
};
