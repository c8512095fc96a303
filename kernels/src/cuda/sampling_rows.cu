// Rows of sampling state: admitted with all that is known, forked, asked for their last token.
#include "sampling.cuh"

// What is admitted besides the row's own words: ranges of `words`.
struct Admitted {
    SamplingRows all;
    SamplingRow state;
    const uint32_t* words;
    uint32_t row;
    uint32_t history;      // its first
    uint32_t history_len;
    uint32_t prompt_len;
    uint32_t biases;       // pairs of a token and the bits of what is added
    uint32_t stops;
};

// The row's counts are 0 before. Any grid.
extern "C" __global__ void admit_row(const __grid_constant__ Admitted admitted) {
    wait_for_previous();
    let_next_begin();
    uint32_t first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    const SamplingRows& all = admitted.all;
    SamplingRow state = admitted.state;
    const uint32_t* history = admitted.words + admitted.history;
    if (first == 0) {
        state.last = admitted.history_len > 0 ? history[admitted.history_len - 1] : 0;
        all.rows[admitted.row] = state;
    }
    for (uint32_t i = first; i < state.biases; i += step)
        all.biases_of(admitted.row)[i] = {admitted.words[admitted.biases + 2 * i], admitted.words[admitted.biases + 2 * i + 1]};
    for (uint32_t i = first; i < state.stops; i += step) all.stops_of(admitted.row)[i] = admitted.words[admitted.stops + i];
    if (!state.is_penalized) return;
    uint32_t* counts = all.counts_of(admitted.row);
    for (uint32_t i = first; i < admitted.history_len; i += step) {
        if (history[i] >= all.vocab) continue;
        atomicOr(counts + history[i], 1u);
        if (i >= admitted.prompt_len) atomicAdd(counts + history[i], 2u);
    }
}

struct Fork {
    SamplingRows all;
    uint32_t from;
    uint32_t to;
    uint32_t choice;
};

// Any grid.
extern "C" __global__ void fork_row(const __grid_constant__ Fork fork) {
    wait_for_previous();
    let_next_begin();
    uint32_t first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x, from = fork.from, to = fork.to;
    const SamplingRows& all = fork.all;
    SamplingRow state = all.rows[from];
    state.choice = fork.choice;
    if (first == 0) all.rows[to] = state;
    if (from == to || !state.is_admitted) return;
    for (uint32_t i = first; i < state.biases; i += step) all.biases_of(to)[i] = all.biases_of(from)[i];
    for (uint32_t i = first; i < state.stops; i += step) all.stops_of(to)[i] = all.stops_of(from)[i];
    if (!state.is_penalized) return;
    for (uint32_t i = first; i < all.vocab; i += step) all.counts_of(to)[i] = all.counts_of(from)[i];
}

struct LastTokens {
    SamplingRows all;
    const uint32_t* rows;  // [count]
    uint32_t* tokens;      // [count]
    uint32_t count;
};

// tokens[i] = the last token of rows[i]; where there is no such row, it stays.
extern "C" __global__ void last_tokens(const __grid_constant__ LastTokens of) {
    wait_for_previous();
    let_next_begin();
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, row = i < of.count ? of.rows[i] : of.all.n_rows;
    if (row < of.all.n_rows && of.all.rows[row].is_admitted) of.tokens[i] = of.all.rows[row].last;
}
