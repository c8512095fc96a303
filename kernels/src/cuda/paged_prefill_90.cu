// Paged prefill attention for sm_90a, after FlashAttention-3 (Shah et al., arXiv 2407.08608): one warp takes work, three ask for
// queries, K and V, the last two through the block table; two warpgroups have 64 rows each, with the next tile's scores on their way
// while they work on this one's, over the ends of units too. Blocks of the arena come as they are: they are stored as the matrix
// instructions want them. Numbers of 8 bits come into the end of each half of a tile and are widened to f16 from its beginning on, by
// a warp for each half of K and of V.
#include "fragments.cuh"
#include "paged_prefill.cuh"
#include <type_traits>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "warpgroup.cuh"

constexpr int ROWS = 128;
constexpr int POSITIONS = 128;
constexpr int STAGES = 2;
constexpr int GROUP_THREADS = 128;
constexpr int CONSUMERS = 2;
// Positions of half a tile, within which a block lies.
constexpr int HALF = 64;
// Warps that widen: one for each half of K and of V.
constexpr int WIDENERS = 2 * POSITIONS / HALF;
constexpr int CONSUMER_WARPS = CONSUMERS * GROUP_THREADS / WARP;
// What warps ask for, in the order of the warps.
enum Asked : uint32_t { K, V, Q, ASKED };

// Units that blocks have taken beside their first; 0 before a launch and after it. Launches follow each other.
__device__ uint32_t taken;

// Arrives without a branch, behind which the compiler would compute the address.
__device__ __forceinline__ void arrive_if(bool is_so, uint32_t barrier) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%1];\n}\n"
                 :: "r"(static_cast<int>(is_so)), "r"(barrier) : "memory");
}

__device__ __forceinline__ uint32_t lane_id() {
    uint32_t id;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(id));
    return id;
}

// A unit and the tiles of positions it sees, one at least, the last of them first.
struct Work {
    Unit unit;
    Rows rows;
    bool is_none;
    int32_t first;
    int32_t last;

    __device__ __forceinline__ Work(const Prefill& prefill, const uint32_t* before, uint32_t index, uint32_t units)
        : unit(unit_of<ROWS>(prefill, before, index)), rows(prefill, unit.sequence), is_none(index >= units) {
        uint32_t end = sight(prefill, rows, unit.first_row + min(static_cast<uint32_t>(ROWS), left(prefill)) - 1).to;
        first = sight(prefill, rows, unit.first_row).from / POSITIONS;
        last = max(first, static_cast<int32_t>(end + POSITIONS - 1) / POSITIONS - 1);
    }

    // Rows of the sequence from the unit's first on.
    __device__ __forceinline__ uint32_t left(const Prefill& prefill) const { return rows.count * prefill.group - unit.first_row; }

    // Where a row of the unit is among the rows of q, which are heads of tokens.
    __device__ __forceinline__ uint32_t place(const Prefill& prefill, uint32_t row) const {
        uint32_t at = unit.first_row + row, group = prefill.group;
        return ((rows.begin + at / group) * prefill.arena.kv_heads + unit.head) * group + at % group;
    }
};

template <typename KV> constexpr bool IS_WIDENED = sizeof(KV) == 1;

template <typename T, typename KV, int D> struct Memory {
    static constexpr int TILE_BYTES = POSITIONS / ATOM_ROWS * Layout<T, D>::GROUP;
    // Bytes by which half a tile is more than what comes for it.
    static constexpr int MORE = HALF / ATOM_ROWS * (Layout<T, D>::GROUP - Layout<KV, D>::GROUP);
    alignas(1024) uint8_t tiles[ASKED][STAGES][TILE_BYTES];
    // 8 rows of results of a warp, on their way out.
    alignas(16) uint8_t results[CONSUMER_WARPS][Layout<T, D>::GROUP];
    // Behind those of ASKED: what has come of K and V and is still to be widened.
    uint64_t full[ASKED + (IS_WIDENED<KV> ? 2 : 0)][STAGES];
    uint64_t free[ASKED][STAGES];
    // V that has come and is to be cleared in part.
    uint64_t landed;
    uint64_t work_full;
    uint64_t work_free;
    alignas(Work) uint8_t work[sizeof(Work)];
    // Positions of a stage's tile whose blocks are not there, a bit for each 8.
    uint32_t absent[STAGES];
    uint32_t scratch[WARP];
    uint32_t before[1];  // [sequences + 1]

    // Where a position that has come lies beyond its place among those that come.
    static __device__ __forceinline__ uint32_t shift(uint32_t position) { return (position / HALF + 1) * MORE; }

    // The barrier of what comes.
    __device__ __forceinline__ uint32_t came(Asked which, uint32_t stage) {
        return shared_address(&full[IS_WIDENED<KV> && which != Q ? ASKED + which : which][stage]);
    }
};
static_assert(ROWS == POSITIONS, "tiles of q are as large as those of K");

// The warp that takes work when the block needs some, since units differ in what they see.
template <typename T, typename KV, int D> __device__ __forceinline__ void take_work(const Prefill& prefill, Memory<T, KV, D>& memory) {
    uint32_t units = memory.before[prefill.sequences] * prefill.arena.kv_heads, index = blockIdx.x, lane = threadIdx.x % WARP;
    for (uint32_t parity = 1;; parity ^= 1) {
        Work work(prefill, memory.before, index, units);
        barrier_wait(shared_address(&memory.work_free), parity);
        __syncwarp();
        if (lane == 0) {
            *reinterpret_cast<Work*>(memory.work) = work;
            barrier_arrive(shared_address(&memory.work_full));
        }
        if (work.is_none) return;
        // All blocks together do so once for each unit: for all but their first, and once in vain, which makes it 0 again.
        if (lane == 0) index = gridDim.x + atomicInc(&taken, units - 1);
        index = __shfl_sync(~0u, index, 0);
    }
}

template <typename T, typename KV, int D> __device__ __forceinline__ Work await_work(Memory<T, KV, D>& memory, uint32_t& parity) {
    barrier_wait(shared_address(&memory.work_full), parity);
    parity ^= 1;
    Work work = *reinterpret_cast<Work*>(memory.work);
    barrier_arrive(shared_address(&memory.work_free));
    return work;
}

// A warp that asks for tiles of one kind.
template <typename T, typename KV, int D> struct Producer {
    using L = Layout<T, D>;
    using Stored = Layout<KV, D>;
    static constexpr uint32_t CHUNKS = L::ROW / 16;

    const Prefill& prefill;
    Memory<T, KV, D>& memory;
    Asked which;
    const T* queries;
    uint32_t parity = 0, landings = 0;
    Stage stage;
    uint32_t lane = threadIdx.x % WARP;

    __device__ __forceinline__ void run() {
        while (true) {
            Work work = await_work(memory, parity);
            if (work.is_none) return;
            if (which == Q) ask_queries(work);
            else ask_tiles(work);
        }
    }

    __device__ __forceinline__ uint8_t* await_stage() {
        barrier_wait(shared_address(&memory.free[which][stage.index]), stage.parity ^ 1);
        // One lane goes on to fill it: the others may not still wait when it is free again.
        __syncwarp();
        return memory.tiles[which][stage.index];
    }

    // What this lane has stored itself is there.
    __device__ __forceinline__ void tell() {
        proxy_fence();
        barrier_arrive(memory.came(which, stage.index));
    }

    // Rows that are of nobody are cleared.
    __device__ __forceinline__ void ask_queries(const Work& work) {
        uint32_t tile = shared_address(await_stage()), left = work.left(prefill), places[ROWS / WARP];
#pragma unroll
        for (uint32_t block = 0; block < ROWS / WARP; block++) places[block] = work.place(prefill, min(block * WARP + lane, left - 1));
#pragma unroll 1
        for (uint32_t step = 0; step < CHUNKS; step++) {
            uint32_t row = (step * WARP + lane) / CHUNKS, chunk = lane % CHUNKS, to = tile + L::chunk(row, chunk);
#pragma unroll
            for (uint32_t block = 0; block < ROWS / WARP; block++) {
                size_t place = __shfl_sync(~0u, places[block], row);
                auto from = reinterpret_cast<const uint4*>(queries) + place * CHUNKS + chunk;
                copy_16_if(block * WARP + row < left, to + block * WARP / ATOM_ROWS * L::GROUP, from);
            }
        }
        commit_copies();
        wait_for_copies<0>();
        tell();
        stage.next(STAGES);
    }

    __device__ __forceinline__ void ask_tiles(const Work& work) {
        uint32_t id = block_of(work, work.last);
        for (int32_t tile = work.last; tile >= work.first; tile--) {
            uint32_t next = tile > work.first ? block_of(work, tile - 1) : 0;
            ask(work, tile, id);
            id = next;
        }
    }

    // The block of this lane; none where there is none, or it is not the arena's.
    __device__ __forceinline__ uint32_t block_of(const Work& work, uint32_t tile) {
        uint32_t size = prefill.arena.block_size, index = tile * (POSITIONS / size) + lane;
        if (lane >= POSITIONS / size || index * size >= work.rows.context) return ~0u;
        return prefill.tables[static_cast<size_t>(work.unit.sequence) * prefill.table_width + index];
    }

    // A lane for each block.
    __device__ __forceinline__ void ask(const Work& work, int32_t tile, uint32_t id) {
        const KvArena& arena = prefill.arena;
        uint32_t bytes = arena.block_size / ATOM_ROWS * Stored::GROUP, there = __ballot_sync(~0u, id < arena.blocks);
        uint32_t absent = __ballot_sync(~0u, lane < POSITIONS / 8 && (there >> (lane * 8 / arena.block_size) & 1) == 0);
        bool has_gaps = which == V && (absent != 0 || (tile + 1) * POSITIONS > work.rows.context);
        uint32_t to = shared_address(await_stage());
        uint32_t barrier = has_gaps ? shared_address(&memory.landed) : memory.came(which, stage.index);
        if (lane == 0) {
            if (which == K) memory.absent[stage.index] = absent;
            barrier_expect(barrier, __popc(there) * bytes);
        } else if (which == V && !has_gaps) {
            barrier_arrive(barrier);
        }
        __syncwarp();
        if (id < arena.blocks) {
            const uint8_t* from = arena.data + Stored::head(arena, id, prefill.layer, which, work.unit.head);
            bulk_copy<EVICT_NORMAL>(to + lane * bytes + memory.shift(lane * arena.block_size), from, bytes, barrier);
        }
        if (has_gaps) clear(work, tile, absent);
        stage.next(STAGES);
    }

    // Clears the rows of V that are of nobody: a weight of nothing times what is no number is no number.
    __device__ __forceinline__ void clear(const Work& work, int32_t tile, uint32_t absent) {
        barrier_wait(shared_address(&memory.landed), landings++ & 1);
        for (uint32_t row = lane; row < POSITIONS; row += WARP)
            if (tile * POSITIONS + row >= work.rows.context || (absent >> (row / 8) & 1) != 0)
                for (uint32_t chunk = 0; chunk < Stored::ROW / 16; chunk++)
                    *reinterpret_cast<uint4*>(memory.tiles[V][stage.index] + memory.shift(row) + Stored::chunk(row, chunk)) = uint4{};
        tell();
    }
};

// A warp that widens half of each tile of K or V.
template <typename T, typename KV, int D> struct Widener {
    using L = Layout<__half, D>;
    using Stored = Layout<KV, D>;
    // A warp loads 8 rows with so many loads of 16 bytes.
    static constexpr int LOADS = Stored::GROUP / 16 / WARP;

    Memory<T, KV, D>& memory;
    Asked which;
    uint32_t half;
    uint32_t parity = 0;
    Stage stage;
    uint32_t lane = threadIdx.x % WARP;
    // Eight lanes have four neighbouring chunks of two rows that differ in their lowest and highest bit: no bank twice, neither of what
    // they load nor of what they store.
    uint32_t row = lane / 8 ^ lane / 4 % 2 * 5, chunk = lane % 4;

    __device__ __forceinline__ void run() {
        while (true) {
            Work work = await_work(memory, parity);
            if (work.is_none) return;
            for (int32_t tile = work.last; tile >= work.first; tile--) widen_half();
        }
    }

    // In place: what is stored never reaches what is still to be loaded.
    __device__ __forceinline__ void widen_half() {
        barrier_wait(memory.came(which, stage.index), stage.parity);
        uint32_t to = shared_address(memory.tiles[which][stage.index]) + half * (HALF / ATOM_ROWS * L::GROUP), from = to + memory.MORE;
        uint32_t pair[2] = {to + L::chunk(row, chunk * 2), to + L::chunk(row, chunk * 2 + 1)};
        uint4 stored[2][LOADS];
        load(stored[0], from);
#pragma unroll
        for (int group = 0; group < HALF / ATOM_ROWS; group++) {
            if (group + 1 < HALF / ATOM_ROWS) load(stored[(group + 1) % 2], from + (group + 1) * Stored::GROUP);
            __syncwarp();
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const uint4& x = stored[group % 2][i];
                uint32_t offset = group * L::GROUP + i * L::ATOM;
                uint2 wide[4] = {widen_four(x.x), widen_four(x.y), widen_four(x.z), widen_four(x.w)};
                store_shared(pair[0] + offset, {wide[0].x, wide[0].y, wide[1].x, wide[1].y});
                store_shared(pair[1] + offset, {wide[2].x, wide[2].y, wide[3].x, wide[3].y});
            }
        }
        proxy_fence();
        barrier_arrive(shared_address(&memory.full[which][stage.index]));
        stage.next(STAGES);
    }

    __device__ __forceinline__ void load(uint4 (&stored)[LOADS], uint32_t group) {
#pragma unroll
        for (int i = 0; i < LOADS; i++) stored[i] = load_shared(group + Stored::chunk(row, chunk + i * 4));
    }
};

// A warpgroup with 64 rows.
template <typename T, typename KV, int D, bool CAPPED> struct Consumer {
    using L = Layout<T, D>;
    using Stored = Layout<KV, D>;
    // What is multiplied.
    using Number = typename Fragments<T, KV, D>::Number;
    static constexpr int SCORES = POSITIONS / 2;
    static constexpr uint32_t CHUNKS = L::ROW / 16;
    // A thread's weights of a row and tile sum up to this at most, so that each is an f16.
    static constexpr float MOST_SUM = 4096;

    const Prefill& prefill;
    Memory<T, KV, D>& memory;
    T* results;
    uint32_t parity;
    // Whose scores are the latest, and what comes after and was before it, whose results may not be written yet.
    Work work, next, done;
    int32_t tile;
    Stage stages[ASKED];
    // Uniform, and read once: the compiler would do so at each use.
    uint32_t group = __shfl_sync(~0u, threadIdx.x / GROUP_THREADS, 0) - 1, lane = lane_id();
    uint32_t warp = group * (GROUP_THREADS / WARP) + threadIdx.x / WARP % (GROUP_THREADS / WARP);
    // Blocks of the tile that are not there.
    uint32_t absent;
    float out[D / 2];
    // Of the tile that is added, and of the one after it.
    uint32_t weights[POSITIONS / 16][4], coming[POSITIONS / 16][4];
    float most[2], sum[2], done_sum[2], factors[2];
    // Whether `factors` are not 1.
    bool is_rebased;
    // Of the unit's head.
    float k_scale = 1;
    Sight sights[2];
    // 0, which the compiler does not know.
    uint32_t nothing = prefill.tokens >> 31;

    __device__ __forceinline__ void run() {
        float s[SCORES];
        begin();
        score(s);
        look_ahead();
        products_wait<0>();
        take_scores(s, true);
        clear_out();
        bool is_new = false;
        // The loop begins where V is waited for: the compiler does not move the wait over its end, before the exponentials.
        for (bool is_first = true;; is_first = false) {
            products_wait<0>();
            settle(out);
            if (!is_first) release(V);
            if (is_new) finish();
            else if (is_rebased) rescale();
            take_weights();
            is_new = tile == work.first;
            if (is_new && next.is_none) break;
            if (is_new) begin();
            else tile--;
            score(s);
            add_values();
            look_ahead();
            products_wait<1>();
            take_scores(s, is_new);
        }
        add_values();
        products_wait<0>();
        settle(out);
        write(work, sum);
    }

    // Goes on to the next unit; the results of the one before it are not complete yet.
    __device__ __forceinline__ void begin() {
        done = work;
        work = next;
        tile = work.last;
        uint32_t row = work.unit.first_row + warp * 16 + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            done_sum[half] = sum[half];
            sum[half] = 0;
            most[half] = -INFINITY;
            sights[half] = sight(prefill, work.rows, row + half * 8);
        }
        k_scale = Stored::scale(prefill.arena, prefill.layer, K, work.unit.head);
        barrier_wait(full(Q), stages[Q].parity);
        if (!std::is_same_v<T, Number>) convert_queries();
    }

    // Makes f16 of this group's queries, in their place.
    __device__ __forceinline__ void convert_queries() {
        constexpr int EACH = 64 * CHUNKS / GROUP_THREADS;
        uint32_t first = address(Q) + group * 64 / ATOM_ROWS * L::GROUP + threadIdx.x % GROUP_THREADS * 16;
        uint4 chunks[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) chunks[i] = load_shared(first + i * GROUP_THREADS * 16);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            using F = Fragments<T, KV, D>;
            const uint4& x = chunks[i];
            store_shared(first + i * GROUP_THREADS * 16, {F::query(x.x), F::query(x.y), F::query(x.z), F::query(x.w)});
        }
        proxy_fence();
        meet(1 + group, GROUP_THREADS);
    }

    __device__ __forceinline__ void finish() {
        write(done, done_sum);
        clear_out();
    }

    // At the last tile of a unit: what comes after it.
    __device__ __forceinline__ void look_ahead() {
        if (tile == work.first) next = await_work(memory, parity);
    }

    __device__ __forceinline__ uint32_t full(Asked which) { return shared_address(&memory.full[which][stages[which].index]); }
    __device__ __forceinline__ uint32_t address(Asked which) { return shared_address(memory.tiles[which][stages[which].index]); }

    // A lane for all that have only multiplied; each for itself where queries were made f16.
    __device__ __forceinline__ void release(Asked which) {
        __syncwarp();
        arrive_if((IS_WIDENED<KV> && which == Q) || lane == 0, shared_address(&memory.free[which][stages[which].index]));
        stages[which].next(STAGES);
    }

    // Queues the scores of the tile.
    __device__ __forceinline__ void score(float (&s)[SCORES]) {
        barrier_wait(full(K), stages[K].parity);
        absent = __shfl_sync(~0u, lane == 0 ? memory.absent[stages[K].index] : 0, 0);
        uint64_t q = operand(address(Q) + group * 64 / ATOM_ROWS * L::GROUP, 0, L::GROUP), keys = operand(address(K), 0, L::GROUP);
        products_begin();
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            uint32_t offset = step / 4 * L::ATOM + step % 4 * 32;
            multiply_shared<POSITIONS, Number>(s, further(q, offset), further(keys, offset), step != 0);
        }
        products_commit();
    }

    // Queues the weighted sum of the next tile of V.
    __device__ __forceinline__ void add_values() {
        barrier_wait(full(V), stages[V].parity);
        uint64_t values = operand(address(V), L::ATOM, L::GROUP);
        products_begin();
#pragma unroll
        for (int step = 0; step < POSITIONS / 16; step++)
            multiply_registers<D, Number>(out, weights[step], further(values, step * 2 * L::GROUP));
        products_commit();
    }

    // Turns the scores into the next weights.
    __device__ __forceinline__ void take_scores(float (&s)[SCORES], bool is_new) {
        settle(s);
        release(K);
        if (tile == work.first) release(Q);
        if (CAPPED)
#pragma unroll
            for (int i = 0; i < SCORES; i++) s[i] = capped(prefill.soft_cap, s[i] * (prefill.scale * k_scale));
        int32_t first = tile * POSITIONS;
        bool is_whole = first + POSITIONS <= min(sights[0].to, sights[1].to) && first >= max(sights[0].from, sights[1].from);
        if (absent != 0 || !is_whole) mask(s);
        weigh(s, is_new);
    }

    // What a row does not see becomes nothing.
    __device__ __forceinline__ void mask(float (&s)[SCORES]) {
        int32_t own = tile * POSITIONS + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < SCORES; i++) {
            int32_t column = i / 4 * 8 + i % 2, from = sights[i / 2 % 2].from - own, to = sights[i / 2 % 2].to - own;
            if (column < from || column >= to) s[i] = -INFINITY;
        }
        if (absent == 0) return;
#pragma unroll
        for (int i = 0; i < SCORES; i++)
            if ((absent >> (i / 4) & 1) != 0) s[i] = -INFINITY;
    }

    // Exponentials are to the base of the largest score so far. One that is far above it shows in the sums, and only then, or where a
    // unit begins, the largest is looked for.
    __device__ __forceinline__ void weigh(const float (&s)[SCORES], bool is_new) {
        float scale = CAPPED ? 1 : prefill.scale * k_scale, bases[2] = {most[0] * scale, most[1] * scale}, total[2] = {INFINITY, INFINITY};
        if (!is_new) add_weights(s, scale, bases, total);
        is_rebased = !__all_sync(~0u, total[0] <= MOST_SUM && total[1] <= MOST_SUM);
        if (is_rebased) {
            rebase(s, scale, bases);
            add_weights(s, scale, bases, total);
        }
        sum[0] += total[0];
        sum[1] += total[1];
    }

    // Takes the largest scores for bases, with the factors of what was added before.
    __device__ __forceinline__ void rebase(const float (&s)[SCORES], float scale, float (&bases)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = most[half];
#pragma unroll
            for (int i = 0; i < SCORES; i += 4) top = fmaxf(top, fmaxf(s[i + half * 2], s[i + half * 2 + 1]));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            bases[half] = top == -INFINITY ? 0 : top * scale;
            factors[half] = exp2_fast(most[half] * scale - bases[half]);
            sum[half] *= factors[half];
            most[half] = top;
        }
    }

    __device__ __forceinline__ void add_weights(const float (&s)[SCORES], float scale, const float (&bases)[2], float (&total)[2]) {
        total[0] = total[1] = 0;
#pragma unroll
        for (int i = 0; i < SCORES; i += 2) {
            float base = bases[i / 2 % 2], low = exp2_fast(fmaf(s[i], scale, -base)), high = exp2_fast(fmaf(s[i + 1], scale, -base));
            total[i / 2 % 2] += low + high;
            coming[i / 8][i / 2 % 4] = pack<Number>(low, high);
        }
    }

    // Reads the old weights once more, since until here products read them: else the compiler has the new ones in their registers.
    __device__ __forceinline__ void take_weights() {
#pragma unroll
        for (int step = 0; step < POSITIONS / 16; step++)
#pragma unroll
            for (int i = 0; i < 4; i++) weights[step][i] = (weights[step][i] & nothing) | coming[step][i];
    }

    __device__ __forceinline__ void rescale() {
#pragma unroll
        for (int i = 0; i < D / 2; i++) out[i] *= factors[i / 2 % 2];
    }

    __device__ __forceinline__ void clear_out() {
#pragma unroll
        for (int i = 0; i < D / 2; i++) out[i] = 0;
    }

    // Writes the rows of a unit, 8 of a warp at a time, through shared memory so that whole rows go out.
    __device__ __forceinline__ void write(const Work& of, float (&total)[2]) {
        // Read anew, since the compiler would compute the addresses at every tile.
        uint32_t lane = lane_id(), own = of.place(prefill, warp * 16 + lane % 16), left = of.left(prefill);
        uint8_t* rows = memory.results[warp];
        float v_scale = Stored::scale(prefill.arena, prefill.layer, V, of.unit.head);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            total[half] += __shfl_xor_sync(~0u, total[half], 1);
            total[half] += __shfl_xor_sync(~0u, total[half], 2);
            float factor = total[half] == 0 ? 0 : __fdividef(v_scale, total[half]);
#pragma unroll
            for (int i = 0; i < D / 8; i++)
                *reinterpret_cast<uint32_t*>(rows + L::chunk(lane / 4, i) + lane % 4 * 4) =
                    pack<T>(out[i * 4 + half * 2] * factor, out[i * 4 + half * 2 + 1] * factor);
            __syncwarp();
#pragma unroll
            for (uint32_t first = 0; first < 8 * CHUNKS; first += WARP) {
                uint32_t row = (first + lane) / CHUNKS, at = half * 8 + row, place = __shfl_sync(~0u, own, at);
                uint4 chunk = *reinterpret_cast<const uint4*>(rows + L::chunk(row, lane % CHUNKS));
                auto to = reinterpret_cast<uint4*>(results) + static_cast<size_t>(place) * CHUNKS + lane % CHUNKS;
                if (warp * 16 + at < left) *to = chunk;
            }
            __syncwarp();
        }
    }
};

// Lanes that store arrive each for itself; where copies store, one tells how much comes.
template <typename T, typename KV, int D> __device__ __forceinline__ void make_barriers(Memory<T, KV, D>& memory) {
    constexpr bool IS_WIDE = IS_WIDENED<KV>;
    barrier_init(shared_address(&memory.landed), 1);
    barrier_init(shared_address(&memory.work_full), 1);
    barrier_init(shared_address(&memory.work_free), (CONSUMER_WARPS + ASKED + (IS_WIDE ? WIDENERS : 0)) * WARP);
    for (int stage = 0; stage < STAGES; stage++) {
        for (Asked which : {K, V, Q}) {
            barrier_init(memory.came(which, stage), which == K ? 1 : WARP);
            barrier_init(shared_address(&memory.free[which][stage]), CONSUMER_WARPS * (IS_WIDE && which == Q ? WARP : 1));
        }
        for (Asked which : {K, V})
            if (IS_WIDE) barrier_init(shared_address(&memory.full[which][stage]), POSITIONS / HALF * WARP);
    }
}

template <typename T, typename KV, int D, bool CAPPED> __device__ __forceinline__ void prefill_attention(const Prefill& prefill) {
    extern __shared__ __align__(1024) uint8_t bytes[];
    auto& memory = *reinterpret_cast<Memory<T, KV, D>*>(bytes);
    const T* queries = static_cast<const T*>(prefill.queries);
    T* results = static_cast<T*>(prefill.results);
    let_next_begin();
    if (threadIdx.x == 0) make_barriers(memory);
    proxy_fence();
    wait_for_previous();
    count_tiles<ROWS>(prefill, memory.before, memory.scratch);
    // The registers of all kinds together are those that the kernel begins with.
    if (threadIdx.x < GROUP_THREADS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        uint32_t warp = threadIdx.x / WARP;
        if (warp == ASKED) take_work(prefill, memory);
        else Producer<T, KV, D>{prefill, memory, static_cast<Asked>(warp), queries}.run();
    } else if (IS_WIDENED<KV> && threadIdx.x >= (1 + CONSUMERS) * GROUP_THREADS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        uint32_t warp = threadIdx.x % GROUP_THREADS / WARP;
        Widener<T, KV, D>{memory, static_cast<Asked>(warp / 2), warp % 2}.run();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(IS_WIDENED<KV> ? 216 : 232));
        uint32_t parity = 0;
        Work work = await_work(memory, parity);
        if (!work.is_none) Consumer<T, KV, D, CAPPED>{prefill, memory, results, parity, work, work, work}.run();
    }
}
#define BODY(T, KV, D, CAPPED) prefill_attention<T, KV, D, CAPPED>(prefill)
#else
// For other devices there is the portable path.
#define BODY(T, KV, D, CAPPED)
#endif

#define PREFILL(name, T, KV, D, CAPPED)                                                                                         \
    extern "C" __global__ void __launch_bounds__(sizeof(KV) == 1 ? 512 : 384, 1)                                                \
        prefill_90_##name(const __grid_constant__ Prefill prefill) {                                                            \
        BODY(T, KV, D, CAPPED);                                                                                                 \
    }
#define PREFILLS(name, T, KV)                                                                                                   \
    PREFILL(name##_64, T, KV, 64, false)                                                                                        \
    PREFILL(name##_128, T, KV, 128, false)                                                                                      \
    PREFILL(name##_64_capped, T, KV, 64, true)                                                                                  \
    PREFILL(name##_128_capped, T, KV, 128, true)

PREFILLS(bf16, __nv_bfloat16, __nv_bfloat16)
PREFILLS(bf16_e4m3, __nv_bfloat16, E4m3)
PREFILLS(f16, __half, __half)
PREFILLS(f16_e4m3, __half, E4m3)
