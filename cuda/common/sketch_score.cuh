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
// Heads and rows come through shared memory, those of sixteen pages at a time, and while a warp works on one the next
// two are under way. Of copies a warp waits for the oldest alone; loads to registers, which the compiler counts
// together, it would have to wait for all at once. The lanes that copy a piece lie side by side, so that memory is
// asked for it once.
#pragma once
#include "common/sketch.cuh"

constexpr int SLOTS = 3;          // heads or rows that a warp has room for
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
    static constexpr int AT_ONCE = Layout::AT_ONCE, STRETCHES = Layout::ROWS / AT_ONCE;  // rows copied at once
    static constexpr int TOKENS = Layout::TOKENS, SHARE_WORDS = Layout::SHARE / 4, MEAN_WORDS = Layout::MEAN_WORDS;
    static constexpr int PARTS = Layout::PIECE / 16, PAGES = WARP / PARTS;  // lanes of a piece; pages copied at once
    // From page to page in shared memory, so that lanes meet no other's banks.
    static constexpr int PITCH = AT_ONCE * Layout::ROW + (D == 96 ? 0 : 16), FACTOR_WORDS = 12;

    using Slot = char[TILE][PITCH];
    struct Room {
        Slot slots[SLOTS];
        u32 factors[TILE][FACTOR_WORDS];  // of the block at hand
    };
    static constexpr int ROOM = sizeof(Room) / 16;
    static_assert(sizeof(Room) % 16 == 0 && Layout::HEAD <= PITCH);

    Room& room;
    int slot = SLOTS - 1;            // of what is at hand
    const char* from[TILE / PAGES];  // of the pages that this lane copies from, its part of what is asked for next
    bool is_there[TILE / PAGES];     // whether there are such
    int coming;                      // which of a block's that is: its head or a row
    u32 query[HEAD_TILES][N][2];
    float unit[TILES], shift[TILES];  // of this lane's heads: of a number, and minus half the sum of all
    const SketchTensors tensors;
    const int stride, head, page_shift;  // bytes from page to page
    const float scaling;

    __device__ SketchScorer(const SketchTensors& tensors, int num_kv_heads, int head, int page_shift, float scaling,
                            uint4* room)
        : room(*reinterpret_cast<Room*>(room)),
          tensors(tensors),
          stride(num_kv_heads * Layout::bytes(1 << page_shift)),
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
                unit[2 * tile + i] = from.units[lane_id() % 4 * 2 + i];
                shift[2 * tile + i] = -from.halves[lane_id() % 4 * 2 + i] * unit[2 * tile + i];
            }
        }
    }

    // The next tile: this lane's two pages are these. Nothing is asked for where there is no page: many warps would
    // ask for the same at once.
    __device__ void aim(int low_id, int high_id) {
#pragma unroll
        for (int i = 0; i < TILE / PAGES; ++i) {
            const int page = i * PAGES + lane_id() / PARTS;
            int id = __shfl_sync(ALL_LANES, i * PAGES < 8 ? low_id : high_id, page % 8 * 4);
            if constexpr (PAGES > 8) {
                const int high = __shfl_sync(ALL_LANES, high_id, page % 8 * 4);
                if (page >= 8) id = high;
            }
            is_there[i] = id >= 0;
            from[i] =
                tensors.records + i64(id) * stride + head * Layout::bytes(1 << page_shift) + lane_id() % PARTS * 16;
        }
        coming = 0;
    }

    __device__ void load_first() {
        load_next(0);
        load_next(1);
    }

    // Scores the tile whose first head and row are under way; `next()` aims at the one after.
    template <typename Next>
    __device__ void score(float (&scores)[HEAD_TILES][4], Next next) {
        float sums[TILES][2] = {}, firsts[TILES][2], of_means[TILES][2];
        const int blocks = (1 << page_shift) / Layout::BLOCK_TOKENS;
#pragma unroll 1
        for (int block = 0; block < blocks; ++block) {
            turn(next, block == blocks - 1 && STRETCHES == 1);
            if (block == 0) score_means(of_means);
            const bool missing = take_factors();
#pragma unroll 1
            for (int stretch = 0; stretch < STRETCHES; ++stretch) {
                turn(next, block == blocks - 1 && stretch == STRETCHES - 2);
                if (missing)
                    add_rows<true>(sums, firsts, stretch, block + stretch == 0);
                else
                    add_rows<false>(sums, firsts, stretch, block + stretch == 0);
            }
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

    // Waits for the next head or row, and asks for the one two further; `next()` comes before that, if it is the next
    // tile's first.
    template <typename Next>
    __device__ void turn(Next next, bool is_last_of_tile) {
        wait_for_copies<1>();
        __syncwarp();  // all lanes have what is at hand, and need the one before no more
        slot = slot == SLOTS - 1 ? 0 : slot + 1;
        if (is_last_of_tile) next();
        load_next(slot == 0 ? SLOTS - 1 : slot - 1);
    }
    __device__ void load_next(int to) {
        if (coming == 0)
            copy<Layout::HEAD>(to);
        else
            copy<AT_ONCE * Layout::ROW>(to);
        coming = coming == STRETCHES ? 0 : coming + 1;
        commit_copies();
    }
    template <int BYTES>
    __device__ void copy(int to) {
        char* const place = room.slots[to][lane_id() / PARTS] + lane_id() % PARTS * 16;
#pragma unroll
        for (int i = 0; i < TILE / PAGES; ++i) {
#pragma unroll
            for (int piece = 0; piece < BYTES; piece += Layout::PIECE)
                if (is_there[i]) copy_async<16>(place + i * PAGES * PITCH + piece, from[i] + piece);
            from[i] += BYTES;
        }
    }

    // What the means add to the logits of this lane's heads, in base 2.
    __device__ void score_means(float (&logits)[TILES][2]) const {
        const char* const low_head = room.slots[slot][lane_id() / 4];
        const char* const high_head = low_head + 8 * PITCH;
        u32 low[MEAN_WORDS], high[MEAN_WORDS];
#pragma unroll
        for (int i = 0; i < MEAN_WORDS; ++i) {
            const int at = (lane_id() % 4 * MEAN_WORDS + i) * 4;
            low[i] = *reinterpret_cast<const u32*>(low_head + at);
            high[i] = *reinterpret_cast<const u32*>(high_head + at);
        }
        const float factors[2] = {*reinterpret_cast<const float*>(low_head + Layout::UNIT),
                                  *reinterpret_cast<const float*>(high_head + Layout::UNIT)};
        Products products;
        multiply<0, MEAN_BITS>(products, low, high);
#pragma unroll
        for (int i = 0; i < TILES * 2; ++i)
            logits[i / 2][i % 2] = factors[i % 2] * sum_of<MEAN_BITS>(products, i / 2, i % 2);
    }

    // The head's factors, put where they stay. True: some are no numbers, as those of tokens that are missing.
    __device__ bool take_factors() {
        const int page = lane_id() / 2, part = lane_id() % 2;
        const uint4 v = *reinterpret_cast<const uint4*>(room.slots[slot][page] + Layout::FACTORS + part * 16);
        *reinterpret_cast<uint4*>(room.factors[page] + part * 4) = v;
        return __any_sync(ALL_LANES, no_number(v.x) | no_number(v.y) | no_number(v.z) | no_number(v.w));
    }
    __device__ static u32 no_number(u32 pair) { return ((pair & 0x7FFF7FFF) + 0x04000400) & 0x80008000; }

    template <bool GUARDED>
    __device__ void add_rows(float (&sums)[TILES][2], float (&firsts)[TILES][2], int stretch, bool is_first) const {
        const char* const codes = room.slots[slot][lane_id() / 4] + lane_id() % 4 * Layout::SHARE;
        const u32* const low_factors = room.factors[lane_id() / 4] + stretch * (AT_ONCE * TOKENS / 2);
        const u32* const high_factors = low_factors + 8 * FACTOR_WORDS;
        unrolled<AT_ONCE>([&](auto row) {
            constexpr int ROW = row.value;
            u32 low[SHARE_WORDS], high[SHARE_WORDS];
            copy_share(low, codes + ROW * Layout::ROW);
            copy_share(high, codes + ROW * Layout::ROW + 8 * PITCH);
            unrolled<TOKENS>([&](auto token) {
                constexpr int TOKEN = ROW * TOKENS + token.value;
                const float factors[2] = {half_of<TOKEN % 2>(low_factors[TOKEN / 2]),
                                          half_of<TOKEN % 2>(high_factors[TOKEN / 2])};
                Products products;
                multiply<token.value * Layout::REGISTERS, BITS>(products, low, high);
#pragma unroll
                for (int i = 0; i < TILES * 2; ++i) {
                    float &sum = sums[i / 2][i % 2], &first = firsts[i / 2][i % 2];
                    const float factor = factors[i % 2], x = sum_of<BITS>(products, i / 2, i % 2);
                    if (TOKEN == 0 && is_first) first = fminf(factor * x, -LOWEST);
                    const float e = exp2_fast(fmaf(factor, x, -first));
                    sum += GUARDED ? fmaxf(e, 0.f) : e;  // NaN: 0
                }
            });
        });
    }
    // In words as long as alignment allows.
    __device__ static void copy_share(u32 (&to)[SHARE_WORDS], const char* from) {
        if constexpr (Layout::SHARE % 16 == 0) {
#pragma unroll
            for (int i = 0; i < SHARE_WORDS; i += 4) copy_words(to + i, from + i * 4);
        } else {
#pragma unroll
            for (int i = 0; i < SHARE_WORDS; ++i) to[i] = *reinterpret_cast<const u32*>(from + i * 4);
        }
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
    // Half of the sum over channels of c * q', in base 2 once multiplied by the code's factor.
    template <int CODE_BITS>
    __device__ float sum_of(const Products& products, int tile, int row) const {
        const float number = __int2float_rn(products[tile / 2][tile % 2 + 2 * row]);
        return fmaf(number, unit[tile], ((1 << CODE_BITS) - 1) * shift[tile]);
    }
};

template <int MAX_HEADS, int BITS>
struct Sketch {
    template <typename T, int D>
    using Summary = SketchSummary<T, D, BITS>;
    template <typename T, int D, int HEAD_TILES>
    using Scorer = SketchScorer<T, D, HEAD_TILES, MAX_HEADS, BITS>;
};
