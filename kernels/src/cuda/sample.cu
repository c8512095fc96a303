// Tokens from logits. With m a row's largest logit and w(i) = 2^((logit(i) - m) * scale): min-p keeps the logits that reach a bar;
// top-k then the k largest and all equal to the last of them; top-p then the largest whose w first reach top_p of what was kept,
// and all equal to the last of them. The token is the first, in id order, whose running sum of kept w exceeds u times their total.
//
// `alter` writes the logits of rows that bias or penalize. `survey` passes over all logits once and leaves the largest of every
// group of 64 and the sum of the group's w. `choose` has a block for each draw and reads again only the groups that can matter:
// what the largest of the groups say bounds the k-th logit and the nucleus from below, and what reaches the bound is listed and
// sorted in shared memory. Where that is too much (flat logits), the row's logits are counted in buckets until the one that holds
// the boundary fits. `report` tells log-probabilities.
//
// Sums of w are whole numbers, multiples of 2^-40, so that their order does not matter: the same logits give the same token.
#include "sampling.cuh"

typedef unsigned long long Amount;

constexpr int EIGHT = 8;
constexpr uint32_t GROUP = 64;
constexpr uint32_t NONE = ~0u;
constexpr float ONE = 1099511627776.0f;  // 2^40
// Below this power of two of the largest, a weight is no amount.
constexpr float DEPTH = 42.0f;
constexpr float LOWEST = -3.402823466e38f;

constexpr int SURVEY_THREADS = 256;
constexpr int SURVEY_STEPS = 4;
constexpr uint32_t PIECE = SURVEY_THREADS * SURVEY_STEPS * EIGHT;

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / WARP;
constexpr uint32_t BUCKETS = 2 * THREADS;
constexpr uint32_t LIST = 2048;

struct Draw {
    uint32_t logits;      // row; none there: no draw
    uint32_t row;         // of the state
    uint32_t candidates;  // above 0: so many of the most likely, and no token
};

struct Score {
    uint32_t token;
    float logprob;
    uint32_t rank;
};

struct Sample {
    SamplingRows rows;
    const Draw* draws;
    uint32_t* tokens;  // [draws]
    float* altered;    // [draws][groups GROUP]; null: no row changes logits
    float2* summary;   // [draws][groups], largest and sum
    Score* scores;     // [draws][1 + top]
    uint32_t* before;  // [draws], how many are more likely than the drawn token
    uint32_t logit_rows;
    uint32_t groups;
    uint32_t top;
};

__device__ __forceinline__ bool holds_back(const SamplingRow& state) { return state.output_length < state.min_tokens && state.stops > 0; }
__device__ __forceinline__ bool changes(const Sample& sample, const SamplingRow& state) {
    return sample.altered != nullptr && (state.is_penalized || state.biases > 0 || holds_back(state));
}
// NaN is impossible, as minus infinity.
__device__ __forceinline__ float clean(float logit) { return logit == logit ? logit : -INFINITY; }

template <typename T> struct Logits {
    const T* row;
    uint32_t vocab;

    __device__ __forceinline__ float at(uint32_t id) const { return id < vocab ? clean(to_float(row[id])) : -INFINITY; }
    __device__ __forceinline__ bool is_whole(uint32_t id) const {
        return id + EIGHT <= vocab && reinterpret_cast<uintptr_t>(row + id) % 16 == 0;
    }
    // Eight from `id` on, a multiple of eight.
    __device__ __forceinline__ void load(uint32_t id, float (&values)[EIGHT]) const {
        constexpr int VECTORS = EIGHT * sizeof(T) / sizeof(uint4);
        if (is_whole(id)) {
            uint4 bits[VECTORS];
#pragma unroll
            for (int i = 0; i < VECTORS; i++) bits[i] = reinterpret_cast<const uint4*>(row + id)[i];
            const T* numbers = reinterpret_cast<const T*>(bits);
#pragma unroll
            for (int i = 0; i < EIGHT; i++) values[i] = clean(to_float(numbers[i]));
        } else {
#pragma unroll
            for (int i = 0; i < EIGHT; i++) values[i] = at(id + i);
        }
    }
};

template <typename T> __device__ __forceinline__ Logits<T> raw(const Sample& sample, const T* logits, const Draw& draw) {
    return {logits + static_cast<size_t>(draw.logits) * sample.rows.vocab, sample.rows.vocab};
}
__device__ __forceinline__ float* altered_row(const Sample& sample, uint32_t draw) {
    return sample.altered + static_cast<size_t>(draw) * sample.groups * GROUP;
}

// ---- alter

__device__ __forceinline__ float penalized(const SamplingRow& state, float logit, uint32_t count) {
    if (count == 0) return logit;
    logit = logit > 0 ? __fdiv_rn(logit, state.repetition) : __fmul_rn(logit, state.repetition);
    uint32_t times = count >> 1;
    logit = __fsub_rn(logit, __fmul_rn(state.frequency, static_cast<float>(times)));
    return times > 0 ? __fsub_rn(logit, state.presence) : logit;
}

// Grid: pieces, draws. A piece's block alone writes its tokens: first all of them, then those with a bias, then stop tokens.
template <typename T> __device__ __forceinline__ void alter(const Sample& sample, const T* all) {
    Draw draw = sample.draws[blockIdx.y];
    SamplingRow state = sample.rows.state(draw.row);
    if (draw.logits >= sample.logit_rows || draw.candidates > 0 || !changes(sample, state)) return;
    Logits<T> logits = raw(sample, all, draw);
    float* out = altered_row(sample, blockIdx.y);
    const uint32_t* counts = sample.rows.counts_of(draw.row);
    uint32_t begin = blockIdx.x * PIECE, end = min(begin + PIECE, logits.vocab);
    auto count = [&](uint32_t id) { return state.is_penalized ? counts[id] : 0; };
    for (uint32_t id = begin + threadIdx.x; id < end; id += blockDim.x) out[id] = penalized(state, logits.at(id), count(id));
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < state.biases; i += blockDim.x) {
        uint2 bias = sample.rows.biases_of(draw.row)[i];
        if (bias.x < begin || bias.x >= end) continue;
        out[bias.x] = penalized(state, __fadd_rn(logits.at(bias.x), __uint_as_float(bias.y)), count(bias.x));
    }
    __syncthreads();
    if (!holds_back(state)) return;
    for (uint32_t i = threadIdx.x; i < state.stops; i += blockDim.x) {
        uint32_t stop = sample.rows.stops_of(draw.row)[i];
        if (stop >= begin && stop < end) out[stop] = -INFINITY;
    }
}

// ---- survey

// The value of the eight lanes of a group put together.
template <typename V, typename F> __device__ __forceinline__ V over_group(V value, F together) {
#pragma unroll
    for (int step = 4; step > 0; step /= 2) value = together(value, __shfl_xor_sync(~0u, value, step));
    return value;
}

__device__ __forceinline__ float weight(float logit, float most, float scale) { return exp2_fast((logit - most) * scale); }

// What one lane's eight logits give its group: the largest, and the sum of w relative to it.
__device__ __forceinline__ float2 summarize(const float (&values)[EIGHT], float scale) {
    float most = values[0], sum = 0;
#pragma unroll
    for (int i = 1; i < EIGHT; i++) most = fmaxf(most, values[i]);
    most = over_group(most, [](float a, float b) { return fmaxf(a, b); });
    if (scale == 0) return {most, 0};
    float base = most == -INFINITY ? 0 : most;
#pragma unroll
    for (int i = 0; i < EIGHT; i++) sum += weight(values[i], base, scale);
    return {most, over_group(sum, [](float a, float b) { return a + b; })};
}

// Grid: pieces, draws.
template <typename T> __device__ __forceinline__ void survey(Logits<T> logits, float scale, float2* summary, uint32_t groups) {
    float values[SURVEY_STEPS][EIGHT];
    uint32_t first = blockIdx.x * PIECE + threadIdx.x * EIGHT;
#pragma unroll
    for (int step = 0; step < SURVEY_STEPS; step++) logits.load(first + step * SURVEY_THREADS * EIGHT, values[step]);
#pragma unroll
    for (int step = 0; step < SURVEY_STEPS; step++) {
        float2 summed = summarize(values[step], scale);
        uint32_t group = (first + step * SURVEY_THREADS * EIGHT) / GROUP;
        if (threadIdx.x % (GROUP / EIGHT) == 0 && group < groups) summary[group] = summed;
    }
}

template <typename T> __device__ __forceinline__ void survey_draw(const Sample& sample, const T* all) {
    Draw draw = sample.draws[blockIdx.y];
    if (draw.logits >= sample.logit_rows || draw.candidates > 0) return;
    SamplingRow state = sample.rows.state(draw.row);
    float2* summary = sample.summary + static_cast<size_t>(blockIdx.y) * sample.groups;
    if (changes(sample, state)) survey(Logits<float>{altered_row(sample, blockIdx.y), sample.rows.vocab}, state.scale, summary, sample.groups);
    else survey(raw(sample, all, draw), state.scale, summary, sample.groups);
}

// ---- what a block does together; all of its threads call these

struct Scratch {
    Amount warps[WARPS];
    float floats[WARPS];
    Amount reached;
    uint32_t bucket, bucket_count, listed, first;
    uint32_t low, high;
};

__device__ __forceinline__ float block_most(float value, Scratch& scratch) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch.floats[threadIdx.x / WARP] = value;
    __syncthreads();
    value = scratch.floats[0];
#pragma unroll
    for (int warp = 1; warp < WARPS; warp++) value = fmaxf(value, scratch.floats[warp]);
    return value;
}

__device__ __forceinline__ Amount warp_sums(Amount value) {
    uint32_t lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        Amount other = __shfl_up_sync(~0u, value, step);
        if (lane >= step) value += other;
    }
    return value;
}

// The sum of the values of the threads before this one; `total`: of all.
__device__ __forceinline__ Amount block_before(Amount value, Scratch& scratch, Amount& total) {
    Amount sum = warp_sums(value), before = sum - value;
    __syncthreads();
    if (threadIdx.x % WARP == WARP - 1) scratch.warps[threadIdx.x / WARP] = sum;
    __syncthreads();
    total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
        if (warp == threadIdx.x / WARP) before += total;
        total += scratch.warps[warp];
    }
    return before;
}

__device__ __forceinline__ Amount block_total(Amount value, Scratch& scratch) {
    Amount total;
    block_before(value, scratch, total);
    return total;
}

// ---- keys: whole numbers in the order of logits

__device__ __forceinline__ uint32_t to_key(float logit) {
    uint32_t bits = __float_as_uint(__fadd_rn(logit, 0.0f));  // -0 is 0
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float to_logit(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// Keys from `low` to `high`, both included; `reached`: the amount of all above `high`.
struct Interval {
    uint32_t low, high;
    Amount reached;
    __device__ __forceinline__ bool has(uint32_t key) const { return key >= low && key <= high; }
};

// An interval in BUCKETS parts, from its high end down: of equal widths, or of equally many keys where floats do not do.
struct Buckets {
    uint32_t high;
    float half, rate;
    uint32_t shift;

    __device__ __forceinline__ Buckets(const Interval& interval, int pass) {
        high = interval.high;
        half = __fmul_rn(to_logit(high), 0.5f);
        float width = __fsub_rn(half, __fmul_rn(to_logit(interval.low), 0.5f));
        rate = pass < 3 && width > 1e-30f && width < 1e30f ? __fdiv_rn(BUCKETS, width) : 0;
        uint32_t bits = 32 - __clz(high - interval.low);
        shift = bits > 10 ? bits - 10 : 0;
    }
    __device__ __forceinline__ uint32_t of(uint32_t key) const {
        if (rate == 0) return (high - key) >> shift;
        float at = __fmul_rn(__fsub_rn(half, __fmul_rn(to_logit(key), 0.5f)), rate);
        return min(static_cast<uint32_t>(at), BUCKETS - 1);
    }
    // The smallest key of [low, high] whose bucket is at most `bucket`.
    __device__ __forceinline__ uint32_t smallest(uint32_t low, uint32_t bucket) const {
        uint32_t above = high;
        while (low < above) {
            uint32_t middle = low + (above - low) / 2;
            if (of(middle) <= bucket) above = middle;
            else low = middle + 1;
        }
        return low;
    }
};
static_assert(BUCKETS == 1 << 10);

enum Kind { COUNT, WEIGHT };

// ---- choose

template <typename T> struct Chooser {
    Logits<T> logits;
    uint32_t groups;
    Scratch& scratch;
    Amount* sums;      // [groups], of what is kept
    Amount* list;      // [LIST], ~key and id
    uint32_t* lows;    // [BUCKETS], the amounts' lower words
    uint32_t* highs;   // [BUCKETS]
    uint32_t* counts;  // [BUCKETS]
    float* maxima;     // [groups]
    float most, scale;

    __device__ __forceinline__ Chooser(Logits<T> logits, uint32_t groups, float scale, Scratch& scratch, uint8_t* shared)
        : logits(logits), groups(groups), scratch(scratch), scale(scale) {
        sums = reinterpret_cast<Amount*>(shared);
        list = sums + groups;
        lows = reinterpret_cast<uint32_t*>(list + LIST);
        highs = lows + BUCKETS;
        counts = highs + BUCKETS;
        maxima = reinterpret_cast<float*>(counts + BUCKETS);
    }

    // Reads the survey.
    __device__ void look(const float2* summary) {
        float own = -INFINITY;
        for (uint32_t group = threadIdx.x; group < groups; group += THREADS) {
            maxima[group] = summary[group].x;
            own = fmaxf(own, maxima[group]);
        }
        most = block_most(own, scratch);
    }

    __device__ __forceinline__ Amount amount(float logit) const { return __float2ull_rn(weight(logit, most, scale) * ONE); }
    __device__ __forceinline__ static uint32_t key_of(Amount item) { return ~static_cast<uint32_t>(item >> 32); }

    // Sums of all logits' w, by group, from the survey. `most` is finite.
    __device__ Amount sum_all(const float2* summary) {
        Amount own = 0;
        for (uint32_t group = threadIdx.x; group < groups; group += THREADS) {
            float2 one = summary[group];
            sums[group] = __float2ull_rn(one.y * weight(one.x, most, scale) * ONE);
            own += sums[group];
        }
        return block_total(own, scratch);
    }

    // The smallest of the threads' indices.
    __device__ uint32_t first_of(uint32_t index) {
        __syncthreads();
        if (threadIdx.x == 0) scratch.first = NONE;
        __syncthreads();
        if (index != NONE) atomicMin(&scratch.first, index);
        __syncthreads();
        return scratch.first;
    }

    // The lowest id of the largest logit; 0 when nothing is possible. In thread 0.
    __device__ uint32_t most_likely() {
        if (most == -INFINITY) return 0;
        uint32_t own = NONE;
        for (uint32_t group = threadIdx.x; group < groups && own == NONE; group += THREADS)
            if (maxima[group] == most) own = group;
        uint32_t group = first_of(own);
        if (threadIdx.x >= WARP) return 0;
        uint32_t first = group * GROUP + threadIdx.x;
        uint32_t low = __ballot_sync(~0u, logits.at(first) == most), high = __ballot_sync(~0u, logits.at(first + WARP) == most);
        return group * GROUP + (low ? __ffs(low) - 1 : WARP + __ffs(high) - 1);
    }

    // ---- narrowing an interval to the bucket that holds a boundary

    // Equal neighbours go into their bucket together, so that equal logits do not queue for it.
    struct Run {
        uint32_t bucket = NONE, count = 0;
        Amount amount = 0;
    };
    template <Kind KIND> __device__ __forceinline__ void flush(const Run& run) {
        if (run.bucket == NONE) return;
        atomicAdd(counts + run.bucket, run.count);
        if (KIND == COUNT) return;
        uint32_t low = static_cast<uint32_t>(run.amount), before = atomicAdd(lows + run.bucket, low);
        uint32_t high = static_cast<uint32_t>(run.amount >> 32) + (before + low < before);
        if (high > 0) atomicAdd(highs + run.bucket, high);
    }
    template <Kind KIND> __device__ __forceinline__ void put(Run& run, const Interval& in, const Buckets& buckets, float logit) {
        uint32_t key = to_key(logit);
        if (!in.has(key)) return;
        uint32_t bucket = buckets.of(key);
        if (bucket != run.bucket) {
            flush<KIND>(run);
            run = Run();
            run.bucket = bucket;
        }
        run.count++;
        if (KIND == WEIGHT) run.amount += amount(logit);
    }

    // Calls `each(id, values, group)` with eight logits at a time, all threads of a warp together; those of groups that do not
    // reach `low` are not read and impossible.
    template <typename F> __device__ __forceinline__ void for_eights(uint32_t low, F each) {
        uint32_t end = groups * GROUP;
        float next[EIGHT], values[EIGHT];
        auto load = [&](uint32_t id) {
            if (id < end && to_key(maxima[id / GROUP]) >= low) logits.load(id, next);
            else
#pragma unroll
                for (int i = 0; i < EIGHT; i++) next[i] = -INFINITY;
        };
        load(threadIdx.x * EIGHT);
        for (uint32_t base = 0; base < end; base += THREADS * EIGHT) {
            uint32_t id = base + threadIdx.x * EIGHT;
#pragma unroll
            for (int i = 0; i < EIGHT; i++) values[i] = next[i];
            // The next are on their way while these are worked on.
            load(id + THREADS * EIGHT);
            each(id, values);
        }
    }

    __device__ void clear_buckets() {
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < 3 * BUCKETS; i += THREADS) lows[i] = 0;
        __syncthreads();
    }
    template <Kind KIND> __device__ void fill_with_maxima(const Interval& in, const Buckets& buckets) {
        Run run;
        for (uint32_t group = threadIdx.x; group < groups; group += THREADS) put<KIND>(run, in, buckets, maxima[group]);
        flush<KIND>(run);
    }
    template <Kind KIND> __device__ void fill_with_row(const Interval& in, const Buckets& buckets) {
        Run run;
        for_eights(in.low, [&](uint32_t, const float (&values)[EIGHT]) {
#pragma unroll
            for (int i = 0; i < EIGHT; i++) put<KIND>(run, in, buckets, values[i]);
        });
        flush<KIND>(run);
    }

    template <Kind KIND> __device__ __forceinline__ Amount bucket_amount(uint32_t bucket) const {
        return KIND == COUNT ? counts[bucket] : static_cast<Amount>(highs[bucket]) << 32 | lows[bucket];
    }

    // Narrows the interval to the filled bucket in which the amount comes to `wanted`. How many it holds; NONE, and no change,
    // when all of it is less than `wanted`.
    template <Kind KIND> __device__ uint32_t narrow(Interval& in, const Buckets& buckets, Amount wanted) {
        __syncthreads();
        if (threadIdx.x == 0) scratch.bucket_count = NONE;
        uint32_t first = 2 * threadIdx.x;
        Amount own[2] = {bucket_amount<KIND>(first), bucket_amount<KIND>(first + 1)}, total;
        Amount before = in.reached + block_before(own[0] + own[1], scratch, total);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (before < wanted && before + own[i] >= wanted) {
                scratch.bucket_count = counts[first + i];
                scratch.reached = before;
                scratch.low = buckets.smallest(in.low, first + i);
                scratch.high = first + i == 0 ? in.high : buckets.smallest(in.low, first + i - 1) - 1;
            }
            before += own[i];
        }
        __syncthreads();
        if (scratch.bucket_count != NONE) in = {scratch.low, scratch.high, scratch.reached};
        return scratch.bucket_count;
    }

    // A key that all logits of which the largest come to `wanted` reach: at least `low`, as near as the groups' largest tell.
    template <Kind KIND> __device__ uint32_t bound(uint32_t low, Amount wanted) {
        Interval in = {low, to_key(most), 0};
        for (int pass = 0; pass < 4 && in.low < in.high; pass++) {
            Buckets buckets(in, pass);
            clear_buckets();
            fill_with_maxima<KIND>(in, buckets);
            uint32_t left = narrow<KIND>(in, buckets, wanted);
            if (left == NONE || left <= 4) break;
        }
        return in.low;
    }

    // ---- listing an interval

    // The whole warp takes part.
    __device__ __forceinline__ void sum_group(uint32_t id, Amount own) {
        own = over_group(own, [](Amount a, Amount b) { return a + b; });
        if (threadIdx.x % (GROUP / EIGHT) == 0 && id / GROUP < groups) sums[id / GROUP] = own;
    }

    // Lists what is in the interval, and sums by group what is above it. How many there are, also when the list has no room.
    __device__ uint32_t gather(const Interval& in) {
        __syncthreads();
        if (threadIdx.x == 0) scratch.listed = 0;
        __syncthreads();
        bool is_any_above = in.high < to_key(most);
        for_eights(in.low, [&](uint32_t id, const float (&values)[EIGHT]) {
            Amount above = 0;
#pragma unroll
            for (int i = 0; i < EIGHT; i++) {
                uint32_t key = to_key(values[i]);
                if (is_any_above && key > in.high) above += amount(values[i]);
                if (!in.has(key)) continue;
                uint32_t place = atomicAdd(&scratch.listed, 1u);
                if (place < LIST) list[place] = static_cast<Amount>(~key) << 32 | (id + i);
            }
            sum_group(id, above);
        });
        __syncthreads();
        return scratch.listed;
    }

    // Sorts the list, the largest first, equal ones in id order (Batcher's bitonic sort).
    __device__ void sort(uint32_t count) {
        uint32_t size = 1;
        while (size < count) size *= 2;
        for (uint32_t i = count + threadIdx.x; i < size; i += THREADS) list[i] = ~0ull;
        for (uint32_t run = 2; run <= size; run *= 2) {
            for (uint32_t step = run / 2; step > 0; step /= 2) {
                __syncthreads();
                for (uint32_t pair = threadIdx.x; pair < size / 2; pair += THREADS) {
                    uint32_t low = 2 * pair - (pair & (step - 1)), high = low + step;
                    Amount a = list[low], b = list[high];
                    if ((a > b) == ((low & run) == 0)) {
                        list[low] = b;
                        list[high] = a;
                    }
                }
            }
        }
        __syncthreads();
    }

    // The amount of the first `count` of the list, and the first of them with which it comes to `wanted`.
    __device__ Amount sum_list(uint32_t count, Amount wanted, uint32_t& index) {
        constexpr uint32_t EACH = LIST / THREADS;
        uint32_t first = threadIdx.x * EACH, found = NONE;
        Amount own[EACH], sum = 0, total;
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) {
            own[i] = first + i < count ? amount(to_logit(key_of(list[first + i]))) : 0;
            sum += own[i];
        }
        Amount before = block_before(sum, scratch, total);
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) {
            before += own[i];
            if (found == NONE && first + i < count && before >= wanted) found = first + i;
        }
        index = first_of(found);
        return total;
    }

    // How many of the sorted list reach `bar`.
    __device__ uint32_t reaching(uint32_t count, uint32_t bar) {
        uint32_t low = 0, high = count;
        while (low < high) {
            uint32_t middle = (low + high) / 2;
            if (key_of(list[middle]) >= bar) low = middle + 1;
            else high = middle;
        }
        return low;
    }

    // Of the sorted list's first `count`: the smallest of the largest that come to `wanted`, or the last.
    template <Kind KIND> __device__ uint32_t boundary(uint32_t count, Amount wanted) {
        uint32_t index = static_cast<uint32_t>(min(wanted, static_cast<Amount>(count)) - 1);
        if (KIND == WEIGHT) sum_list(count, wanted, index);
        return key_of(list[min(index, count - 1)]);
    }

    // The smallest key of the largest of [low, most] that come to `wanted`. The list then has what is in `in`, sorted, `count`
    // of it, and `sums` what is above.
    template <Kind KIND> __device__ uint32_t select(uint32_t low, Amount wanted, Interval& in, uint32_t& count) {
        in = {low, to_key(most), 0};
        // A guess: groups that reach the bound have about two logits that do.
        count = static_cast<uint32_t>(2 * groups_reaching(low));
        for (int pass = 0;; pass++) {
            if (count <= LIST) count = gather(in);
            if (count <= LIST) break;
            if (pass > 0) tighten(in);
            // More equal logits than the list holds are summed already.
            if (in.low == in.high && pass > 0) return none_listed(in, count);
            Buckets buckets(in, pass);
            clear_buckets();
            fill_with_row<KIND>(in, buckets);
            if (narrow<KIND>(in, buckets, wanted) == NONE) {
                // All of it is too little: all of it is kept.
                tighten(in);
                in.low = low;
                return none_listed(in, count);
            }
            count = scratch.bucket_count;
        }
        sort(count);
        return count == 0 ? in.low : boundary<KIND>(count, wanted > in.reached ? wanted - in.reached : 1);
    }
    // All that reaches the interval's low end is kept and summed.
    __device__ __forceinline__ static uint32_t none_listed(Interval& in, uint32_t& count) {
        in.high = in.low - 1;
        count = 0;
        return in.low;
    }
    // Narrows the interval to the keys that are there, and sums by group what reaches its low end.
    __device__ void tighten(Interval& in) {
        __syncthreads();
        if (threadIdx.x == 0) scratch.low = NONE, scratch.high = 0;
        __syncthreads();
        uint32_t low = NONE, high = 0;
        for_eights(in.low, [&](uint32_t id, const float (&values)[EIGHT]) {
            Amount reaching = 0;
#pragma unroll
            for (int i = 0; i < EIGHT; i++) {
                uint32_t key = to_key(values[i]);
                if (key >= in.low) reaching += amount(values[i]);
                if (in.has(key)) low = min(low, key), high = max(high, key);
            }
            sum_group(id, reaching);
        });
        atomicMin(&scratch.low, low);
        atomicMax(&scratch.high, high);
        __syncthreads();
        if (scratch.low <= scratch.high) in.low = scratch.low, in.high = scratch.high;
    }
    __device__ Amount groups_reaching(uint32_t low) {
        Amount own = 0;
        for (uint32_t group = threadIdx.x; group < groups; group += THREADS) own += to_key(maxima[group]) >= low;
        return block_total(own, scratch);
    }

    // ---- what is kept

    __device__ Amount total_of_sums() {
        Amount own = 0;
        for (uint32_t group = threadIdx.x; group < groups; group += THREADS) own += sums[group];
        return block_total(own, scratch);
    }
    // Adds the list's first `count` to the sums of their groups.
    __device__ void add_list(uint32_t count) {
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < count; i += THREADS)
            atomicAdd(sums + static_cast<uint32_t>(list[i]) / GROUP, amount(to_logit(key_of(list[i]))));
        __syncthreads();
    }

    __device__ __forceinline__ static Amount share(Amount total, float part) {
        Amount wanted = static_cast<Amount>(ceil(static_cast<double>(total) * part));
        return max(min(wanted, total), static_cast<Amount>(1));
    }

    // Nothing below this can be in the nucleus: all that is comes to less than what the nucleus leaves out. As on the CPU.
    __device__ __forceinline__ uint32_t nucleus_floor(uint32_t low, Amount total, Amount wanted) const {
        float least = static_cast<float>(total - wanted) / ONE / logits.vocab;
        float bound = most + log2f(least) / scale - 1e-3f;
        return bound > to_logit(low) ? to_key(bound) : low;
    }

    // Leaves in `sums` what the filters keep; the smallest key of it.
    __device__ uint32_t keep(const SamplingRow& state, const float2* summary) {
        float floor = fmaxf(fmaxf(most + state.least, most - DEPTH / scale), LOWEST);
        uint32_t low = to_key(floor), bar = low, count = 0;
        bool has_top_k = state.top_k > 0 && state.top_k < logits.vocab;
        if (!has_top_k && state.least == -INFINITY) return state.top_p < 1 ? keep_nucleus(low, sum_all(summary)) : (sum_all(summary), 0);
        Interval in;
        if (has_top_k) {
            bar = select<COUNT>(bound<COUNT>(low, state.top_k), state.top_k, in, count);
            count = reaching(count, bar);
            if (state.top_p < 1 && in.high >= to_key(most) && count > 0) {
                uint32_t index;
                Amount total = sum_list(count, ~0ull, index);
                bar = boundary<WEIGHT>(count, share(total, state.top_p));
                add_list(reaching(count, bar));
                return bar;
            }
            add_list(count);
        } else {
            in = {low, low - 1, 0};
            gather(in);
        }
        return state.top_p < 1 ? keep_nucleus(bar, total_of_sums()) : bar;
    }
    // Of what reaches `low` and comes to `total`.
    __device__ uint32_t keep_nucleus(uint32_t low, Amount total) {
        Amount wanted = share(total, reach);
        Interval in;
        uint32_t count;
        low = bound<WEIGHT>(nucleus_floor(low, total, wanted), wanted);
        uint32_t bar = select<WEIGHT>(low, wanted, in, count);
        add_list(reaching(count, bar));
        return bar;
    }
    float reach;  // top_p

    // ---- the draw

    // The first token that reaches `bar` and whose running sum exceeds u of the total. In warp 0.
    __device__ uint32_t draw(uint32_t bar, uint32_t bits) {
        uint32_t each = (groups + THREADS - 1) / THREADS, first = min(threadIdx.x * each, groups), last = min(first + each, groups);
        Amount own = 0, total;
        __syncthreads();
        for (uint32_t group = first; group < last; group++) own += sums[group];
        Amount before = block_before(own, scratch, total);
        // floor(total * u): a whole number exceeds it when it exceeds total * u.
        Amount target = (total >> 24) * bits + ((total & 0xffffff) * bits >> 24);
        if (before <= target && before + own > target) {
            uint32_t group = first;
            while (before + sums[group] <= target) before += sums[group++];
            scratch.first = group;
            scratch.reached = target - before;
        }
        __syncthreads();
        return threadIdx.x < WARP ? draw_of_group(scratch.first, bar, scratch.reached) : 0;
    }
    __device__ uint32_t draw_of_group(uint32_t group, uint32_t bar, Amount target) {
        Amount running = 0;
        uint32_t last = group * GROUP;
        for (uint32_t first = group * GROUP; first < (group + 1) * GROUP; first += WARP) {
            float logit = logits.at(first + threadIdx.x);
            Amount own = to_key(logit) >= bar ? amount(logit) : 0, sum = running + warp_sums(own);
            uint32_t beyond = __ballot_sync(~0u, own > 0 && sum > target), possible = __ballot_sync(~0u, own > 0);
            if (beyond) return first + __ffs(beyond) - 1;
            // Where rounding leaves the sum short it is the last.
            if (possible) last = first + 31 - __clz(possible);
            running = __shfl_sync(~0u, sum, WARP - 1);
        }
        return last;
    }
};

extern __shared__ uint64_t shared[];

template <typename T>
__device__ __noinline__ uint32_t choose(Logits<T> logits, const SamplingRow& state, const float2* summary, uint32_t groups, Scratch& scratch) {
    Chooser<T> chooser(logits, groups, state.scale, scratch, reinterpret_cast<uint8_t*>(shared));
    chooser.look(summary);
    if (state.scale == 0 || !isfinite(chooser.most)) return chooser.most_likely();
    chooser.reach = state.top_p;
    uint32_t bar = chooser.keep(state, summary);
    return chooser.draw(bar, uniform_bits(state));
}

// The row takes up its token.
__device__ __forceinline__ void take_up(const SamplingRows& rows, const SamplingRow& state, uint32_t row, uint32_t token) {
    if (!state.is_admitted) return;
    rows.rows[row].last = token;
    rows.rows[row].length++;
    rows.rows[row].output_length++;
    if (!state.is_penalized || token >= rows.vocab) return;
    uint32_t& count = rows.counts_of(row)[token];
    count = (count | 1) + 2;
}

// Grid: draws.
template <typename T> __device__ __forceinline__ void choose_draw(const Sample& sample, const T* all) {
    __shared__ Scratch scratch;
    Draw draw = sample.draws[blockIdx.x];
    uint32_t token = 0;
    if (draw.logits < sample.logit_rows && draw.candidates == 0) {
        SamplingRow state = sample.rows.state(draw.row);
        const float2* summary = sample.summary + static_cast<size_t>(blockIdx.x) * sample.groups;
        if (changes(sample, state)) {
            Logits<float> logits = {altered_row(sample, blockIdx.x), sample.rows.vocab};
            token = choose(logits, state, summary, sample.groups, scratch);
        } else {
            token = choose(raw(sample, all, draw), state, summary, sample.groups, scratch);
        }
        if (threadIdx.x == 0) take_up(sample.rows, state, draw.row, token);
    }
    if (threadIdx.x > 0) return;
    sample.tokens[blockIdx.x] = token;
    sample.before[blockIdx.x] = 0;
}

// ---- report: log-probabilities of raw logits

// How many of the most likely a draw wants, 0 and `is_wanted` false when it wants no report.
struct Wanted {
    bool is_wanted;
    uint32_t top;
};
__device__ __forceinline__ Wanted wanted(const Sample& sample, const Draw& draw) {
    if (draw.logits >= sample.logit_rows) return {false, 0};
    uint32_t logprobs = sample.rows.state(draw.row).logprobs;
    uint32_t top = draw.candidates > 0 ? draw.candidates : logprobs > 0 ? logprobs - 1 : 0;
    return {draw.candidates > 0 || logprobs > 0, min(min(top, sample.top), sample.rows.vocab)};
}

// Grid: pieces, draws. The survey of the raw logits, and how many tokens are more likely than the drawn one.
template <typename T> __device__ __forceinline__ void survey_raw(const Sample& sample, const T* all) {
    Draw draw = sample.draws[blockIdx.y];
    if (!wanted(sample, draw).is_wanted) return;
    Logits<T> logits = raw(sample, all, draw);
    survey(logits, LOG2_E, sample.summary + static_cast<size_t>(blockIdx.y) * sample.groups, sample.groups);
    if (draw.candidates > 0) return;
    uint32_t token = sample.tokens[blockIdx.y], end = min((blockIdx.x + 1) * PIECE, logits.vocab), count = 0;
    float own = logits.at(token);
    for (uint32_t id = blockIdx.x * PIECE + threadIdx.x; id < end; id += blockDim.x) {
        float logit = logits.at(id);
        count += logit > own || (logit == own && id < token);
    }
    count = __reduce_add_sync(~0u, count);
    if (threadIdx.x % WARP == 0 && count > 0) atomicAdd(sample.before + blockIdx.y, count);
}

template <typename T> struct Reporter {
    Chooser<T>& chooser;
    double partition;

    __device__ __forceinline__ float logprob(float logit) const {
        float value = static_cast<float>(logit - partition);
        return value == value ? value : -INFINITY;
    }

    // Appends the logits of this key to the list, in id order, until it holds `wanted`; how many it holds then.
    __device__ uint32_t append(uint32_t key, uint32_t held, uint32_t wanted) {
        for (uint32_t base = 0; base < chooser.logits.vocab && held < wanted; base += THREADS) {
            uint32_t id = base + threadIdx.x;
            bool is_one = id < chooser.logits.vocab && to_key(chooser.logits.at(id)) == key;
            Amount total, place = held + block_before(is_one, chooser.scratch, total);
            if (is_one && place < wanted) chooser.list[place] = static_cast<Amount>(~key) << 32 | id;
            held = min(held + static_cast<uint32_t>(total), wanted);
        }
        return held;
    }

    // Lists the most likely, best first, equal ones in id order.
    __device__ void list(uint32_t wanted) {
        uint32_t held = 0;
        if (chooser.most > -INFINITY) {
            Interval in;
            uint32_t low = chooser.template bound<COUNT>(to_key(LOWEST), wanted);
            uint32_t bar = chooser.template select<COUNT>(low, wanted, in, held);
            if (held >= wanted && in.high >= to_key(chooser.most)) return;
            held = 0;
            if (bar < to_key(chooser.most)) {
                held = chooser.gather({bar + 1, to_key(chooser.most), 0});
                chooser.sort(held);
            }
            held = append(bar, held, wanted);
        }
        append(to_key(-INFINITY), held, wanted);
        __syncthreads();
    }
};

// Grid: draws.
template <typename T> __device__ __forceinline__ void report(const Sample& sample, const T* all) {
    __shared__ Scratch scratch;
    Draw draw = sample.draws[blockIdx.x];
    Wanted want = wanted(sample, draw);
    if (!want.is_wanted) return;
    const float2* summary = sample.summary + static_cast<size_t>(blockIdx.x) * sample.groups;
    Score* scores = sample.scores + static_cast<size_t>(blockIdx.x) * (1 + sample.top);
    Chooser<T> chooser(raw(sample, all, draw), sample.groups, LOG2_E, scratch, reinterpret_cast<uint8_t*>(shared));
    chooser.look(summary);
    Reporter<T> reporter = {chooser, chooser.most};
    if (isfinite(chooser.most)) reporter.partition += log(static_cast<double>(chooser.sum_all(summary)) / ONE);
    uint32_t token = sample.tokens[blockIdx.x];
    if (threadIdx.x == 0 && draw.candidates == 0)
        scores[0] = {token, reporter.logprob(chooser.logits.at(token)), 1 + sample.before[blockIdx.x]};
    if (want.top == 0) return;
    reporter.list(want.top);
    for (uint32_t i = threadIdx.x; i < want.top; i += THREADS) {
        Amount item = chooser.list[i];
        scores[1 + i] = {static_cast<uint32_t>(item), reporter.logprob(to_logit(Chooser<T>::key_of(item))), 1 + i};
    }
}

#define SAMPLE(name, T)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(SURVEY_THREADS) alter_##name(Sample sample, const T* logits) { alter(sample, logits); } \
    extern "C" __global__ void __launch_bounds__(SURVEY_THREADS) survey_##name(Sample sample, const T* logits) { survey_draw(sample, logits); } \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) choose_##name(Sample sample, const T* logits) { choose_draw(sample, logits); } \
    extern "C" __global__ void __launch_bounds__(SURVEY_THREADS) survey_raw_##name(Sample sample, const T* logits) { survey_raw(sample, logits); } \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) report_##name(Sample sample, const T* logits) { report(sample, logits); }

SAMPLE(f32, float)
SAMPLE(bf16, __nv_bfloat16)
