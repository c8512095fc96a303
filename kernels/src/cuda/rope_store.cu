// Rotary position embedding of Q and K (Su et al., arXiv 2104.09864, halves as in Llama), after a norm of each head where there
// is one, and the store of K and V into their slots. A block has a token: its angles are computed once for all heads, of which
// each warp takes one after the other.
#include "fragments.cuh"
#include "rows.cuh"

struct RopeStore {
    KvArena arena;
    const uint32_t* positions;   // [tokens]
    const uint32_t* slots;       // [tokens], block * block size + row; one that is not there is not stored
    const float* frequencies;    // [rotary / 2], radians a position
    uint32_t tokens, heads, layer, rotary;
    float epsilon;
};

constexpr int WARPS = 8;

// Numbers that a lane moves at once, where they are so many.
template <typename T, int N> struct alignas((N & (N - 1)) == 0 ? N * sizeof(T) : sizeof(T)) Numbers {
    T values[N];
};

template <typename T, int D> struct Head {
    static constexpr int N = D / WARP;
    float x[N];
    uint32_t lane = threadIdx.x % WARP, first = lane * N;

    __device__ __forceinline__ void load(const T* from) {
        Numbers<T, N> numbers = reinterpret_cast<const Numbers<T, N>*>(from)[lane];
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = to_float(numbers.values[i]);
    }
    template <typename TO> __device__ __forceinline__ Numbers<TO, N> rounded(float factor) const {
        Numbers<TO, N> numbers;
#pragma unroll
        for (int i = 0; i < N; i++) numbers.values[i] = from_float<TO>(x[i] * factor);
        return numbers;
    }
    __device__ __forceinline__ void norm(const T* weight, float epsilon) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < N; i++) sum += x[i] * x[i];
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        float factor = rsqrtf(sum / D + epsilon);
#pragma unroll
        for (int i = 0; i < N; i++) x[i] *= factor * to_float(weight[first + i]);
    }
    // `turns`: cosine and sine of each pair; `own`: room for the head, since the other half's lane depends on how much turns.
    __device__ __forceinline__ void turn(const float2* turns, uint32_t half, float* own) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < N; i++) own[first + i] = x[i];
        __syncwarp();
#pragma unroll
        for (int i = 0; i < N; i++) {
            uint32_t dim = first + i;
            if (dim >= 2 * half) continue;
            float2 turn = turns[dim % half];
            x[i] = dim < half ? x[i] * turn.x - own[dim + half] * turn.y : x[i] * turn.x + own[dim - half] * turn.y;
        }
    }
    template <typename KV> __device__ __forceinline__ void store(uint8_t* to, uint32_t row, float scale) const {
        using L = Layout<KV, D>;
        Numbers<KV, N> numbers = rounded<KV>(1 / scale);
        uint32_t byte = first * sizeof(KV);
        if constexpr (N * sizeof(KV) == alignof(Numbers<KV, N>)) {
            *reinterpret_cast<Numbers<KV, N>*>(to + L::chunk(row, byte / 16) + byte % 16) = numbers;
        } else {
#pragma unroll
            for (int i = 0; i < N; i++, byte += sizeof(KV))
                *reinterpret_cast<KV*>(to + L::chunk(row, byte / 16) + byte % 16) = numbers.values[i];
        }
    }
};

template <typename T, typename KV, int D>
__device__ __forceinline__ void token_of(const RopeStore& rope, const T* qkv, const T* q_weight, const T* k_weight, T* q) {
    __shared__ float2 turns[D / 2];
    __shared__ float others[WARPS][D];
    uint32_t token = blockIdx.x, warp = threadIdx.x / WARP, half = rope.rotary / 2, all = rope.heads + 2 * rope.arena.kv_heads;
    float position = rope.positions[token];
    for (uint32_t pair = threadIdx.x; pair < half; pair += blockDim.x)
        sincosf(position * rope.frequencies[pair], &turns[pair].y, &turns[pair].x);
    __syncthreads();
    uint32_t slot = rope.slots[token], block = slot / rope.arena.block_size, row = slot % rope.arena.block_size;
    for (uint32_t index = warp; index < all; index += WARPS) {
        bool is_q = index < rope.heads, is_v = index >= rope.heads + rope.arena.kv_heads;
        const T* weight = is_q ? q_weight : k_weight;
        Head<T, D> head;
        head.load(qkv + (static_cast<size_t>(token) * all + index) * D);
        if (!is_v && weight != nullptr) head.norm(weight, rope.epsilon);
        if (!is_v) head.turn(turns, half, others[warp]);
        if (is_q) {
            Numbers<T, Head<T, D>::N>* row_of_q = reinterpret_cast<Numbers<T, Head<T, D>::N>*>(q + (static_cast<size_t>(token) * rope.heads + index) * D);
            row_of_q[head.lane] = head.template rounded<T>(1);
        } else if (block < rope.arena.blocks) {
            uint32_t kv_head = (index - rope.heads) % rope.arena.kv_heads;
            float scale = Layout<KV, D>::scale(rope.arena, rope.layer, is_v, kv_head);
            head.template store<KV>(rope.arena.data + Layout<KV, D>::head(rope.arena, block, rope.layer, is_v, kv_head), row, scale);
        }
    }
}

#define ROPE(name, T, KV, D)                                                                                         \
    extern "C" __global__ void __launch_bounds__(256) rope_store_##name##_##D(                                       \
        const __grid_constant__ RopeStore rope, const T* qkv, const T* q_weight, const T* k_weight, T* q) {          \
        token_of<T, KV, D>(rope, qkv, q_weight, k_weight, q);                                                         \
    }
#define ROPES(name, T, KV) ROPE(name, T, KV, 64) ROPE(name, T, KV, 96) ROPE(name, T, KV, 128) ROPE(name, T, KV, 256)

ROPES(bf16, __nv_bfloat16, __nv_bfloat16)
ROPES(bf16_e4m3, __nv_bfloat16, E4m3)
ROPES(f16, __half, __half)
ROPES(f16_e4m3, __half, E4m3)
