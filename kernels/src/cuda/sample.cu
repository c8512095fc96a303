// Tokens from logits. With m a row's largest logit and w(i) = 2^((logit(i) - m) * scale): min-p keeps the logits that reach a bar;
// top-k then the k largest and all equal to the last of them; top-p then the largest whose w first reach top_p of what was kept,
// and all equal to the last of them. The token is the first, in id order, whose running sum of kept w exceeds u times their total.
//
// `alter` writes the logits of rows that bias or penalize. `survey` passes over all logits once and leaves the largest of every
// group of 64 and the sum of the group's w. `choose` has a block for each draw and goes again only through groups that can matter:
// what their largest say bounds the k-th logit and the nucleus from below, and what reaches the bound is listed in shared memory and
// sorted there. Where that is too much, a pass first counts logits in buckets, which says where the boundary probably is. The pass
// that lists what is there and sums what is above it is exact: it tells whether the boundary is there or on which side it is.
// `report` tells log-probabilities.
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
constexpr uint32_t EACH = LIST / THREADS;  // of the list, for each thread
// Steps of a pass whose logits are on their way to the second cache.
constexpr uint32_t AHEAD = 2;

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
    const void* logits;  // [logit_rows][vocab]
    uint32_t logit_rows;
    uint32_t groups;
    uint32_t top;
};

__device__ __forceinline__ bool holds_back(const SamplingRow& state) { return state.output_length < state.min_tokens && state.stops > 0; }
__device__ __forceinline__ bool changes(const Sample& sample, const SamplingRow& state) {
    return sample.altered != nullptr && (state.is_penalized || state.biases > 0 || holds_back(state));
}
// NaN is impossible, as minus infinity.
__device__ __forceinline__ float clean(float logit) { return fmaxf(logit, -INFINITY); }

// Eight logits as they are in memory: what is made of them can wait until they have come.
template <typename T> struct Eight {
    uint4 bits[EIGHT * sizeof(T) / sizeof(uint4)];

    __device__ __forceinline__ T& raw(int i) { return reinterpret_cast<T*>(bits)[i]; }
    __device__ __forceinline__ void get(float (&values)[EIGHT]) {
#pragma unroll
        for (int i = 0; i < EIGHT; i++) values[i] = to_float(raw(i));
    }
};

template <typename T> struct Logits {
    const T* row;
    uint32_t vocab;

    __device__ __forceinline__ float at(uint32_t id) const { return id < vocab ? clean(to_float(row[id])) : -INFINITY; }
    __device__ __forceinline__ bool is_whole(uint32_t id) const {
        return id + EIGHT <= vocab && reinterpret_cast<uintptr_t>(row + id) % 16 == 0;
    }
    __device__ __forceinline__ void fetch(uint32_t id) const { asm volatile("prefetch.global.L2 [%0];" :: "l"(row + id)); }
    // Eight from `id` on, a multiple of eight.
    __device__ __forceinline__ void load(uint32_t id, Eight<T>& to) const {
        if (is_whole(id)) {
#pragma unroll
            for (int i = 0; i < sizeof(to.bits) / sizeof(uint4); i++) to.bits[i] = __ldg(reinterpret_cast<const uint4*>(row + id) + i);
        } else {
#pragma unroll
            for (int i = 0; i < EIGHT; i++) to.raw(i) = id + i < vocab ? row[id + i] : from_float<T>(-INFINITY);
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
template <typename T> __device__ __forceinline__ float2 summarize(Eight<T>& logits, float scale) {
    float values[EIGHT];
    logits.get(values);
    float most = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < EIGHT; i++) {
        values[i] = clean(values[i]);
        most = fmaxf(most, values[i]);
    }
    most = over_group(most, [](float a, float b) { return fmaxf(a, b); });
    if (scale == 0) return {most, 0};
    float base = most == -INFINITY ? 0 : most;
#pragma unroll
    for (int i = 0; i < EIGHT; i++) sum += weight(values[i], base, scale);
    return {most, over_group(sum, [](float a, float b) { return a + b; })};
}

// Grid: pieces, draws.
template <typename T> __device__ __forceinline__ void survey(Logits<T> logits, float scale, float2* summary, uint32_t groups) {
    Eight<T> values[SURVEY_STEPS];
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

// ---- keys: whole numbers in the order of logits

__device__ __forceinline__ uint32_t to_key(float logit) {
    uint32_t bits = __float_as_uint(__fadd_rn(logit, 0.0f));  // -0 is 0
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float to_logit(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// Logits from `low` to `high`, both included.
struct Interval {
    float low, high;
    // The upper half of the numbers that there are in it.
    __device__ __forceinline__ Interval upper_half() const {
        uint32_t first = to_key(low);
        return {to_logit(first + (to_key(high) - first + 1) / 2), high};
    }
};

// An interval in BUCKETS parts of equal width, from its high end down.
struct Buckets {
    Interval in;
    float rate, width;

    __device__ __forceinline__ explicit Buckets(const Interval& in) : in(in) {
        float whole = fminf(fmaxf(in.high - in.low, 1e-30f), -LOWEST);
        width = whole / BUCKETS;
        rate = (BUCKETS - 0.001f) / whole;
    }
    // Where nothing is in the interval it is no bucket.
    __device__ __forceinline__ uint32_t of(float logit) const {
        // Whole numbers are the last bits of floats from 2^23 on: that is faster than a conversion.
        return __float_as_uint(__fadd_rz((in.high - logit) * rate, 8388608.0f)) - __float_as_uint(8388608.0f);
    }
    // A little wider than the bucket, for what is rounded.
    __device__ __forceinline__ Interval part(uint32_t bucket) const {
        float low = in.high - (bucket + 1.01f) * width, high = in.high - (bucket - 0.01f) * width;
        return {bucket == BUCKETS - 1 ? in.low : fmaxf(low, in.low), fmaxf(fminf(high, in.high), in.low)};
    }
};

// ---- what a block does together; all of its threads call these

struct Scratch {
    alignas(16) Amount list[LIST];  // ~key and id
    uint32_t buckets[BUCKETS + WARP];  // the last: for what is in none
    Amount warps[WARPS];
    float floats[WARPS];
    Amount reached;
    Interval part;
    uint32_t listed, first, reaching;
};
__shared__ Scratch scratch;
extern __shared__ Amount sums[];  // [groups], of what is kept; then what else is kept of groups

template <typename F> __device__ __forceinline__ float over_block(float value, F together) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value = together(value, __shfl_xor_sync(~0u, value, step));
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch.floats[threadIdx.x / WARP] = value;
    __syncthreads();
    value = scratch.floats[0];
#pragma unroll
    for (int warp = 1; warp < WARPS; warp++) value = together(value, scratch.floats[warp]);
    return value;
}
__device__ __forceinline__ float block_most(float value) {
    return over_block(value, [](float a, float b) { return fmaxf(a, b); });
}
__device__ __forceinline__ float block_least(float value) {
    return over_block(value, [](float a, float b) { return fminf(a, b); });
}

template <typename V> __device__ __forceinline__ V warp_sums(V value) {
    uint32_t lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        V other = __shfl_up_sync(~0u, value, step);
        if (lane >= step) value += other;
    }
    return value;
}

// The sum of the values of the threads before this one; `total`: of all.
template <typename V> __device__ __forceinline__ V block_before(V value, V& total) {
    V sum = warp_sums(value), before = sum - value;
    __syncthreads();
    if (threadIdx.x % WARP == WARP - 1) scratch.warps[threadIdx.x / WARP] = sum;
    __syncthreads();
    total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
        if (warp == threadIdx.x / WARP) before += total;
        total += static_cast<V>(scratch.warps[warp]);
    }
    return before;
}

template <typename V> __device__ __forceinline__ V block_total(V value) {
    V total;
    block_before(value, total);
    return total;
}

// ---- choose

enum Kind { COUNT, WEIGHT };

// What was seen of an interval, of a kind.
struct Gathered {
    uint32_t listed;
    Amount above, inside;
    Interval seen;
};

// Where a boundary is.
struct Boundary {
    float bar;        // all that reaches it is kept
    uint32_t listed;  // so many are listed, of which some reach the bar
    bool is_whole;    // none of what is kept is not listed
};

template <typename T> struct Chooser {
    Logits<T> logits;
    uint32_t groups;
    float scale, most;

    __device__ __forceinline__ float* maxima() const { return reinterpret_cast<float*>(sums + groups); }
    // Those that are gone through.
    __device__ __forceinline__ uint16_t* reaching() const { return reinterpret_cast<uint16_t*>(maxima() + groups); }

    // Reads the survey: the sums as they are.
    __device__ void look(const float2* summary) {
        constexpr uint32_t AT_ONCE = 4;
        float own = -INFINITY;
        for (uint32_t base = threadIdx.x; base < groups; base += AT_ONCE * THREADS) {
            float2 read[AT_ONCE];
#pragma unroll
            for (uint32_t i = 0; i < AT_ONCE; i++) read[i] = __ldg(summary + min(base + i * THREADS, groups - 1));
#pragma unroll
            for (uint32_t i = 0; i < AT_ONCE; i++) {
                uint32_t group = base + i * THREADS;
                if (group >= groups) break;
                maxima()[group] = read[i].x;
                sums[group] = __float_as_uint(read[i].y);
                own = fmaxf(own, read[i].x);
            }
        }
        most = block_most(own);
    }

    __device__ __forceinline__ Amount amount(float logit) const { return __float2ull_rn(weight(logit, most, scale) * ONE); }
    __device__ __forceinline__ static float logit_of(Amount item) { return to_logit(~static_cast<uint32_t>(item >> 32)); }

    // Sums of all logits' w, by group, of the survey that was read last. `most` is finite.
    __device__ Amount sum_all() {
        Amount own = 0;
        for (uint32_t group = threadIdx.x; group < groups; group += THREADS) {
            float sum = __uint_as_float(sums[group]);
            sums[group] = __float2ull_rn(sum * weight(maxima()[group], most, scale) * ONE);
            own += sums[group];
        }
        return block_total(own);
    }

    // The lowest id of the largest logit; 0 when nothing is possible. In thread 0.
    __device__ uint32_t most_likely() {
        if (most == -INFINITY) return 0;
        if (threadIdx.x == 0) scratch.first = NONE;
        __syncthreads();
        for (uint32_t group = threadIdx.x; group < groups; group += THREADS)
            if (maxima()[group] == most) atomicMin(&scratch.first, group);
        __syncthreads();
        if (threadIdx.x >= WARP) return 0;
        uint32_t first = scratch.first * GROUP;
        float own[2] = {logits.at(first + threadIdx.x), logits.at(first + WARP + threadIdx.x)};
        uint32_t low = __ballot_sync(~0u, own[0] == most), high = __ballot_sync(~0u, own[1] == most);
        return first + (low ? __ffs(low) - 1 : WARP + __ffs(high) - 1);
    }

    // ---- going through the groups that can matter

    // Lists the groups of which a logit reaches `low`, and forgets all sums. How many there are.
    __device__ __noinline__ uint32_t list_groups(float low) {
        __syncthreads();
        if (threadIdx.x == 0) scratch.reaching = 0;
        __syncthreads();
        Chooser own = *this;  // in registers
#pragma unroll 4
        for (uint32_t group = threadIdx.x; group < own.groups; group += THREADS) {
            sums[group] = 0;
            if (own.maxima()[group] >= low) own.reaching()[atomicAdd(&scratch.reaching, 1u)] = group;
        }
        __syncthreads();
        return scratch.reaching;
    }

    // Calls `each(values, id)` with eight logits of the `count` listed groups at a time, all threads of a warp together; where
    // there are none they are impossible, as NaN is, and `id` is of no group.
    template <typename F> __device__ __forceinline__ void for_eights(uint32_t count, F each) {
        constexpr uint32_t LANES = GROUP / EIGHT, STEP = THREADS / LANES;
        Eight<T> next;
        float values[EIGHT];
        uint32_t first = threadIdx.x / WARP * (WARP / LANES), own = threadIdx.x % WARP / LANES, offset = threadIdx.x % LANES * EIGHT;
        auto id_of = [&](uint32_t index) { return index < count ? reaching()[index] * GROUP + offset : groups * GROUP; };
        auto fetch = [&](uint32_t index) {
            if (index < count) logits.fetch(id_of(index));
        };
        for (uint32_t step = 0; step < AHEAD; step++) fetch(first + step * STEP + own);
        logits.load(id_of(first + own), next);
        for (uint32_t at = first; at < count; at += STEP) {
            fetch(at + AHEAD * STEP + own);
            next.get(values);
            // The next are on their way while these are worked on.
            logits.load(id_of(at + STEP + own), next);
            each(values, id_of(at + own));
        }
    }

    // ---- where a boundary is, guessed: what is gathered then tells

    // Weights are counted in parts of 2^31 of what there is, so that a bucket is one word: how many are 1, as a power of two.
    template <Kind KIND> __device__ __forceinline__ static float units_of(Amount all) {
        return KIND == COUNT ? 0 : 71 - log2f(static_cast<float>(all));
    }
    template <Kind KIND> __device__ __forceinline__ uint32_t units(float logit, float one) const {
        return KIND == COUNT ? 1 : __float2uint_rn(exp2_fast(__fmaf_rn(logit - most, scale, one)));
    }
    template <Kind KIND> __device__ __forceinline__ static uint32_t to_units(Amount wanted, float one) {
        return KIND == COUNT ? wanted : max(__float2uint_rn(static_cast<float>(wanted) / ONE * exp2f(one)), 1u);
    }

    __device__ __forceinline__ void clear_buckets() {
        for (uint32_t i = threadIdx.x; i < BUCKETS; i += THREADS) scratch.buckets[i] = 0;
    }

    // The part in whose bucket the units come to `wanted`; when they do not before their total, which is given too, from there down.
    __device__ Interval part_of(const Buckets& of, uint32_t wanted, uint32_t& total) {
        __syncthreads();
        uint32_t first = 2 * threadIdx.x, own[2] = {scratch.buckets[first], scratch.buckets[first + 1]};
        if (threadIdx.x == 0) scratch.part = of.in;
        uint32_t before = block_before(own[0] + own[1], total);
        wanted = min(wanted, total);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (before < wanted && before + own[i] >= wanted) scratch.part = of.part(first + i);
            before += own[i];
        }
        __syncthreads();
        return {wanted < total ? scratch.part.low : of.in.low, scratch.part.high};
    }

    // Of what reaches `low`: where the groups' largest come to `wanted` of `all`, which is no more than where all logits do.
    template <Kind KIND> __device__ __noinline__ float bound(float low, Amount wanted, Amount all) {
        float least = most, one = units_of<KIND>(all);
        for (uint32_t group = threadIdx.x; group < groups; group += THREADS)
            if (maxima()[group] >= low) least = fminf(least, maxima()[group]);
        clear_buckets();
        Buckets of({block_least(least), most});
        for (uint32_t group = threadIdx.x; group < groups; group += THREADS)
            if (maxima()[group] >= low) atomicAdd(scratch.buckets + min(of.of(maxima()[group]), BUCKETS - 1), units<KIND>(maxima()[group], one));
        uint32_t total, needed = to_units<KIND>(wanted, one);
        Interval part = part_of(of, needed, total);
        // When the largest of more groups than are listed at once are equal all logits may be.
        bool are_equal = of.in.low == most && total / (LIST / 2) > units<KIND>(most, one);
        return are_equal ? most : total < needed ? low : part.low;
    }

    // A part of the interval, which comes to `all`: where the largest probably come to `wanted`, and so many times as much on
    // either side of it.
    template <Kind KIND> __device__ __noinline__ Interval likely(Interval in, Amount wanted, Amount all, uint32_t beside) {
        Chooser own = *this;  // in registers
        Buckets of(in);
        float one = units_of<KIND>(all);
        uint32_t none = BUCKETS + threadIdx.x % WARP, total;
        clear_buckets();
        own.for_eights(list_groups(in.low), [&](const float (&values)[EIGHT], uint32_t) {
#pragma unroll
            for (int i = 0; i < EIGHT; i++)  // without a branch
                atomicAdd(scratch.buckets + min(of.of(values[i]), none), own.units<KIND>(values[i], one));
        });
        Interval part = part_of(of, to_units<KIND>(wanted, one), total);
        float more = beside * (part.high - part.low);
        part = {fmaxf(part.low - more, in.low), fminf(part.high + more, in.high)};
        // Where all of it was too much to list it must be less.
        return beside > 0 || part.low > in.low || part.high < in.high ? part : in.upper_half();
    }

    // ---- listing an interval

    // Lists what `count` listed groups have in the interval, and sums by group what is above it.
    template <Kind KIND> __device__ __noinline__ Gathered gather(Interval in, uint32_t count) {
        Chooser own = *this;  // in registers
        Gathered got = {0, 0, 0, {INFINITY, -INFINITY}};
        if (threadIdx.x == 0) scratch.listed = 0;
        __syncthreads();
        own.for_eights(count, [&](const float (&values)[EIGHT], uint32_t id) {
            Amount above = 0;
            uint32_t found = 0;
#pragma unroll
            for (int i = 0; i < EIGHT; i++) {
                bool is_above = values[i] > in.high;
                above += is_above ? own.amount(values[i]) : 0;
                if (KIND == COUNT) got.above += is_above;
                found |= (values[i] >= in.low && !is_above) << i;
            }
            if (found > 0) own.list<KIND>(got, found, id);
            if (KIND == WEIGHT) got.above += above;
            above = over_group(above, [](Amount a, Amount b) { return a + b; });
            if (id % GROUP == 0 && id / GROUP < own.groups) sums[id / GROUP] = above;
        });
        got.above = block_total(got.above);
        got.inside = block_total(got.inside);
        got.listed = scratch.listed;
        if (got.listed > LIST) got.seen = {block_least(got.seen.low), block_most(got.seen.high)};
        return got;
    }
    // Lists those of the eight logits from `id` on whose bits are set.
    template <Kind KIND> __device__ __forceinline__ void list(Gathered& got, uint32_t found, uint32_t id) const {
        uint32_t place = atomicAdd(&scratch.listed, __popc(found));
        for (; found > 0; found &= found - 1, place++) {
            uint32_t one = id + __ffs(found) - 1;
            float logit = logits.at(one);
            if (place < LIST) scratch.list[place] = static_cast<Amount>(~to_key(logit)) << 32 | one;
            got.inside += KIND == COUNT ? 1 : amount(logit);
            got.seen = {fminf(got.seen.low, logit), fmaxf(got.seen.high, logit)};
        }
    }
    // Sums by group what reaches `low`; what it comes to.
    __device__ Amount sum_reaching(float low) { return gather<WEIGHT>({low, nextafterf(low, -INFINITY)}, list_groups(low)).above; }

    // Sorts the list, the largest first, equal ones in id order: each goes where as many are before it.
    __device__ __noinline__ void sort(uint32_t count) {
        Amount own[EACH];
        uint32_t place[EACH];
        if (threadIdx.x == 0 && count % 2 > 0) scratch.list[count] = ~0ull;
        __syncthreads();
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) {
            place[i] = 0;
            if (threadIdx.x + i * THREADS >= count) break;
            own[i] = scratch.list[threadIdx.x + i * THREADS];
            for (uint32_t j = 0; j < count; j += 2) {
                ulonglong2 two = *reinterpret_cast<const ulonglong2*>(scratch.list + j);
                place[i] += (two.x < own[i]) + (two.y < own[i]);
            }
        }
        __syncthreads();
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++)
            if (threadIdx.x + i * THREADS < count) scratch.list[place[i]] = own[i];
        __syncthreads();
    }

    // Of the sorted list's first `count`, which come to a total: the first with which they come to `wanted_of(total)`, or the last.
    template <typename F> __device__ float reach_in_list(uint32_t count, F wanted_of) {
        uint32_t first = threadIdx.x * EACH;
        Amount own[EACH], sum = 0, total;
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) {
            own[i] = first + i < count ? amount(logit_of(scratch.list[first + i])) : 0;
            sum += own[i];
        }
        if (threadIdx.x == 0) scratch.first = count - 1;
        Amount before = block_before(sum, total), wanted = wanted_of(total);
#pragma unroll
        for (uint32_t i = 0; i < EACH; i++) {
            if (before < wanted && before + own[i] >= wanted) scratch.first = first + i;
            before += own[i];
        }
        __syncthreads();
        return logit_of(scratch.list[scratch.first]);
    }

    // How many of the sorted list reach `bar`.
    __device__ uint32_t count_reaching(uint32_t count, float bar) {
        uint32_t low = 0, high = count;
        while (low < high) {
            uint32_t middle = (low + high) / 2;
            if (logit_of(scratch.list[middle]) >= bar) low = middle + 1;
            else high = middle;
        }
        return low;
    }

    // Adds what of the list reaches `bar` to the sums of its groups.
    __device__ void add_list(uint32_t count, float bar) {
        for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
            float logit = logit_of(scratch.list[i]);
            if (logit >= bar) atomicAdd(sums + static_cast<uint32_t>(scratch.list[i]) / GROUP, amount(logit));
        }
        __syncthreads();
    }

    // ---- where a boundary is

    // The smallest of the largest logits that come to `wanted`, of those that reach `low` and come to `all`; `low` when all of
    // them do not. Leaves what is near in the list, sorted, and what is above that in `sums`. `guess`: where to look first.
    template <Kind KIND> __device__ __noinline__ Boundary select(float low, float guess, Amount wanted, Amount all) {
        Interval in = {low, most}, part = {guess, most};
        Amount reached = 0;
        uint32_t count = list_groups(guess), beside = 0;
        // Groups that reach a bound have about two logits that do.
        if (count > LIST / 2 && guess < most) count = list_groups((part = likely<KIND>(in, wanted, all, beside)).low);
        for (;;) {
            Gathered got = gather<KIND>(part, count);
            Amount through = got.above + got.inside;
            // Each time that it is not there more is looked at, so that it is soon.
            if (got.above >= wanted) {
                in.low = nextafterf(part.high, INFINITY), all = got.above, beside = 2 * beside + 1;
            } else if (through < wanted) {
                if (part.low <= low) return all_reaching(low);
                in.high = nextafterf(part.low, -INFINITY), reached = through, beside = 2 * beside + 1;
            } else if (got.listed <= LIST) {
                return in_list<KIND>(got, part, wanted);
            } else {
                in = got.seen, reached = got.above, all = through, beside = 0;
            }
            if (in.low == in.high) return all_reaching(in.low);
            Amount left = max(all, reached) - reached + (all >> 20) + 1;
            count = list_groups((part = likely<KIND>(in, wanted - reached, left, beside)).low);
        }
    }
    __device__ Boundary all_reaching(float bar) {
        sum_reaching(bar);
        return {bar, 0, false};
    }
    template <Kind KIND> __device__ Boundary in_list(const Gathered& got, const Interval& part, Amount wanted) {
        sort(got.listed);
        wanted -= got.above;
        float bar = KIND == COUNT ? logit_of(scratch.list[wanted - 1]) : reach_in_list(got.listed, [&](Amount) { return wanted; });
        return {bar, got.listed, part.high >= most};
    }

    // ---- what is kept

    __device__ Amount total_of_sums() {
        Amount own = 0;
        for (uint32_t group = threadIdx.x; group < groups; group += THREADS) own += sums[group];
        return block_total(own);
    }

    __device__ __forceinline__ static Amount share(Amount total, float part) {
        Amount wanted = static_cast<Amount>(ceil(static_cast<double>(total) * part));
        return max(min(wanted, total), static_cast<Amount>(1));
    }

    // Nothing below this can be in the nucleus: all that is comes to less than what the nucleus leaves out. As on the CPU.
    __device__ __forceinline__ float nucleus_floor(float low, Amount total, Amount wanted) const {
        float least = static_cast<float>(total - wanted) / ONE / logits.vocab;
        return fmaxf(low, most + log2f(least) / scale - 1e-3f);
    }

    // Leaves in `sums` what the filters keep; the smallest of it.
    __device__ float keep(const SamplingRow& state) {
        float low = fmaxf(fmaxf(most + state.least, most - DEPTH / scale), LOWEST);
        if (state.top_k > 0 && state.top_k < logits.vocab) return keep_top_k(low, state.top_k, state.top_p);
        bool keeps_all = state.least == -INFINITY;
        Amount total = keeps_all ? sum_all() : sum_reaching(low);
        if (state.top_p < 1) return keep_nucleus(low, total, state.top_p);
        return keeps_all ? -INFINITY : low;
    }
    __device__ float keep_top_k(float low, uint32_t k, float top_p) {
        Boundary found = select<COUNT>(low, bound<COUNT>(low, k, k), k, k);
        if (top_p < 1 && found.is_whole) {
            uint32_t count = count_reaching(found.listed, found.bar);
            found.bar = reach_in_list(count, [&](Amount total) { return share(total, top_p); });
        }
        add_list(found.listed, found.bar);
        return top_p < 1 && !found.is_whole ? keep_nucleus(found.bar, total_of_sums(), top_p) : found.bar;
    }
    // Of what reaches `low` and comes to `total`.
    __device__ float keep_nucleus(float low, Amount total, float top_p) {
        Amount wanted = share(total, top_p);
        low = nucleus_floor(low, total, wanted);
        Boundary found = select<WEIGHT>(low, bound<WEIGHT>(low, wanted, total), wanted, total);
        add_list(found.listed, found.bar);
        return found.bar;
    }

    // ---- the draw

    // The first token that reaches `bar` and whose running sum exceeds u of the total. In warp 0.
    __device__ uint32_t draw(float bar, uint32_t bits) {
        uint32_t each = (groups + THREADS - 1) / THREADS, first = min(threadIdx.x * each, groups), last = min(first + each, groups);
        Amount own = 0, total;
        __syncthreads();
        for (uint32_t group = first; group < last; group++) own += sums[group];
        Amount before = block_before(own, total);
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
    __device__ uint32_t draw_of_group(uint32_t group, float bar, Amount target) {
        uint32_t begin = group * GROUP, last = begin;
        float values[2] = {logits.at(begin + threadIdx.x), logits.at(begin + WARP + threadIdx.x)};
        Amount running = 0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t first = begin + half * WARP;
            Amount own = values[half] >= bar ? amount(values[half]) : 0, sum = running + warp_sums(own);
            uint32_t beyond = __ballot_sync(~0u, own > 0 && sum > target), possible = __ballot_sync(~0u, own > 0);
            if (beyond) return first + __ffs(beyond) - 1;
            // Where rounding leaves the sum short it is the last.
            if (possible) last = first + 31 - __clz(possible);
            running = __shfl_sync(~0u, sum, WARP - 1);
        }
        return last;
    }
};

template <typename T>
__device__ __noinline__ uint32_t choose(Logits<T> logits, const SamplingRow& state, const float2* summary, uint32_t groups) {
    Chooser<T> chooser = {logits, groups, state.scale};
    chooser.look(summary);
    if (state.scale == 0 || !isfinite(chooser.most)) return chooser.most_likely();
    return chooser.draw(chooser.keep(state), uniform_bits(state));
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
    Draw draw = sample.draws[blockIdx.x];
    uint32_t token = 0;
    if (draw.logits < sample.logit_rows && draw.candidates == 0) {
        SamplingRow state = sample.rows.state(draw.row);
        const float2* summary = sample.summary + static_cast<size_t>(blockIdx.x) * sample.groups;
        if (changes(sample, state)) {
            Logits<float> logits = {altered_row(sample, blockIdx.x), sample.rows.vocab};
            token = choose(logits, state, summary, sample.groups);
        } else {
            token = choose(raw(sample, all, draw), state, summary, sample.groups);
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

    // Appends the tokens of this logit to the list, in id order, until it holds `wanted`; how many it holds then.
    __device__ uint32_t append(float logit, uint32_t held, uint32_t wanted) {
        for (uint32_t base = 0; base < chooser.logits.vocab && held < wanted; base += THREADS) {
            uint32_t id = base + threadIdx.x, total;
            uint32_t is_one = id < chooser.logits.vocab && chooser.logits.at(id) == logit;
            uint32_t place = held + block_before(is_one, total);
            if (is_one && place < wanted) scratch.list[place] = static_cast<Amount>(~to_key(logit)) << 32 | id;
            held = min(held + total, wanted);
        }
        return held;
    }

    // Lists the most likely, best first, equal ones in id order.
    __device__ void list(uint32_t wanted) {
        uint32_t held = 0;
        if (chooser.most > -INFINITY) {
            float guess = chooser.template bound<COUNT>(LOWEST, wanted, wanted);
            Boundary found = chooser.template select<COUNT>(LOWEST, guess, wanted, wanted);
            if (found.is_whole) return;
            // Fewer than are wanted are above the bar.
            Interval above = {nextafterf(found.bar, INFINITY), INFINITY};
            held = chooser.template gather<COUNT>(above, chooser.list_groups(above.low)).listed;
            chooser.sort(held);
            held = append(found.bar, held, wanted);
        }
        append(-INFINITY, held, wanted);
        __syncthreads();
    }
};

// Grid: draws.
template <typename T> __device__ __forceinline__ void report(const Sample& sample, const T* all) {
    Draw draw = sample.draws[blockIdx.x];
    Wanted want = wanted(sample, draw);
    if (!want.is_wanted) return;
    const float2* summary = sample.summary + static_cast<size_t>(blockIdx.x) * sample.groups;
    Score* scores = sample.scores + static_cast<size_t>(blockIdx.x) * (1 + sample.top);
    Chooser<T> chooser = {raw(sample, all, draw), sample.groups, LOG2_E};
    chooser.look(summary);
    Reporter<T> reporter = {chooser, chooser.most};
    if (isfinite(chooser.most)) reporter.partition += log(static_cast<double>(chooser.sum_all()) / ONE);
    uint32_t token = sample.tokens[blockIdx.x];
    if (threadIdx.x == 0 && draw.candidates == 0)
        scores[0] = {token, reporter.logprob(chooser.logits.at(token)), 1 + sample.before[blockIdx.x]};
    if (want.top == 0) return;
    reporter.list(want.top);
    for (uint32_t i = threadIdx.x; i < want.top; i += THREADS) {
        Amount item = scratch.list[i];
        scores[1 + i] = {static_cast<uint32_t>(item), reporter.logprob(Chooser<T>::logit_of(item)), 1 + i};
    }
}

#define KERNEL(name, body, T, NEXT, ...)                                                                         \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name(const __grid_constant__ Sample sample) {     \
        NEXT;                                                                                                    \
        wait_for_previous();                                                                                     \
        body(sample, static_cast<const T*>(sample.logits));                                                      \
    }
// What follows a kernel of one block a draw begins after its end: beside it, log-probabilities took 10 us more (PERFORMANCE.md).
#define SAMPLE(name, T)                                                          \
    KERNEL(alter_##name, alter, T, let_next_begin(), SURVEY_THREADS)             \
    KERNEL(survey_##name, survey_draw, T, let_next_begin(), SURVEY_THREADS)      \
    KERNEL(choose_##name, choose_draw, T, , THREADS, 2)                          \
    KERNEL(survey_raw_##name, survey_raw, T, let_next_begin(), SURVEY_THREADS)   \
    KERNEL(report_##name, report, T, , THREADS, 2)

SAMPLE(f32, float)
SAMPLE(bf16, __nv_bfloat16)
SAMPLE(f16, __half)
