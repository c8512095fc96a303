// Paged prefill attention for sm_90a, after FlashAttention-3 (Shah et al., arXiv 2407.08608): one warp asks for K and V through the
// block table, two warpgroups have 64 rows each; while one takes exponentials the other multiplies, and each has the next tile's
// scores on their way while it works on this one's. Blocks of the arena come as they are: they are stored as the matrix
// instructions want them.
#include "paged_prefill.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "warpgroup.cuh"

constexpr int ROWS = 128;
constexpr int POSITIONS = 128;
constexpr int STAGES = 2;
constexpr int GROUP_THREADS = 128;
constexpr int CONSUMERS = 2;
constexpr int CONSUMER_WARPS = CONSUMERS * GROUP_THREADS / WARP;

template <typename T, int D> struct Memory {
    static constexpr int TILE_BYTES = POSITIONS / ATOM_ROWS * Layout<T, D>::GROUP;
    // This unit's and the next one's.
    alignas(1024) uint8_t q[CONSUMERS][2][64 / ATOM_ROWS * Layout<T, D>::GROUP];
    alignas(1024) uint8_t kv[2][STAGES][TILE_BYTES];
    uint64_t full[2][STAGES];
    uint64_t free[2][STAGES];
    // Blocks of a stage's tile that are not there, a bit each.
    uint32_t absent[STAGES];
    uint32_t scratch[WARP];
    uint32_t before[1];  // [sequences + 1]
};

// Which tiles of positions a unit sees, the last first.
struct Range {
    int32_t first;
    int32_t last;

    __device__ __forceinline__ Range(const Prefill& prefill, const Rows& rows, const Unit& unit) {
        uint32_t all = rows.count * prefill.group;
        first = sight(prefill, rows, unit.first_row).from / POSITIONS;
        last = static_cast<int32_t>(sight(prefill, rows, min(unit.first_row + ROWS, all) - 1).to + POSITIONS - 1) / POSITIONS - 1;
    }
};

struct Stage {
    uint32_t index = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++index == STAGES) {
            index = 0;
            parity ^= 1;
        }
    }
};

// The warp that asks, a lane for each block of a tile: K of a tile before V of the one before it, as they are used.
template <typename T, int D> struct Producer {
    const Prefill& prefill;
    Memory<T, D>& memory;
    Stage k, v;
    uint32_t lane = threadIdx.x % WARP;

    __device__ __forceinline__ void unit(const Unit& unit) {
        Rows rows(prefill, unit.sequence);
        Range range(prefill, rows, unit);
        uint32_t id = block_of(unit, rows, range.last);
        ask(unit, 0, k, id);
        for (int32_t tile = range.last; tile >= range.first; tile--) {
            uint32_t next = 0;
            if (tile > range.first) {
                next = block_of(unit, rows, tile - 1);
                ask(unit, 0, k, next);
            }
            ask(unit, 1, v, id);
            id = next;
        }
    }

    // The block of this lane; none where there is none, or it is not the arena's.
    __device__ __forceinline__ uint32_t block_of(const Unit& unit, const Rows& rows, uint32_t tile) {
        uint32_t size = prefill.arena.block_size, index = tile * (POSITIONS / size) + lane;
        if (lane >= POSITIONS / size || index * size >= rows.context) return ~0u;
        return prefill.tables[static_cast<size_t>(unit.sequence) * prefill.table_width + index];
    }

    __device__ __forceinline__ void ask(const Unit& unit, uint32_t which, Stage& stage, uint32_t id) {
        using L = Layout<T, D>;
        const KvArena& arena = prefill.arena;
        uint32_t blocks = POSITIONS / arena.block_size, bytes = arena.block_size / ATOM_ROWS * L::GROUP;
        bool is_there = id < arena.blocks;
        uint32_t there = __ballot_sync(~0u, is_there);
        uint32_t full = shared_address(&memory.full[which][stage.index]);
        barrier_wait(shared_address(&memory.free[which][stage.index]), stage.parity ^ 1);
        if (lane == 0) {
            if (which == 0) memory.absent[stage.index] = ~there & ((1u << blocks) - 1);
            barrier_expect(full, __popc(there) * bytes);
        }
        __syncwarp();
        if (is_there) {
            const uint8_t* from = arena.data + L::head(arena, id, prefill.layer, which, unit.head);
            bulk_copy<EVICT_NORMAL>(shared_address(memory.kv[which][stage.index]) + lane * bytes, from, bytes, full);
        }
        stage.next();
    }
};

// A warpgroup with 64 rows.
template <typename T, int D, bool CAPPED> struct Consumer {
    using L = Layout<T, D>;
    static constexpr int SCORES = POSITIONS / 2;

    const Prefill& prefill;
    Memory<T, D>& memory;
    uint32_t q_index = 0;
    uint32_t group = threadIdx.x / GROUP_THREADS - 1, thread = threadIdx.x % GROUP_THREADS, lane = threadIdx.x % WARP;
    Stage k, v;
    float out[D / 2];
    uint32_t weights[POSITIONS / 16][4];
    float most[2], sum[2];
    Sight sights[2];

    __device__ __forceinline__ size_t place(const Rows& rows, const Unit& unit, uint32_t row) {
        size_t token = rows.begin + row / prefill.group, heads = prefill.arena.kv_heads * prefill.group;
        return (token * heads + unit.head * prefill.group + row % prefill.group) * D;
    }

    // Asks for a unit's queries; rows that are of nobody are cleared.
    __device__ __forceinline__ void ask_queries(const Unit& unit, uint32_t index, const T* queries) {
        constexpr uint32_t CHUNKS = L::ROW / 16;
        Rows rows(prefill, unit.sequence);
        uint32_t all = rows.count * prefill.group;
#pragma unroll
        for (uint32_t i = thread; i < 64 * CHUNKS; i += GROUP_THREADS) {
            uint32_t row = i / CHUNKS, at = unit.first_row + group * 64 + row;
            uint8_t* to = memory.q[group][index] + L::chunk(row, i % CHUNKS);
            if (at < all) copy_16(shared_address(to), reinterpret_cast<const uint4*>(queries + place(rows, unit, at)) + i % CHUNKS);
            else *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
        }
        commit_copies();
    }

    __device__ __forceinline__ void await_queries() {
        wait_for_copies<0>();
        proxy_fence();
        meet(1 + group, GROUP_THREADS);
    }

    // Queues the scores of the next tile of K.
    __device__ __forceinline__ void score(float (&s)[SCORES]) {
        barrier_wait(shared_address(&memory.full[0][k.index]), k.parity);
        uint32_t q = shared_address(memory.q[group][q_index]), keys = shared_address(memory.kv[0][k.index]);
        products_begin();
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            uint32_t offset = step / 4 * L::ATOM + step % 4 * 32;
            multiply_shared<POSITIONS, T>(s, operand(q + offset, 0, L::GROUP), operand(keys + offset, 0, L::GROUP), step != 0);
        }
        products_commit();
    }

    // Queues the weighted sum of the next tile of V.
    __device__ __forceinline__ void add_values(const Rows& rows, int32_t tile, uint32_t absent) {
        barrier_wait(shared_address(&memory.full[1][v.index]), v.parity);
        if (absent != 0 || (tile + 1) * POSITIONS > rows.context) clear(rows, tile, absent);
        uint32_t values = shared_address(memory.kv[1][v.index]);
        products_begin();
#pragma unroll
        for (int step = 0; step < POSITIONS / 16; step++)
            multiply_registers<D, T>(out, weights[step], operand(values + step * 2 * L::GROUP, L::ATOM, L::GROUP));
        products_commit();
    }

    __device__ __forceinline__ bool is_gone(const Rows& rows, uint32_t position, uint32_t absent) {
        return position >= rows.context || (absent >> (position % POSITIONS / prefill.arena.block_size) & 1) != 0;
    }

    // Clears the rows of V that are of nobody: a weight of nothing times what is no number is no number. The first warpgroup
    // does it for both, which come here for the same tiles.
    __device__ __forceinline__ void clear(const Rows& rows, int32_t tile, uint32_t absent) {
        uint32_t row = threadIdx.x - GROUP_THREADS;
        if (row < POSITIONS && is_gone(rows, tile * POSITIONS + row, absent))
            for (uint32_t chunk = 0; chunk < L::ROW / 16; chunk++)
                *reinterpret_cast<uint4*>(memory.kv[1][v.index] + L::chunk(row, chunk)) = uint4{0, 0, 0, 0};
        proxy_fence();
        meet(1 + CONSUMERS, CONSUMERS * GROUP_THREADS);
    }

    __device__ __forceinline__ void release(uint32_t which, Stage& stage) {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&memory.free[which][stage.index]));
        stage.next();
    }

    // What a row does not see becomes nothing.
    __device__ __forceinline__ void mask(const Rows& rows, int32_t tile, uint32_t absent, float (&s)[SCORES]) {
        int32_t first = tile * POSITIONS, own = first + lane % 4 * 2;
        int32_t to = min(sights[0].to, sights[1].to), from = max(sights[0].from, sights[1].from);
        if (absent == 0 && first + POSITIONS <= to && first >= from) return;
        int32_t begins[2], ends[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            begins[half] = static_cast<int32_t>(sights[half].from) - own;
            ends[half] = static_cast<int32_t>(sights[half].to) - own;
        }
#pragma unroll
        for (int i = 0; i < SCORES; i++) {
            int32_t column = i / 4 * 8 + i % 2;
            if (column < begins[i / 2 % 2] || column >= ends[i / 2 % 2]) s[i] = -INFINITY;
        }
        if (absent == 0) return;
#pragma unroll
        for (int i = 0; i < SCORES; i++)
            if (is_gone(rows, own + i / 4 * 8 + i % 2, absent)) s[i] = -INFINITY;
    }

    // Turns scores into weights in place; gives the factors of what was summed before.
    __device__ __forceinline__ void weigh(const Rows& rows, int32_t tile, uint32_t absent, float (&s)[SCORES], float (&factors)[2]) {
        if (CAPPED)
#pragma unroll
            for (int i = 0; i < SCORES; i++) s[i] = capped(prefill.soft_cap, s[i] * prefill.scale);
        float scale = CAPPED ? 1 : prefill.scale;
        mask(rows, tile, absent, s);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = most[half];
#pragma unroll
            for (int i = 0; i < SCORES; i += 4) top = fmaxf(top, fmaxf(s[i + half * 2], s[i + half * 2 + 1]));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            float base = top == -INFINITY ? 0 : top * scale;
            factors[half] = exp2_fast(most[half] * scale - base);
            most[half] = top;
            float total = 0;
#pragma unroll
            for (int i = 0; i < SCORES; i += 4)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    float& value = s[i + half * 2 + k];
                    value = exp2_fast(fmaf(value, scale, -base));
                    total += value;
                }
            sum[half] = sum[half] * factors[half] + total;
        }
    }

    __device__ __forceinline__ void keep(const float (&s)[SCORES]) {
#pragma unroll
        for (int step = 0; step < POSITIONS / 16; step++)
#pragma unroll
            for (int i = 0; i < 4; i++) weights[step][i] = pack<T>(s[step * 8 + i * 2], s[step * 8 + i * 2 + 1]);
    }

    // Computes a unit, whose queries were asked for, and asks for those of the next.
    __device__ __forceinline__ void unit(const Unit& unit, const Unit* next, const T* queries, T* results) {
        Rows rows(prefill, unit.sequence);
        Range range(prefill, rows, unit);
        uint32_t row = unit.first_row + group * 64 + thread / WARP * 16 + lane / 4;
        sights[0] = sight(prefill, rows, row);
        sights[1] = sight(prefill, rows, row + 8);
        await_queries();
        if (next != nullptr) ask_queries(*next, q_index ^ 1, queries);
#pragma unroll
        for (int i = 0; i < D / 2; i++) out[i] = 0;
        most[0] = most[1] = -INFINITY;
        sum[0] = sum[1] = 0;
        float s[SCORES], factors[2];
        int32_t tile = range.last;
        score(s);
        uint32_t absent = memory.absent[k.index];
        products_wait<0>();
        settle(s);
        release(0, k);
        weigh(rows, tile, absent, s, factors);
        keep(s);
        while (--tile >= range.first) {
            score(s);
            uint32_t absent_now = memory.absent[k.index];
            add_values(rows, tile + 1, absent);
            absent = absent_now;
            products_wait<1>();
            settle(s);
            release(0, k);
            weigh(rows, tile, absent, s, factors);
            products_wait<0>();
            settle(out);
            release(1, v);
#pragma unroll
            for (int i = 0; i < D / 2; i++) out[i] *= factors[i / 2 % 2];
            keep(s);
        }
        add_values(rows, tile + 1, absent);
        products_wait<0>();
        settle(out);
        release(1, v);
        write(rows, unit, row, results);
        q_index ^= 1;
    }

    __device__ __forceinline__ void write(const Rows& rows, const Unit& unit, uint32_t row, T* results) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
            sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
            float factor = sum[half] == 0 ? 0 : 1 / sum[half];
            if (row + half * 8 >= rows.count * prefill.group) continue;
            T* to = results + place(rows, unit, row + half * 8) + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < D / 8; i++)
                *reinterpret_cast<uint32_t*>(to + i * 8) = pack<T>(out[i * 4 + half * 2] * factor, out[i * 4 + half * 2 + 1] * factor);
        }
    }
};

template <typename T, int D, bool CAPPED>
__device__ __forceinline__ void prefill_attention(const Prefill& prefill, const T* queries, T* results) {
    extern __shared__ __align__(1024) uint8_t bytes[];
    auto& memory = *reinterpret_cast<Memory<T, D>*>(bytes);
    if (threadIdx.x == 0)
        for (int which = 0; which < 2; which++)
            for (int stage = 0; stage < STAGES; stage++) {
                barrier_init(shared_address(&memory.full[which][stage]), 1);
                barrier_init(shared_address(&memory.free[which][stage]), CONSUMER_WARPS);
            }
    proxy_fence();
    count_tiles<ROWS>(prefill, memory.before, memory.scratch);
    uint32_t units = memory.before[prefill.sequences] * prefill.arena.kv_heads;
    if (threadIdx.x < GROUP_THREADS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x >= WARP) return;
        Producer<T, D> producer{prefill, memory};
        for (uint32_t index = blockIdx.x; index < units; index += gridDim.x) producer.unit(unit_of<ROWS>(prefill, memory.before, index));
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        Consumer<T, D, CAPPED> consumer{prefill, memory};
        if (blockIdx.x >= units) return;
        Unit unit = unit_of<ROWS>(prefill, memory.before, blockIdx.x), next;
        consumer.ask_queries(unit, 0, queries);
        for (uint32_t index = blockIdx.x; index < units; index += gridDim.x, unit = next) {
            bool is_last = index + gridDim.x >= units;
            if (!is_last) next = unit_of<ROWS>(prefill, memory.before, index + gridDim.x);
            consumer.unit(unit, is_last ? nullptr : &next, queries, results);
        }
    }
}
#define BODY(T, D, CAPPED) prefill_attention<T, D, CAPPED>(prefill, queries, results)
#else
// For other devices there is the portable path.
#define BODY(T, D, CAPPED)
#endif

#define PREFILL(name, T, D)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                                        \
        prefill_90_##name##_##D(const __grid_constant__ Prefill prefill, const T* queries, T* results) {                        \
        BODY(T, D, false);                                                                                                      \
    }                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                                        \
        prefill_90_capped_##name##_##D(const __grid_constant__ Prefill prefill, const T* queries, T* results) {                 \
        BODY(T, D, true);                                                                                                       \
    }
#define PREFILLS(name, T) PREFILL(name, T, 64) PREFILL(name, T, 128)

PREFILLS(bf16, __nv_bfloat16)
PREFILLS(f16, __half)
