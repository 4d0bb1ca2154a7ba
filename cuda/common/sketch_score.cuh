// Scores sketches. Of a page's mean and of each of its tokens there are a code c and a factor f, and
//
//     f * sum over channels of c * q'
//
// where q' is a query q, rotated and scaled as attention scales it, estimates a part of the token's logit: that of
// the mean, and that of what is left of the token. c is -1 or 1 by a channel's sign s, or of two planes of bits 2 s +
// u. A page scores the log-sum-exp of its tokens' logits. It is summed in base 2 and without a running maximum: what
// is left after the mean is small, and where it is not, infinity is as good a score.
//
// The bits stay bits. q' is in whole numbers with digits t of -1, 0 or 1 (sketch_query.cuh). Of a digit, let M be the
// number of channels in which a sign is equal to a digit that is not 0, and Z the number of digits that are not 0:
// then M meetings add 1 each, Z - M subtract 1, and the sum over channels of s * t is 2 M - Z. The tensor core counts
// M for eight columns at a time, two digits of four heads: it is the ones of (bits, ~bits) AND (where the digit is 1,
// where it is -1), 256 bits to a product. What a lane loads is the operand: sixteen pages to a product, token after
// token, so that the sum of a page stays in a register. Of the four lanes of a page, each holds its part of a token's
// channels. Of two planes the first is counted twice, into the same registers: then M is up to three times the
// channels, and so is Z.
//
// Counts become floats at no cost. The sum over channels of s * q' is 2 (sum of 3^i M_i - sum of 3^i Z_i / 2), where
// M_i is an integer in a register. The bits of an integer M below 2^23, read as a float32 (__int_as_float), have the
// exponent 0: they are a denormal float, which is worth exactly M * 2^-149. So fmaf(__int_as_float(M), 3^i * 2^112,
// sum) adds 3^i M * 2^-37, without a conversion of every count, which would be an instruction more and of a slower
// kind. Nothing is rounded: with at most 256 channels, each counted up to three times, and digits that make up at
// most 40, every partial sum is a multiple of 2^-38 below 2^15 * 2^-37, and so has 16 bits where a float has 24. It
// is 2^112, not 2^149, as 27 * 2^149 is no float; the query's unit takes back the 2^-37 that is left (COUNT_UNIT) and
// the 2. All of it rests on multiply-adds that do not flush denormal operands to zero: sparsekv/ops/compiler.py
// compiles with ftz=False.
#pragma once
#include "common/sketch_query.cuh"

// c[16 x 8] = ones of a[16 x 256 bits] AND b[256 bits x 8], plus c. Of lane l, r = l / 4 and q = l % 4: a0, a2 hold
// row r, a1, a3 row r + 8, b0, b1 column r; a0, a1, b0 the bits from 32 q on, the others those 128 later. c as in
// device.cuh.
__device__ inline void count_ones(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// `MAX_HEADS`: query heads of a kv head for which there is room; four to a tile.
template <typename T, int D, int HEAD_TILES, int MAX_HEADS, int PLANES>
struct SketchScorer {
    using Layout = SketchLayout<D, PLANES>;
    using Query = SketchQuery<D>;
    static constexpr int N = Query::N, WORDS = Query::WORDS, MEAN_WORDS = (D + 63) / 64;
    static constexpr int TILES = MAX_HEADS / TILE_HEADS;
    // Words of 16 bytes of a staged query, and more: with as little shared memory as is used, score_pages takes 200
    // us at 16 x 128k, with so much 198 (H100).
    static constexpr int STAGED = HEAD_TILES * (2 * D + 8);
    static_assert(TILES * Query::TILE_WORDS <= STAGED, "a query has room");
    static constexpr int VECTORS = D / 32, GROUP = 16 / PLANES;  // 16 bytes each; tokens that are loaded at once
    static constexpr int TOKEN_BYTES = PLANES * D / 8, MEAN_BYTES = MEAN_PLANES * D / 8;
    static constexpr float COUNT_SCALE = 0x1p112f;  // makes 2^-149 a COUNT_UNIT

    u32 low[4 * VECTORS], high[4 * VECTORS];  // signs of pages lane / 4 and lane / 4 + 8, this lane's part
    u32 low_factors[GROUP / 2], high_factors[GROUP / 2];
    u32 digits[TILES][DIGIT_PAIRS][WORDS];
    float offset[TILES], unit[TILES];  // of this lane's head
    const char *low_page, *high_page, *signs, *means;
    const u16 *low_factor, *high_factor, *factors;
    const float *units, *flips;
    int num_kv_heads, head, page_shift;
    float scaling;

    __device__ SketchScorer(const SketchTensors& tensors, int num_kv_heads, int head, int page_shift, float scaling)
        : signs(tensors.signs + Layout::lane_offset(lane_id())),
          means(tensors.means),
          factors(tensors.factors),
          units(tensors.units),
          flips(tensors.flips + head * 2 * D),
          num_kv_heads(num_kv_heads),
          head(head),
          page_shift(page_shift),
          scaling(scaling) {}

    // The query head that this lane's scores[tile][i] and scores[tile][2 + i] belong to.
    __device__ static int head_of(int tile, int i) { return tile * MMA_HEADS + i * 4 + lane_id() % 4; }

    // Warps first, first + stride, ... of those that share the work call it; each takes two digits of a head at a
    // time.
    template <typename Begin>
    __device__ void stage(uint4* staged /* [STAGED] */, const u16* query /* [group, d] */, int group, int first,
                          int stride, Begin begin) {
        float x[N];
        int loaded = first / DIGIT_PAIRS;
        bool rotated = false;
        const auto load_head = [&](int i) {
#pragma unroll
            for (int j = 0; j < N; ++j) x[j] = i < group ? T::to_float(query[i * D + j * WARP + lane_id()]) : 0.f;
        };
        const Rotation<D> rotate(flips);
        load_head(loaded);
        begin();
#pragma unroll 1
        for (int item = first; item < MAX_HEADS * DIGIT_PAIRS; item += stride) {
            const int i = item / DIGIT_PAIRS;
            u32* const tile = reinterpret_cast<u32*>(staged + i / TILE_HEADS * Query::TILE_WORDS);
            if (i != loaded) load_head(loaded = i), rotated = false;
            if (!rotated) rotate(x);
            rotated = true;
            Query::stage_digits(tile, i % TILE_HEADS, item % DIGIT_PAIRS, x, scaling);
        }
    }

    __device__ void use(const uint4* staged) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const u32* const words = reinterpret_cast<const u32*>(staged + tile * Query::TILE_WORDS);
            const float* const constants = reinterpret_cast<const float*>(words + Query::OFFSETS) + lane_id() % 4;
            offset[tile] = 0.f;
#pragma unroll
            for (int i = 0; i < DIGIT_PAIRS * WORDS; ++i)
                digits[tile][i / WORDS][i % WORDS] = words[i * WARP + lane_id()];
#pragma unroll
            for (int pair = 0; pair < DIGIT_PAIRS; ++pair)
                offset[tile] += ((1 << PLANES) - 1) * constants[TILE_HEADS * pair];
            unit[tile] = constants[TILE_HEADS * DIGIT_PAIRS];
        }
    }

    // Registers hold one tile of such small digests, too little to be under way: the signs of the tile after come as
    // far as L2. A lane asks for every other line of the page of its number.
    __device__ void prefetch_page(int id) const {
        const char* const page =
            signs - Layout::lane_offset(lane_id()) + ((i64(id) * num_kv_heads + head) << page_shift) * TOKEN_BYTES;
#pragma unroll 1
        for (int i = lane_id() / TILE * 128; i < TOKEN_BYTES << page_shift; i += 256) prefetch(page + i);
    }

    // This lane's two pages of the next tile.
    __device__ void aim(int low_id, int high_id) {
        const i64 low_item = (i64(low_id) * num_kv_heads + head) << page_shift;
        const i64 high_item = (i64(high_id) * num_kv_heads + head) << page_shift;
        low_page = signs + low_item * TOKEN_BYTES;
        high_page = signs + high_item * TOKEN_BYTES;
        low_factor = factors + low_item;
        high_factor = factors + high_item;
        if (lane_id() % 4) return;
        prefetch(means + (low_item >> page_shift) * MEAN_BYTES);
        prefetch(means + (high_item >> page_shift) * MEAN_BYTES);
    }

    __device__ void load_first() {
        unrolled<VECTORS>([&](auto i) { load<i.value>(); });
        unrolled<GROUP / 8>([&](auto i) { load_factors<i.value>(); });
        __syncwarp();  // all are under way before the first is used
    }

    // Scores the tile whose first tokens are under way; `next()` aims at the one after.
    template <typename Next>
    __device__ void score(float (&scores)[HEAD_TILES][4], Next next) {
        float sums[TILES][2] = {}, means[TILES][2];
        score_means(means);
        const int groups = (1u << page_shift) / GROUP;
#pragma unroll 1
        for (int group = 1; group <= groups; ++group) {
            if (group == groups) {
                next();
            } else {
                low_page += GROUP * TOKEN_BYTES, high_page += GROUP * TOKEN_BYTES;
                low_factor += GROUP, high_factor += GROUP;
            }
            Counts counts[2];
            count_token<0>(counts[0]);
            unrolled<GROUP>([&](auto token) {  // the next token's are counted meanwhile
                constexpr int TOKEN = token.value;
                if constexpr (TOKEN + 1 < GROUP) count_token<TOKEN + 1>(counts[(TOKEN + 1) % 2]);
                add_token<TOKEN>(sums, counts[TOKEN % 2]);
            });
        }
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES * 2; ++tile) {
            float &low_score = scores[tile / 2][tile % 2], &high_score = scores[tile / 2][2 + tile % 2];
            low_score = high_score = 0.f;
            if (tile >= TILES) continue;
            low_score = LN_2 * (means[tile % TILES][0] + __log2f(sums[tile % TILES][0]));
            high_score = LN_2 * (means[tile % TILES][1] + __log2f(sums[tile % TILES][1]));
        }
    }

  private:
    using Counts = int[TILES][DIGIT_PAIRS][4];

    // What the means of the pages aimed at add to the logits of this lane's heads, in base 2. Before anything of the
    // next tile is loaded: what waits for these loads would wait for those, as the hardware has few counters of
    // loads.
    __device__ void score_means(float (&logits)[TILES][2]) const {
        constexpr float MORE =
            ((1 << MEAN_PLANES) - 1) / ((1 << PLANES) - 1) - 1;  // offsets than a token of its planes
        const i64 items[2] = {item_of(low_factor), item_of(high_factor)};
        const float factors[2] = {units[items[0]], units[items[1]]};
        u32 low_mean[MEAN_WORDS], high_mean[MEAN_WORDS];
        load_mean(low_mean, means + items[0] * MEAN_BYTES);
        load_mean(high_mean, means + items[1] * MEAN_BYTES);
        Counts counts;
        count_code<0, MEAN_PLANES>(counts, low_mean, high_mean);
#pragma unroll
        for (int i = 0; i < TILES * 2; ++i) {
            const float sum = product(counts[i / 2], i % 2, offset[i / 2]) - MORE * offset[i / 2];
            logits[i / 2][i % 2] = factors[i % 2] * unit[i / 2] * sum;
        }
    }

    // This lane's part of a mean.
    __device__ static void load_mean(u32 (&words)[MEAN_WORDS], const char* mean) {
        const char* const part = mean + MeanLayout<D>::lane_offset(lane_id());
        if constexpr (D == 64) {
            words[0] = load4(part);
        } else if constexpr (D == 256) {
            const uint4 v = load16_of_line<0>(part);
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
        } else if constexpr (D == 128) {
            const uint2 v = load8(part);
            words[0] = v.x, words[1] = v.y;
        } else {  // 6 bytes, which begin in the middle of a word where the lane is odd
            const int begun = lane_id() % 2 * 2;
            const u32 first = load4(part - begun), next = load4<4>(part - begun);
            words[0] = __funnelshift_r(first, next, begun * 8);
            words[1] = next >> begun * 8;
        }
    }
    // Where the page lies, counted in digests, whose first factor this is.
    __device__ i64 item_of(const u16* factor) const { return (factor - factors) >> page_shift; }

    template <int I>
    __device__ void load() {
        const uint4 a = load16_of_line<Layout::vector(I)>(low_page), b = load16_of_line<Layout::vector(I)>(high_page);
        low[4 * I] = a.x, low[4 * I + 1] = a.y, low[4 * I + 2] = a.z, low[4 * I + 3] = a.w;
        high[4 * I] = b.x, high[4 * I + 1] = b.y, high[4 * I + 2] = b.z, high[4 * I + 3] = b.w;
    }
    // The factors of eight tokens.
    template <int I>
    __device__ void load_factors() {
        const uint4 a = load16_of_line<I * 16>(low_factor), b = load16_of_line<I * 16>(high_factor);
        u32 *const low = low_factors + 4 * I, *const high = high_factors + 4 * I;
        low[0] = a.x, low[1] = a.y, low[2] = a.z, low[3] = a.w;
        high[0] = b.x, high[1] = b.y, high[2] = b.z, high[3] = b.w;
    }

    // This lane's bits of a plane of a token, word `I`; where it has fewer than 32, others follow that meet no digit.
    template <int PIECE, int I, int SIZE>
    __device__ static u32 bits_of(const u32 (&bits)[SIZE]) {
        if constexpr (D == 64) {
            return PIECE % 2 ? bits[PIECE / 2] >> 16 : bits[PIECE / 2];
        } else if constexpr (D == 96) {
            constexpr int FIRST = PIECE * 24 / 32, NEXT = FIRST + 1 < SIZE ? FIRST + 1 : FIRST;
            return __funnelshift_r(bits[FIRST], bits[NEXT], PIECE * 24 % 32);
        } else {
            return bits[PIECE * (D / 128) + I];
        }
    }
    template <int TOKEN>
    __device__ static float factor_of(const u32 (&pairs)[GROUP / 2]) {
        return fp16::to_float(TOKEN % 2 ? pairs[TOKEN / 2] >> 16 : pairs[TOKEN / 2] & 0xFFFF);
    }

    // Counts of one token of every page; then the next bits are loaded into the registers that are free by now.
    template <int TOKEN>
    __device__ void count_token(Counts& counts) {
        count_code<TOKEN * PLANES, PLANES>(counts, low, high);
        constexpr int FROM = TOKEN * TOKEN_BYTES / 64, TO = (TOKEN + 1) * TOKEN_BYTES / 64;
        unrolled<TO - FROM>([&](auto i) { load<FROM + i.value>(); });
    }

    // Counts of a code of every page, whose planes are the pieces from FIRST on.
    template <int FIRST, int CODE_PLANES, int SIZE>
    __device__ void count_code(Counts& counts, const u32 (&low)[SIZE], const u32 (&high)[SIZE]) const {
#pragma unroll
        for (int i = 0; i < TILES * DIGIT_PAIRS * 4; ++i)
            counts[i / (DIGIT_PAIRS * 4)][i / 4 % DIGIT_PAIRS][i % 4] = 0;
        unrolled<CODE_PLANES>([&](auto plane) {
            constexpr int WEIGHT = 1 << (CODE_PLANES - 1 - plane.value);
            const Bits<FIRST + plane.value> bits(low, high);
#pragma unroll
            for (int i = 0; i < TILES * DIGIT_PAIRS * WEIGHT; ++i) {
                const int tile = i / WEIGHT / DIGIT_PAIRS, pair = i / WEIGHT % DIGIT_PAIRS;
                bits.count(counts[tile][pair], digits[tile][pair]);
            }
        });
    }

    // What counts amount to, half of the sum over channels of c * q' in COUNT_UNIT: they are read as floats.
    __device__ static float product(const int (&counts)[DIGIT_PAIRS][4], int row, float offset) {
        float sum = fmaf(__int_as_float(counts[0][2 * row]), COUNT_SCALE, -offset);
        sum = fmaf(__int_as_float(counts[0][2 * row + 1]), 3 * COUNT_SCALE, sum);
        sum = fmaf(__int_as_float(counts[1][2 * row]), 9 * COUNT_SCALE, sum);
        return fmaf(__int_as_float(counts[1][2 * row + 1]), 27 * COUNT_SCALE, sum);
    }

    template <int TOKEN>
    __device__ void add_token(float (&sums)[TILES][2], const Counts& counts) {
        const float factors[2] = {factor_of<TOKEN>(low_factors), factor_of<TOKEN>(high_factors)};
#pragma unroll
        for (int i = 0; i < TILES * 2; ++i) {
            const float logit = factors[i % 2] * unit[i / 2] * product(counts[i / 2], i % 2, offset[i / 2]);
            sums[i / 2][i % 2] += exp2_fast(fmaxf(logit, LOWEST));  // 0 if there is no token, whose factor is NaN
        }
        if constexpr (TOKEN % 8 == 7) load_factors<TOKEN / 8>();
    }

    // The bits of a plane of a token, as operands.
    template <int PIECE>
    struct Bits {
        u32 a[WORDS / 2][4];

        template <int SIZE>
        __device__ Bits(const u32 (&low)[SIZE], const u32 (&high)[SIZE]) {
            if constexpr (D == 256) {
                a[0][0] = bits_of<PIECE, 0>(low), a[0][1] = bits_of<PIECE, 0>(high);
                a[0][2] = bits_of<PIECE, 1>(low), a[0][3] = bits_of<PIECE, 1>(high);
#pragma unroll
                for (int i = 0; i < 4; ++i) a[1][i] = ~a[0][i];
            } else {
                a[0][0] = bits_of<PIECE, 0>(low), a[0][1] = bits_of<PIECE, 0>(high);
                a[0][2] = ~a[0][0], a[0][3] = ~a[0][1];
            }
        }

        __device__ void count(int (&counts)[4], const u32 (&digits)[WORDS]) const {
#pragma unroll
            for (int i = 0; i < WORDS / 2; ++i) count_ones(counts, a[i], digits[2 * i], digits[2 * i + 1]);
        }
    };
};

template <int MAX_HEADS, int PLANES>
struct Sketch {
    template <typename T, int D>
    using Summary = SketchSummary<T, D, PLANES>;
    template <typename T, int D, int HEAD_TILES>
    using Scorer = SketchScorer<T, D, HEAD_TILES, MAX_HEADS, PLANES>;
};
