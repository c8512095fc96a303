// What both kernels of paged prefill attention share: who computes which rows, and what a row sees.
#pragma once
#include "attention.cuh"
#include "sequences.cuh"

struct Prefill : Attention {
    const uint32_t* begins;  // [sequences + 1], rows of q where sequences begin
    const uint32_t* starts;  // [sequences], positions of their first rows
    void* results;           // as queries
    uint32_t sequences;
    uint32_t tokens;         // rows of q
};

// Tokens times the query heads of one KV head are the rows of a sequence: the heads that share K and V are neighbours, so that a
// short chunk fills a tile too.
struct Rows {
    uint32_t begin;    // row of q
    uint32_t count;    // tokens
    uint32_t start;    // position of the first
    uint32_t context;  // positions, those of these tokens included

    __device__ __forceinline__ Rows(const Prefill& prefill, uint32_t sequence) {
        begin = min(prefill.begins[sequence], prefill.tokens);
        uint32_t end = min(prefill.begins[sequence + 1], prefill.tokens), most = prefill.table_width * prefill.arena.block_size;
        count = end > begin ? end - begin : 0;
        start = min(prefill.starts[sequence], most);
        context = min(start + count, most);
    }
};

// A tile of ROWS rows of one sequence and KV head.
struct Unit {
    uint32_t sequence;
    uint32_t head;
    uint32_t first_row;
};

// Counts the tiles of the sequences before each, in shared memory: [sequences + 1]. All threads take part.
template <int ROWS> __device__ void count_tiles(const Prefill& prefill, uint32_t* before, uint32_t* scratch) {
    auto tiles = [&](uint32_t s) { return (Rows(prefill, s).count * prefill.group + ROWS - 1) / ROWS; };
    sum_before(prefill.sequences, before, scratch, tiles);
}

// The `index`th unit: of each sequence the tiles that see most first, so that short ones fill the gaps at the end.
template <int ROWS> __device__ __forceinline__ Unit unit_of(const Prefill& prefill, const uint32_t* before, uint32_t index) {
    uint32_t tile = index / prefill.arena.kv_heads, sequence = sequence_of(before, prefill.sequences, tile);
    return {sequence, index % prefill.arena.kv_heads, (before[sequence + 1] - 1 - tile) * ROWS};
}

// What a row sees.
__device__ __forceinline__ Sight sight(const Prefill& prefill, const Rows& rows, uint32_t row) {
    uint32_t token = min(row / prefill.group, rows.count - 1);
    return Sight::up_to(min(rows.start + token + 1, rows.context), prefill.window);
}
