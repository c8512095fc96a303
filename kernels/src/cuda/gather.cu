// Rows of a table by their numbers: embeddings by token, last positions by row. A row that is not there becomes zeros.
// Rows are moved as they are, 16 bytes at a time.
#include "common.cuh"

extern "C" __global__ void gather(const uint4* table, const uint32_t* ids, uint4* out, uint32_t table_rows, uint32_t width) {
    uint32_t id = ids[blockIdx.x];
    for (uint32_t i = blockIdx.y * blockDim.x + threadIdx.x; i < width; i += gridDim.y * blockDim.x)
        out[static_cast<size_t>(blockIdx.x) * width + i] = id < table_rows ? table[static_cast<size_t>(id) * width + i] : uint4{0, 0, 0, 0};
}
