// What kernels over rows share: eight numbers at once, sums over a block.
#pragma once
#include "common.cuh"

// Numbers of 16 bits in a uint4, which is how rows are moved: what a thread asks for as bits, it waits for when it widens them.
constexpr int EIGHT = 8;

// Two numbers of one register, as `pack` makes it.
template <typename T> __device__ __forceinline__ float2 unpack(uint32_t both);
template <> __device__ __forceinline__ float2 unpack<__half>(uint32_t both) { return __half22float2(*reinterpret_cast<__half2*>(&both)); }
template <> __device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t both) {
    return {__uint_as_float(both << 16), __uint_as_float(both & 0xFFFF0000)};
}

template <typename T> __device__ __forceinline__ void widen(uint4 bits, float (&values)[EIGHT]) {
    uint32_t pairs[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < EIGHT; i += 2) {
        float2 both = unpack<T>(pairs[i / 2]);
        values[i] = both.x, values[i + 1] = both.y;
    }
}

template <typename T> __device__ __forceinline__ uint4 narrow(const float (&values)[EIGHT]) {
    return {pack<T>(values[0], values[1]), pack<T>(values[2], values[3]), pack<T>(values[4], values[5]), pack<T>(values[6], values[7])};
}

// The sum over all threads of the block, in every thread; once a launch. At most 1024 threads.
__device__ __forceinline__ float block_sum(float value) {
    __shared__ float sums[WARP];
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = value;
    __syncthreads();
    value = threadIdx.x % WARP < blockDim.x / WARP ? sums[threadIdx.x % WARP] : 0;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}
