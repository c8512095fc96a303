// Copies whole blocks of the KV arena, pair by pair. A pair with a block that is not there is left out.
#include "common.cuh"

// `pairs`: [count][from, to]; `width`: 16-byte pieces of a block.
extern "C" __global__ void copy_blocks(uint4* arena, const uint2* pairs, uint32_t blocks, uint64_t width) {
    uint2 pair = pairs[blockIdx.y];
    if (pair.x >= blocks || pair.y >= blocks) return;
    const uint4* from = arena + pair.x * width;
    uint4* to = arena + pair.y * width;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < width; i += static_cast<uint64_t>(gridDim.x) * blockDim.x)
        to[i] = from[i];
}
