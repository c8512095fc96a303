// Decode attention to what sequences share: groups of consecutive sequences begin with the same blocks, which are read once for
// all of them (Juravsky et al., "Hydragen", arXiv 2402.05099). The query heads of a group that share a KV head are rows of one
// product. What is left of each sequence is paged_decode's, which adds these parts to its own.
//
// The work of a launch is a line of tiles: group after group, KV head after KV head, 64 rows after 64 rows. Every block has an
// equal piece of the line; rows that lie across pieces are put together by a second launch, a warp a row: whoever of a few blocks
// comes last would have to add 64 rows alone.
#include "row_tile.cuh"
#include "sequences.cuh"
#include "shared_prefix.cuh"

// Pieces that a group's rows may lie across: a lane has one when they are put together.
constexpr uint32_t MOST_PARTS = WARP;
// Tiles of a piece at least: a part is as large as a tile.
constexpr uint32_t LEAST_TILES = 4;

// A sequence has one token.
struct SharedPrefix : Attention {
    const uint32_t* lengths;  // [sequences], the query's own position included
    const uint32_t* begins;   // [groups + 1], the sequences where groups begin
    const uint32_t* blocks;   // [groups], that its sequences share
    uint32_t groups;
    uint32_t sequences;
    float* parts;             // [2 grid][64][D + 2]
    uint2* across;            // [sequences][heads], the piece where a row begins and how many it lies across
    PrefixParts results;
};

// Rows of a unit, of which only some positions were seen.
template <int D> struct alignas(16) Part {
    float values[ROWS][D];
    float2 sums[ROWS];
};

// A group of sequences.
struct Group {
    uint32_t begin;
    uint32_t count;
    uint32_t length;  // positions that are shared

    __device__ __forceinline__ Group(const SharedPrefix& prefix, uint32_t index) {
        begin = min(prefix.begins[index], prefix.sequences);
        uint32_t end = min(prefix.begins[index + 1], prefix.sequences);
        count = end > begin ? end - begin : 0;
        length = count == 0 ? 0 : min(prefix.blocks[index], prefix.table_width) * prefix.arena.block_size;
    }
    __device__ __forceinline__ uint32_t rows(const SharedPrefix& prefix) const { return count * prefix.group; }
    __device__ __forceinline__ uint32_t tiles(uint32_t positions) const { return (length + positions - 1) / positions; }
    // Tiles of 64 rows of all KV heads.
    __device__ __forceinline__ uint32_t units(const SharedPrefix& prefix) const {
        return (rows(prefix) + ROWS - 1) / ROWS * prefix.arena.kv_heads;
    }
};

template <typename KV, int D> struct Memory {
    Tiles<KV, D> tiles;
    uint32_t scratch[WARP];
    uint32_t most_tiles;
    uint32_t before[1];  // [groups + 1], items
};

// 64 rows of one group and KV head, and the tiles of the line that are theirs.
struct Unit {
    Group group;
    uint32_t head;
    uint32_t first_row;
    uint32_t first_item;
    uint32_t tiles;

    __device__ __forceinline__ Unit(const SharedPrefix& prefix, const uint32_t* before, uint32_t item, uint32_t positions)
        : Unit(prefix, before, item, positions, sequence_of(before, prefix.groups, item)) {}
    __device__ __forceinline__ Unit(const SharedPrefix& prefix, const uint32_t* before, uint32_t item, uint32_t positions, uint32_t index)
        : group(prefix, index) {
        uint32_t offset = item - before[index];
        tiles = group.tiles(positions);
        uint32_t unit = offset / tiles;
        first_item = item - offset % tiles;
        head = unit % prefix.arena.kv_heads;
        first_row = unit / prefix.arena.kv_heads * ROWS;
    }
    __device__ __forceinline__ uint32_t sequence(const SharedPrefix& prefix, uint32_t row) const {
        return group.begin + (first_row + row) / prefix.group;
    }
    __device__ __forceinline__ uint32_t rows(const SharedPrefix& prefix) const {
        return min(group.rows(prefix) - first_row, static_cast<uint32_t>(ROWS));
    }
    // The query head among all sequences' heads that a row is.
    __device__ __forceinline__ size_t place(const SharedPrefix& prefix, uint32_t row) const {
        size_t heads = prefix.arena.kv_heads * prefix.group;
        return sequence(prefix, row) * heads + head * prefix.group + (first_row + row) % prefix.group;
    }
};

// Into how many pieces the line is cut: rows of `most_tiles` lie across two more than whole pieces fit into them, and no more than
// are put together, however short the shortest piece is.
__device__ __forceinline__ uint32_t count_pieces(uint32_t items, uint32_t most_tiles) {
    uint32_t least = max(LEAST_TILES, (most_tiles + MOST_PARTS - 3) / (MOST_PARTS - 2));
    return min(gridDim.x, max(1u, items / least));
}

// Attends with a unit's rows to the positions of `count` tiles from its `first` on.
template <typename T, typename KV, int D>
__device__ __forceinline__ void attend_unit(RowTile<T, KV, D>& tile, const SharedPrefix& prefix, const Unit& unit, const T* queries, uint32_t first, uint32_t count) {
    const T* from[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        bool is_row = tile.row(i) < unit.rows(prefix);
        uint32_t length = is_row ? prefix.lengths[unit.sequence(prefix, tile.row(i))] : 0;
        from[i] = is_row ? queries + unit.place(prefix, tile.row(i)) * D : nullptr;
        tile.sights[i] = Sight::up_to(min(length, prefix.table_width * prefix.arena.block_size), prefix.window);
        tile.sights[i].to = min(tile.sights[i].to, unit.group.length);
    }
    tile.begin(from);
    Pages pages{prefix.arena, prefix.tables + static_cast<size_t>(unit.group.begin) * prefix.table_width, prefix.layer, unit.head};
    float scale = prefix.scale * Layout<KV, D>::scale(prefix.arena, prefix.layer, 0, unit.head);
    uint32_t to = min((first + count) * tile.N, unit.group.length);
    tile.attend(pages, first * tile.N, to, scale, prefix.soft_cap);
}

// Whether groups follow each other. Those that overlap would be more work than can be counted.
__device__ __forceinline__ bool is_ascending(const SharedPrefix& prefix) {
    bool is = true;
    for (uint32_t g = threadIdx.x; g < prefix.groups; g += blockDim.x) is &= prefix.begins[g] <= prefix.begins[g + 1];
    return __syncthreads_and(is);
}

// Says how much each sequence shares. One block does it.
__device__ void tell_lengths(const SharedPrefix& prefix, uint32_t groups) {
    for (uint32_t s = threadIdx.x; s < prefix.sequences; s += blockDim.x) prefix.results.lengths[s] = 0;
    __syncthreads();
    for (uint32_t g = 0; g < groups; g++) {
        Group group(prefix, g);
        for (uint32_t s = threadIdx.x; s < group.count; s += blockDim.x) prefix.results.lengths[group.begin + s] = group.length;
    }
}

// Where the part of a piece is: of rows that begin in it, or of rows that began before.
__device__ __forceinline__ uint32_t part_of(uint32_t piece, bool has_begin) { return 2 * piece + has_begin; }

// Writes a unit's rows: whole, or what this piece knows of them.
template <int D, typename TILE>
__device__ __forceinline__ void write(const TILE& tile, const SharedPrefix& prefix, const Unit& unit, const Pieces& line, float v_scale) {
    uint32_t begin = line.begin(blockIdx.x), end = line.begin(blockIdx.x + 1);
    uint32_t from = line.of(unit.first_item), last = line.of(unit.first_item + unit.tiles - 1);
    bool has_begin = unit.first_item >= begin, is_whole = has_begin && unit.first_item + unit.tiles <= end;
    Part<D>& part = reinterpret_cast<Part<D>*>(prefix.parts)[part_of(blockIdx.x, has_begin)];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t row = tile.row(i);
        if (row >= unit.rows(prefix)) continue;
        size_t place = unit.place(prefix, row);
        tile.write(i, is_whole ? prefix.results.values + place * D : part.values[row], v_scale);
        (is_whole ? prefix.results.sums[place] : part.sums[row]) = {tile.most[i], tile.sum[i]};
        if (has_begin) prefix.across[place] = {from * ROWS + row, last - from + 1};
    }
}

template <typename T, typename KV, int D> __device__ __forceinline__ void shared_prefix(const SharedPrefix& prefix) {
    extern __shared__ __align__(1024) uint8_t bytes[];
    wait_for_previous();
    auto& memory = *reinterpret_cast<Memory<KV, D>*>(bytes);
    constexpr uint32_t N = Tiles<KV, D>::POSITIONS;
    bool has_groups = is_ascending(prefix);
    if (blockIdx.x == gridDim.x - 1) tell_lengths(prefix, has_groups ? prefix.groups : 0);
    if (!has_groups) return;
    if (threadIdx.x == 0) memory.most_tiles = 0;
    __syncthreads();
    sum_before(prefix.groups, memory.before, memory.scratch, [&](uint32_t g) {
        Group group(prefix, g);
        atomicMax(&memory.most_tiles, group.tiles(N));
        return group.tiles(N) * group.units(prefix);
    });
    uint32_t items = memory.before[prefix.groups], count = count_pieces(items, memory.most_tiles);
    if (blockIdx.x >= count) return;
    Pieces line(items, count);
    uint32_t begin = line.begin(blockIdx.x), end = line.begin(blockIdx.x + 1);
    for (uint32_t item = begin; item < end;) {
        Unit unit(prefix, memory.before, item, N);
        uint32_t first = item - unit.first_item, tiles = min(unit.tiles - first, end - item);
        RowTile<T, KV, D> tile(memory.tiles);
        attend_unit(tile, prefix, unit, static_cast<const T*>(prefix.queries), first, tiles);
        write<D>(tile, prefix, unit, line, Layout<KV, D>::scale(prefix.arena, prefix.layer, 1, unit.head));
        item += tiles;
    }
}

// Puts the parts of rows that lie across pieces together, a warp a row.
template <int D> __device__ __forceinline__ void merge(const SharedPrefix& prefix) {
    wait_for_previous();
    uint32_t lane = threadIdx.x % WARP, heads = prefix.arena.kv_heads * prefix.group;
    uint32_t row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, sequence = row / heads;
    if (sequence >= prefix.sequences || prefix.results.lengths[sequence] == 0) return;
    uint2 across = prefix.across[row];
    uint32_t from = across.x / ROWS, own = across.x % ROWS, count = across.y;
    if (count == 1) return;
    const Part<D>* parts = reinterpret_cast<const Part<D>*>(prefix.parts);
    auto part = [&](uint32_t i) { return &parts[part_of(from + i, i == 0)]; };
    float2 sums = lane < count ? part(lane)->sums[own] : float2{-INFINITY, 0};
    float most = sums.x;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    float factor = most == -INFINITY ? 0 : exp2_fast(sums.x - most), sum = factor * sums.y;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) prefix.results.sums[row] = {most, sum};
#pragma unroll
    for (uint32_t dim = lane * 4; dim < (D + 127) / 128 * 128; dim += WARP * 4) {
        float4 total = {0, 0, 0, 0};
#pragma unroll 8
        for (uint32_t i = 0; i < count; i++) {
            float of_part = __shfl_sync(~0u, factor, i);
            if (dim >= D) continue;
            float4 value = *reinterpret_cast<const float4*>(&part(i)->values[own][dim]);
            total.x += of_part * value.x;
            total.y += of_part * value.y;
            total.z += of_part * value.z;
            total.w += of_part * value.w;
        }
        if (dim < D) *reinterpret_cast<float4*>(prefix.results.values + static_cast<size_t>(row) * D + dim) = total;
    }
}

#define PREFIX(name, T, KV, D)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                            \
        shared_prefix_##name##_##D(const __grid_constant__ SharedPrefix prefix) {                                    \
        shared_prefix<T, KV, D>(prefix);                                                                             \
    }
#define PREFIXES(name, T, KV) PREFIX(name, T, KV, 64) PREFIX(name, T, KV, 96) PREFIX(name, T, KV, 128) PREFIX(name, T, KV, 256)

PREFIXES(bf16, __nv_bfloat16, __nv_bfloat16)
PREFIXES(bf16_e4m3, __nv_bfloat16, E4m3)
PREFIXES(f16, __half, __half)
PREFIXES(f16_e4m3, __half, E4m3)

#define MERGE(D) \
    extern "C" __global__ void __launch_bounds__(THREADS) merge_prefixes_##D(const __grid_constant__ SharedPrefix prefix) { merge<D>(prefix); }

MERGE(64)
MERGE(96)
MERGE(128)
MERGE(256)
