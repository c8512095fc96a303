// Products of up to some hundred rows for sm_90a: out[m][n] = sum over k of x[m][k] w[n][k], at the speed at which weights
// arrive. The line of all tiles' steps of k is cut into equal pieces, one a cluster: stream-K (Osama et al., arXiv 2301.03598).
//
// Weights are the side of 64 of the matrix instruction and rows of x the other, so that a tile has all rows (up to 256) and weights
// are read once. The two blocks of a cluster have neighbouring tiles of outputs and the same steps: each asks for its weights and
// for half of x, which comes to both. One warp asks, two warpgroups multiply. The weights of the first stages are asked for before
// the launch before this one has ended.
//
// A tile of several clusters: each leaves its sums in memory (they stay in the second cache) and adds up an equal share of what all
// leave, in the order of k, so that results do not depend on who is first. A word that is not there yet is 0: whoever reads a sum
// waits for it and puts the 0 back, so that nobody has to fence or count. A cluster leaves all its sums before it waits for others',
// and the grid is no larger than what the device runs at once, so that nobody waits for ever.
#include "common.cuh"

constexpr int WARPGROUP = 128;

// A `CUtensorMap`.
struct alignas(128) TensorMap {
    uint64_t words[16];
};

struct StreamK {
    TensorMap w;       // [outputs][inputs] in boxes of [OUTPUTS][DEPTH]
    TensorMap x;       // [rows][inputs] in boxes of [N / CLUSTER][DEPTH]
    void* out;         // [rows][outputs]
    uint4* parts;      // [blocks][2][N / 8][CONSUMERS], 0 before and after
    uint32_t rows;
    uint32_t outputs;  // a multiple of 8
    uint32_t steps;    // of a tile
    uint32_t columns;  // tiles that the rows are cut into, of N each
    uint32_t tiles;    // of a cluster: CLUSTER * OUTPUTS outputs by N rows
    uint32_t adds;     // whether out is added to
};

// Tiles of N rows: their outputs, and stages of w and of x.
template <int N> struct Tile;
template <> struct Tile<32> { static constexpr int OUTPUTS = 128, W = 8, X = 8; };
template <> struct Tile<64> { static constexpr int OUTPUTS = 128, W = 8, X = 8; };
template <> struct Tile<96> { static constexpr int OUTPUTS = 128, W = 8, X = 7; };
template <> struct Tile<128> { static constexpr int OUTPUTS = 128, W = 7, X = 6; };
template <> struct Tile<192> { static constexpr int OUTPUTS = 128, W = 6, X = 5; };
template <> struct Tile<256> { static constexpr int OUTPUTS = 128, W = 6, X = 4; };
template <int N> constexpr int CONSUMERS = Tile<N>::OUTPUTS / 64 * WARPGROUP;
template <int N> constexpr int THREADS = CONSUMERS<N> + WARP;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "warpgroup.cuh"

constexpr int CLUSTER = 2;
// The k of a step: a row of 128 bytes.
constexpr int DEPTH = 64;
constexpr int ROW_BYTES = DEPTH * 2;

template <int N> struct Memory {
    static constexpr int W_STAGES = Tile<N>::W, X_STAGES = Tile<N>::X;
    alignas(1024) uint8_t w[W_STAGES][Tile<N>::OUTPUTS * ROW_BYTES];
    alignas(1024) uint8_t x[X_STAGES][N * ROW_BYTES];
    uint64_t w_full[W_STAGES];
    uint64_t x_full[X_STAGES];
    // Of w; what frees a stage of w frees that of x too.
    uint64_t free[W_STAGES];
};

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

// The cut of the line into pieces of clusters. The host has checked that the products fit; divisions of 64 bits take a microsecond.
struct Line {
    uint32_t steps, total, clusters;

    __device__ __forceinline__ explicit Line(const StreamK& product)
        : steps(product.steps), total(product.tiles * product.steps), clusters(gridDim.x / CLUSTER) {}
    __device__ __forceinline__ uint32_t begin(uint32_t cluster) const { return total * cluster / clusters; }
    __device__ __forceinline__ uint32_t owner(uint32_t step) const { return ((step + 1) * clusters - 1) / total; }
};

// A step of the line.
struct Place {
    uint32_t tile, step;

    __device__ __forceinline__ Place(uint32_t at, uint32_t steps) : tile(at / steps), step(at % steps) {}
    __device__ __forceinline__ void next(uint32_t steps) {
        if (++step < steps) return;
        step = 0;
        tile++;
    }
};

struct Stage {
    uint32_t index = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next(uint32_t stages) {
        if (++index < stages) return;
        index = 0;
        parity ^= 1;
    }
};

// A block's share of its cluster's piece.
template <typename T, int N> struct Worker {
    static constexpr uint32_t W_STAGES = Tile<N>::W, X_STAGES = Tile<N>::X, OUTPUTS = Tile<N>::OUTPUTS;
    static constexpr uint32_t W_BYTES = OUTPUTS * ROW_BYTES, X_BYTES = N * ROW_BYTES;

    const StreamK& product;
    Memory<N>& memory;
    Line line;
    uint32_t rank = cluster_rank(), cluster = blockIdx.x / CLUSTER;
    uint32_t begin, end;

    __device__ __forceinline__ Worker(const StreamK& product, Memory<N>& memory) : product(product), memory(memory), line(product) {
        begin = line.begin(cluster);
        end = line.begin(cluster + 1);
    }

    // Where a tile of the line begins.
    __device__ __forceinline__ uint32_t first_output(uint32_t tile) const { return (tile / product.columns * CLUSTER + rank) * OUTPUTS; }
    __device__ __forceinline__ uint32_t first_row(uint32_t tile) const { return tile % product.columns * N; }
};

// The thread that asks.
template <typename T, int N> struct Producer : Worker<T, N> {
    using Base = Worker<T, N>;
    using Base::begin, Base::end, Base::line, Base::memory, Base::product, Base::rank;
    static constexpr uint32_t W_STAGES = Base::W_STAGES, X_STAGES = Base::X_STAGES;
    static_assert(W_STAGES >= X_STAGES);
    uint32_t count = end - begin;
    Place w{begin, line.steps}, x{begin, line.steps};

    __device__ __forceinline__ Producer(const StreamK& product, Memory<N>& memory) : Base(product, memory) {}

    __device__ __forceinline__ void make_barriers() {
        for (auto& barrier : memory.w_full) barrier_init(shared_address(&barrier), 1);
        for (auto& barrier : memory.x_full) barrier_init(shared_address(&barrier), 1);
        for (auto& barrier : memory.free) barrier_init(shared_address(&barrier), CLUSTER * CONSUMERS<N> / WARP);
        barriers_fence();
    }

    __device__ __forceinline__ void ask_w(uint32_t stage) {
        uint32_t full = shared_address(&memory.w_full[stage]);
        barrier_expect(full, Base::W_BYTES);
        box_copy<EVICT_FIRST>(shared_address(memory.w[stage]), product.w, w.step * DEPTH, Base::first_output(w.tile), full);
        w.next(line.steps);
    }

    // This block's half of the rows, for both.
    __device__ __forceinline__ void ask_x(uint32_t stage) {
        uint32_t full = shared_address(&memory.x_full[stage]);
        barrier_expect(full, Base::X_BYTES);
        box_copy_to_all<EVICT_NORMAL>(shared_address(memory.x[stage]) + rank * Base::X_BYTES / CLUSTER, product.x, x.step * DEPTH,
                                      Base::first_row(x.tile) + rank * N / CLUSTER, full);
        x.next(line.steps);
    }

    // What does not depend on the launch before.
    __device__ __forceinline__ void begin_weights() {
        for (uint32_t i = 0; i < min(count, W_STAGES); i++) ask_w(i);
    }

    __device__ __forceinline__ void run() {
        for (uint32_t i = 0; i < min(count, X_STAGES); i++) ask_x(i);
        for (uint32_t i = 0; i + X_STAGES < count; i++) {
            barrier_wait(shared_address(&memory.free[i % W_STAGES]), i / W_STAGES % 2);
            ask_x(i % X_STAGES);
            if (i + W_STAGES < count) ask_w(i % W_STAGES);
        }
    }
};

// The warpgroups that multiply: 64 outputs each.
template <typename T, int N> struct Consumer : Worker<T, N> {
    using Base = Worker<T, N>;
    using Base::begin, Base::cluster, Base::end, Base::line, Base::memory, Base::product, Base::rank;
    // Groups of eight rows of a share that are added up at a time, and parts.
    static constexpr uint32_t EIGHTS = N < 128 ? N / 32 : 4, PARTS = 4;

    uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    Stage w, x;
    float sums[N / 2];

    __device__ __forceinline__ Consumer(const StreamK& product, Memory<N>& memory) : Base(product, memory) {}

    __device__ __forceinline__ void run() {
        for (uint32_t step = begin; step < end;) {
            uint32_t tile = step / line.steps, next = min((tile + 1) * line.steps, end);
            bool is_whole = next - step == line.steps;
            multiply(next - step);
            step = next;
            if (is_whole) write(tile);
            else leave(tile);
        }
        uint32_t first = begin / line.steps, last = (end - 1) / line.steps;
        if (is_shared(first)) add_up(first);
        if (last != first && is_shared(last)) add_up(last);
    }

    __device__ __forceinline__ bool is_shared(uint32_t tile) { return tile * line.steps < begin || (tile + 1) * line.steps > end; }

    // The sums of the next `count` steps.
    __device__ __forceinline__ void multiply(uint32_t count) {
        uint32_t before = 0;
        for (uint32_t i = 0; i < count; i++) {
            barrier_wait(shared_address(&memory.w_full[w.index]), w.parity);
            barrier_wait(shared_address(&memory.x_full[x.index]), x.parity);
            uint32_t weights = shared_address(memory.w[w.index]) + warp / 4 * 64 * ROW_BYTES, rows = shared_address(memory.x[x.index]);
            products_begin();
#pragma unroll
            for (int k = 0; k < DEPTH; k += 16)
                multiply_shared<N, T>(sums, operand(weights + k * 2, 0, 8 * ROW_BYTES), operand(rows + k * 2, 0, 8 * ROW_BYTES), i + k);
            products_commit();
            if (i > 0) {
                products_wait<1>();
                release(before);
            }
            before = w.index;
            w.next(Base::W_STAGES);
            x.next(Base::X_STAGES);
        }
        products_wait<0>();
        settle(sums);
        release(before);
    }

    // Both blocks must have used a stage: x comes to both at once.
    __device__ __forceinline__ void release(uint32_t stage) {
        __syncwarp();
        if (lane < CLUSTER) barrier_arrive_at(shared_address(&memory.free[stage]), lane);
    }

    // Groups of eight rows of a tile.
    __device__ __forceinline__ uint32_t eights(uint32_t tile) const { return (min(product.rows - Base::first_row(tile), N) + 7) / 8; }

    // Where two results of a row are, of the `half`th eight of a warp's sixteen outputs; none beyond the matrix.
    __device__ __forceinline__ uint32_t* place(uint32_t tile, uint32_t eight, uint32_t half) const {
        uint32_t row = Base::first_row(tile) + eight * 8 + lane / 4, output = Base::first_output(tile) + warp * 16 + half * 8 + lane % 4 * 2;
        if (row >= product.rows || output >= product.outputs) return nullptr;
        return reinterpret_cast<uint32_t*>(static_cast<T*>(product.out) + static_cast<size_t>(row) * product.outputs + output);
    }

    // What results are added to.
    __device__ __forceinline__ uint2 load_before(uint32_t tile, uint32_t eight) const {
        const uint32_t *low = place(tile, eight, 0), *high = place(tile, eight, 1);
        bool adds = product.adds != 0;
        return {adds && low != nullptr ? *low : 0, adds && high != nullptr ? *high : 0};
    }

    // Writes results of eight rows. Outputs by rows become rows by outputs, and what is added the other way round.
    __device__ __forceinline__ void write(uint32_t tile, uint32_t eight, float4 values, uint2 before) {
        write_half(place(tile, eight, 0), values.x, values.y, before.x);
        write_half(place(tile, eight, 1), values.z, values.w, before.y);
    }
    __device__ __forceinline__ void write_half(uint32_t* to, float first, float second, uint32_t before) {
        uint32_t turned = transposed(before);
        const T* added = reinterpret_cast<const T*>(&turned);
        uint32_t result = transposed(pack<T>(first + to_float(added[0]), second + to_float(added[1])));
        if (to != nullptr) *to = result;
    }

    // Writes a tile that is this cluster's alone.
    __device__ __forceinline__ void write(uint32_t tile) {
#pragma unroll
        for (int i = 0; i < N / 8; i++) write(tile, i, sums_of(i), load_before(tile, i));
    }
    __device__ __forceinline__ float4 sums_of(int eight) const {
        return {sums[eight * 4], sums[eight * 4 + 1], sums[eight * 4 + 2], sums[eight * 4 + 3]};
    }

    // Where this thread's sums of a cluster's part of a tile are, every CONSUMERS. A piece shares two tiles at most: its first,
    // which another has begun, and its last.
    __device__ __forceinline__ uint4* part(uint32_t cluster, bool is_begun) const {
        size_t index = (cluster * CLUSTER + rank) * 2 + is_begun;
        return product.parts + index * (N / 8 * CONSUMERS<N>) + threadIdx.x;
    }

    // Leaves the sums for those who have other parts of the tile.
    __device__ __forceinline__ void leave(uint32_t tile) {
        uint4* to = part(cluster, tile * line.steps < begin);
        uint32_t count = eights(tile);
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            uint4 words = {marked(sums[i * 4]), marked(sums[i * 4 + 1]), marked(sums[i * 4 + 2]), marked(sums[i * 4 + 3])};
            if (i < count) leave_words(to + i * CONSUMERS<N>, words);
        }
    }

    // Adds up this block's share of a tile of several clusters.
    __device__ __forceinline__ void add_up(uint32_t tile) {
        uint32_t first = line.owner(tile * line.steps), count = line.owner((tile + 1) * line.steps - 1) - first + 1;
        uint32_t all = eights(tile), index = cluster - first, end = all * (index + 1) / count;
        for (uint32_t eight = all * index / count; eight < end; eight += EIGHTS) {
            uint2 before[EIGHTS];
            float4 totals[EIGHTS] = {};
#pragma unroll
            for (uint32_t k = 0; k < EIGHTS; k++) before[k] = load_before(tile, eight + k);
            for (uint32_t i = 0; i < count; i += PARTS) add_parts(totals, eight, end, first + i, count - i, i == 0);
#pragma unroll
            for (uint32_t k = 0; k < EIGHTS; k++)
                if (eight + k < end) write(tile, eight + k, totals[k], before[k]);
        }
    }

    // Adds some clusters' parts of some groups of a share. All are asked for before the first is waited for.
    __device__ __forceinline__ void add_parts(float4 (&totals)[EIGHTS], uint32_t eight, uint32_t end, uint32_t first, uint32_t count,
                                              bool has_begun) {
        uint4 words[PARTS][EIGHTS];
#pragma unroll
        for (uint32_t i = 0; i < PARTS; i++)
#pragma unroll
            for (uint32_t k = 0; k < EIGHTS; k++)
                words[i][k] = see_words(part(first + min(i, count - 1), i > 0 && count > 1 || !has_begun) + min(eight + k, end - 1) * CONSUMERS<N>);
#pragma unroll
        for (uint32_t i = 0; i < PARTS; i++)
#pragma unroll
            for (uint32_t k = 0; k < EIGHTS; k++)
                if (i < count && eight + k < end) add(totals[k], words[i][k], part(first + i, i > 0 || !has_begun) + (eight + k) * CONSUMERS<N>);
    }

    // Adds sums that were seen; waits for them if they were not there yet.
    __device__ __forceinline__ void add(float4& total, uint4 words, uint4* from) {
        while (!is_there(words)) words = see_words(from);
        leave_words(from, uint4{0, 0, 0, 0});
        total.x += unmarked(words.x);
        total.y += unmarked(words.y);
        total.z += unmarked(words.z);
        total.w += unmarked(words.w);
    }
};

template <typename T, int N> __device__ __forceinline__ void stream_k(const StreamK& product) {
    extern __shared__ __align__(1024) uint8_t bytes[];
    auto& memory = *reinterpret_cast<Memory<N>*>(bytes);
    bool asks = threadIdx.x == CONSUMERS<N>;
    let_next_begin();
    Producer<T, N> producer(product, memory);
    if (asks) {
        producer.make_barriers();
        producer.begin_weights();
    }
    __syncwarp();
    cluster_meet();
    wait_for_previous();
    if (threadIdx.x < CONSUMERS<N>) Consumer<T, N>(product, memory).run();
    else if (asks) producer.run();
    __syncwarp();
    // The other block may still arrive at barriers of this one.
    cluster_meet();
}
#define BODY(T, N) stream_k<T, N>(product)
#else
// For other devices there is the library.
#define BODY(T, N)
#endif

#define STREAM_K(name, T, N)                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS<N>, 1)                         \
        stream_k_##name##_##N(const __grid_constant__ StreamK product) {                \
        BODY(T, N);                                                                     \
    }
#define STREAM_KS(name, T) \
    STREAM_K(name, T, 32) STREAM_K(name, T, 64) STREAM_K(name, T, 96) STREAM_K(name, T, 128) STREAM_K(name, T, 192) STREAM_K(name, T, 256)

STREAM_KS(bf16, __nv_bfloat16)
STREAM_KS(f16, __half)
