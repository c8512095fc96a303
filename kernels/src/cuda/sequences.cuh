// Work that is sequence after sequence: how much is before each, and whose a piece of it is.
#pragma once
#include "common.cuh"

// The sequences that this thread counts: [from, to).
struct Counted {
    uint32_t from;
    uint32_t to;

    __device__ __forceinline__ explicit Counted(uint32_t count) {
        uint32_t per_thread = (count + blockDim.x - 1) / blockDim.x;
        from = min(threadIdx.x * per_thread, count);
        to = min(from + per_thread, count);
    }
};

// Sums of what is before each of `count` sequences: `before`, [count + 1], in shared memory. All threads of the block take part,
// each asks for the amounts of the sequences it counts; `scratch` is a number for each warp.
template <typename F> __device__ __forceinline__ void sum_before(uint32_t count, uint32_t* before, uint32_t* scratch, F amount) {
    Counted mine(count);
    uint32_t own = 0;
#pragma unroll 1
    for (uint32_t s = mine.from; s < mine.to; s++) own += amount(s);
    uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, sum = own;
    for (int step = 1; step < WARP; step *= 2) {
        uint32_t other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == WARP - 1) scratch[warp] = sum;
    __syncthreads();
    for (uint32_t w = 0; w < warp; w++) sum += scratch[w];
    uint32_t running = sum - own;
#pragma unroll 1
    for (uint32_t s = mine.from; s < mine.to; s++) {
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

// A line of items cut into pieces, of which the first ones have one item more where it does not come out even. 32 bits throughout:
// a division of 64 takes hundreds of clocks.
struct Pieces {
    uint32_t each;
    uint32_t longer;

    __device__ __forceinline__ Pieces(uint32_t items, uint32_t pieces) : each(items / pieces), longer(items % pieces) {}
    // The first item of a piece, or what is behind the last one.
    __device__ __forceinline__ uint32_t begin(uint32_t piece) const { return piece * each + min(piece, longer); }
    // The piece that has an item.
    __device__ __forceinline__ uint32_t of(uint32_t item) const {
        uint32_t in_longer = longer * (each + 1);
        return item < in_longer ? item / (each + 1) : longer + (item - in_longer) / each;
    }
};
