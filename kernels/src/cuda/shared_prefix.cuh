// What attention to shared prefixes leaves for decode attention to add: unnormalized rows, one a query head of a sequence.
#pragma once
#include "common.cuh"

struct PrefixParts {
    float* values;      // [sequences][heads][D]
    float2* sums;       // [sequences][heads], maximum and sum
    uint32_t* lengths;  // [sequences], the positions that were attended to; 0: no part
};
