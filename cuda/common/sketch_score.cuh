// Scores sketches. Of a page's mean and of each of its tokens there are a code c and a factor f, and
//
//     f * sum over channels of c * q'
//
// where q' is a query q, rotated and scaled as attention scales it, estimates a part of the token's logit: that of
// the mean, and that of what is left of the token. A page scores the log-sum-exp of its tokens' logits. They are
// summed in base 2 and relative to the page's first token, without a running maximum: more than 88 above it is
// infinity.
//
// The tensor core multiplies bytes. q' is in whole numbers of one byte, and c = 2 n + 1 - 2^bits, where n are the
// bits of a channel: then the sum is twice that of n * q', plus a constant of the query. A word's four bytes hold the
// bits of several registers. A shift and a mask leave those of one, a lane's operand for sixteen pages; of every
// other register the mask alone, whose numbers are then 2^bits times as large, and so is the unit of q' in these
// channels.
//
// Codes come through shared memory, a few tokens of sixteen pages at a time, and while a warp works on one block the
// next ones are under way. Of copies a warp waits for the oldest alone; loads to registers, which the compiler counts
// together, it would have to wait for all at once.
#pragma once
#include "common/sketch.cuh"

constexpr int QUERY_LIMIT = 124;  // the largest whole number of a rotated query, a multiple of four

// c[16 x 8] += a[16 x 32] b[32 x 8], of bytes, those of b with signs. Of lane l, r = l / 4 and q = l % 4: a0, a2
// hold row r, a1, a3 row r + 8, b0, b1 column r; a0, a1, b0 the columns (rows of b) from 4 q on, the others those 16
// later. c as in device.cuh.
__device__ inline void multiply_bytes(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A query of up to eight heads in shared memory, in the order in which lanes hold the tensor core's operands. Head i
// is column i % 4 * 2 + i / 4, so that up to four heads are in other columns than a lane's second.
template <int D, int BITS>
struct SketchQuery {
    static constexpr int N = D / WARP;
    static constexpr int WORDS = N * 16 + 4;  // of 16 bytes

    u32 numbers[N][2][WARP];
    float halves[MMA_HEADS], units[MMA_HEADS];  // half the sum of all numbers; what 2 adds to a logit in base 2

    __device__ static int column_of(int head) { return head % 4 * 2 + head / 4; }

    // Of a head whose channels l, l + 32, ... lane l has, rotated.
    __device__ void stage(int head, const float (&x)[N], float scaling) {
        float largest = 0.f;
#pragma unroll
        for (int j = 0; j < N; ++j) largest = fmaxf(largest, fabsf(x[j]));
        largest = largest_of_warp(largest);
        const int odd = lane_id() % 2, step = odd ? 1 << BITS : 1, column = column_of(head);
        const float inverse = largest > 0.f ? QUERY_LIMIT / (largest * step) : 0.f;
        int sum = 0;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const int number = __float2int_rn(x[j] * inverse);
            sum += number * step;
            char* const word = reinterpret_cast<char*>(&numbers[j][odd][column * 4 + lane_id() / 2 % 4]);
            word[lane_id() / 8] = number;
        }
        halves[column] = 0.5f * __reduce_add_sync(ALL_LANES, sum);
        units[column] = 2.f * LOG2_E / QUERY_LIMIT * largest * scaling;
    }
};

// `MAX_HEADS`: query heads of a kv head for which there is room.
template <typename T, int D, int HEAD_TILES, int MAX_HEADS, int BITS>
struct SketchScorer {
    using Layout = SketchLayout<D, BITS>;
    using Query = SketchQuery<D, BITS>;
    static constexpr int N = Query::N, TILES = MAX_HEADS / 4, STAGED = HEAD_TILES * Query::WORDS;
    static constexpr int TOKENS = Layout::TOKENS, SHARE_WORDS = Layout::SHARE / 4;
    static constexpr int MEAN_WORDS = MeanLayout<D>::WORDS;
    static constexpr int AHEAD = TOKENS < TILE ? 2 : 1;  // blocks that are under way; a page has no fewer
    // From page to page in shared memory, so that lanes meet no other's banks.
    static constexpr int PITCH = Layout::BLOCK + (D == 96 ? 0 : 16);

    // What a warp works with in shared memory.
    struct Block {
        char codes[TILE][PITCH];
        u32 factors[TILE][TOKENS / 2];
    };
    struct Room {
        Block blocks[AHEAD + 1];
        u32 means[TILE][4][MEAN_WORDS];
        float units[TILE];
    };
    static constexpr int ROOM = sizeof(Room) / 16;
    static_assert(sizeof(Room) % 16 == 0 && sizeof(Block) % 16 == 0);

    // Bytes of a page's factors that come at once, and how many times that a block has.
    static constexpr int FACTORS = TOKENS < 8 ? 2 * TOKENS : 16, FACTOR_PARTS = 2 * TOKENS / FACTORS;

    Room& room;
    int slot = 0;                          // of the block at hand
    const char *low_record, *high_record;  // of pages lane / 4 and lane / 4 + 8, whose blocks are asked for
    int coming;                            // the block that is asked for next
    u32 query[HEAD_TILES][N][2];
    float half[TILES], unit[TILES];  // of this lane's heads
    const SketchTensors tensors;
    const SketchRecord<D, BITS> record;
    int num_kv_heads, head, page_shift;
    float scaling;

    __device__ SketchScorer(const SketchTensors& tensors, int num_kv_heads, int head, int page_shift, float scaling,
                            uint4* room)
        : room(*reinterpret_cast<Room*>(room)),
          tensors(tensors),
          record(1 << page_shift),
          num_kv_heads(num_kv_heads),
          head(head),
          page_shift(page_shift),
          scaling(scaling) {}

    // The query head that this lane's scores[tile][i] and scores[tile][2 + i] belong to.
    __device__ static int head_of(int tile, int i) { return tile * MMA_HEADS + i * 4 + lane_id() % 4; }

    // Warps first, first + stride, ... of those that share the work call it; each takes a head at a time.
    template <typename Begin>
    __device__ void stage(uint4* staged /* [STAGED] */, const u16* query /* [group, d] */, int group, int first,
                          int stride, Begin begin) {
        const Rotation<D> rotate(tensors.flips + head * 2 * D);
        float x[N];
        const auto load_head = [&](int i) {
#pragma unroll
            for (int j = 0; j < N; ++j) x[j] = i < group ? T::to_float(query[i * D + j * WARP + lane_id()]) : 0.f;
        };
        load_head(first);
        begin();
#pragma unroll 1
        for (int i = first; i < MAX_HEADS; i += stride) {
            if (i != first) load_head(i);
            rotate(x);
            reinterpret_cast<Query*>(staged)[i / MMA_HEADS].stage(i % MMA_HEADS, x, scaling);
        }
    }

    __device__ void use(const uint4* staged) {
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile) {
            const Query& from = reinterpret_cast<const Query*>(staged)[tile];
#pragma unroll
            for (int i = 0; i < 2 * N; ++i) query[tile][i / 2][i % 2] = from.numbers[i / 2][i % 2][lane_id()];
#pragma unroll
            for (int i = 0; i < 2 && 2 * tile + i < TILES; ++i) {
                half[2 * tile + i] = from.halves[lane_id() % 4 * 2 + i];
                unit[2 * tile + i] = from.units[lane_id() % 4 * 2 + i];
            }
        }
    }

    // The next tile: this lane's two pages are these. Their means are asked for, once those at hand were used.
    // Nothing is asked for where there is no page: many warps would ask for the same at once.
    __device__ void aim(int low_id, int high_id) {
        low_record = low_id < 0 ? nullptr : record_of(low_id);
        high_record = high_id < 0 ? nullptr : record_of(high_id);
        coming = 0;
        copy_parts<16, MEAN_WORDS>(record.mean, [&](int page, int i) { return room.means[page][0] + i * 4; });
        copy_parts<4, 1>(record.unit, [&](int page, int) { return room.units + page; });
    }

    __device__ void load_first() {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) load_block(i);
    }

    // Scores the tile whose first tokens are under way; `next()` aims at the one after.
    template <typename Next>
    __device__ void score(float (&scores)[HEAD_TILES][4], Next next) {
        float sums[TILES][2] = {}, firsts[TILES][2], of_means[TILES][2];
        const int blocks = (1 << page_shift) / TOKENS;
#pragma unroll 1
        for (int block = 0; block < blocks; ++block) {
            wait_for_copies<AHEAD - 1>();
            __syncwarp();  // all lanes have the block at hand, and need the one before no more
            if (block == 0) {
                score_means(of_means);
                __syncwarp();
            }
            if (block + AHEAD == blocks) next();
            load_block(slot == 0 ? AHEAD : slot - 1);
            add_block(sums, firsts, block == 0);
            slot = slot == AHEAD ? 0 : slot + 1;
        }
#pragma unroll
        for (int i = 0; i < HEAD_TILES * 4; ++i) scores[i / 4][i % 4] = 0.f;
#pragma unroll
        for (int i = 0; i < TILES * 2; ++i)
            scores[i / 4][i / 2 % 2 + i % 2 * 2] =
                LN_2 * (of_means[i / 2][i % 2] + firsts[i / 2][i % 2] + __log2f(sums[i / 2][i % 2]));
    }

  private:
    using Products = int[HEAD_TILES][4];

    __device__ const char* record_of(int id) const {
        return tensors.records + (i64(id) * num_kv_heads + head) * record.bytes;
    }
    // PARTS pieces of BYTES that lie side by side in each of this lane's pages, by the four lanes that share them;
    // `place(page, i)` is where they go.
    template <int BYTES, int PARTS, typename Place>
    __device__ void copy_parts(i64 from, Place place) {
#pragma unroll
        for (int base = 0; base < 2 * PARTS; base += 4) {
            const int i = base + lane_id() % 4;
            const char* const page = i < PARTS ? low_record : high_record;
            if (page && i < 2 * PARTS)
                copy_async<BYTES>(place(lane_id() / 4 + i / PARTS * 8, i % PARTS), page + from + i % PARTS * BYTES);
        }
    }

    // Asks for the next block.
    __device__ void load_block(int to) {
        Block& block = room.blocks[to];
        copy_parts<16, Layout::BLOCK / 16>(coming * Layout::BLOCK,
                                           [&](int page, int i) { return block.codes[page] + i * 16; });
        copy_parts<FACTORS, FACTOR_PARTS>(record.factors + coming * (2 * TOKENS),
                                          [&](int page, int i) { return block.factors[page] + i * (FACTORS / 4); });
        ++coming;
        commit_copies();
    }

    // What the means add to the logits of this lane's heads, in base 2.
    __device__ void score_means(float (&logits)[TILES][2]) const {
        u32 low[MEAN_WORDS], high[MEAN_WORDS];
#pragma unroll
        for (int i = 0; i < MEAN_WORDS; ++i) {
            low[i] = room.means[lane_id() / 4][lane_id() % 4][i];
            high[i] = room.means[lane_id() / 4 + 8][lane_id() % 4][i];
        }
        const float factors[2] = {room.units[lane_id() / 4], room.units[lane_id() / 4 + 8]};
        Products products;
        multiply<0, MEAN_BITS>(products, low, high);
#pragma unroll
        for (int i = 0; i < TILES * 2; ++i)
            logits[i / 2][i % 2] = factors[i % 2] * unit[i / 2] * sum_of<MEAN_BITS>(products, i / 2, i % 2);
    }

    __device__ void add_block(float (&sums)[TILES][2], float (&firsts)[TILES][2], bool is_first) const {
        const Block& block = room.blocks[slot];
        u32 low[SHARE_WORDS], high[SHARE_WORDS];
#pragma unroll
        for (int i = 0; i < SHARE_WORDS / 4; ++i) {
            const int at = lane_id() % 4 * Layout::SHARE + i * 16;
            copy_words(low + 4 * i, block.codes[lane_id() / 4] + at);
            copy_words(high + 4 * i, block.codes[lane_id() / 4 + 8] + at);
        }
        const u32* const low_factors = block.factors[lane_id() / 4];
        const u32* const high_factors = block.factors[lane_id() / 4 + 8];
        unrolled<TOKENS>([&](auto token) {
            constexpr int TOKEN = token.value;
            const float factors[2] = {half_of<TOKEN % 2>(low_factors[TOKEN / 2]),
                                      half_of<TOKEN % 2>(high_factors[TOKEN / 2])};
            Products products;
            multiply<TOKEN * Layout::REGISTERS, BITS>(products, low, high);
#pragma unroll
            for (int i = 0; i < TILES * 2; ++i) {
                float &sum = sums[i / 2][i % 2], &first = firsts[i / 2][i % 2];
                const float factor = factors[i % 2] * unit[i / 2], x = sum_of<BITS>(products, i / 2, i % 2);
                if (TOKEN == 0 && is_first) first = fminf(factor * x, -LOWEST);
                sum += fmaxf(exp2_fast(fmaf(factor, x, -first)), 0.f);  // NaN, if there is no token: 0
            }
        });
    }
    __device__ static void copy_words(u32* to, const char* from) {
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
    template <int UPPER>
    __device__ static float half_of(u32 pair) {
        return fp16::to_float(UPPER ? pair >> 16 : pair & 0xFFFF);
    }

    // Numbers of a code whose registers begin at FIRST, of two pages of every lane, by the query's.
    template <int FIRST, int CODE_BITS, int SIZE>
    __device__ void multiply(Products& products, const u32 (&low)[SIZE], const u32 (&high)[SIZE]) const {
        unrolled<N>([&](auto j) {
            constexpr int EVEN = FIRST + 2 * j.value;
            const u32 a0 = numbers<EVEN, CODE_BITS>(low), a1 = numbers<EVEN, CODE_BITS>(high);
            const u32 a2 = numbers<EVEN + 1, CODE_BITS>(low), a3 = numbers<EVEN + 1, CODE_BITS>(high);
#pragma unroll
            for (int tile = 0; tile < HEAD_TILES; ++tile) {
                int (&c)[4] = products[tile];
                if constexpr (j.value == 0) c[0] = c[1] = c[2] = c[3] = 0;
                multiply_bytes(c, a0, a1, a2, a3, query[tile][j.value][0], query[tile][j.value][1]);
            }
        });
    }
    // Of a register; those of odd ones times 2^BITS.
    template <int REGISTER, int CODE_BITS, int SIZE>
    __device__ static u32 numbers(const u32 (&words)[SIZE]) {
        constexpr int BEGIN = REGISTER * CODE_BITS % 8, SHIFT = REGISTER % 2 * BITS;
        return words[REGISTER * CODE_BITS / 8] >> (BEGIN - SHIFT) & (0x01010101u * ((1 << CODE_BITS) - 1)) << SHIFT;
    }
    // Half of the sum over channels of c * q', in whole numbers of q'.
    template <int CODE_BITS>
    __device__ float sum_of(const Products& products, int tile, int row) const {
        return fmaf(1 - (1 << CODE_BITS), half[tile], __int2float_rn(products[tile / 2][tile % 2 + 2 * row]));
    }
};

template <int MAX_HEADS, int BITS>
struct Sketch {
    template <typename T, int D>
    using Summary = SketchSummary<T, D, BITS>;
    template <typename T, int D, int HEAD_TILES>
    using Scorer = SketchScorer<T, D, HEAD_TILES, MAX_HEADS, BITS>;
};
