// What every kernel of attention means by a score and by what a query sees.
#pragma once
#include "common.cuh"

// The positions that a query sees: [from, to).
struct Sight {
    uint32_t from;
    uint32_t to;

    // Of a query at position `to - 1`; a window of 0 is none.
    static __device__ __forceinline__ Sight up_to(uint32_t to, uint32_t window) {
        return {window == 0 || to <= window ? 0 : to - window, to};
    }
};

// A scaled score, capped, as the exponent of a power of two.
__device__ __forceinline__ float capped(float soft_cap, float scaled) { return soft_cap * LOG2_E * tanhf(scaled / soft_cap); }
