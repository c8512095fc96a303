// Rotary position embedding of Q and K (Su et al., arXiv 2104.09864, halves as in Llama), after a norm of each head where there
// is one, and the store of K and V into their slots. A block has heads of a token, each thread two chunks of one: its angles are
// computed once for all of them, while they are on their way.
#include "fragments.cuh"
#include "rows.cuh"

struct RopeStore {
    KvArena arena;
    const uint32_t* positions;   // [tokens]
    const uint32_t* slots;       // [tokens], block * block size + row; one that is not there is not stored
    const float* frequencies;    // [rotary / 2], radians a position
    const uint4* qkv;            // [tokens][heads + 2 kv heads][D]
    const uint4* q_weight;       // [D], of the heads' norms; null: there are none
    const uint4* k_weight;       // [D]
    uint4* q;                    // [tokens][heads][D]
    uint32_t heads, layer, rotary;
    float epsilon;
};

template <typename T> struct alignas(EIGHT * sizeof(T)) Eight {
    T values[EIGHT];
};

// Cosine and sine of eight pairs, and room, so that lanes read from different banks.
struct alignas(16) Turns {
    float2 by[EIGHT + 2];
};

// What a lane has of a head: two chunks of eight numbers. Those of the first `turning` lanes turn with each other, so that no lane
// needs what another has.
template <typename T, int D> struct Head {
    static constexpr uint32_t LANES = D <= 64 ? 4 : D <= 128 ? 8 : 16;
    uint32_t turning, lane = threadIdx.x % LANES;
    uint4 bits[2] = {};
    float x[2][EIGHT];

    __device__ __forceinline__ Head(uint32_t rotary) : turning(rotary / 2 / EIGHT) {}
    __device__ __forceinline__ uint32_t chunk(int which) const { return lane < turning ? lane + which * turning : 2 * lane + which; }

    __device__ __forceinline__ void ask(const uint4* from) {
#pragma unroll
        for (int which = 0; which < 2; which++) bits[which] = from[chunk(which)];
    }
    __device__ __forceinline__ void widen_all() {
#pragma unroll
        for (int which = 0; which < 2; which++) widen<T>(bits[which], x[which]);
    }
    // In all lanes of the head.
    __device__ __forceinline__ float squares() const {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < EIGHT; i++) sum += x[0][i] * x[0][i] + x[1][i] * x[1][i];
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        return sum;
    }
    __device__ __forceinline__ void scale(const uint4* weight, float factor) {
#pragma unroll
        for (int which = 0; which < 2; which++) {
            float weights[EIGHT];
            widen<T>(weight[chunk(which)], weights);
#pragma unroll
            for (int i = 0; i < EIGHT; i++) x[which][i] *= factor * weights[i];
        }
    }
    __device__ __forceinline__ void turn(const Turns* turns) {
        if (lane >= turning) return;
#pragma unroll
        for (int i = 0; i < EIGHT; i++) {
            float2 by = turns[lane].by[i], pair = {x[0][i], x[1][i]};
            x[0][i] = pair.x * by.x - pair.y * by.y;
            x[1][i] = pair.y * by.x + pair.x * by.y;
        }
    }
    __device__ __forceinline__ void write(uint4* to) const {
#pragma unroll
        for (int which = 0; which < 2; which++) to[chunk(which)] = narrow<T>(x[which]);
    }
    // `is_v`: V, otherwise K.
    template <typename KV> __device__ __forceinline__ void store(const RopeStore& rope, uint32_t slot, bool is_v, uint32_t kv_head) const {
        using L = Layout<KV, D>;
        uint32_t block = slot / rope.arena.block_size, row = slot % rope.arena.block_size;
        if (block >= rope.arena.blocks) return;
        float scale = L::scale(rope.arena, rope.layer, is_v, kv_head);
        uint8_t* to = rope.arena.data + L::head(rope.arena, block, rope.layer, is_v, kv_head);
#pragma unroll
        for (int which = 0; which < 2; which++) {
            Eight<KV> eight;
#pragma unroll
            for (int i = 0; i < EIGHT; i++) eight.values[i] = from_float<KV>(x[which][i] * (1 / scale));
            uint32_t byte = chunk(which) * sizeof(eight);
            *reinterpret_cast<Eight<KV>*>(to + L::chunk(row, byte / 16) + byte % 16) = eight;
        }
    }
};

__device__ __forceinline__ void turns_of(const RopeStore& rope, Turns* turns) {
    float position = rope.positions[blockIdx.x];
    for (uint32_t pair = threadIdx.x; pair < rope.rotary / 2; pair += blockDim.x) {
        float2& by = turns[pair / EIGHT].by[pair % EIGHT];
        sincosf(position * rope.frequencies[pair], &by.y, &by.x);
    }
}

template <typename T, typename KV, int D> __device__ __forceinline__ void head_of(const RopeStore& rope) {
    __shared__ Turns turns[D / 2 / EIGHT];
    Head<T, D> head(rope.rotary);
    uint32_t kv_heads = rope.arena.kv_heads, all = rope.heads + 2 * kv_heads;
    uint32_t index = (blockIdx.y * blockDim.x + threadIdx.x) / head.LANES;
    bool is_there = index < all && head.lane < D / (2 * EIGHT), is_q = index < rope.heads, is_v = index >= rope.heads + kv_heads;
    size_t token = blockIdx.x;
    wait_for_previous();
    let_next_begin();
    if (is_there) head.ask(rope.qkv + (token * all + index) * (D / EIGHT));
    uint32_t slot = rope.slots[token];
    turns_of(rope, turns);
    __syncthreads();
    head.widen_all();
    float factor = rope.q_weight == nullptr ? 1 : rsqrtf(head.squares() / D + rope.epsilon);
    if (!is_there) return;
    if (rope.q_weight != nullptr && !is_v) head.scale(is_q ? rope.q_weight : rope.k_weight, factor);
    if (!is_v) head.turn(turns);
    if (is_q) return head.write(rope.q + (token * rope.heads + index) * (D / EIGHT));
    head.template store<KV>(rope, slot, is_v, (index - rope.heads) % kv_heads);
}

#define ROPE(name, T, KV, D)                                                                                         \
    extern "C" __global__ void __launch_bounds__(512) rope_store_##name##_##D(const __grid_constant__ RopeStore rope) { \
        head_of<T, KV, D>(rope);                                                                                     \
    }
#define ROPES(name, T, KV) ROPE(name, T, KV, 64) ROPE(name, T, KV, 96) ROPE(name, T, KV, 128) ROPE(name, T, KV, 256)

ROPES(bf16, __nv_bfloat16, __nv_bfloat16)
ROPES(bf16_e4m3, __nv_bfloat16, E4m3)
ROPES(f16, __half, __half)
ROPES(f16_e4m3, __half, E4m3)
