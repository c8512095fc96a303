// Paged prefill attention, the portable path.
#include "paged_prefill.cuh"
#include "row_tile.cuh"

template <typename KV, int D> struct Memory {
    Tiles<KV, D> tiles;
    uint32_t scratch[WARP];
    uint32_t before[1];  // [sequences + 1]
};

template <typename T, typename KV, int D>
__device__ __forceinline__ void attend_unit(const Prefill& prefill, Tiles<KV, D>& tiles, const Unit& unit, const T* queries, T* results) {
    using L = Layout<KV, D>;
    Rows rows(prefill, unit.sequence);
    uint32_t all = rows.count * prefill.group;
    auto place = [&](uint32_t row) {
        size_t token = rows.begin + row / prefill.group, heads = prefill.arena.kv_heads * prefill.group;
        return (token * heads + unit.head * prefill.group + row % prefill.group) * D;
    };
    RowTile<T, KV, D> tile(tiles);
    const T* from[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t row = unit.first_row + tile.row(i);
        from[i] = row < all ? queries + place(row) : nullptr;
        tile.sights[i] = sight(prefill, rows, row);
    }
    tile.begin(from);
    Pages pages{prefill.arena, prefill.tables + static_cast<size_t>(unit.sequence) * prefill.table_width, prefill.layer, unit.head};
    uint32_t first = sight(prefill, rows, unit.first_row).from / tile.N * tile.N, to = sight(prefill, rows, min(unit.first_row + ROWS, all) - 1).to;
    tile.attend(pages, first, to, prefill.scale * L::scale(prefill.arena, prefill.layer, 0, unit.head), prefill.soft_cap);
    float v_scale = L::scale(prefill.arena, prefill.layer, 1, unit.head);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t row = unit.first_row + tile.row(i);
        if (row < all) tile.write(i, results + place(row), tile.sum[i] == 0 ? 0 : v_scale / tile.sum[i]);
    }
}

template <typename T, typename KV, int D> __device__ __forceinline__ void prefill_attention(const Prefill& prefill) {
    extern __shared__ __align__(1024) uint8_t bytes[];
    let_next_begin();
    wait_for_previous();
    const T* queries = static_cast<const T*>(prefill.queries);
    T* results = static_cast<T*>(prefill.results);
    auto& memory = *reinterpret_cast<Memory<KV, D>*>(bytes);
    count_tiles<ROWS>(prefill, memory.before, memory.scratch);
    uint32_t units = memory.before[prefill.sequences] * prefill.arena.kv_heads;
    for (uint32_t index = blockIdx.x; index < units; index += gridDim.x)
        attend_unit<T, KV, D>(prefill, memory.tiles, unit_of<ROWS>(prefill, memory.before, index), queries, results);
}

#define PREFILL(name, T, KV, D)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) prefill_##name##_##D(const __grid_constant__ Prefill prefill) { \
        prefill_attention<T, KV, D>(prefill);                                                                 \
    }
#define PREFILLS(name, T, KV) PREFILL(name, T, KV, 64) PREFILL(name, T, KV, 96) PREFILL(name, T, KV, 128) PREFILL(name, T, KV, 256)

PREFILLS(bf16, __nv_bfloat16, __nv_bfloat16)
PREFILLS(bf16_e4m3, __nv_bfloat16, E4m3)
PREFILLS(f16, __half, __half)
PREFILLS(f16_e4m3, __half, E4m3)
