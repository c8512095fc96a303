// out = activation(gate) * up, from rows that hold the gate and then the up projection.
#include "activation.cuh"
#include "rows.cuh"

template <typename T, float (*ACTIVATION)(float)>
__device__ __forceinline__ void gate(const T* x, T* out, uint32_t rows, uint32_t width) {
    size_t eights = static_cast<size_t>(rows) * (width / EIGHT);
    for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < eights; i += static_cast<size_t>(gridDim.x) * blockDim.x) {
        size_t row = i / (width / EIGHT), at = i % (width / EIGHT) * EIGHT;
        float gates[EIGHT], ups[EIGHT];
        load_eight(x + row * 2 * width + at, gates);
        load_eight(x + row * 2 * width + width + at, ups);
#pragma unroll
        for (int k = 0; k < EIGHT; k++) gates[k] = ACTIVATION(gates[k]) * ups[k];
        store_eight(out + row * width + at, gates);
    }
}

#define GATE(name, T)                                                                                                      \
    extern "C" __global__ void silu_mul_##name(const T* x, T* out, uint32_t rows, uint32_t width) { gate<T, silu>(x, out, rows, width); } \
    extern "C" __global__ void gelu_mul_##name(const T* x, T* out, uint32_t rows, uint32_t width) { gate<T, gelu>(x, out, rows, width); }

GATE(bf16, __nv_bfloat16)
GATE(f16, __half)
