// What every kernel of attention over pages takes, and means by a score and by what a query sees.
#pragma once
#include "kv.cuh"

struct Attention {
    KvArena arena;
    const uint32_t* tables;  // [sequences][table_width]
    const void* queries;     // [tokens][heads][D]
    uint32_t table_width;
    uint32_t layer;
    uint32_t group;          // query heads a KV head
    uint32_t window;         // 0: none
    float scale;             // of scores, times log2 e unless they are capped
    float soft_cap;          // 0: none
};

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
