// out = activation(gate) * up, from rows that hold the gate and then the up projection.
#include "activation.cuh"
#include "rows.cuh"

// `width`: eights of a row of `out`. Blocks go over a row in x, over rows in y.
template <typename T, float (*ACTIVATION)(float)>
__device__ __forceinline__ void gate(const uint4* x, uint4* out, uint32_t rows, uint32_t width) {
    uint32_t at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= width) return;
    for (size_t row = blockIdx.y; row < rows; row += gridDim.y) {
        uint4 gate_bits = x[2 * row * width + at], up_bits = x[(2 * row + 1) * width + at];
        float gates[EIGHT], ups[EIGHT];
        widen<T>(gate_bits, gates);
        widen<T>(up_bits, ups);
#pragma unroll
        for (int i = 0; i < EIGHT; i++) gates[i] = ACTIVATION(gates[i]) * ups[i];
        out[row * width + at] = narrow<T>(gates);
    }
}

#define GATE(name, T)                                                                                                      \
    extern "C" __global__ void silu_mul_##name(const uint4* x, uint4* out, uint32_t rows, uint32_t width) { gate<T, silu>(x, out, rows, width); } \
    extern "C" __global__ void gelu_mul_##name(const uint4* x, uint4* out, uint32_t rows, uint32_t width) { gate<T, gelu>(x, out, rows, width); }

GATE(bf16, __nv_bfloat16)
GATE(f16, __half)
