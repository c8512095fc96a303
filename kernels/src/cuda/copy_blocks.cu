// Copies whole blocks of the KV arena, pair by pair. A pair with a block that is not there is left out.
#include "common.cuh"

constexpr uint32_t THREADS = 256;
// 16-byte pieces that a thread has on their way.
constexpr int PIECES = 4;

struct CopyBlocks {
    uint4* arena;        // [blocks][width]
    const uint2* pairs;  // [count], from and to
    uint32_t blocks;
    uint32_t width;      // 16-byte pieces
};

// Blocks go over a pair in x, over pairs in y.
extern "C" __global__ void __launch_bounds__(THREADS) copy_blocks(const __grid_constant__ CopyBlocks of) {
    wait_for_previous();
    let_next_begin();
    uint2 pair = of.pairs[blockIdx.y];
    if (pair.x >= of.blocks || pair.y >= of.blocks) return;
    uint32_t first = blockIdx.x * PIECES * THREADS + threadIdx.x, width = of.width;
    const uint4* from = of.arena + static_cast<size_t>(pair.x) * width + first;
    uint4* to = of.arena + static_cast<size_t>(pair.y) * width + first;
    uint4 kept[PIECES];
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
        if (first + piece * THREADS < width) kept[piece] = from[piece * THREADS];
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
        if (first + piece * THREADS < width) to[piece * THREADS] = kept[piece];
}
