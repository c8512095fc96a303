// Paged decode attention: one query token a sequence against all its positions.
//
// The work of a launch is a line of tiles of 16 positions: sequence after sequence, KV head after KV head. Every block of the
// grid takes an equal piece of the line, and every warp an equal piece of that, so that nobody waits for a long sequence.
// A (sequence, KV head) that lies across pieces is put together by whoever of its pieces comes last: "split KV" by work, in one
// launch. Each warp keeps its own tiles on their way (bulk copies from sm_90 on, 16-byte copies before).
//
// Scores are computed as K Q^T, 16 positions by 8 query heads, so that the heads that share a KV head fill the small side of the
// matrix instruction; outputs as V^T P^T. The softmax goes along (Milakov and Gimelshein, arXiv 1805.02867); its maximum is
// moved only when a score is more than 2^8 above it.
#include "attention.cuh"
#include "fragments.cuh"
#include "sequences.cuh"
#include "shared_prefix.cuh"

constexpr int TILE = 16;
// Query heads of one matrix instruction.
constexpr int HEADS = 8;
constexpr int WARPS = 4;
// How far above the maximum a score may be, in powers of two.
constexpr float SLACK = 8.0f;

struct Decode {
    KvArena arena;
    const uint32_t* tables;   // [sequences][table_width]
    const uint32_t* lengths;  // [sequences], the query's own position included; 0: no sequence
    const void* queries;      // [sequences][heads][D]
    void* results;            // as queries
    uint32_t sequences;
    uint32_t table_width;
    uint32_t layer;
    uint32_t group;           // query heads a KV head
    uint32_t window;          // 0: none
    float scale;              // of scores, times log2 e unless they are capped
    float soft_cap;           // 0: none
    float* parts;             // [2 grid][HEADS TILES][D + 2]
    uint32_t* arrived;        // [sequences][kv heads], 0 before and after
    PrefixParts prefix;       // null: nothing is shared
};

// What every warp knows of the sequences, in shared memory.
struct Sequences {
    uint32_t* before;   // [sequences + 1], sums of the tiles before each
    uint32_t* lengths;  // [sequences], within the table
    uint32_t* firsts;   // [sequences], the first position that a query sees and that is not of a shared prefix

    __device__ __forceinline__ uint32_t tiles(uint32_t sequence) const {
        return (lengths[sequence] + TILE - 1) / TILE - firsts[sequence] / TILE;
    }
    __device__ __forceinline__ bool is_empty(uint32_t sequence) const { return before[sequence] == before[sequence + 1]; }
};

// Reads the lengths. All threads of the block take part.
__device__ void look(const Decode& decode, Sequences all, uint32_t* scratch) {
    uint32_t most = decode.table_width * decode.arena.block_size;
    for (uint32_t s = threadIdx.x; s < decode.sequences; s += blockDim.x) {
        uint32_t length = min(decode.lengths[s], most), shared = decode.prefix.lengths == nullptr ? 0 : decode.prefix.lengths[s];
        all.lengths[s] = length;
        all.firsts[s] = max(Sight::up_to(length, decode.window).from, min(shared, length));
    }
    __syncthreads();
    sum_before(decode.sequences, all.before, scratch, [&](uint32_t s) { return all.tiles(s); });
}

// A place on the line.
struct Place {
    uint32_t sequence;
    uint32_t head;
    uint32_t tile;   // among the sequence's own
    uint32_t tiles;
    uint32_t first;  // the sequence's first position that is seen
    uint32_t length;

    __device__ __forceinline__ void look(Sequences all) {
        length = all.lengths[sequence];
        first = all.firsts[sequence];
        tiles = all.tiles(sequence);
    }
    __device__ __forceinline__ uint32_t position() const { return (first / TILE + tile) * TILE; }
    __device__ __forceinline__ void enter(const Decode& decode, Sequences all, uint32_t item) {
        sequence = sequence_of(all.before, decode.sequences, item / decode.arena.kv_heads);
        look(all);
        uint32_t offset = item - all.before[sequence] * decode.arena.kv_heads;
        head = offset / tiles;
        tile = offset % tiles;
    }
    // The next tile; beyond the line's end it is none.
    __device__ __forceinline__ void next(const Decode& decode, Sequences all) {
        if (++tile < tiles) return;
        tile = 0;
        if (++head < decode.arena.kv_heads) return;
        head = 0;
        do sequence++; while (sequence < decode.sequences && all.is_empty(sequence));
        if (sequence < decode.sequences) look(all);
    }
};

// Block ids of the tiles that are asked for next: lane `l` knows that of the `l`th.
struct Blocks {
    uint32_t ids;
    uint32_t sequence = ~0u;
    uint32_t from;

    // The block of a position; a bad or absent one: none of the arena's.
    __device__ __forceinline__ uint32_t at(const Decode& decode, uint32_t of, uint32_t index) {
        if (of != sequence || index < from || index >= from + WARP) {
            sequence = of;
            from = index;
            uint32_t mine = index + threadIdx.x % WARP;
            ids = mine < decode.table_width ? decode.tables[static_cast<size_t>(of) * decode.table_width + mine] : ~0u;
        }
        uint32_t id = __shfl_sync(~0u, ids, index - from);
        return id < decode.arena.blocks ? id : ~0u;
    }
};

// What a warp or a block knows of a (sequence, KV head): rows before they are divided by their sums.
template <int D, int ROWS> struct alignas(16) Part {
    float values[ROWS][D];
    float most[ROWS];
    float sum[ROWS];
};

constexpr uint32_t NOTHING = ~0u;

template <typename KV, int D, int N, int STAGES> struct Shared {
    static constexpr int HALF = TILE / ATOM_ROWS * Layout<KV, D>::GROUP;  // K or V of a tile
    alignas(1024) uint8_t tiles[WARPS][STAGES][2][HALF];
    Part<D, N * HEADS> parts[2 * WARPS];
    // Whose the parts are: sequence * kv heads + head.
    uint32_t owners[2 * WARPS];
    uint64_t barriers[WARPS][STAGES];
    uint32_t scratch[WARPS];
    uint32_t is_last;
    uint32_t sequences[1];  // before, lengths and firsts
};

// Makes results of a query head's row, together with what its sequence shares.
template <int D> struct Whole {
    float own, shared = 0;  // what the row's values, and those of the shared part, are multiplied by
    const float* values;

    __device__ __forceinline__ Whole(const Decode& decode, uint32_t sequence, uint32_t head, float most, float sum) {
        own = sum == 0 ? 0 : 1 / sum;
        if (decode.prefix.lengths == nullptr || decode.prefix.lengths[sequence] == 0) return;
        size_t row = static_cast<size_t>(sequence) * decode.arena.kv_heads * decode.group + head;
        float2 part = decode.prefix.sums[row];
        float top = fmaxf(most, part.x), base = top == -INFINITY ? 0 : top;
        own = exp2_fast(most - base);
        shared = exp2_fast(part.x - base);
        float total = own * sum + shared * part.y, factor = total == 0 ? 0 : 1 / total;
        own *= factor;
        shared *= factor;
        values = decode.prefix.values + row * D;
    }
    __device__ __forceinline__ float of(float value, uint32_t dim) const { return own * value + (shared == 0 ? 0 : shared * values[dim]); }
};

// One warp's tiles, from memory to its part of the result.
template <typename T, typename KV, int D, int N, int STAGES> struct Worker {
    using L = Layout<KV, D>;
    using F = Fragments<T, KV, D>;
    using S = Shared<KV, D, N, STAGES>;
    static constexpr int STEPS = D / 16;
    static_assert(STAGES <= 16, "two bits a stage");

    const Decode& decode;
    S& shared;
    Sequences all;
    uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    Blocks blocks;
    // Two bits a stage: rows 0 to 7 or 8 to 15 are of no block.
    uint32_t absent = 0;
    float k_scale, v_scale;
    uint32_t q[N][STEPS][2];
    float out[N][STEPS][4];
    float most[N][2];
    float sum[N][2];

    __device__ __forceinline__ Worker(const Decode& decode, S& shared, Sequences all) : decode(decode), shared(shared), all(all) {}

    __device__ __forceinline__ uint32_t stage_address(uint32_t stage, uint32_t which) {
        return shared_address(shared.tiles[warp][stage][which]);
    }

    // Asks for a tile. The whole warp takes part.
    __device__ __forceinline__ void ask(const Place& place, uint32_t stage) {
        const KvArena& arena = decode.arena;
        uint32_t position = place.position();
        uint32_t rows = min(arena.block_size, static_cast<uint32_t>(TILE));
        uint32_t bytes = rows / ATOM_ROWS * L::GROUP, expected = 0;
        absent &= ~(3u << (2 * stage));
        const uint8_t* from[2] = {nullptr, nullptr};
#pragma unroll
        for (uint32_t piece = 0; piece < 2; piece++) {
            if (piece * rows >= TILE) break;
            uint32_t at = position + piece * rows, id = blocks.at(decode, place.sequence, at / arena.block_size);
            if (id == NOTHING) absent |= (rows == TILE ? 3u : 1u << piece) << (2 * stage);
            else {
                from[piece] = arena.data + L::head(arena, id, decode.layer, 0, place.head) + at % arena.block_size / ATOM_ROWS * L::GROUP;
                expected += 2 * bytes;
            }
        }
        // V lies behind K, so that a block of one tile is one copy.
        uint32_t to_v = arena.block_size / ATOM_ROWS * L::GROUP;
#if BULK_COPIES
        if (lane == 0) {
            uint32_t barrier = shared_address(&shared.barriers[warp][stage]);
            barrier_expect(barrier, expected);
            if (arena.block_size == TILE) {
                if (from[0] != nullptr) bulk_copy<EVICT_FIRST>(stage_address(stage, 0), from[0], 2 * bytes, barrier);
                return;
            }
#pragma unroll
            for (uint32_t piece = 0; piece < 2; piece++)
                if (from[piece] != nullptr) {
                    bulk_copy<EVICT_FIRST>(stage_address(stage, 0) + piece * bytes, from[piece], bytes, barrier);
                    bulk_copy<EVICT_FIRST>(stage_address(stage, 1) + piece * bytes, from[piece] + to_v, bytes, barrier);
                }
        }
#else
#pragma unroll
        for (uint32_t piece = 0; piece < 2; piece++)
            if (from[piece] != nullptr)
                for (uint32_t byte = lane * 16; byte < bytes; byte += WARP * 16) {
                    copy_16(stage_address(stage, 0) + piece * bytes + byte, from[piece] + byte);
                    copy_16(stage_address(stage, 1) + piece * bytes + byte, from[piece] + to_v + byte);
                }
        commit_copies();
#endif
    }

    __device__ __forceinline__ void await(uint32_t stage, uint32_t parity) {
#if BULK_COPIES
        barrier_wait(shared_address(&shared.barriers[warp][stage]), parity);
#else
        wait_for_copies<STAGES - 1>();
#endif
        __syncwarp();
    }

    // Loads the queries of a (sequence, KV head) and forgets what was before.
    __device__ __forceinline__ void begin(const T* queries, const Place& place) {
        uint32_t heads = decode.arena.kv_heads * decode.group;
        const T* rows = queries + (static_cast<size_t>(place.sequence) * heads + place.head * decode.group) * D;
        k_scale = decode.scale * L::scale(decode.arena, decode.layer, 0, place.head);
        v_scale = L::scale(decode.arena, decode.layer, 1, place.head);
#pragma unroll
        for (int n = 0; n < N; n++) {
            uint32_t head = n * HEADS + lane / 4;
#pragma unroll
            for (int step = 0; step < STEPS; step++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const T* pair = rows + head * D + F::k_dim(step, half, lane);
                    q[n][step][half] = head < decode.group ? F::query(*reinterpret_cast<const uint32_t*>(pair)) : 0;
                }
#pragma unroll
            for (int step = 0; step < STEPS; step++)
#pragma unroll
                for (int i = 0; i < 4; i++) out[n][step][i] = 0;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                most[n][i] = -INFINITY;
                sum[n][i] = 0;
            }
        }
    }

    // Scores of the tile: rows are positions `lane / 4` and 8 more, columns heads `lane % 4 * 2` and one more.
    __device__ __forceinline__ void score(uint32_t stage, float (&s)[N][4]) {
        uint32_t k = stage_address(stage, 0);
        float chains[2][N][4] = {};
#pragma unroll
        for (int pair = 0; pair < STEPS / 2; pair++) {
            uint32_t a[2][4];
            F::keys(a, k, 0, pair, lane);
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) multiply<typename F::Number>(chains[i][n], a[i], q[n][2 * pair + i][0], q[n][2 * pair + i][1]);
        }
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[n][i] = k_scale * (chains[0][n][i] + chains[1][n][i]);
        if (decode.soft_cap == 0) return;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[n][i] = capped(decode.soft_cap, s[n][i]);
    }

    // Scores of positions that the query does not see become nothing; what is of no block, or not written yet, is cleared: nothing
    // times what is no number is no number.
    __device__ __forceinline__ void mask(const Place& place, uint32_t stage, float (&s)[N][4]) {
        uint32_t position = place.position(), gone = absent >> (2 * stage) & 3;
        if (gone == 0 && position >= place.first && position + TILE <= place.length) return;
        auto is_seen = [&](uint32_t row) {
            uint32_t at = position + row;
            return at >= place.first && at < place.length && (gone >> (row / ATOM_ROWS) & 1) == 0;
        };
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (!is_seen(lane / 4 + i / 2 * ATOM_ROWS)) s[n][i] = -INFINITY;
        uint32_t row = lane / 2;
        if (!is_seen(row))
            for (uint32_t chunk = lane % 2; chunk < L::ROW / 16; chunk += 2)
                *reinterpret_cast<uint4*>(shared.tiles[warp][stage][1] + L::chunk(row, chunk)) = uint4{0, 0, 0, 0};
        proxy_fence();
        __syncwarp();
    }

    // Makes room for scores far above the maximum, then turns scores into weights.
    __device__ __forceinline__ void weigh(float (&s)[N][4]) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            bool is_above = false;
#pragma unroll
            for (int i = 0; i < 2; i++) is_above |= fmaxf(s[n][i], s[n][i + 2]) > most[n][i] + SLACK;
            if (__any_sync(~0u, is_above)) raise(n, s[n]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float top = most[n][i % 2];
                s[n][i] = exp2_fast(s[n][i] - (top == -INFINITY ? 0 : top));
                sum[n][i % 2] += s[n][i];
            }
        }
    }

    __device__ __forceinline__ void raise(int n, const float (&s)[4]) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float top = fmaxf(fmaxf(s[i], s[i + 2]), most[n][i]);
#pragma unroll
            for (int step = 4; step < WARP; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
            float factor = top == -INFINITY ? 1 : exp2_fast(most[n][i] - top);
            most[n][i] = top;
            sum[n][i] *= factor;
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                out[n][step][i] *= factor;
                out[n][step][i + 2] *= factor;
            }
        }
    }

    __device__ __forceinline__ void attend(const Place& place, uint32_t stage) {
        float s[N][4];
        score(stage, s);
        mask(place, stage, s);
        weigh(s);
        uint32_t weights[N][2];
#pragma unroll
        for (int n = 0; n < N; n++) {
            weights[n][0] = transposed(pack<typename F::Number>(s[n][0], s[n][1]));
            weights[n][1] = transposed(pack<typename F::Number>(s[n][2], s[n][3]));
        }
        uint32_t v = stage_address(stage, 1);
#pragma unroll
        for (int pair = 0; pair < STEPS / 2; pair++) {
            uint32_t a[2][4];
            F::values(a, v, 0, pair, lane);
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) multiply<typename F::Number>(out[n][2 * pair + i], a[i], weights[n][0], weights[n][1]);
        }
    }

    // Sums over the lanes that have other positions.
    __device__ __forceinline__ void close() {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int step = 4; step < WARP; step *= 2) sum[n][i] += __shfl_xor_sync(~0u, sum[n][i], step);
    }

    // For each value of this lane: head, dimension, value, maximum and sum of its head.
    template <typename G> __device__ __forceinline__ void each(G f) {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int step = 0; step < STEPS; step++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    uint32_t head = n * HEADS + lane % 4 * 2 + i % 2;
                    f(head, F::v_dim(step, i / 2, lane / 4), out[n][step][i] * v_scale, most[n][i % 2], sum[n][i % 2]);
                }
    }

    // Makes the results whole with what the sequence shares.
    __device__ __forceinline__ void add_shared(const Place& place) {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t head = n * HEADS + lane % 4 * 2 + i;
                if (head >= decode.group) continue;
                Whole<D> whole(decode, place.sequence, place.head * decode.group + head, most[n][i], sum[n][i]);
#pragma unroll
                for (int step = 0; step < STEPS; step++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float& value = out[n][step][half * 2 + i];
                        value = whole.of(value * v_scale, F::v_dim(step, half, lane / 4));
                    }
                sum[n][i] = 1;
            }
        v_scale = 1;
    }

    __device__ __forceinline__ void write(T* results, const Place& place) {
        uint32_t heads = decode.arena.kv_heads * decode.group;
        T* rows = results + (static_cast<size_t>(place.sequence) * heads + place.head * decode.group) * D;
        if (decode.prefix.lengths != nullptr) add_shared(place);
        each([&](uint32_t head, uint32_t dim, float value, float, float sum) {
            if (head < decode.group) rows[head * D + dim] = from_float<T>(sum == 0 ? 0 : value / sum);
        });
    }

    __device__ __forceinline__ void keep(uint32_t slot, const Place& place) {
        Part<D, N * HEADS>& part = shared.parts[slot];
        each([&](uint32_t head, uint32_t dim, float value, float most, float sum) {
            part.values[head][dim] = value;
            part.most[head] = most;
            part.sum[head] = sum;
        });
        if (lane == 0) shared.owners[slot] = place.sequence * decode.arena.kv_heads + place.head;
    }

    // Goes along the items from `begin_item` to `end`.
    __device__ __forceinline__ void run(const T* queries, T* results, uint32_t begin_item, uint32_t end) {
        if (begin_item == end) return;
        Place asked, place;
        asked.enter(decode, all, begin_item);
        place = asked;
#pragma unroll
        for (int stage = 0; stage < STAGES; stage++) ask_if(begin_item + stage < end, asked, stage);
        uint32_t stage = 0, parity = 0;
        for (uint32_t item = begin_item; item < end; item++) {
            if (item == begin_item || place.tile == 0) begin(queries, place);
            await(stage, parity);
            attend(place, stage);
            __syncwarp();
            ask_if(item + STAGES < end, asked, stage);
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1;
            }
            bool is_over = place.tile + 1 == place.tiles, has_begun = item - begin_item >= place.tile;
            if (is_over || item + 1 == end) {
                close();
                if (is_over && has_begun) write(results, place);
                else keep(2 * warp + has_begun, place);
            }
            place.next(decode, all);
        }
    }

    __device__ __forceinline__ void ask_if(bool is_there, Place& asked, uint32_t stage) {
        if (is_there) {
            ask(asked, stage);
            asked.next(decode, all);
        }
#if !BULK_COPIES
        else commit_copies();
#endif
    }
};

// Puts `count` parts of a (sequence, KV head) together. All threads of the block take part; `each` gets row, dimension, value,
// maximum and sum; `load` reads what is at an address. `factors` is room for (count + 2) rows of numbers.
template <int D, typename P, typename L, typename F>
__device__ __forceinline__ void together(uint32_t rows, uint32_t count, float* factors, P part, L load, F each) {
    uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float* mosts = factors + count * rows;
    float* sums = mosts + rows;
    for (uint32_t row = warp; row < rows; row += WARPS) {
        float most = -INFINITY, sum = 0;
        for (uint32_t i = lane; i < count; i += WARP) most = fmaxf(most, load(&part(i)->most[row]));
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
        for (uint32_t i = lane; i < count; i += WARP) {
            float factor = most == -INFINITY ? 0 : exp2_fast(load(&part(i)->most[row]) - most);
            factors[i * rows + row] = factor;
            sum += factor * load(&part(i)->sum[row]);
        }
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (lane == 0) {
            mosts[row] = most;
            sums[row] = sum;
        }
    }
    __syncthreads();
    for (uint32_t at = threadIdx.x * 4; at < rows * D; at += blockDim.x * 4) {
        uint32_t row = at / D, dim = at % D;
        float4 total = {0, 0, 0, 0};
#pragma unroll 8
        for (uint32_t i = 0; i < count; i++) {
            float factor = factors[i * rows + row];
            float4 value = load(reinterpret_cast<const float4*>(&part(i)->values[row][dim]));
            total.x += factor * value.x;
            total.y += factor * value.y;
            total.z += factor * value.z;
            total.w += factor * value.w;
        }
        each(row, dim, total, mosts[row], sums[row]);
    }
}

template <typename T, int D> __device__ __forceinline__ void store_four(T* row, uint32_t dim, float4 values, const Whole<D>& whole) {
    uint32_t low = pack<T>(whole.of(values.x, dim), whole.of(values.y, dim + 1)), high = pack<T>(whole.of(values.z, dim + 2), whole.of(values.w, dim + 3));
    *reinterpret_cast<uint2*>(row + dim) = {low, high};
}

// The parts of a block's warps, one (sequence, KV head) after the other; what reaches beyond the block goes to memory, and who
// comes last puts it together.
template <typename T, typename KV, int D, int N, int STAGES>
__device__ void finish(const Decode& decode, Shared<KV, D, N, STAGES>& shared, Sequences all, T* results, uint32_t items, uint32_t pieces) {
    using P = Part<D, N * HEADS>;
    uint32_t kv_heads = decode.arena.kv_heads, piece = blockIdx.x;
    uint32_t begin = piece_begin(items, piece, pieces), end = piece_begin(items, piece + 1, pieces);
    P* parts = reinterpret_cast<P*>(decode.parts);
    // Nobody's tiles are on their way any more.
    float* factors = reinterpret_cast<float*>(&shared.tiles);
    for (uint32_t slot = 0; slot < 2 * WARPS;) {
        uint32_t owner = shared.owners[slot];
        if (owner == NOTHING) {
            slot++;
            continue;
        }
        // Those of one owner follow each other, with unused slots between them.
        uint32_t after = slot + 1, members = 1u << slot, count = 1;
        for (; after < 2 * WARPS && (shared.owners[after] == owner || shared.owners[after] == NOTHING); after++)
            if (shared.owners[after] == owner) {
                members |= 1u << after;
                count++;
            }
        slot = after;
        uint32_t sequence = owner / kv_heads, head = owner % kv_heads;
        uint32_t tiles = all.before[sequence + 1] - all.before[sequence];
        uint32_t first = all.before[sequence] * kv_heads + head * tiles, last = first + tiles - 1;
        bool is_whole = first >= begin && last < end;
        T* rows = results + (static_cast<size_t>(sequence) * kv_heads + head) * decode.group * D;
        P& own = parts[2 * piece + (first >= begin)];
        auto mine = [&](uint32_t i) { return &shared.parts[__fns(members, 0, i + 1)]; };
        auto write = [&](uint32_t row, uint32_t dim, float4 value, float most, float sum) {
            store_four(rows + row * D, dim, value, Whole<D>(decode, sequence, head * decode.group + row, most, sum));
        };
        auto keep = [&](uint32_t row, uint32_t dim, float4 value, float most, float sum) {
            if (is_whole) return write(row, dim, value, most, sum);
            *reinterpret_cast<float4*>(&own.values[row][dim]) = value;
            if (dim == 0) {
                own.most[row] = most;
                own.sum[row] = sum;
            }
        };
        together<D>(decode.group, count, factors, mine, [](const auto* at) { return *at; }, keep);
        if (is_whole) {
            __syncthreads();
            continue;
        }
        uint32_t from = piece_of(items, first, pieces), n_parts = piece_of(items, last, pieces) - from + 1;
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            shared.is_last = atomicAdd(&decode.arrived[owner], 1) == n_parts - 1;
            __threadfence();
        }
        __syncthreads();
        if (!shared.is_last) continue;
        auto theirs = [&](uint32_t i) { return &parts[2 * (from + i) + (i == 0)]; };
        // What others wrote is not in this multiprocessor's cache.
        together<D>(decode.group, n_parts, factors, theirs, [](const auto* at) { return __ldcg(at); }, write);
        if (threadIdx.x == 0) decode.arrived[owner] = 0;
        __syncthreads();
    }
}

template <typename T, typename KV, int D, int N, int STAGES>
__device__ __forceinline__ void decode_attention(const Decode& decode) {
    extern __shared__ __align__(1024) uint8_t memory[];
    let_next_begin();
    const T* queries = static_cast<const T*>(decode.queries);
    T* results = static_cast<T*>(decode.results);
    auto& shared = *reinterpret_cast<Shared<KV, D, N, STAGES>*>(memory);
    Sequences all = {shared.sequences, shared.sequences + decode.sequences + 1, shared.sequences + 2 * decode.sequences + 1};
    uint32_t warp = threadIdx.x / WARP, row = decode.arena.kv_heads * decode.group * D;
#if BULK_COPIES
    if (threadIdx.x % WARP == 0)
        for (int stage = 0; stage < STAGES; stage++) barrier_init(shared_address(&shared.barriers[warp][stage]), 1);
    proxy_fence();
#endif
    if (threadIdx.x < 2 * WARPS) shared.owners[threadIdx.x] = NOTHING;
    wait_for_previous();
    look(decode, all, shared.scratch);
    for (uint32_t s = blockIdx.x; s < decode.sequences; s += gridDim.x)
        if (all.is_empty(s))
            for (uint32_t i = threadIdx.x; i < row; i += blockDim.x)
                results[static_cast<size_t>(s) * row + i] = from_float<T>(Whole<D>(decode, s, i / D, -INFINITY, 0).of(0, i % D));
    uint32_t items = all.before[decode.sequences] * decode.arena.kv_heads;
    uint32_t pieces = min(gridDim.x, (items + WARPS - 1) / WARPS);
    if (blockIdx.x >= pieces) return;
    uint32_t begin = piece_begin(items, blockIdx.x, pieces), end = piece_begin(items, blockIdx.x + 1, pieces);
    Worker<T, KV, D, N, STAGES> worker(decode, shared, all);
    worker.run(queries, results, begin + piece_begin(end - begin, warp, WARPS), begin + piece_begin(end - begin, warp + 1, WARPS));
    __syncthreads();
    finish<T>(decode, shared, all, results, items, pieces);
}

#define DECODE(name, T, KV, D, N, STAGES)                                                                   \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP) decode_##name(const __grid_constant__ Decode decode) { \
        decode_attention<T, KV, D, N, STAGES>(decode);                                                      \
    }

// Stages of the largest head; those of 8 bits have as many bytes on their way.
#define DECODE_DTYPE(name, T, KV, STAGES)             \
    DECODE(name##_64_8, T, KV, 64, 1, 4 * STAGES)     \
    DECODE(name##_64_16, T, KV, 64, 2, 4 * STAGES)    \
    DECODE(name##_96_8, T, KV, 96, 1, 2 * STAGES)     \
    DECODE(name##_96_16, T, KV, 96, 2, 2 * STAGES)    \
    DECODE(name##_128_8, T, KV, 128, 1, 2 * STAGES)   \
    DECODE(name##_128_16, T, KV, 128, 2, 2 * STAGES)  \
    DECODE(name##_256_8, T, KV, 256, 1, STAGES)       \
    DECODE(name##_256_16, T, KV, 256, 2, STAGES)

DECODE_DTYPE(bf16, __nv_bfloat16, __nv_bfloat16, 1)
DECODE_DTYPE(bf16_e4m3, __nv_bfloat16, E4m3, 2)
DECODE_DTYPE(f16, __half, __half, 1)
DECODE_DTYPE(f16_e4m3, __half, E4m3, 2)
