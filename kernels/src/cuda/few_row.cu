// Products of few rows: out[m][n] = sum over k of x[m][k] w[n][k] for at most 16 rows of x, at the speed at which weights arrive.
//
// The weights are the side of 16 of a matrix instruction and x the side of 8, so that even one row leaves the tensor cores idle
// most of the time. An item is a group of 16 weight rows by a chunk of k that x is kept in shared memory for; items lie on a line,
// chunk after chunk, and every block takes an equal piece. Within an item the warps share k: each keeps its own ring of tiles on
// their way, over the ends of items. Blocks that have a chunk each of a group add up in the order of chunks: whoever comes last
// does it, so that results do not depend on who that is.
//
// The order of k within a matrix instruction is free as long as both sides agree: a lane loads 16 bytes of its row at once and
// uses them as the k of two instructions.
#include <cstddef>

#include "common.cuh"

// Weight rows of a group.
constexpr int ROWS = 16;
// Rows of x of one matrix instruction.
constexpr int COLUMNS = 8;
constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
// Numbers of a weight row that a warp takes at once, and that all warps take.
constexpr int TILE = 128;
constexpr int SPAN = WARPS * TILE;
constexpr int ROW_BYTES = TILE * 2;
// Rows of a tile and of x are apart by a multiple of 128 bytes and 64, so that eight lanes on two rows read all banks.
constexpr int APART = 64;
constexpr int TILE_BYTES = ROWS * ROW_BYTES + ROWS / 2 * APART;
// Numbers from one column of a warp's sums to the next: the lanes of a warp write to different banks.
constexpr int PITCH = 20;

struct FewRow {
    const void* x;      // [rows][inputs]
    const void* w;      // [outputs][inputs]
    void* out;          // [rows][outputs]
    float* parts;       // [chunks][rows][groups * ROWS], where there are several chunks
    uint32_t* arrived;  // [groups], 0 before and after
    uint32_t rows;
    uint32_t inputs;    // a multiple of 8
    uint32_t outputs;
    uint32_t steps;     // spans of a chunk
    uint32_t chunks;
    uint32_t adds;      // whether out is added to

    __device__ __forceinline__ uint32_t groups() const { return (outputs + ROWS - 1) / ROWS; }
    // Bytes from one row of x in shared memory to the next.
    __device__ __forceinline__ uint32_t x_pitch() const { return steps * SPAN * 2 + APART; }
};

// `copy_16_if` of what is read once: the second cache need not keep it.
__device__ __forceinline__ void copy_16_once_if(bool is_there, uint32_t to, const void* from, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;"
                 :: "r"(to), "l"(__cvta_generic_to_global(from)), "r"(is_there ? 16 : 0), "l"(policy) : "memory");
}
__device__ __forceinline__ uint64_t evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Where a row of a tile begins.
__device__ __forceinline__ uint32_t row_offset(uint32_t row) { return row * ROW_BYTES + (row + 1) / 2 * APART; }

// A tile of the line: an item's group and chunk, and a span of the chunk.
struct Place {
    uint32_t item;
    uint32_t group;
    uint32_t chunk;
    uint32_t step = 0;

    __device__ __forceinline__ Place(uint32_t item, uint32_t groups) : item(item), group(item % groups), chunk(item / groups) {}
    __device__ __forceinline__ void next_item(uint32_t groups) {
        item++;
        if (++group < groups) return;
        group = 0;
        chunk++;
    }
    __device__ __forceinline__ void next(const FewRow& product, uint32_t groups) {
        if (++step < product.steps) return;
        step = 0;
        next_item(groups);
    }
};

template <int N, int STAGES> struct Shared {
    alignas(128) uint8_t tiles[WARPS][STAGES][TILE_BYTES];
    float sums[2][WARPS][COLUMNS * N][PITCH];
    uint32_t is_last[THREADS];
    alignas(128) uint8_t x[1];  // [rows][x_pitch]

    // What `few_row.rs` counts on.
    static constexpr size_t BESIDE_X = WARPS * STAGES * TILE_BYTES + 2 * WARPS * COLUMNS * N * PITCH * 4 + THREADS * 4;
};

// A block: COLUMNS * N rows of x at most.
template <typename T, int N, int STAGES> struct Worker {
    const FewRow& product;
    Shared<N, STAGES>& shared;
    uint32_t groups, begin, end;
    uint64_t policy = evict_first();
    uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float sums[2][N][4];

    __device__ __forceinline__ Worker(const FewRow& product, Shared<N, STAGES>& shared) : product(product), shared(shared) {
        groups = product.groups();
        uint64_t items = static_cast<uint64_t>(groups) * product.chunks;
        begin = static_cast<uint32_t>(items * blockIdx.x / gridDim.x);
        end = static_cast<uint32_t>(items * (blockIdx.x + 1) / gridDim.x);
    }

    // Asks for this warp's part of a span, or for nothing beyond the block's piece.
    __device__ __forceinline__ void ask(Place& asked, uint32_t stage) {
        if (asked.item < end) {
            uint32_t k = (asked.chunk * product.steps + asked.step) * SPAN + warp * TILE + lane % 16 * 8;
            bool is_there = k < product.inputs;
            const T* from = static_cast<const T*>(product.w) + (is_there ? k : 0);
            uint32_t to = shared_address(shared.tiles[warp][stage]) + lane % 16 * 16;
            uint32_t first = asked.group * ROWS + lane / 16, last = product.outputs - 1;
#pragma unroll
            for (uint32_t row = 0; row < ROWS; row += 2) {
                const T* at = from + static_cast<size_t>(min(first + row, last)) * product.inputs;
                copy_16_once_if(is_there, to + row_offset(row + lane / 16), at, policy);
            }
            asked.next(product, groups);
        }
        commit_copies();
    }

    // Brings a chunk of x. All threads of the block take part; nobody reads x meanwhile.
    __device__ __forceinline__ void load_x(uint32_t chunk) {
        uint32_t first = chunk * product.steps * SPAN;
        for (uint32_t row = 0; row < product.rows; row++) {
            const T* from = static_cast<const T*>(product.x) + static_cast<size_t>(row) * product.inputs;
            uint32_t to = shared_address(shared.x) + row * product.x_pitch();
            for (uint32_t k = threadIdx.x * 8; k < product.steps * SPAN; k += THREADS * 8) {
                bool is_there = first + k < product.inputs;
                copy_16_if(is_there, to + k * 2, from + (is_there ? first + k : 0));
            }
        }
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
    }

    // sums += tile times x. Columns beyond the rows of x repeat the last one; nobody looks at them.
    __device__ __forceinline__ void multiply_tile(uint32_t stage, uint32_t step) {
        uint32_t low = shared_address(shared.tiles[warp][stage]) + row_offset(lane / 4) + lane % 4 * 16;
        uint32_t high = low + row_offset(8);
        uint32_t x[N];
#pragma unroll
        for (int n = 0; n < N; n++) {
            uint32_t column = min(n * COLUMNS + lane / 4, product.rows - 1);
            x[n] = shared_address(shared.x) + column * product.x_pitch() + (step * SPAN + warp * TILE) * 2 + lane % 4 * 16;
        }
#pragma unroll
        for (uint32_t byte = 0; byte < ROW_BYTES; byte += 64) {
            uint4 upper = load_shared(low + byte), lower = load_shared(high + byte);
            const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y}, second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
            for (int n = 0; n < N; n++) {
                uint4 b = load_shared(x[n] + byte);
                multiply<T>(sums[0][n], first, b.x, b.y);
                multiply<T>(sums[1][n], second, b.z, b.w);
            }
        }
    }

    // Where a result is; whether it is one.
    struct Result {
        uint32_t column, row;
        bool is_there;
        size_t index;
    };
    // The `i`th result of an item that this thread writes.
    __device__ __forceinline__ Result result(const Place& place, int i) {
        uint32_t at = threadIdx.x + i * THREADS, column = at / ROWS, row = at % ROWS, output = place.group * ROWS + row;
        bool is_there = column < product.rows && output < product.outputs;
        return {column, row, is_there, static_cast<size_t>(column) * product.outputs + output};
    }
    __device__ __forceinline__ float* part(uint32_t chunk, uint32_t column, uint32_t group) {
        return product.parts + (static_cast<size_t>(chunk) * product.rows + column) * groups * ROWS + group * ROWS;
    }

    // What is added to, asked for before the product is there.
    __device__ __forceinline__ void load_before(const Place& place, float (&before)[N]) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            Result to = result(place, i);
            bool is_read = product.adds != 0 && product.chunks == 1 && to.is_there;
            before[i] = is_read ? to_float(static_cast<const T*>(product.out)[to.index]) : 0;
        }
    }

    // Adds up what the warps have. `which` alternates, so that the sums of one item are read while those of the next are written.
    __device__ __forceinline__ void write(const Place& place, uint32_t which, const float (&before)[N]) {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                shared.sums[which][warp][n * COLUMNS + lane % 4 * 2 + i % 2][lane / 4 + i / 2 * 8] = sums[0][n][i] + sums[1][n][i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < N; i++) {
            Result to = result(place, i);
            if (to.column >= product.rows) continue;
            float sum = before[i];
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += shared.sums[which][w][to.column][to.row];
            if (product.chunks > 1) part(place.chunk, to.column, place.group)[to.row] = sum;
            else if (to.is_there) static_cast<T*>(product.out)[to.index] = from_float<T>(sum);
        }
    }

    __device__ __forceinline__ void run() {
        Place asked(begin, groups), place(begin, groups);
#pragma unroll
        for (int stage = 0; stage < STAGES; stage++) ask(asked, stage);
        wait_for_previous();
        load_x(place.chunk);
        uint32_t stage = 0, chunk = place.chunk;
        for (; place.item < end; place.next_item(groups)) {
            if (place.chunk != chunk) {
                chunk = place.chunk;
                __syncthreads();
                load_x(chunk);
            }
            float before[N];
            load_before(place, before);
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) sums[0][n][i] = sums[1][n][i] = 0;
            for (uint32_t step = 0; step < product.steps; step++) {
                wait_for_copies<STAGES - 1>();
                __syncwarp();
                multiply_tile(stage, step);
                __syncwarp();
                ask(asked, stage);
                stage = (stage + 1) % STAGES;
            }
            write(place, place.item % 2, before);
        }
    }

    // Adds up the chunks of the groups that this block is the last to have worked on.
    __device__ __forceinline__ void finish() {
        __threadfence();
        for (uint32_t from = begin; from < end; from += THREADS) {
            __syncthreads();
            uint32_t item = from + threadIdx.x;
            bool is_last = item < end && atomicAdd(&product.arrived[item % groups], 1) == product.chunks - 1;
            if (is_last) product.arrived[item % groups] = 0;
            __threadfence();
            shared.is_last[threadIdx.x] = is_last;
            __syncthreads();
            uint32_t fours = product.rows * (ROWS / 4), count = min(end - from, THREADS) * fours;
            for (uint32_t at = threadIdx.x; at < count; at += THREADS)
                if (shared.is_last[at / fours]) add_up((from + at / fours) % groups, at % fours / 4, at % 4 * 4);
        }
    }

    // Four results of a group. What other blocks wrote is not in this multiprocessor's cache.
    __device__ __forceinline__ void add_up(uint32_t group, uint32_t column, uint32_t row) {
        float sum[4] = {};
#pragma unroll 4
        for (uint32_t chunk = 0; chunk < product.chunks; chunk++) {
            float4 values = __ldcg(reinterpret_cast<const float4*>(part(chunk, column, group) + row));
            sum[0] += values.x;
            sum[1] += values.y;
            sum[2] += values.z;
            sum[3] += values.w;
        }
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t output = group * ROWS + row + i;
            if (output >= product.outputs) return;
            T* to = static_cast<T*>(product.out) + static_cast<size_t>(column) * product.outputs + output;
            *to = from_float<T>(product.adds != 0 ? to_float(*to) + sum[i] : sum[i]);
        }
    }
};

template <typename T, int N, int STAGES> __device__ __forceinline__ void few_row(const FewRow& product) {
    extern __shared__ __align__(128) uint8_t memory[];
    using Block = Shared<N, STAGES>;
    static_assert(offsetof(Block, x) == Block::BESIDE_X);
    let_next_begin();
    Worker<T, N, STAGES> worker(product, *reinterpret_cast<Block*>(memory));
    worker.run();
    if (product.chunks > 1) worker.finish();
}

#define FEW_ROW(name, T, N, STAGES)                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) few_row_##name(const __grid_constant__ FewRow product) { \
        few_row<T, N, STAGES>(product);                                                                       \
    }

FEW_ROW(bf16_8_4, __nv_bfloat16, 1, 4)
FEW_ROW(bf16_16_4, __nv_bfloat16, 2, 4)
FEW_ROW(bf16_8_2, __nv_bfloat16, 1, 2)
FEW_ROW(bf16_16_2, __nv_bfloat16, 2, 2)
FEW_ROW(f16_8_4, __half, 1, 4)
FEW_ROW(f16_16_4, __half, 2, 4)
FEW_ROW(f16_8_2, __half, 1, 2)
FEW_ROW(f16_16_2, __half, 2, 2)
