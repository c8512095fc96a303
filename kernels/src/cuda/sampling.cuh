// A row of sampling state: how a sequence's tokens are drawn, and what it has drawn. `sampling_rows.rs` says the same for the host.
#pragma once
#include "common.cuh"

struct SamplingRow {
    uint32_t seed[2];
    uint32_t prompt_index;
    uint32_t choice;
    uint32_t length;         // tokens of prompt and output
    uint32_t output_length;
    uint32_t last;           // token
    uint32_t min_tokens;
    float scale;             // log2 e / temperature; 0: greedy
    float least;             // a logit must reach the largest plus this
    uint32_t top_k;          // 0: all
    float top_p;
    float presence;
    float frequency;
    float repetition;
    uint32_t biases;
    uint32_t stops;
    uint32_t logprobs;       // 0: none; else 1 + how many of the most likely
    uint32_t is_admitted;
    uint32_t is_penalized;
};

struct SamplingRows {
    SamplingRow* rows;  // [n_rows]
    uint32_t* counts;   // [n_rows][vocab], of penalized rows: bit 0: the token was seen; above: how often in the output
    uint2* biases;      // [n_rows][room], token and the bits of what is added
    uint32_t* stops;    // [n_rows][room]
    uint32_t n_rows;
    uint32_t vocab;
    uint32_t room;

    __device__ __forceinline__ uint32_t* counts_of(uint32_t row) const { return counts + static_cast<size_t>(row) * vocab; }
    __device__ __forceinline__ uint2* biases_of(uint32_t row) const { return biases + static_cast<size_t>(row) * room; }
    __device__ __forceinline__ uint32_t* stops_of(uint32_t row) const { return stops + static_cast<size_t>(row) * room; }
    // A row's state; a row that is not there or not admitted is greedy.
    __device__ __forceinline__ SamplingRow state(uint32_t row) const {
        SamplingRow none = {}, state = row < n_rows ? rows[row] : none;
        return state.is_admitted ? state : none;
    }
};

// The first word of Philox4x32-10 (Salmon et al., SC 2011), its upper 24 bits: u * 2^24.
__device__ __forceinline__ uint32_t uniform_bits(const SamplingRow& row) {
    uint32_t key[2] = {row.seed[0], row.seed[1]}, state[4] = {row.prompt_index, row.choice, row.length, 0};
#pragma unroll
    for (int round = 0; round < 10; round++) {
        uint32_t high[2] = {__umulhi(0xD2511F53u, state[0]), __umulhi(0xCD9E8D57u, state[2])};
        uint32_t low[2] = {0xD2511F53u * state[0], 0xCD9E8D57u * state[2]};
        state[0] = high[1] ^ state[1] ^ key[0];
        state[1] = low[1];
        state[2] = high[0] ^ state[3] ^ key[1];
        state[3] = low[0];
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return state[0] >> 8;
}
