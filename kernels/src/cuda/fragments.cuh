// K and V of a tile as operands of matrix instructions, whatever they are stored as. 16 rows (positions) by 32 dimensions at a
// time: two operands of 16x16, each in the order (low rows, low k), (high rows, low k), (low rows, high k), (high rows, high k).
//
// Numbers of 8 bits are widened to f16, which holds each of them exactly. Matrix loads move 16-bit units, so that a lane gets
// four dimensions of K in one register, and two neighbouring dimensions of V: which dimension is which k of a product is free as
// long as Q has the same order, and which row of V^T is which dimension as long as results are written so.
#pragma once
#include "kv.cuh"

using E4m3 = __nv_fp8_e4m3;

// Four numbers of 8 bits: the low two, then the high two.
__device__ __forceinline__ uint2 widen_four(uint32_t four) {
    uint2 wide;
#if __CUDA_ARCH__ >= 890
    // The halves of the register are named, so that nothing is shifted.
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}\n"
        : "=r"(wide.x), "=r"(wide.y) : "r"(four));
#else
    // The same exponent and mantissa, at the place that f16 has for them, are 2^8 too small. (No number becomes 480.)
    auto widen = [&](uint32_t order) {
        uint32_t apart = __byte_perm(four, 0, order), bits = (apart & 0x80008000) | (apart & 0x7F007F00) >> 1;
        __half2 wide = __hmul2(*reinterpret_cast<__half2*>(&bits), __float2half2_rn(256));
        return *reinterpret_cast<uint32_t*>(&wide);
    };
    wide = {widen(0x1404), widen(0x3424)};
#endif
    return wide;
}

template <typename T, typename KV, int D> struct Fragments {
    static_assert(sizeof(T) == sizeof(KV));
    using L = Layout<T, D>;
    // What is multiplied.
    using Number = T;

    // Two numbers of Q as they are multiplied.
    static __device__ __forceinline__ uint32_t query(uint32_t two) { return two; }
    // The first of the two dimensions that a lane's register of a 16-dimension step has.
    static __device__ __forceinline__ uint32_t k_dim(uint32_t step, uint32_t half, uint32_t lane) { return step * 16 + half * 8 + lane % 4 * 2; }
    // The dimension of a row (0 to 7) of a half of an operand of V.
    static __device__ __forceinline__ uint32_t v_dim(uint32_t step, uint32_t half, uint32_t row) { return step * 16 + half * 8 + row; }

    static __device__ __forceinline__ void keys(uint32_t (&a)[2][4], uint32_t k, uint32_t first_row, uint32_t pair, uint32_t lane) {
#pragma unroll
        for (int i = 0; i < 2; i++) load_matrices(a[i], k + L::chunk(first_row + lane % 16, (pair * 2 + i) * 2 + lane / 16));
    }
    // Of V^T: rows are dimensions.
    static __device__ __forceinline__ void values(uint32_t (&a)[2][4], uint32_t v, uint32_t first_row, uint32_t pair, uint32_t lane) {
        uint32_t row = first_row + lane % 8 + lane / 16 * 8;
#pragma unroll
        for (int i = 0; i < 2; i++) load_matrices_transposed(a[i], v + L::chunk(row, (pair * 2 + i) * 2 + lane / 8 % 2));
    }
    // A lane's numbers of a row of results: columns `lane % 4 * 2` and one more of both halves.
    static __device__ __forceinline__ void write(T* step, uint32_t lane, float2 low, float2 high) {
        *reinterpret_cast<uint32_t*>(step + lane % 4 * 2) = pack<T>(low.x, low.y);
        *reinterpret_cast<uint32_t*>(step + 8 + lane % 4 * 2) = pack<T>(high.x, high.y);
    }
    static __device__ __forceinline__ void write(float* step, uint32_t lane, float2 low, float2 high) {
        *reinterpret_cast<float2*>(step + lane % 4 * 2) = low;
        *reinterpret_cast<float2*>(step + 8 + lane % 4 * 2) = high;
    }
};

template <typename T, int D> struct Fragments<T, E4m3, D> {
    using L = Layout<E4m3, D>;
    using Number = __half;

    static __device__ __forceinline__ uint32_t query(uint32_t two) {
        T numbers[2];
        *reinterpret_cast<uint32_t*>(numbers) = two;
        return pack_half(to_float(numbers[0]), to_float(numbers[1]));
    }
    static __device__ __forceinline__ uint32_t k_dim(uint32_t step, uint32_t half, uint32_t lane) { return step * 16 + lane % 4 * 4 + half * 2; }
    static __device__ __forceinline__ uint32_t v_dim(uint32_t step, uint32_t half, uint32_t row) { return step * 16 + row * 2 + half; }

    static __device__ __forceinline__ void keys(uint32_t (&a)[2][4], uint32_t k, uint32_t first_row, uint32_t pair, uint32_t lane) {
        uint32_t m[4];
        load_matrices(m, k + L::chunk(first_row + lane % 16, pair * 2 + lane / 16));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint2 wide = widen_four(m[i]);
            a[i / 2][i % 2] = wide.x;
            a[i / 2][2 + i % 2] = wide.y;
        }
    }
    static __device__ __forceinline__ void values(uint32_t (&a)[2][4], uint32_t v, uint32_t first_row, uint32_t pair, uint32_t lane) {
        uint32_t m[4];
        load_matrices_transposed(m, v + L::chunk(first_row + lane % 16, pair * 2 + lane / 16));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // Two positions of two dimensions: first those of the one, then those of the other.
            uint2 wide = widen_four(__byte_perm(m[i], 0, 0x3120));
            a[i / 2][i % 2 * 2] = wide.x;
            a[i / 2][i % 2 * 2 + 1] = wide.y;
        }
    }
    static __device__ __forceinline__ void write(T* step, uint32_t lane, float2 low, float2 high) {
        *reinterpret_cast<uint2*>(step + lane % 4 * 4) = {pack<T>(low.x, high.x), pack<T>(low.y, high.y)};
    }
    static __device__ __forceinline__ void write(float* step, uint32_t lane, float2 low, float2 high) {
        *reinterpret_cast<float4*>(step + lane % 4 * 4) = {low.x, high.x, low.y, high.y};
    }

private:
    // What is too large becomes the largest: times nothing it must be nothing.
    static __device__ __forceinline__ uint32_t pack_half(float low, float high) {
        uint32_t both;
        asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
        return both;
    }
};
