// Paged prefill attention, the portable path: FlashAttention-2's order of work (Dao, arXiv 2307.08691) with matrix instructions of a
// warp, from sm_80 on and for every head dimension. Each warp has 16 rows; tiles of K and V come through the block table.
#include "fragments.cuh"
#include "paged_prefill.cuh"

constexpr int ROWS = 64;
constexpr int THREADS = ROWS / 16 * WARP;

template <typename KV, int D> struct Tiles {
    static constexpr int POSITIONS = D > 128 ? 32 : 64;
    static constexpr int BYTES = POSITIONS / ATOM_ROWS * Layout<KV, D>::GROUP;
    alignas(1024) uint8_t kv[2][2][BYTES];
    uint32_t scratch[WARP];
    uint32_t before[1];  // [sequences + 1]
};

// Asks for the K and V of a tile's positions; what is not there is cleared.
template <typename KV, int D>
__device__ __forceinline__ void ask(const Prefill& prefill, Tiles<KV, D>& tiles, uint32_t stage, const Unit& unit, uint32_t first, uint32_t context) {
    using L = Layout<KV, D>;
    constexpr int CHUNKS = L::ROW / 16, POSITIONS = Tiles<KV, D>::POSITIONS;
    for (uint32_t i = threadIdx.x; i < 2 * POSITIONS * CHUNKS; i += THREADS) {
        uint32_t chunk = i % CHUNKS, row = i / CHUNKS % POSITIONS, which = i / CHUNKS / POSITIONS;
        uint32_t position = first + row, size = prefill.arena.block_size, id = ~0u;
        if (position < context) id = prefill.tables[static_cast<size_t>(unit.sequence) * prefill.table_width + position / size];
        uint8_t* to = tiles.kv[stage][which] + L::chunk(row, chunk);
        if (id < prefill.arena.blocks)
            copy_16(shared_address(to), prefill.arena.data + L::head(prefill.arena, id, prefill.layer, which, unit.head) + L::chunk(position % size, chunk));
        else
            *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
    }
    commit_copies();
}

// Whether the block of a position is there.
__device__ __forceinline__ bool is_there(const Prefill& prefill, uint32_t sequence, uint32_t position) {
    return prefill.tables[static_cast<size_t>(sequence) * prefill.table_width + position / prefill.arena.block_size] < prefill.arena.blocks;
}

template <typename T, typename KV, int D>
__device__ __forceinline__ void attend_unit(const Prefill& prefill, Tiles<KV, D>& tiles, const Unit& unit, const T* queries, T* results) {
    using F = Fragments<T, KV, D>;
    using Number = typename F::Number;
    constexpr int N = Tiles<KV, D>::POSITIONS, STEPS = D / 16;
    Rows rows(prefill, unit.sequence);
    uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, all = rows.count * prefill.group;
    uint32_t own[2] = {unit.first_row + warp * 16 + lane / 4, unit.first_row + warp * 16 + lane / 4 + 8};
    auto place = [&](uint32_t row) {
        size_t token = rows.begin + row / prefill.group, heads = prefill.arena.kv_heads * prefill.group;
        return (token * heads + unit.head * prefill.group + row % prefill.group) * D;
    };
    uint32_t q[STEPS][4];
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t row = own[i % 2];
            q[step][i] = row < all ? F::query(*reinterpret_cast<const uint32_t*>(queries + place(row) + F::k_dim(step, i / 2, lane))) : 0;
        }
    Sight sights[2] = {Sight(prefill, rows, own[0]), Sight(prefill, rows, own[1])};
    Sight top(prefill, rows, unit.first_row), bottom(prefill, rows, min(unit.first_row + ROWS, all) - 1);
    float scale = prefill.scale * Layout<KV, D>::scale(prefill.arena, prefill.layer, 0, unit.head);
    float out[STEPS][2][4] = {}, most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    uint32_t first = top.from / N * N, stage = 0;
    __syncthreads();
    ask(prefill, tiles, 0, unit, first, bottom.to);
    for (; first < bottom.to; first += N, stage ^= 1) {
        if (first + N < bottom.to) ask(prefill, tiles, stage ^ 1, unit, first + N, bottom.to);
        else commit_copies();
        wait_for_copies<1>();
        __syncthreads();
        float s[N / 8][4] = {};
#pragma unroll
        for (int pair = 0; pair < STEPS / 2; pair++)
#pragma unroll
            for (int rows = 0; rows < N / 16; rows++) {
                uint32_t b[2][4];
                F::keys(b, shared_address(tiles.kv[stage][0]), rows * 16, pair, lane);
#pragma unroll
                for (int i = 0; i < 4; i++) multiply<Number>(s[rows * 2 + i % 2], q[2 * pair + i / 2], b[i / 2][i % 2], b[i / 2][2 + i % 2]);
            }
        float top_now[2] = {most[0], most[1]};
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t position = first + n * 8 + lane % 4 * 2 + i % 2;
                const Sight& sight = sights[i / 2];
                bool is_seen = position >= sight.from && position < sight.to && is_there(prefill, unit.sequence, position);
                s[n][i] = is_seen ? capped(prefill, s[n][i] * scale) : -INFINITY;
                top_now[i / 2] = fmaxf(top_now[i / 2], s[n][i]);
            }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            top_now[i] = fmaxf(top_now[i], __shfl_xor_sync(~0u, top_now[i], 1));
            top_now[i] = fmaxf(top_now[i], __shfl_xor_sync(~0u, top_now[i], 2));
            float base = top_now[i] == -INFINITY ? 0 : top_now[i], factor = exp2_fast(most[i] - base);
            most[i] = top_now[i];
            top_now[i] = base;
            sum[i] *= factor;
#pragma unroll
            for (int step = 0; step < STEPS; step++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    out[step][half][i * 2] *= factor;
                    out[step][half][i * 2 + 1] *= factor;
                }
        }
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[n][i] = exp2_fast(s[n][i] - top_now[i / 2]);
                sum[i / 2] += s[n][i];
            }
#pragma unroll
        for (int k = 0; k < N / 16; k++) {
            uint32_t p[4] = {pack<Number>(s[2 * k][0], s[2 * k][1]), pack<Number>(s[2 * k][2], s[2 * k][3]),
                             pack<Number>(s[2 * k + 1][0], s[2 * k + 1][1]), pack<Number>(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
            for (int pair = 0; pair < STEPS / 2; pair++) {
                uint32_t b[2][4];
                F::values(b, shared_address(tiles.kv[stage][1]), k * 16, pair, lane);
#pragma unroll
                for (int i = 0; i < 4; i++) multiply<Number>(out[2 * pair + i / 2][i % 2], p, b[i / 2][i % 2], b[i / 2][2 + i % 2]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
        sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
        float factor = sum[i] == 0 ? 0 : Layout<KV, D>::scale(prefill.arena, prefill.layer, 1, unit.head) / sum[i];
        if (own[i] >= all) continue;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            auto two = [&](int half) { return float2{out[step][half][i * 2] * factor, out[step][half][i * 2 + 1] * factor}; };
            F::write(results + place(own[i]) + step * 16, lane, two(0), two(1));
        }
    }
}

template <typename T, typename KV, int D>
__device__ __forceinline__ void prefill_attention(const Prefill& prefill, const T* queries, T* results) {
    extern __shared__ __align__(1024) uint8_t memory[];
    auto& tiles = *reinterpret_cast<Tiles<KV, D>*>(memory);
    count_tiles<ROWS>(prefill, tiles.before, tiles.scratch);
    uint32_t units = tiles.before[prefill.sequences] * prefill.arena.kv_heads;
    for (uint32_t index = blockIdx.x; index < units; index += gridDim.x)
        attend_unit<T, KV, D>(prefill, tiles, unit_of<ROWS>(prefill, tiles.before, index), queries, results);
}

#define PREFILL(name, T, KV, D)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                     \
        prefill_##name##_##D(const __grid_constant__ Prefill prefill, const T* queries, T* results) {         \
        prefill_attention<T, KV, D>(prefill, queries, results);                                               \
    }
#define PREFILLS(name, T, KV) PREFILL(name, T, KV, 64) PREFILL(name, T, KV, 96) PREFILL(name, T, KV, 128) PREFILL(name, T, KV, 256)

PREFILLS(bf16, __nv_bfloat16, __nv_bfloat16)
PREFILLS(bf16_e4m3, __nv_bfloat16, E4m3)
PREFILLS(f16, __half, __half)
PREFILLS(f16_e4m3, __half, E4m3)
