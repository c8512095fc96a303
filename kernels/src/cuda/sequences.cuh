// Work that is sequence after sequence: how much is before each, and whose a piece of it is.
#pragma once
#include "common.cuh"

// Sums of what is before each of `count` sequences: `before`, [count + 1], in shared memory. All threads of the block take part;
// `scratch` is a number for each warp.
template <typename F> __device__ __forceinline__ void sum_before(uint32_t count, uint32_t* before, uint32_t* scratch, F amount) {
    uint32_t per_thread = (count + blockDim.x - 1) / blockDim.x;
    uint32_t from = min(threadIdx.x * per_thread, count), to = min(from + per_thread, count), own = 0;
    for (uint32_t s = from; s < to; s++) own += amount(s);
    uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, sum = own;
    for (int step = 1; step < WARP; step *= 2) {
        uint32_t other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == WARP - 1) scratch[warp] = sum;
    __syncthreads();
    for (uint32_t w = 0; w < warp; w++) sum += scratch[w];
    uint32_t running = sum - own;
    for (uint32_t s = from; s < to; s++) {
        before[s] = running;
        running += amount(s);
    }
    if (threadIdx.x == blockDim.x - 1) before[count] = sum;
    __syncthreads();
}

// The sequence that has the `index`th piece.
__device__ __forceinline__ uint32_t sequence_of(const uint32_t* before, uint32_t count, uint32_t index) {
    uint32_t low = 0, high = count;
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        (before[middle] <= index ? low : high) = middle;
    }
    return low;
}

// The items of the line that piece `index` of `pieces` has: [begin, end).
__device__ __forceinline__ uint32_t piece_begin(uint32_t items, uint32_t index, uint32_t pieces) {
    return static_cast<uint32_t>(static_cast<uint64_t>(items) * index / pieces);
}
// The piece that has an item.
__device__ __forceinline__ uint32_t piece_of(uint32_t items, uint32_t item, uint32_t pieces) {
    return static_cast<uint32_t>(((static_cast<uint64_t>(item) + 1) * pieces - 1) / items);
}
