// out = activation(gate) * up, from rows that hold the gate and then the up projection.
#include "activation.cuh"
#include "rows.cuh"

struct Gate {
    const uint4* x;  // [rows][2 width]
    uint4* out;      // [rows][width]
    uint32_t rows;
    uint32_t width;  // eights
};

// Blocks go over a row in x, over rows in y.
template <typename T, float (*ACTIVATION)(float)> __device__ __forceinline__ void gate(const Gate& of) {
    wait_for_previous();
    let_next_begin();
    uint32_t at = blockIdx.x * blockDim.x + threadIdx.x, width = of.width;
    if (at >= width) return;
    for (size_t row = blockIdx.y; row < of.rows; row += gridDim.y) {
        uint4 gate_bits = of.x[2 * row * width + at], up_bits = of.x[(2 * row + 1) * width + at];
        float gates[EIGHT], ups[EIGHT];
        widen<T>(gate_bits, gates);
        widen<T>(up_bits, ups);
#pragma unroll
        for (int i = 0; i < EIGHT; i++) gates[i] = ACTIVATION(gates[i]) * ups[i];
        of.out[row * width + at] = narrow<T>(gates);
    }
}

#define GATE(name, T)                                                                                             \
    extern "C" __global__ void silu_mul_##name(const __grid_constant__ Gate of) { gate<T, silu>(of); }             \
    extern "C" __global__ void gelu_mul_##name(const __grid_constant__ Gate of) { gate<T, gelu>(of); }

GATE(bf16, __nv_bfloat16)
GATE(f16, __half)
