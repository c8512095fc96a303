// Copies whole blocks of the KV arena, pair by pair. A pair with a block that is not there is left out.
#include "common.cuh"

constexpr uint32_t THREADS = 256;
// 16-byte pieces that a thread has on their way.
constexpr int PIECES = 4;

// `pairs`: [count][from, to]; `width`: 16-byte pieces of a block. Blocks go over a pair in x, over pairs in y.
extern "C" __global__ void __launch_bounds__(THREADS) copy_blocks(uint4* arena, const uint2* pairs, uint32_t blocks, uint32_t width) {
    uint2 pair = pairs[blockIdx.y];
    if (pair.x >= blocks || pair.y >= blocks) return;
    uint32_t first = blockIdx.x * PIECES * THREADS + threadIdx.x;
    const uint4* from = arena + static_cast<size_t>(pair.x) * width + first;
    uint4* to = arena + static_cast<size_t>(pair.y) * width + first;
    uint4 kept[PIECES];
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
        if (first + piece * THREADS < width) kept[piece] = from[piece * THREADS];
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
        if (first + piece * THREADS < width) to[piece * THREADS] = kept[piece];
}
