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
// As many as leave a block room in the shared memory of sm_86 and sm_89, 99 KiB, where there is no more.
constexpr int WARPS = BULK_COPIES ? 4 : 2;
// How far above the maximum a score may be, in powers of two.
constexpr float SLACK = 8.0f;

// A sequence has one token.
struct Decode : Attention {
    const uint32_t* lengths;  // [sequences], the query's own position included; 0: no sequence
    void* results;            // as queries
    uint32_t sequences;
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
    Counted mine(decode.sequences);
#pragma unroll 1
    for (uint32_t s = mine.from; s < mine.to; s++) {
        uint32_t length = min(decode.lengths[s], most), shared = decode.prefix.lengths == nullptr ? 0 : decode.prefix.lengths[s];
        all.lengths[s] = length;
        all.firsts[s] = max(Sight::up_to(length, decode.window).from, min(shared, length));
    }
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
    // Owners that reach beyond the block, at its begin and at its end; then those of which this block is the last.
    uint32_t crossing[2];
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
    // Blocks have a power of two of positions.
    uint32_t block_shift = __ffs(decode.arena.block_size) - 1;
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
            uint32_t at = position + piece * rows, id = blocks.at(decode, place.sequence, at >> block_shift);
            if (id == NOTHING) absent |= (rows == TILE ? 3u : 1u << piece) << (2 * stage);
            else {
                from[piece] = arena.data + L::head(arena, id, decode.layer, 0, place.head) + at % (1u << block_shift) / ATOM_ROWS * L::GROUP;
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

    __device__ __forceinline__ void await(Stage stage) {
#if BULK_COPIES
        barrier_wait(shared_address(&shared.barriers[warp][stage.index]), stage.parity);
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

    // Writes results, whole with what the sequence shares.
    __device__ __forceinline__ void write(T* results, const Place& place) {
        uint32_t heads = decode.arena.kv_heads * decode.group;
        T* rows = results + (static_cast<size_t>(place.sequence) * heads + place.head * decode.group) * D;
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
                        uint32_t dim = F::v_dim(step, half, lane / 4);
                        rows[head * D + dim] = from_float<T>(whole.of(out[n][step][half * 2 + i] * v_scale, dim));
                    }
            }
    }

    __device__ __forceinline__ void keep(uint32_t slot, const Place& place) {
        Part<D, N * HEADS>& part = shared.parts[slot];
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t head = n * HEADS + lane % 4 * 2 + i;
                part.most[head] = most[n][i];
                part.sum[head] = sum[n][i];
#pragma unroll
                for (int step = 0; step < STEPS; step++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        part.values[head][F::v_dim(step, half, lane / 4)] = out[n][step][half * 2 + i] * v_scale;
            }
        if (lane == 0) shared.owners[slot] = place.sequence * decode.arena.kv_heads + place.head;
    }

    // Goes along the items from `begin_item` to `end`, which are asked for STAGES before they are attended to. There is one place
    // for either: code that runs but a few times takes as long to fetch as to run.
    __device__ __forceinline__ void run(const T* queries, T* results, uint32_t begin_item, uint32_t end) {
        if (begin_item == end) return;
        Place asked, place;
        asked.enter(decode, all, begin_item);
        place = asked;
        // The first round only asks.
        Stage stage = {0, 1};
#pragma unroll 1
        for (uint32_t asking = begin_item; asking < end + STAGES; asking++) {
            uint32_t item = asking - STAGES;
            bool is_there = asking >= begin_item + STAGES;
            if (is_there) {
                if (item == begin_item || place.tile == 0) begin(queries, place);
                await(stage);
                attend(place, stage.index);
                __syncwarp();
            }
            ask_if(asking < end, asked, stage.index);
            stage.next(STAGES);
            if (!is_there) continue;
            leave_if(item + 1 == end, results, place, item - begin_item);
            place.next(decode, all);
        }
    }

    // What belongs to a (sequence, KV head) is left behind at its last tile, and at the last of the items. `before`: items before this.
    __device__ __forceinline__ void leave_if(bool is_last, T* results, const Place& place, uint32_t before) {
        bool is_over = place.tile + 1 == place.tiles, has_begun = before >= place.tile;
        if (!is_over && !is_last) return;
        close();
        if (is_over && has_begun) write(results, place);
        else keep(2 * warp + has_begun, place);
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

// A row as its parts are put together, by one warp: a lane has four values of each 128.
template <int D> struct Row {
    static constexpr int FOURS = (D + 127) / 128;
    float4 values[FOURS] = {};
    float most = -INFINITY;
    float sum = 0;

    static __device__ __forceinline__ uint32_t dim(int four) { return four * 128 + threadIdx.x % WARP * 4; }

    // Adds those of BATCH parts whose bits are set. `load` reads what is at an address; all of it is on its way at once.
    template <int BATCH, typename P, typename L> __device__ __forceinline__ void add(uint32_t there, uint32_t row, P part, L load) {
        uint32_t lane = threadIdx.x % WARP;
        bool is_there = there >> lane & 1;
        float own_most = is_there ? load(&part(lane)->most[row]) : -INFINITY, own_sum = is_there ? load(&part(lane)->sum[row]) : 0;
        float4 read[BATCH][FOURS];
#pragma unroll
        for (int i = 0; i < BATCH; i++)
#pragma unroll
            for (int four = 0; four < FOURS; four++) {
                bool is_read = (there >> i & 1) && dim(four) < D;
                read[i][four] = is_read ? load(reinterpret_cast<const float4*>(&part(i)->values[row][dim(four)])) : float4{0, 0, 0, 0};
            }
        float factor = rebase(own_most, own_sum);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            float of_part = __shfl_sync(~0u, factor, i);
#pragma unroll
            for (int four = 0; four < FOURS; four++) {
                values[four].x += of_part * read[i][four].x;
                values[four].y += of_part * read[i][four].y;
                values[four].z += of_part * read[i][four].z;
                values[four].w += of_part * read[i][four].w;
            }
        }
    }

    // Takes the maximum and sum of each lane's part in; what that part is to be multiplied by.
    __device__ __forceinline__ float rebase(float own_most, float own_sum) {
        float top = fmaxf(most, own_most);
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
        float base = top == -INFINITY ? 0 : top, factor = exp2_fast(own_most - base), before = exp2_fast(most - base);
        float added = factor * own_sum;
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) added += __shfl_xor_sync(~0u, added, step);
        most = top;
        sum = sum * before + added;
#pragma unroll
        for (float4& value : values) value = {value.x * before, value.y * before, value.z * before, value.w * before};
        return factor;
    }

    template <int ROWS> __device__ __forceinline__ void keep(Part<D, ROWS>& part, uint32_t row) const {
#pragma unroll
        for (int four = 0; four < FOURS; four++)
            if (dim(four) < D) *reinterpret_cast<float4*>(&part.values[row][dim(four)]) = values[four];
        if (threadIdx.x % WARP > 0) return;
        part.most[row] = most;
        part.sum[row] = sum;
    }
    // `head`: among all query heads.
    template <typename T> __device__ __forceinline__ void write(const Decode& decode, T* results, uint32_t sequence, uint32_t head) const {
        Whole<D> whole(decode, sequence, head, most, sum);
        T* row = results + (static_cast<size_t>(sequence) * decode.arena.kv_heads * decode.group + head) * D;
#pragma unroll
        for (int four = 0; four < FOURS; four++) {
            uint32_t at = dim(four);
            if (at >= D) continue;
            float4 value = {whole.of(values[four].x, at), whole.of(values[four].y, at + 1), whole.of(values[four].z, at + 2), whole.of(values[four].w, at + 3)};
            *reinterpret_cast<uint2*>(row + at) = {pack<T>(value.x, value.y), pack<T>(value.z, value.w)};
        }
    }
};

// Where the tiles of a (sequence, KV head) are on the line.
struct Owner {
    uint32_t sequence;
    uint32_t head;
    uint32_t first;
    uint32_t last;

    __device__ __forceinline__ Owner(Sequences all, uint32_t kv_heads, uint32_t index) : sequence(index / kv_heads), head(index % kv_heads) {
        uint32_t tiles = all.before[sequence + 1] - all.before[sequence];
        first = all.before[sequence] * kv_heads + head * tiles;
        last = first + tiles - 1;
    }
};

// Counts this block among those that have left their part of something; what was there before.
__device__ __forceinline__ uint32_t arrive(uint32_t* count) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(__cvta_generic_to_global(count)) : "memory");
    return before;
}

// The ends of a block: the parts of its warps are put together, a warp a row; what reaches beyond the block goes to memory, and the
// block that comes last puts that together.
template <typename T, typename KV, int D, int N, int STAGES> struct Ends {
    using P = Part<D, N * HEADS>;
    // Parts that are asked for at once.
    static constexpr int BATCH = D > 128 ? 8 : 16;

    const Decode& decode;
    Shared<KV, D, N, STAGES>& shared;
    Sequences all;
    T* results;
    const Pieces& pieces;
    uint32_t kv_heads = decode.arena.kv_heads, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    P* parts = reinterpret_cast<P*>(decode.parts);

    __device__ __forceinline__ void finish() {
        put_own_together();
        __syncthreads();
        if (threadIdx.x < 2) claim(threadIdx.x);
        __syncthreads();
        for (uint32_t which = 0; which < 2; which++)
            if (shared.crossing[which] != NOTHING) put_all_together(shared.crossing[which]);
    }

    __device__ __forceinline__ void put_own_together() {
        uint32_t begin = pieces.begin(blockIdx.x), end = pieces.begin(blockIdx.x + 1);
        uint32_t index = lane < 2 * WARPS ? shared.owners[lane] : NOTHING;
        for (uint32_t left = __ballot_sync(~0u, index != NOTHING); left != 0;) {
            uint32_t one = __shfl_sync(~0u, index, __ffs(left) - 1), members = __ballot_sync(~0u, index == one);
            left &= ~members;
            Owner owner(all, kv_heads, one);
            bool has_begin = owner.first >= begin, is_whole = has_begin && owner.last < end;
            for (uint32_t row = warp; row < decode.group; row += WARPS) {
                Row<D> whole;
                whole.template add<2 * WARPS>(members, row, [&](uint32_t i) { return &shared.parts[i]; }, [](const auto* at) { return *at; });
                if (is_whole) whole.write(decode, results, owner.sequence, owner.head * decode.group + row);
                else whole.keep(parts[2 * blockIdx.x + has_begin], row);
            }
            if (!is_whole && threadIdx.x == 0) shared.crossing[has_begin] = one;
        }
    }

    // What reaches beyond this block is its own to put together where all others have left their parts.
    __device__ __forceinline__ void claim(uint32_t which) {
        uint32_t one = shared.crossing[which];
        if (one == NOTHING) return;
        Owner owner(all, kv_heads, one);
        uint32_t others = pieces.of(owner.last) - pieces.of(owner.first);
        // For the next launch it is 0 again.
        if (arrive(&decode.arrived[one]) == others) decode.arrived[one] = 0;
        else shared.crossing[which] = NOTHING;
    }

    __device__ __forceinline__ void put_all_together(uint32_t one) {
        Owner owner(all, kv_heads, one);
        uint32_t from = pieces.of(owner.first), count = pieces.of(owner.last) - from + 1;
        for (uint32_t row = warp; row < decode.group; row += WARPS) {
            Row<D> whole;
            for (uint32_t first = 0; first < count; first += BATCH) {
                auto theirs = [&](uint32_t i) { return &parts[2 * (from + first + i) + (first + i == 0)]; };
                uint32_t there = ~0u >> (WARP - min(count - first, static_cast<uint32_t>(BATCH)));
                // What others wrote is not in this multiprocessor's cache.
                whole.template add<BATCH>(there, row, theirs, [](const auto* at) { return __ldcg(at); });
            }
            whole.write(decode, results, owner.sequence, owner.head * decode.group + row);
        }
    }
};

// Results of sequences that have no position beside what they share.
template <int D, typename T> __device__ __forceinline__ void write_empty(const Decode& decode, Sequences all, T* results) {
    uint32_t row = decode.arena.kv_heads * decode.group * D;
    for (uint32_t s = blockIdx.x; s < decode.sequences; s += gridDim.x)
        if (all.is_empty(s))
            for (uint32_t i = threadIdx.x; i < row; i += blockDim.x)
                results[static_cast<size_t>(s) * row + i] = from_float<T>(Whole<D>(decode, s, i / D, -INFINITY, 0).of(0, i % D));
}

// What a block's shared memory holds before it begins.
template <typename KV, int D, int N, int STAGES> __device__ __forceinline__ void make(Shared<KV, D, N, STAGES>& shared) {
#if BULK_COPIES
    if (threadIdx.x % WARP == 0)
        for (int stage = 0; stage < STAGES; stage++) barrier_init(shared_address(&shared.barriers[threadIdx.x / WARP][stage]), 1);
    proxy_fence();
#endif
    if (threadIdx.x < 2 * WARPS) shared.owners[threadIdx.x] = NOTHING;
    if (threadIdx.x < 2) shared.crossing[threadIdx.x] = NOTHING;
}

template <typename T, typename KV, int D, int N, int STAGES>
__device__ __forceinline__ void decode_attention(const Decode& decode) {
    extern __shared__ __align__(1024) uint8_t memory[];
    let_next_begin();
    T* results = static_cast<T*>(decode.results);
    auto& shared = *reinterpret_cast<Shared<KV, D, N, STAGES>*>(memory);
    Sequences all = {shared.sequences, shared.sequences + decode.sequences + 1, shared.sequences + 2 * decode.sequences + 1};
    make(shared);
    wait_for_previous();
    look(decode, all, shared.scratch);
    write_empty<D>(decode, all, results);
    uint32_t items = all.before[decode.sequences] * decode.arena.kv_heads;
    uint32_t count = min(gridDim.x, (items + WARPS - 1) / WARPS);
    if (blockIdx.x >= count) return;
    Pieces pieces(items, count);
    uint32_t begin = pieces.begin(blockIdx.x), warp = threadIdx.x / WARP;
    Pieces own(pieces.begin(blockIdx.x + 1) - begin, WARPS);
    Worker<T, KV, D, N, STAGES> worker(decode, shared, all);
    worker.run(static_cast<const T*>(decode.queries), results, begin + own.begin(warp), begin + own.begin(warp + 1));
    __syncthreads();
    Ends<T, KV, D, N, STAGES>{decode, shared, all, results, pieces}.finish();
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
