// Rotary position embedding of Q and K (Su et al., arXiv 2104.09864, halves as in Llama), after a norm of each head where there
// is one, and the store of K and V into their slots. A warp has a head of a token.
#include "kv.cuh"
#include "rows.cuh"

struct RopeStore {
    uint8_t* arena;
    uint32_t blocks, block_size, layers, kv_heads;
    const uint32_t* positions;   // [tokens]
    const uint32_t* slots;       // [tokens], block * block size + row; one that is not there is not stored
    const float* frequencies;    // [rotary / 2], radians a position
    uint32_t tokens, heads, layer, rotary;
    float epsilon;
};

// Each lane has the numbers `lane + i * 32`, so that the halves of a pair are in one lane where D is 64 or more.
template <typename T, int D>
__device__ __forceinline__ void head_of(const RopeStore& rope, const T* qkv, const T* q_weight, const T* k_weight, T* q) {
    constexpr int N = D / WARP;
    uint32_t lane = threadIdx.x % WARP, all = rope.heads + 2 * rope.kv_heads;
    uint64_t index = static_cast<uint64_t>(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    uint32_t token = index / all, head = index % all;
    if (token >= rope.tokens) return;
    const T* from = qkv + index * D;
    float x[N];
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = to_float(from[lane + i * WARP]);
    bool is_q = head < rope.heads, is_v = head >= rope.heads + rope.kv_heads;
    const T* weight = is_q ? q_weight : k_weight;
    if (!is_v && weight != nullptr) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < N; i++) sum += x[i] * x[i];
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        float factor = rsqrtf(sum / D + rope.epsilon);
#pragma unroll
        for (int i = 0; i < N; i++) x[i] *= factor * to_float(weight[lane + i * WARP]);
    }
    if (!is_v) {
        float position = rope.positions[token];
        uint32_t half = rope.rotary / 2;
        float turned[N];
        // Through shared memory: the other half's place depends on how much of a head turns.
        __shared__ float others[8][D];
        float* own = others[threadIdx.x / WARP];
#pragma unroll
        for (int i = 0; i < N; i++) own[lane + i * WARP] = x[i];
        __syncwarp();
#pragma unroll
        for (int i = 0; i < N; i++) {
            uint32_t dim = lane + i * WARP;
            turned[i] = x[i];
            if (dim >= rope.rotary) continue;
            uint32_t pair = dim % half;
            float sine, cosine;
            sincosf(position * rope.frequencies[pair], &sine, &cosine);
            turned[i] = dim < half ? x[i] * cosine - own[dim + half] * sine : x[i] * cosine + own[dim - half] * sine;
        }
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = turned[i];
    }
    if (is_q) {
        T* to = q + (static_cast<size_t>(token) * rope.heads + head) * D;
#pragma unroll
        for (int i = 0; i < N; i++) to[lane + i * WARP] = from_float<T>(x[i]);
        return;
    }
    uint32_t slot = rope.slots[token], block = slot / rope.block_size, row = slot % rope.block_size;
    if (block >= rope.blocks) return;
    using L = Layout<T, D>;
    KvArena arena = {rope.arena, rope.blocks, rope.block_size, rope.layers, rope.kv_heads};
    uint32_t kv_head = (head - rope.heads) % rope.kv_heads;
    uint8_t* to = rope.arena + L::head(arena, block, rope.layer, is_v, kv_head);
#pragma unroll
    for (int i = 0; i < N; i++) {
        uint32_t byte = (lane + i * WARP) * sizeof(T);
        *reinterpret_cast<T*>(to + L::chunk(row, byte / 16) + byte % 16) = from_float<T>(x[i]);
    }
}

#define ROPE(name, T, D)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) rope_store_##name##_##D(                                       \
        const __grid_constant__ RopeStore rope, const T* qkv, const T* q_weight, const T* k_weight, T* q) {          \
        head_of<T, D>(rope, qkv, q_weight, k_weight, q);                                                             \
    }
#define ROPES(name, T) ROPE(name, T, 64) ROPE(name, T, 96) ROPE(name, T, 128) ROPE(name, T, 256)

ROPES(bf16, __nv_bfloat16)
ROPES(f16, __half)
