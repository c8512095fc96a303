// Root-mean-square norm of rows, and the same of a residual that something is added to first.
// A block has a row; each thread keeps up to PIECES times eight of its numbers in registers, so that the row is read once.
// All that it reads is on its way before it waits for any of it.
#include "rows.cuh"

constexpr int PIECES = 4;

struct Norm {
    const uint4* x;       // [rows][width]
    uint4* residual;      // [rows][width], added to; null where there is none
    const uint4* weight;  // [width]
    uint4* out;           // [rows][width]
    uint32_t width;       // eights of a row
    float epsilon;
};

// Eights of a row that a thread has, zeros beyond its end.
struct Pieces {
    uint4 bits[PIECES];

    __device__ __forceinline__ void read(const uint4* row, uint32_t width) {
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
            bits[piece] = at(piece) < width ? row[at(piece)] : uint4{0, 0, 0, 0};
    }
    __device__ __forceinline__ void write(uint4* row, uint32_t width) const {
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
            if (at(piece) < width) row[at(piece)] = bits[piece];
    }
    static __device__ __forceinline__ uint32_t at(int piece) { return piece * blockDim.x + threadIdx.x; }
};

template <typename T> __device__ __forceinline__ void add(Pieces& to, const Pieces& what) {
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        float sums[EIGHT], values[EIGHT];
        widen<T>(to.bits[piece], sums);
        widen<T>(what.bits[piece], values);
#pragma unroll
        for (int i = 0; i < EIGHT; i++) sums[i] += values[i];
        to.bits[piece] = narrow<T>(sums);
    }
}

template <typename T> __device__ __forceinline__ float squares(const Pieces& of) {
    float sum = 0;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        float values[EIGHT];
        widen<T>(of.bits[piece], values);
#pragma unroll
        for (int i = 0; i < EIGHT; i++) sum += values[i] * values[i];
    }
    return sum;
}

template <typename T> __device__ __forceinline__ void scale(Pieces& what, const Pieces& weights, float factor) {
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        float values[EIGHT], by[EIGHT];
        widen<T>(what.bits[piece], values);
        widen<T>(weights.bits[piece], by);
#pragma unroll
        for (int i = 0; i < EIGHT; i++) values[i] *= factor * by[i];
        what.bits[piece] = narrow<T>(values);
    }
}

template <typename T, bool ADD> __device__ __forceinline__ void norm(const Norm& of) {
    size_t row = static_cast<size_t>(blockIdx.x) * of.width;
    Pieces kept, before, weights;
    weights.read(of.weight, of.width);
    wait_for_previous();
    let_next_begin();
    kept.read(of.x + row, of.width);
    if (ADD) before.read(of.residual + row, of.width);
    if (ADD) {
        add<T>(kept, before);
        kept.write(of.residual + row, of.width);
    }
    scale<T>(kept, weights, rsqrtf(block_sum(squares<T>(kept)) / (of.width * EIGHT) + of.epsilon));
    kept.write(of.out + row, of.width);
}

#define NORM(name, T)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(1024) rms_norm_##name(const __grid_constant__ Norm of) { norm<T, false>(of); } \
    extern "C" __global__ void __launch_bounds__(1024) add_rms_norm_##name(const __grid_constant__ Norm of) { norm<T, true>(of); }

NORM(bf16, __nv_bfloat16)
NORM(f16, __half)
