// Rows of a table by their numbers: embeddings by token, last positions by row. A row that is not there becomes zeros.
// Rows are moved as they are, 16 bytes at a time.
#include "common.cuh"

constexpr uint32_t THREADS = 128;
// 16-byte pieces that a thread has on their way.
constexpr int PIECES = 4;

struct Gather {
    const uint4* table;   // [table_rows][width]
    const uint32_t* ids;  // [rows]
    uint4* out;           // [rows][width]
    uint32_t table_rows;
    uint32_t width;       // 16-byte pieces
};

// Blocks go over rows in x, over a row in y.
extern "C" __global__ void __launch_bounds__(THREADS) gather(const __grid_constant__ Gather of) {
    wait_for_previous();
    let_next_begin();
    uint32_t id = of.ids[blockIdx.x], width = of.width, first = blockIdx.y * PIECES * THREADS + threadIdx.x;
    const uint4* from = of.table + static_cast<size_t>(id) * width + first;
    uint4* to = of.out + static_cast<size_t>(blockIdx.x) * width + first;
    uint4 kept[PIECES] = {};
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
        if (id < of.table_rows && first + piece * THREADS < width) kept[piece] = from[piece * THREADS];
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
        if (first + piece * THREADS < width) to[piece * THREADS] = kept[piece];
}
