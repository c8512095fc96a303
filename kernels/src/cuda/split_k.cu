// Products of up to some hundred rows for sm_90a: out[m][n] = sum over k of x[m][k] w[n][k].
//
// A block has a tile of 64 or 128 rows by as many outputs as leave every multiprocessor one: widths come in steps that the host
// chooses from. Where that would be so few that rows of x are most of what is loaded, tiles are wider and several clusters split the
// k of one. The two blocks of a cluster share what they load: rows of x where their tiles are neighbours along the outputs, weights
// where they are neighbours along the rows. One warp asks, a warpgroup for each 64 rows multiplies. The weights of the first stages
// are asked for before the launch before this one has ended.
//
// A tile whose k is split: each block leaves what others add up in memory (it stays in the second cache) and adds up an equal share
// of the outputs, in the order of k, so that results do not depend on who is first. A word that is not there yet is 0: whoever reads
// a sum waits for it and puts the 0 back, so that nobody has to fence or count. A block leaves its sums before it waits for others',
// and the grid is no larger than what the device runs at once, so that nobody waits for ever.
#include "activation.cuh"

constexpr int WARPGROUP = 128;

// A `CUtensorMap`.
struct alignas(128) TensorMap {
    uint64_t words[16];
};

enum class Gate : uint32_t { NONE, SILU, GELU };

struct SplitK {
    TensorMap w;        // [outputs][inputs], or [2 outputs][inputs] with a gate, in boxes of [W_BOX][DEPTH], or half as many rows
    TensorMap x;        // [rows][inputs] in boxes of [x_box][DEPTH]
    void* out;          // [rows][outputs]
    uint4* parts;       // [units][CLUSTER][OUTPUTS / 8][CONSUMERS] where k is split, 0 before and after
    uint32_t rows;
    uint32_t outputs;   // a multiple of 8
    uint32_t x_box;     // rows that a block asks for at once: where all are fewer than a tile, no more than there are
    uint32_t steps;     // of k
    uint32_t row_tiles; // of a cluster, which the rows are cut into
    uint32_t splits;    // of k: 1, 2 or 4
    uint32_t units;     // tiles of a cluster times splits
    uint32_t adds;      // whether out is added to
    Gate gate;          // what a product goes through before it is multiplied by that of as many rows of w further on
};

constexpr int CLUSTER = 2;
// The k of a step: a row of 128 bytes.
constexpr int DEPTH = 64;
constexpr int ROW_BYTES = DEPTH * 2;
constexpr int MOST_SHARED = 227 << 10;

// What the blocks of a cluster share.
constexpr bool X = false, W = true;

// A block's tile: ROWS by OUTPUTS.
template <int ROWS, int OUTPUTS, bool SHARED> struct Tile {
    static constexpr uint32_t CONSUMERS = ROWS / 64 * WARPGROUP, THREADS = CONSUMERS + WARP;
    static constexpr uint32_t CLUSTER_ROWS = SHARED == W ? ROWS * CLUSTER : ROWS, CLUSTER_OUTPUTS = SHARED == X ? OUTPUTS * CLUSTER : OUTPUTS;
    static constexpr uint32_t W_BOX = SHARED == W ? OUTPUTS / CLUSTER : OUTPUTS;
    static constexpr uint32_t X_BYTES = ROWS * ROW_BYTES, W_BYTES = OUTPUTS * ROW_BYTES;
    static constexpr uint32_t FIT = (MOST_SHARED - 512) / (X_BYTES + W_BYTES), STAGES = FIT < 16 ? FIT : 16;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "warpgroup.cuh"

template <int ROWS, int OUTPUTS, bool SHARED> struct Memory {
    using Sizes = Tile<ROWS, OUTPUTS, SHARED>;
    alignas(1024) uint8_t x[Sizes::STAGES][Sizes::X_BYTES];
    alignas(1024) uint8_t w[Sizes::STAGES][Sizes::W_BYTES];
    uint64_t full[Sizes::STAGES];
    uint64_t free[Sizes::STAGES];
};

// One lane of a warp.
__device__ __forceinline__ bool elected() {
    uint32_t is_elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(is_elected));
    return is_elected != 0;
}
__device__ __forceinline__ void prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory"); }
__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// Orders no memory but the barriers that were made before it.
__device__ __forceinline__ void cluster_meet() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Makes barriers that were set up visible to the cluster.
__device__ __forceinline__ void barriers_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives at the barrier of the same address of a block of the cluster. With `.release.cluster` it would wait for everything that
// is on its way: what it has to wait for, the products, the caller has.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" :: "r"(barrier), "r"(rank) : "memory");
}

// A box of a matrix whose first number is at `k` of `row`, in this block or in every block of the cluster.
template <uint64_t POLICY>
__device__ __forceinline__ void box_copy(uint32_t to, const TensorMap& map, uint32_t k, uint32_t row, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3}], [%4], %5;"
                 :: "r"(to), "l"(&map), "r"(k), "r"(row), "r"(barrier), "l"(POLICY) : "memory");
}
template <uint64_t POLICY>
__device__ __forceinline__ void box_copy_to_all(uint32_t to, const TensorMap& map, uint32_t k, uint32_t row, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
                 "[%0], [%1, {%2, %3}], [%4], %5, %6;"
                 :: "r"(to), "l"(&map), "r"(k), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>((1 << CLUSTER) - 1)), "l"(POLICY)
                 : "memory");
}

// Sums are left with their bits turned over, so that 0, a word that is not there, would be a NaN; its neighbour is one too.
__device__ __forceinline__ uint32_t marked(float sum) { return max(~__float_as_uint(sum), 1u); }
__device__ __forceinline__ float unmarked(uint32_t word) { return __uint_as_float(~word); }
__device__ __forceinline__ bool is_there(const uint4& words) { return words.x != 0 && words.y != 0 && words.z != 0 && words.w != 0; }
__device__ __forceinline__ void leave_words(uint4* to, const uint4& words) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "l"(to), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w) : "memory");
}
__device__ __forceinline__ uint4 see_words(const uint4* from) {
    uint4 words;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w) : "l"(from) : "memory");
    return words;
}

// A part of the k of a tile, as a block of the cluster sees it.
template <int ROWS, int OUTPUTS, bool SHARED> struct Unit {
    using Sizes = Tile<ROWS, OUTPUTS, SHARED>;
    uint32_t split, first_row, first_output;
    uint32_t begin, end; // steps

    __device__ __forceinline__ Unit(const SplitK& product, uint32_t index, uint32_t rank) {
        uint32_t tile = index / product.splits;
        split = index % product.splits;
        // Tiles of the same weights follow each other, so that the second finds them in the second cache.
        first_row = tile % product.row_tiles * Sizes::CLUSTER_ROWS + (SHARED == W ? rank * ROWS : 0);
        first_output = tile / product.row_tiles * Sizes::CLUSTER_OUTPUTS + (SHARED == X ? rank * OUTPUTS : 0);
        if (product.gate != Gate::NONE) first_output /= 2;
        begin = product.steps * split / product.splits;
        end = product.steps * (split + 1) / product.splits;
    }
};

// The warp that asks. What it counts with is the same for all lanes, so that it is in registers of the warp.
template <int ROWS, int OUTPUTS, bool SHARED> struct Producer {
    using Sizes = Tile<ROWS, OUTPUTS, SHARED>;
    using Unit = ::Unit<ROWS, OUTPUTS, SHARED>;
    const SplitK& product;
    Memory<ROWS, OUTPUTS, SHARED>& memory;
    uint32_t rank = cluster_rank();
    bool leads = elected();
    Stage stage;

    __device__ __forceinline__ Producer(const SplitK& product, Memory<ROWS, OUTPUTS, SHARED>& memory) : product(product), memory(memory) {}

    __device__ __forceinline__ void make_barriers() {
        if (!leads) return;
        prefetch(product.w);
        prefetch(product.x);
        for (auto& barrier : memory.full) barrier_init(shared_address(&barrier), 1);
        for (auto& barrier : memory.free) barrier_init(shared_address(&barrier), CLUSTER * Sizes::CONSUMERS / WARP);
        barriers_fence();
    }

    __device__ __forceinline__ void ask_w(uint32_t stage, const Unit& unit, uint32_t step) {
        if (!leads) return;
        uint32_t full = shared_address(&memory.full[stage]), to = shared_address(memory.w[stage]);
        barrier_expect(full, product.x_box * (SHARED == W ? 1 : CLUSTER) * ROW_BYTES + Sizes::W_BYTES);
        // The second half of a tile's weights follows the first, or is what the gates are multiplied by.
        uint32_t k = step * DEPTH, first = unit.first_output, second = first + (product.gate == Gate::NONE ? OUTPUTS / 2 : product.outputs);
        if constexpr (SHARED == W) {
            box_copy_to_all<EVICT_FIRST>(to + rank * Sizes::W_BYTES / 2, product.w, k, rank == 0 ? first : second, full);
        } else {
            box_copy<EVICT_FIRST>(to, product.w, k, first, full);
            if (product.gate != Gate::NONE) box_copy<EVICT_FIRST>(to + Sizes::W_BYTES / 2, product.w, k, second, full);
        }
    }

    __device__ __forceinline__ void ask_x(uint32_t stage, const Unit& unit, uint32_t step) {
        if (!leads) return;
        uint32_t full = shared_address(&memory.full[stage]), to = shared_address(memory.x[stage]);
        if constexpr (SHARED == W) {
            box_copy<EVICT_NORMAL>(to, product.x, step * DEPTH, unit.first_row, full);
        } else {
            uint32_t first = rank * product.x_box;
            box_copy_to_all<EVICT_NORMAL>(to + first * ROW_BYTES, product.x, step * DEPTH, unit.first_row + first, full);
        }
    }

    // Weights do not depend on the launch before.
    __device__ __forceinline__ void run() {
        uint32_t index = blockIdx.x / CLUSTER;
        Unit unit(product, index, rank);
        uint32_t early = min(unit.end - unit.begin, Sizes::STAGES);
#pragma unroll 1
        for (uint32_t i = 0; i < early; i++) ask_w(i, unit, unit.begin + i);
        wait_for_previous();
#pragma unroll 1
        for (uint32_t i = 0; i < early; i++, stage.next(Sizes::STAGES)) ask_x(i, unit, unit.begin + i);
        ask(unit, unit.begin + early);
        while ((index += gridDim.x / CLUSTER) < product.units) {
            unit = Unit(product, index, rank);
            ask(unit, unit.begin);
        }
    }

    // A stage that nobody has used yet is free: its barrier has the parity before the first.
    __device__ __forceinline__ void ask(const Unit& unit, uint32_t step) {
#pragma unroll 1
        for (; step < unit.end; step++, stage.next(Sizes::STAGES)) {
            barrier_wait(shared_address(&memory.free[stage.index]), stage.parity ^ 1);
            ask_w(stage.index, unit, step);
            ask_x(stage.index, unit, step);
        }
    }
};

// The warpgroups that multiply: 64 rows each.
template <typename T, int ROWS, int OUTPUTS, bool SHARED> struct Consumer {
    using Sizes = Tile<ROWS, OUTPUTS, SHARED>;
    // Sixteens of outputs, and how many are written at a time.
    static constexpr int PAIRS = OUTPUTS / 16, BATCH = 4;

    const SplitK& product;
    Memory<ROWS, OUTPUTS, SHARED>& memory;
    uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, rank = cluster_rank();
    Stage stage;
    float sums[OUTPUTS / 2];

    __device__ __forceinline__ Consumer(const SplitK& product, Memory<ROWS, OUTPUTS, SHARED>& memory) : product(product), memory(memory) {}

    __device__ __forceinline__ void run() {
        for (uint32_t index = blockIdx.x / CLUSTER; index < product.units; index += gridDim.x / CLUSTER) {
            Unit<ROWS, OUTPUTS, SHARED> unit(product, index, rank);
            multiply(unit.end - unit.begin);
            if (product.gate != Gate::NONE) write_gated(unit);
            else if (product.splits == 1) write<0, PAIRS>(unit);
            else if (product.splits == 2) exchange<2>(unit, index);
            else exchange<4>(unit, index);
        }
    }

    // The sums of the next `count` steps. They are cleared before the loop: a predicate of the first products would make ptxas
    // serialize all of them (its remark C7520).
    __device__ __forceinline__ void multiply(uint32_t count) {
#pragma unroll
        for (float& sum : sums) sum = 0;
        uint32_t before = stage.index;
        for (uint32_t i = 0; i < count; i++) {
            barrier_wait(shared_address(&memory.full[stage.index]), stage.parity);
            uint64_t rows = operand(shared_address(memory.x[stage.index]) + warp / 4 * 64 * ROW_BYTES, 0, 8 * ROW_BYTES);
            uint64_t weights = operand(shared_address(memory.w[stage.index]), 0, 8 * ROW_BYTES);
            products_begin();
#pragma unroll
            for (int k = 0; k < DEPTH; k += 16) multiply_shared<OUTPUTS, T>(sums, further(rows, k * 2), further(weights, k * 2), 1);
            products_commit();
            if (i > 0) {
                products_wait<1>();
                release(before);
            }
            before = stage.index;
            stage.next(Sizes::STAGES);
        }
        products_wait<0>();
        settle(sums);
        if (count > 0) release(before);
    }

    // Both blocks must have used a stage: what is shared comes to both at once.
    __device__ __forceinline__ void release(uint32_t stage) {
        __syncwarp();
        if (lane < CLUSTER) barrier_arrive_at(shared_address(&memory.free[stage]), lane);
    }

    // Where this lane's results of a tile are, of each of its warp's two eights of rows: four neighbours of each sixteen of outputs
    // on from here, while outputs are left.
    struct Target {
        T* rows[2];
        int left[2];
    };
    __device__ __forceinline__ Target target(const Unit<ROWS, OUTPUTS, SHARED>& unit) const {
        uint32_t row = unit.first_row + warp * 16 + lane / 4, output = unit.first_output + lane % 2 * 8 + lane % 4 / 2 * 4;
        T* first = static_cast<T*>(product.out) + static_cast<size_t>(row) * product.outputs + output;
        int left = static_cast<int>(product.outputs - output);
        return {{first, first + 8 * static_cast<size_t>(product.outputs)}, {row < product.rows ? left : 0, row + 8 < product.rows ? left : 0}};
    }

    // A lane has two neighbouring results of each of two eights of outputs. From there to four neighbours of one, and back.
    __device__ __forceinline__ uint2 exchanged(uint2 words) const {
        bool is_odd = lane % 2 != 0;
        uint32_t got = __shfl_xor_sync(~0u, is_odd ? words.x : words.y, 1);
        return is_odd ? uint2{got, words.y} : uint2{words.x, got};
    }

    // Writes some sixteens of outputs. Code that runs once a tile takes as long as it is: no instruction cache has it.
    template <int FIRST, int LAST> __device__ __forceinline__ void write(const Unit<ROWS, OUTPUTS, SHARED>& unit) const {
        Target to = target(unit);
        if (product.adds != 0) write<FIRST, LAST, true>(to);
        else write<FIRST, LAST, false>(to);
    }
    template <int FIRST, int LAST, bool ADDS> __device__ __forceinline__ void write(const Target& to) const {
#pragma unroll
        for (int first = FIRST; first < LAST; first += BATCH) {
            uint2 before[BATCH][2] = {};
#pragma unroll
            for (int i = 0; i < BATCH * 2; i++)
                if (ADDS && first + i / 2 < LAST && (first + i / 2) * 16 < to.left[i % 2]) before[i / 2][i % 2] = *place(to, first + i / 2, i % 2);
#pragma unroll
            for (int i = 0; i < BATCH * 2; i++)
                if (first + i / 2 < LAST) write_half<ADDS>(to, first + i / 2, i % 2, before[i / 2][i % 2]);
        }
    }
    static __device__ __forceinline__ uint2* place(const Target& to, int pair, int half) {
        return reinterpret_cast<uint2*>(to.rows[half] + pair * 16);
    }
    template <bool ADDS> __device__ __forceinline__ void write_half(const Target& to, int pair, int half, uint2 before) const {
        uint2 added = ADDS ? exchanged(before) : before;
        uint2 results = exchanged({sum_of<ADDS>(pair * 8 + half * 2, added.x), sum_of<ADDS>(pair * 8 + half * 2 + 4, added.y)});
        if (pair * 16 < to.left[half]) *place(to, pair, half) = results;
    }

    // Writes a tile whose first half goes through the gate.
    __device__ __forceinline__ void write_gated(const Unit<ROWS, OUTPUTS, SHARED>& unit) {
        if (product.gate == Gate::SILU) gate<silu>();
        else gate<gelu>();
        write<0, PAIRS / 2, false>(target(unit));
    }
    template <float (*ACTIVATION)(float)> __device__ __forceinline__ void gate() {
#pragma unroll
        for (int i = 0; i < OUTPUTS / 4; i++) sums[i] = ACTIVATION(sums[i]) * sums[OUTPUTS / 4 + i];
    }
    template <bool ADDS> __device__ __forceinline__ uint32_t sum_of(int first, uint32_t added) const {
        if (!ADDS) return pack<T>(sums[first], sums[first + 1]);
        const T* numbers = reinterpret_cast<const T*>(&added);
        return pack<T>(sums[first] + to_float(numbers[0]), sums[first + 1] + to_float(numbers[1]));
    }

    // Where the sixteens of outputs begin that a split adds up, and whose one is.
    template <int SPLITS> static constexpr __device__ int share(int split) { return PAIRS * split / SPLITS; }
    template <int SPLITS> static constexpr __device__ uint32_t owner(int pair) { return ((pair + 1) * SPLITS - 1) / PAIRS; }

    // Where this thread's sums of a unit are, and how many there are of an eight of outputs, and of a unit.
    static constexpr uint32_t EIGHT = Sizes::CONSUMERS, UNIT = CLUSTER * (OUTPUTS / 8) * EIGHT;
    __device__ __forceinline__ uint4* part(uint32_t index) const {
        return product.parts + index * UNIT + rank * (UNIT / CLUSTER) + threadIdx.x;
    }

    // Leaves what others add up, adds up what they leave.
    template <int SPLITS> __device__ __forceinline__ void exchange(const Unit<ROWS, OUTPUTS, SHARED>& unit, uint32_t index) {
        uint4* to = part(index);
#pragma unroll
        for (int i = 0; i < PAIRS * 2; i++)
            if (owner<SPLITS>(i / 2) != unit.split)
                leave_words(to + i * EIGHT, {marked(sums[i * 4]), marked(sums[i * 4 + 1]), marked(sums[i * 4 + 2]), marked(sums[i * 4 + 3])});
        collect_one<SPLITS, 0>(unit, part(index - unit.split));
    }
    // Registers have no index that is known at run time: each split has code of its own.
    template <int SPLITS, int MINE> __device__ __forceinline__ void collect_one(const Unit<ROWS, OUTPUTS, SHARED>& unit, uint4* first) {
        if (unit.split == MINE) collect<SPLITS, MINE>(unit, first);
        else if constexpr (MINE + 1 < SPLITS) collect_one<SPLITS, MINE + 1>(unit, first);
    }

    template <int SPLITS, int MINE> __device__ __forceinline__ void collect(const Unit<ROWS, OUTPUTS, SHARED>& unit, uint4* first) {
        constexpr int BEGIN = share<SPLITS>(MINE), END = share<SPLITS>(MINE + 1), EIGHTS = 16 / SPLITS;
#pragma unroll
        for (int begin = BEGIN * 2; begin < END * 2; begin += EIGHTS) {
            uint4 words[SPLITS][EIGHTS];
#pragma unroll
            for (int i = 0; i < SPLITS * EIGHTS; i++)
                if (i / EIGHTS != MINE && begin + i % EIGHTS < END * 2)
                    words[i / EIGHTS][i % EIGHTS] = see_words(first + i / EIGHTS * UNIT + (begin + i % EIGHTS) * EIGHT);
#pragma unroll
            for (int k = 0; k < EIGHTS; k++)
                if (begin + k < END * 2) add_up<SPLITS, MINE>(words, k, begin + k, first);
        }
        write<BEGIN, END>(unit);
    }

    // Adds up an eight of outputs in the order of k, waiting for what was not there yet.
    template <int SPLITS, int MINE, int EIGHTS>
    __device__ __forceinline__ void add_up(uint4 (&words)[SPLITS][EIGHTS], int k, int eight, uint4* first) {
        float4 total = {};
#pragma unroll
        for (int split = 0; split < SPLITS; split++) {
            float4 term = {sums[eight * 4], sums[eight * 4 + 1], sums[eight * 4 + 2], sums[eight * 4 + 3]};
            if (split != MINE) term = taken(words[split][k], first + split * UNIT + eight * EIGHT);
            total = {total.x + term.x, total.y + term.y, total.z + term.z, total.w + term.w};
        }
        sums[eight * 4] = total.x, sums[eight * 4 + 1] = total.y, sums[eight * 4 + 2] = total.z, sums[eight * 4 + 3] = total.w;
    }
    __device__ __forceinline__ float4 taken(uint4 words, uint4* from) const {
        while (!is_there(words)) words = see_words(from);
        leave_words(from, uint4{0, 0, 0, 0});
        return {unmarked(words.x), unmarked(words.y), unmarked(words.z), unmarked(words.w)};
    }
};

template <typename T, int ROWS, int OUTPUTS, bool SHARED> __device__ __forceinline__ void split_k(const SplitK& product) {
    extern __shared__ __align__(1024) uint8_t bytes[];
    auto& memory = *reinterpret_cast<Memory<ROWS, OUTPUTS, SHARED>*>(bytes);
    let_next_begin();
    // The compiler has to know that it is the same for all lanes.
    bool asks = __shfl_sync(~0u, threadIdx.x, 0) == Tile<ROWS, OUTPUTS, SHARED>::CONSUMERS;
    Producer<ROWS, OUTPUTS, SHARED> producer(product, memory);
    if (asks) producer.make_barriers();
    // What comes to both blocks needs both blocks' barriers.
    cluster_meet();
    if (asks) {
        producer.run();
    } else {
        wait_for_previous();
        Consumer<T, ROWS, OUTPUTS, SHARED>(product, memory).run();
    }
    __syncwarp();
    // The other block may still arrive at barriers of this one.
    cluster_meet();
}
#define BODY(T, ROWS, OUTPUTS, SHARED) split_k<T, ROWS, OUTPUTS, SHARED>(product)
#else
// For other devices there is the library.
#define BODY(T, ROWS, OUTPUTS, SHARED)
#endif

#define SPLIT_K(name, T, ROWS, OUTPUTS, SHARED)                                                     \
    extern "C" __global__ void __launch_bounds__(Tile<ROWS, OUTPUTS, SHARED>::THREADS, 1)           \
        split_k_##name##_##ROWS##x##OUTPUTS##_##SHARED(const __grid_constant__ SplitK product) {    \
        BODY(T, ROWS, OUTPUTS, SHARED);                                                             \
    }
#define ALL(name, T)                                                                                \
    SPLIT_K(name, T, 64, 32, X) SPLIT_K(name, T, 64, 48, X) SPLIT_K(name, T, 64, 64, X)             \
    SPLIT_K(name, T, 64, 96, X) SPLIT_K(name, T, 64, 128, X) SPLIT_K(name, T, 64, 224, X)           \
    SPLIT_K(name, T, 64, 64, W) SPLIT_K(name, T, 64, 96, W) SPLIT_K(name, T, 64, 128, W)            \
    SPLIT_K(name, T, 128, 64, X) SPLIT_K(name, T, 128, 96, X) SPLIT_K(name, T, 128, 128, X)         \
    SPLIT_K(name, T, 128, 192, X) SPLIT_K(name, T, 128, 224, X) SPLIT_K(name, T, 128, 256, X)       \
    SPLIT_K(name, T, 128, 64, W) SPLIT_K(name, T, 128, 96, W) SPLIT_K(name, T, 128, 128, W)         \
    SPLIT_K(name, T, 128, 192, W) SPLIT_K(name, T, 128, 224, W) SPLIT_K(name, T, 128, 256, W)

ALL(bf16, __nv_bfloat16)
ALL(f16, __half)
