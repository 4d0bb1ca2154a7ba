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
// bits of several registers. A mask leaves those of one, a lane's operand for sixteen pages. They need not be the
// lowest bits: 2^s times as large a number has a unit of q' that is as much larger, and so one shift, by half a byte,
// serves several registers.
//
// Whole numbers become floats by no instruction: added to the bits of a large float, they are its last places.
//
// Codes come through shared memory, a few tokens of sixteen pages at a time, and while a warp works on one block the
// next ones are under way. Of copies a warp waits for the oldest alone; loads to registers, which the compiler counts
// together, it would have to wait for all at once.
#pragma once
#include "common/sketch.cuh"

constexpr int QUERY_LIMIT = 120;  // the largest whole number of a rotated query, a multiple of every step

// The bits by which the numbers of a register stay shifted: those of one half of a byte are masked where they lie.
template <int BITS>
__device__ constexpr int shift_of(int register_of_token) {
    return register_of_token % (4 / BITS) * BITS;
}

// A float whose last place is worth 1. Its bits plus a whole number, not too large, are those of their sum.
constexpr float LARGE = 12582912.f;
constexpr int LARGE_BITS = 0x4B400000;

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
        const int odd = lane_id() % 2, column = column_of(head);
        const float inverse = largest > 0.f ? QUERY_LIMIT / largest : 0.f;
        int sum = 0;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const int step = 1 << shift_of<BITS>(2 * j + odd), number = __float2int_rn(x[j] * inverse / step);
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
    static constexpr int TOKENS = Layout::TOKENS,
                         AT_ONCE = TOKENS < 8 ? TOKENS : 8;        // for more, registers are too few
    static constexpr int PART = Layout::SHARE * AT_ONCE / TOKENS;  // bytes that a lane has of so many
    static constexpr int MEAN_WORDS = MeanLayout<D>::WORDS;
    static constexpr int AHEAD = TOKENS < TILE ? 2 : 1;  // blocks that are under way; a page has no fewer
    // From page to page in shared memory, so that lanes meet no other's banks.
    static constexpr int PITCH = Layout::BLOCK + (D == 96 ? 0 : 16);

    // A block in shared memory, in bytes: the codes of sixteen pages, then their factors. A warp has a few of them,
    // and the means of the tile after and their units.
    static constexpr int FACTORS_AT = TILE * PITCH, SLOT = FACTORS_AT + TILE * 2 * TOKENS;
    static constexpr int MEANS_AT = (AHEAD + 1) * SLOT, UNITS_AT = MEANS_AT + TILE * MeanLayout<D>::BYTES;
    static constexpr int ROOM = (UNITS_AT + TILE * 4) / 16;

    // Bytes of a page's factors that come at once, and how many times that a block has.
    static constexpr int FACTORS = TOKENS < 8 ? 2 * TOKENS : 16, FACTOR_PARTS = 2 * TOKENS / FACTORS;

    // This lane's places in the first slot: where its copies go, and what it reads. Then what is to be added to reach
    // the block at hand, and the one before.
    u32 codes_to, factors_to, codes_at, factors_at;
    u32 slot = 0, before = AHEAD * SLOT;

    // Pages lane / 4 and lane / 4 + 8, whose blocks are asked for: which of the two are there, whose factors this
    // lane copies, and where its first parts lie.
    static constexpr u32 LOW = 1, HIGH = 2;
    u32 there, whose_factors;
    const char *low, *high, *factors;
    u32 coming;  // the block that is asked for next

    u32 query[HEAD_TILES][N][2];
    float half[TILES], unit[TILES];  // of this lane's heads
    const char* records;             // this lane's first part of page 0
    u32 factors_from;                // from there to its part of the factors
    int stride;                      // bytes from page to page
    const float* const flips;        // of this head
    const int page_shift;
    const float scaling;

    __device__ SketchScorer(const SketchTensors& tensors, int num_kv_heads, int head, int page_shift, float scaling,
                            uint4* room)
        : stride(num_kv_heads * SketchRecord<D, BITS>(1 << page_shift).bytes),
          flips(tensors.flips + head * 2 * D),
          page_shift(page_shift),
          scaling(scaling) {
        const SketchRecord<D, BITS> record(1 << page_shift);
        const u32 base = shared_address(room);
        const int row = lane_id() / 4, q = lane_id() % 4, part = q % FACTOR_PARTS * FACTORS;
        codes_to = base + row * PITCH + q * 16;
        codes_at = base + row * PITCH + q * Layout::SHARE;
        factors_at = base + FACTORS_AT + row * 2 * TOKENS;
        factors_to = factors_at + q / FACTOR_PARTS * 8 * 2 * TOKENS + part;
        records = tensors.records + head * record.bytes + q * 16;
        factors_from = record.factors + part - q * 16;
        whose_factors = q < FACTOR_PARTS ? LOW : q < 2 * FACTOR_PARTS ? HIGH : 0;
        keep_in_register(codes_to), keep_in_register(codes_at), keep_in_register(factors_at);
        keep_in_register(factors_to), keep_in_register(records), keep_in_register(factors_from);
        keep_in_register(whose_factors);
    }

    // The query head that this lane's scores[tile][i] and scores[tile][2 + i] belong to.
    __device__ static int head_of(int tile, int i) { return tile * MMA_HEADS + i * 4 + lane_id() % 4; }

    // Warps first, first + stride, ... of those that share the work call it; each takes a head at a time.
    template <typename Begin>
    __device__ void stage(uint4* staged /* [STAGED] */, const u16* query /* [group, d] */, int group, int first,
                          int stride, Begin begin) {
        const Rotation<D> rotate(flips);
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
        const int row = lane_id() / 4, q = lane_id() % 4;
        low = records + i64(low_id) * stride, high = records + i64(high_id) * stride;
        keep_in_register(low), keep_in_register(high);
        factors = (whose_factors == HIGH ? high : low) + factors_from;
        there = u32(~low_id) >> 31 | u32(~high_id) >> 31 << 1;
        coming = 0;
        constexpr int MEAN = MeanLayout<D>::BYTES;
        const u32 mean_to = own_room() + MEANS_AT + row * MEAN + q * 16, unit_to = own_room() + UNITS_AT + row * 4;
        copy_async_if<16>(q < MEAN_WORDS && low_id >= 0, mean_to, low);
        copy_async_if<16, 8 * MEAN>(q < MEAN_WORDS && high_id >= 0, mean_to, high);
        copy_async_if<4, 0, MEAN>(q == 0 && low_id >= 0, unit_to, low);
        copy_async_if<4, 8 * 4, MEAN>(q == 0 && high_id >= 0, unit_to, high);
    }

    __device__ void load_first() {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) load_block(i * SLOT);
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
            load_block(before);
#pragma unroll 1
            for (int part = 0; part < TOKENS / AT_ONCE; ++part) add_tokens(sums, firsts, part, block + part == 0);
            const u32 after = AHEAD == 1 ? before : 3 * SLOT - slot - before;
            before = slot, slot = after;
        }
#pragma unroll
        for (int i = 0; i < HEAD_TILES * 4; ++i) scores[i / 4][i % 4] = 0.f;
#pragma unroll
        for (int i = 0; i < TILES * 2; ++i)
            scores[i / 4][i / 2 % 2 + i % 2 * 2] =
                LN_2 * (of_means[i / 2][i % 2] + firsts[i / 2][i % 2] + log2_fast(sums[i / 2][i % 2]));
    }

  private:
    using Products = int[HEAD_TILES][4];

    __device__ u32 own_room() const { return factors_at - FACTORS_AT - lane_id() / 4 * (2 * TOKENS); }

    // Asks for the next block.
    __device__ void load_block(u32 to) {
        const u64 from = u64(coming++) * Layout::BLOCK;
        unrolled<Layout::BLOCK / 64>([&](auto i) {
            constexpr int PART = 64 * i.value, FROM = SketchRecord<D, BITS>::CODES + PART;
            copy_async_if<16, PART, FROM>(there & LOW, codes_to + to, low + from);
            copy_async_if<16, 8 * PITCH + PART, FROM>(there & HIGH, codes_to + to, high + from);
        });
        copy_async_if<FACTORS>(there & whose_factors, factors_to + to, factors + from / Layout::BLOCK * (2 * TOKENS));
        commit_copies();
    }

    // What the means add to the logits of this lane's heads, in base 2.
    __device__ void score_means(float (&logits)[TILES][2]) const {
        constexpr int MEAN = MeanLayout<D>::BYTES;
        const u32 mean_at = own_room() + MEANS_AT + lane_id() * (MEAN / 4),
                  unit_at = own_room() + UNITS_AT + lane_id() / 4 * 4;
        u32 low[MEAN_WORDS], high[MEAN_WORDS], low_unit[1], high_unit[1];
        load_shared<0>(low, mean_at), load_shared<8 * MEAN>(high, mean_at);
        load_shared<0>(low_unit, unit_at), load_shared<8 * 4>(high_unit, unit_at);
        const float factors[2] = {__uint_as_float(low_unit[0]), __uint_as_float(high_unit[0])};
        Products products;
        multiply<0, MEAN_BITS>(products, low, high);
#pragma unroll
        for (int i = 0; i < TILES * 2; ++i)
            logits[i / 2][i % 2] = factors[i % 2] * sum_of<MEAN_BITS>(products, i / 2, i % 2);
    }

    using Words = u32[2][PART / 4];
    using Factors = u32[2][AT_ONCE / 2];

    // Tokens of the block at hand, so many at once. Those that are missing have NaN for a factor, and are a page's
    // last: few pages need the instructions that guard against them.
    __device__ void add_tokens(float (&sums)[TILES][2], float (&firsts)[TILES][2], int part, bool is_first) const {
        Words words;
        Factors factors;
        const u32 factors_of = factors_at + slot + part * (2 * AT_ONCE), codes = codes_at + slot + part * PART;
        load_shared<0>(factors[0], factors_of), load_shared<16 * TOKENS>(factors[1], factors_of);
        load_shared<0>(words[0], codes), load_shared<8 * PITCH>(words[1], codes);
        const bool missing = max(factors[0][AT_ONCE / 2 - 1], factors[1][AT_ONCE / 2 - 1]) > 0x7C00FFFF;
        if (__any_sync(ALL_LANES, missing))
            add<true>(sums, firsts, is_first, words, factors);
        else
            add<false>(sums, firsts, is_first, words, factors);
    }
    template <bool GUARDED>
    __device__ void add(float (&sums)[TILES][2], float (&firsts)[TILES][2], bool is_first, const Words& words,
                        const Factors& pairs) const {
        unrolled<AT_ONCE>([&](auto token) {
            constexpr int TOKEN = token.value;
            const float factors[2] = {half_of<TOKEN % 2>(pairs[0][TOKEN / 2]),
                                      half_of<TOKEN % 2>(pairs[1][TOKEN / 2])};
            Products products;
            multiply<TOKEN * Layout::REGISTERS, BITS>(products, words[0], words[1]);
#pragma unroll
            for (int i = 0; i < TILES * 2; ++i) {
                float &sum = sums[i / 2][i % 2], &first = firsts[i / 2][i % 2];
                const float factor = factors[i % 2], x = sum_of<BITS>(products, i / 2, i % 2);
                if (TOKEN == 0 && is_first) first = fminf(factor * x, -LOWEST);
                const float e = exp2_fast(fmaf(factor, x, -first));
                sum += GUARDED ? fmaxf(e, 0.f) : e;
            }
        });
    }
    template <int UPPER>
    __device__ static float half_of(u32 pair) {
        return fp16::to_float(UPPER ? pair >> 16 : pair & 0xFFFF);
    }

    // LARGE plus the numbers of a code, whose registers begin at FIRST, of two pages of every lane, by the query's.
    template <int FIRST, int CODE_BITS, int SIZE>
    __device__ void multiply(Products& products, const u32 (&low)[SIZE], const u32 (&high)[SIZE]) const {
        unrolled<N>([&](auto j) {
            constexpr int EVEN = 2 * j.value;
            const u32 a0 = numbers<FIRST, EVEN, CODE_BITS>(low), a1 = numbers<FIRST, EVEN, CODE_BITS>(high);
            const u32 a2 = numbers<FIRST, EVEN + 1, CODE_BITS>(low), a3 = numbers<FIRST, EVEN + 1, CODE_BITS>(high);
#pragma unroll
            for (int tile = 0; tile < HEAD_TILES; ++tile) {
                int (&c)[4] = products[tile];
                if constexpr (j.value == 0) c[0] = c[1] = c[2] = c[3] = LARGE_BITS;
                multiply_bytes(c, a0, a1, a2, a3, query[tile][j.value][0], query[tile][j.value][1]);
            }
        });
    }
    // Of a register, 2^shift_of times as large.
    template <int FIRST, int REGISTER, int CODE_BITS, int SIZE>
    __device__ static u32 numbers(const u32 (&words)[SIZE]) {
        constexpr int BEGIN = (FIRST + REGISTER) * CODE_BITS, SHIFT = shift_of<BITS>(REGISTER);
        constexpr int RIGHT = BEGIN % 8 - SHIFT;
        const u32 word = words[BEGIN / 8];
        return (RIGHT < 0 ? word << -RIGHT : word >> RIGHT) & (0x01010101u * ((1 << CODE_BITS) - 1)) << SHIFT;
    }
    // Half of the sum over channels of c * q', in base 2 once multiplied by the code's factor.
    template <int CODE_BITS>
    __device__ float sum_of(const Products& products, int tile, int row) const {
        const float constant = LARGE + ((1 << CODE_BITS) - 1) * half[tile];
        return fmaf(__int_as_float(products[tile / 2][tile % 2 + 2 * row]), unit[tile], -constant * unit[tile]);
    }
};

template <int MAX_HEADS, int BITS>
struct Sketch {
    template <typename T, int D>
    using Summary = SketchSummary<T, D, BITS>;
    template <typename T, int D, int HEAD_TILES>
    using Scorer = SketchScorer<T, D, HEAD_TILES, MAX_HEADS, BITS>;
};
