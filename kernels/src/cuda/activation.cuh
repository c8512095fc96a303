// What the gate of a feed-forward layer goes through.
#pragma once
#include "common.cuh"

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1, 1 + exp2_fast(-x * LOG2_E)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
// With the hyperbolic tangent (Hendrycks and Gimpel, arXiv 1606.08415): (1 + tanh x) / 2 is sigmoid 2 x.
__device__ __forceinline__ float gelu(float x) { return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x)); }
