// Root-mean-square norm of rows, and the same of a residual that something is added to first.
// A block has a row; each thread keeps up to PIECES times eight of its numbers in registers, so that the row is read once.
#include "rows.cuh"

constexpr int PIECES = 4;

template <typename T, bool ADD>
__device__ __forceinline__ void norm(const T* x, T* residual, const T* weight, T* out, uint32_t width, float epsilon) {
    size_t row = static_cast<size_t>(blockIdx.x) * width;
    float kept[PIECES][EIGHT], sum = 0;
    uint32_t step = blockDim.x * EIGHT;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        uint32_t at = piece * step + threadIdx.x * EIGHT;
        if (at >= width) break;
        load_eight(x + row + at, kept[piece]);
        if (ADD) {
            float before[EIGHT];
            load_eight(residual + row + at, before);
#pragma unroll
            for (int i = 0; i < EIGHT; i++) kept[piece][i] = to_float(from_float<T>(kept[piece][i] + before[i]));
            store_eight(residual + row + at, kept[piece]);
        }
#pragma unroll
        for (int i = 0; i < EIGHT; i++) sum += kept[piece][i] * kept[piece][i];
    }
    float factor = rsqrtf(block_sum(sum) / width + epsilon);
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        uint32_t at = piece * step + threadIdx.x * EIGHT;
        if (at >= width) break;
        float weights[EIGHT];
        load_eight(weight + at, weights);
#pragma unroll
        for (int i = 0; i < EIGHT; i++) kept[piece][i] *= factor * weights[i];
        store_eight(out + row + at, kept[piece]);
    }
}

#define NORM(name, T)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(1024)                                                                    \
        rms_norm_##name(const T* x, const T* weight, T* out, uint32_t width, float epsilon) {                             \
        norm<T, false>(x, nullptr, weight, out, width, epsilon);                                                          \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(1024)                                                                    \
        add_rms_norm_##name(const T* x, T* residual, const T* weight, T* out, uint32_t width, float epsilon) {            \
        norm<T, true>(x, residual, weight, out, width, epsilon);                                                          \
    }

NORM(bf16, __nv_bfloat16)
NORM(f16, __half)
