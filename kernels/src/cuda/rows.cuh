// What kernels over rows share: eight numbers at once, sums over a block.
#pragma once
#include "common.cuh"

// Eight numbers of 16 bits.
constexpr int EIGHT = 8;

template <typename T> __device__ __forceinline__ void load_eight(const T* from, float (&values)[EIGHT]) {
    uint4 bits = *reinterpret_cast<const uint4*>(from);
    const T* numbers = reinterpret_cast<const T*>(&bits);
#pragma unroll
    for (int i = 0; i < EIGHT; i++) values[i] = to_float(numbers[i]);
}

template <typename T> __device__ __forceinline__ void store_eight(T* to, const float (&values)[EIGHT]) {
    uint4 bits = {pack<T>(values[0], values[1]), pack<T>(values[2], values[3]), pack<T>(values[4], values[5]), pack<T>(values[6], values[7])};
    *reinterpret_cast<uint4*>(to) = bits;
}

// The sum over all threads of the block, in every thread. At most 1024 threads.
__device__ __forceinline__ float block_sum(float value) {
    __shared__ float sums[WARP];
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    __syncthreads();
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = value;
    __syncthreads();
    value = threadIdx.x % WARP < (blockDim.x + WARP - 1) / WARP ? sums[threadIdx.x % WARP] : 0;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}
