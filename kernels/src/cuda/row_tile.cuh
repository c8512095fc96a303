// 64 rows of queries, 16 a warp, against tiles of K and V that come through a block table: FlashAttention-2's order of work (Dao,
// arXiv 2307.08691) with matrix instructions of a warp, from sm_80 on, for every head dimension and whatever K and V are stored as.
#pragma once
#include "attention.cuh"
#include "fragments.cuh"

constexpr int ROWS = 64;
constexpr int THREADS = ROWS / 16 * WARP;

// A sequence's blocks, of which one KV head of a layer is read.
struct Pages {
    const KvArena& arena;
    const uint32_t* table;
    uint32_t layer;
    uint32_t head;
};

template <typename KV, int D> struct Tiles {
    using L = Layout<KV, D>;
    static constexpr int POSITIONS = D > 128 ? 32 : 64;
    static constexpr int BYTES = POSITIONS / ATOM_ROWS * Layout<KV, D>::GROUP;
    alignas(1024) uint8_t kv[2][2][BYTES];

    // Asks for the K and V of a tile's positions; what is not there, or not before `to`, is cleared. All threads take part. Gives
    // a bit for each group of 8 positions that is not there.
    __device__ __forceinline__ uint32_t ask(const Pages& pages, uint32_t stage, uint32_t first, uint32_t to) {
        // Eight positions are one piece of memory; a lane knows where those of its own number begin. V lies behind K.
        constexpr uint32_t CHUNKS = L::GROUP / 16;
        static_assert(2 * POSITIONS / ATOM_ROWS * CHUNKS % THREADS == 0);
        uint32_t own = first + threadIdx.x % (POSITIONS / ATOM_ROWS) * ATOM_ROWS, size = pages.arena.block_size;
        uint32_t id = own < to ? pages.table[own / size] : ~0u, to_v = size / ATOM_ROWS * L::GROUP;
        const uint8_t* k = pages.arena.data + L::head(pages.arena, id, pages.layer, 0, pages.head) + own % size / ATOM_ROWS * L::GROUP;
        uint32_t absent = __ballot_sync(~0u, id >= pages.arena.blocks);
#pragma unroll
        for (uint32_t step = 0; step < 2 * POSITIONS / ATOM_ROWS * CHUNKS / THREADS; step++) {
            uint32_t i = step * THREADS + threadIdx.x;
            uint32_t group = i / CHUNKS % (POSITIONS / ATOM_ROWS), which = i / CHUNKS / (POSITIONS / ATOM_ROWS), byte = i % CHUNKS * 16;
            const uint8_t* from = reinterpret_cast<const uint8_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(k), group)) + which * to_v + byte;
            bool is_there = (absent >> group & 1) == 0 && first + group * ATOM_ROWS + byte % L::ATOM / L::PANEL < to;
            copy_16_if(is_there, shared_address(kv[stage][which] + group * L::GROUP + byte), is_there ? from : pages.arena.data);
        }
        commit_copies();
        return absent;
    }
};

// A thread's share of the rows: rows `lane / 4` and 8 more of its warp's 16.
template <typename T, typename KV, int D> struct RowTile {
    using F = Fragments<T, KV, D>;
    using Number = typename F::Number;
    static constexpr int N = Tiles<KV, D>::POSITIONS, STEPS = D / 16;

    Tiles<KV, D>& tiles;
    uint32_t lane = threadIdx.x % WARP;
    Sight sights[2];
    uint32_t q[STEPS][4];
    float out[STEPS][2][4], most[2], sum[2];

    __device__ __forceinline__ RowTile(Tiles<KV, D>& tiles) : tiles(tiles) {}

    // The row of the tile that this thread's half `i` has.
    static __device__ __forceinline__ uint32_t row(int i) { return threadIdx.x / WARP * 16 + threadIdx.x % WARP / 4 + i * 8; }

    // Loads the queries; those of a null pointer are nothing.
    __device__ __forceinline__ void begin(const T* const (&rows)[2]) {
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const T* from = rows[i % 2];
                q[step][i] = from != nullptr ? F::query(*reinterpret_cast<const uint32_t*>(from + F::k_dim(step, i / 2, lane))) : 0;
                out[step][i / 2][i % 2 * 2] = out[step][i / 2][i % 2 * 2 + 1] = 0;
            }
        most[0] = most[1] = -INFINITY;
        sum[0] = sum[1] = 0;
    }

    // Attends to the positions of the tiles from `first`, a multiple of N, to `to`.
    __device__ __forceinline__ void attend(const Pages& pages, uint32_t first, uint32_t to, float scale, float soft_cap) {
        uint32_t stage = 0;
        __syncthreads();
        uint32_t absent = tiles.ask(pages, 0, first, to), absent_next = 0;
        for (; first < to; first += N, stage ^= 1, absent = absent_next) {
            if (first + N < to) absent_next = tiles.ask(pages, stage ^ 1, first + N, to);
            else commit_copies();
            wait_for_copies<1>();
            __syncthreads();
            float s[N / 8][4] = {};
            score(stage, s);
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) s[n][i] *= scale;
            if (soft_cap != 0) cap(s, soft_cap);
            mask(s, first, absent);
            weigh(s);
            add_values(stage, s);
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
            sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
        }
    }

    // Writes this thread's numbers of row half `i`, times a factor.
    template <typename TO> __device__ __forceinline__ void write(int i, TO* to, float factor) const {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            auto two = [&](int half) { return float2{out[step][half][i * 2] * factor, out[step][half][i * 2 + 1] * factor}; };
            F::write(to + step * 16, lane, two(0), two(1));
        }
    }

private:
    __device__ __forceinline__ void score(uint32_t stage, float (&s)[N / 8][4]) {
#pragma unroll
        for (int pair = 0; pair < STEPS / 2; pair++)
#pragma unroll
            for (int rows = 0; rows < N / 16; rows++) {
                uint32_t b[2][4];
                F::keys(b, shared_address(tiles.kv[stage][0]), rows * 16, pair, lane);
#pragma unroll
                for (int i = 0; i < 4; i++) multiply<Number>(s[rows * 2 + i % 2], q[2 * pair + i / 2], b[i / 2][i % 2], b[i / 2][2 + i % 2]);
            }
    }

    __device__ __forceinline__ void cap(float (&s)[N / 8][4], float soft_cap) {
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[n][i] = capped(soft_cap, s[n][i]);
    }

    // What a row does not see becomes nothing.
    __device__ __forceinline__ void mask(float (&s)[N / 8][4], uint32_t first, uint32_t absent) {
        if (absent == 0 && first >= max(sights[0].from, sights[1].from) && first + N <= min(sights[0].to, sights[1].to)) return;
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t position = first + n * 8 + lane % 4 * 2 + i % 2;
                bool is_seen = position >= sights[i / 2].from && position < sights[i / 2].to && (absent >> n & 1) == 0;
                s[n][i] = is_seen ? s[n][i] : -INFINITY;
            }
    }

    // Turns scores into weights in place, and what was summed before into their measure.
    __device__ __forceinline__ void weigh(float (&s)[N / 8][4]) {
        float top[2] = {most[0], most[1]};
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) top[i / 2] = fmaxf(top[i / 2], s[n][i]);
#pragma unroll
        for (int i = 0; i < 2; i++) top[i] = raise(i, top[i]);
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[n][i] = exp2_fast(s[n][i] - top[i / 2]);
                sum[i / 2] += s[n][i];
            }
    }

    // Moves a row's maximum; gives what scores are taken relative to.
    __device__ __forceinline__ float raise(int i, float top) {
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        float base = top == -INFINITY ? 0 : top, factor = exp2_fast(most[i] - base);
        most[i] = top;
        sum[i] *= factor;
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                out[step][half][i * 2] *= factor;
                out[step][half][i * 2 + 1] *= factor;
            }
        return base;
    }

    __device__ __forceinline__ void add_values(uint32_t stage, const float (&s)[N / 8][4]) {
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
    }
};
