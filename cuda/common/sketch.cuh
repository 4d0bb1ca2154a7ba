// One bit per channel of every key, and a factor: an estimate of each token's dot product with the query
// (sparsekv/digests/sign_sketch.py, which has the source). A page scores its best token.
//
// The estimate is f * sum over channels of +-q, q rotated. A bit b is 2 b - 1, so the sum is 2 sum(b q) - sum(q), and
// sum(b q) is a product of bytes on the tensor cores, exact in whole numbers: q is a whole number of 16 bits, of
// which the upper and the lower eight are two columns. A row is a page, and one product after another takes the
// tokens of sixteen pages one by one, so the best of a page stays in a register.
//
// A word of bits becomes four operands' bytes by a shift and a mask: bit 7 of each byte, 128 or 0. Of the four lanes
// of a page, each holds its part of a token's channels, in the order that these shifts give.
#pragma once
#include "common/digest.cuh"

// Plane p of a word: its bits 7 - p of each byte, as bytes of 0 or 128.
__device__ inline u32 bit_plane(u32 word, int p) { return word << p & 0x80808080u; }

// c[16 x 8] = a[16 x 32] b[32 x 8] + c of bytes, a without and b with a sign. Of lane l, r = l / 4 and q = l % 4: a0,
// a2 hold row r, a1, a3 row r + 8, b0, b1 column r; a0, a1, b0 the columns (of b, rows) 4 q to 4 q + 3, the others 16
// on.
__device__ inline void mma_bytes(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline float sum_of_warp(float x) {
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

// A vector turned as the digest turns keys: two rounds of flipped signs, a Hadamard transform of every 32 channels
// and one across them (for d 96 a reflection). Lane l holds channels l, l + 32, ...
template <int D>
__device__ void rotate(float (&x)[D / WARP], const float* flips /* [2, d] */) {
    constexpr int N = D / WARP;
    constexpr float SCALE = D == 64    ? 0.125f
                            : D == 96  ? 0.17677669529663687f
                            : D == 128 ? 0.08838834764831845f
                                       : 0.0625f;
    float flip[2 * N];  // all on their way at once
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) flip[i] = flips[i * WARP + lane_id()];
#pragma unroll
    for (int round = 0; round < 2; ++round) {
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] *= flip[round * N + i] * SCALE;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float other = __shfl_xor_sync(ALL_LANES, x[i], step);
                x[i] = lane_id() & step ? other - x[i] : other + x[i];
            }
        }
        if constexpr (N == 3) {
            const float shared = (x[0] + x[1] + x[2]) * (2.f / 3.f);
#pragma unroll
            for (int i = 0; i < N; ++i) x[i] -= shared;
        } else {
#pragma unroll
            for (int step = 1; step < N; step *= 2) {
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    if (i & step) continue;
                    const float a = x[i], b = x[i + step];
                    x[i] = a + b;
                    x[i + step] = a - b;
                }
            }
        }
    }
}

template <int D>
struct SketchLayout {
    static constexpr int BYTES = D / 32;                      // of a lane's part of a token
    static constexpr int TOKENS = D == 96 ? 16 : 32 / BYTES;  // whose parts lie side by side

    // Where byte `i` of a token lies in its page.
    __device__ static int place(int token, int i) {
        return ((token / TOKENS * 4 + i / BYTES) * TOKENS + token % TOKENS) * BYTES + i % BYTES;
    }
    // Where the lane's 16 bytes number `i` of every sixteen tokens begin: for whole lines of 128 bytes, two by two.
    __device__ static constexpr int vector(int i) { return D == 96 ? i * 16 : i / 2 * 128 + i % 2 * 16; }
    __device__ static int lane_offset(int lane) { return lane % 4 * (D == 96 ? 48 : 32); }
};

template <typename T, int D>
struct SketchSummary {
    static constexpr bool WHOLE = false;
    using Layout = SketchLayout<D>;

    __device__ void take(uint4) {}

    // Tokens of the page from `stale` on are new, and there are `count`.
    __device__ void store(const Page& page, const Digests& digests, int stale, int count, int page_size) {
        char* const signs = static_cast<char*>(digests.first) + page.item * page_size * (D / 8);
        u16* const factors = digests.factors + page.item * page_size;
        const float *const mean = digests.mean + page.head * D, *const flips = digests.flips + page.head * 2 * D;
#pragma unroll 1
        for (int token = stale; token < count; ++token) {
            float x[D / WARP], squares = 0.f, sizes = 0.f;
#pragma unroll
            for (int i = 0; i < D / WARP; ++i) {
                const int channel = i * WARP + lane_id();
                x[i] = T::to_float(page.keys[token * D + channel]) - mean[channel];
                squares += x[i] * x[i];
            }
            rotate<D>(x, flips);
            u32 byte = 0;
#pragma unroll
            for (int i = 0; i < D / WARP; ++i) {
                sizes += fabsf(x[i]);
                const u32 word = __ballot_sync(ALL_LANES, x[i] > 0.f);
                if (lane_id() / 4 == i) byte = word >> lane_id() % 4 * 8;
            }
            const float factor = sum_of_warp(squares) / fmaxf(sum_of_warp(sizes), 1e-20f);
            if (lane_id() < D / 8) signs[Layout::place(token, lane_id())] = byte;
            if (lane_id() == 0) factors[token] = fp16::pack(factor, 0.f);
        }
        for (int token = count + lane_id(); token < page_size; token += WARP) factors[token] = 0x7FFF;  // NaN: none
    }
};

// `MOST_HEADS`: query heads of a kv head for which there is room; four to a product.
template <typename T, int D, int HEAD_TILES, int MOST_HEADS>
struct SketchScorer {
    using Layout = SketchLayout<D>;
    static constexpr int TILES = MOST_HEADS / 4;
    static constexpr int PLANES = D == 64 ? 4 : D == 256 ? 16 : 8;  // of a token
    static constexpr int TILE_WORDS = PLANES * WARP / 4 + 4;        // of 16 bytes: operands, then a word per head
    static constexpr int STAGED = TILES * TILE_WORDS;               // of a staged query
    static constexpr int VECTORS = D / 32, GROUP = 16;              // 16 bytes each; tokens that are loaded at once
    static constexpr int MAGIC = 0x4B400000;                        // a float's bits: 1.5 * 2^23, in which whole
    static constexpr float MAGIC_FLOAT = 12582912.f;                // numbers up to 2^22 add up like integers

    u32 low[4 * VECTORS], high[4 * VECTORS];  // signs of pages lane / 4 and lane / 4 + 8, this lane's part
    u32 low_factors[8], high_factors[8];
    u32 query[TILES][PLANES];
    float upper[TILES], lower[TILES],
        scale[TILES];  // of this lane's head: what 64 sum(q) and the magic add, and the unit
    const char *low_page, *high_page, *signs;
    const u16 *low_factor, *high_factor, *factors;
    const float* flips;
    int num_kv_heads, head, page_shift;

    __device__ SketchScorer(const Digests& digests, int num_kv_heads, int head, int page_shift)
        : signs(static_cast<const char*>(digests.first) + Layout::lane_offset(lane_id())),
          factors(digests.factors),
          flips(digests.flips + head * 2 * D),
          num_kv_heads(num_kv_heads),
          head(head),
          page_shift(page_shift) {}

    // The query head that this lane's scores[tile][i] and scores[tile][2 + i] belong to.
    __device__ static int head_of(int tile, int i) { return tile * MMA_HEADS + i * 4 + lane_id() % 4; }

    // Warps first, first + stride, ... of those that share the work call it; each takes whole heads.
    __device__ void stage(uint4* staged /* [STAGED] */, const u16* query /* [group, d] */, int group, int first,
                          int stride) const {
#pragma unroll 1
        for (int i = first; i < MOST_HEADS; i += stride) {
            float x[D / WARP];
            float largest = 0.f;
#pragma unroll
            for (int j = 0; j < D / WARP; ++j)
                x[j] = i < group ? T::to_float(query[i * D + j * WARP + lane_id()]) : 0.f;
            rotate<D>(x, flips);
#pragma unroll
            for (int j = 0; j < D / WARP; ++j) largest = fmaxf(largest, fabsf(x[j]));
            largest = __uint_as_float(__reduce_max_sync(ALL_LANES, __float_as_uint(largest)));
            const float unit = largest / 32512.f, inverse = largest > 0.f ? 32512.f / largest : 0.f;
            uint4* const tile = staged + i / 4 * TILE_WORDS;
            char* const operands = reinterpret_cast<char*>(tile) + i % 4 * 2 * 16;  // column 2 (i % 4), of a plane
            if constexpr (D == 96)  // a word's fourth byte is another token's
                operands[lane_id() / 4 * 128 + lane_id() % 4 * 4 + 3] =
                    operands[lane_id() / 4 * 128 + 16 + lane_id() % 4 * 4 + 3] = 0;
            int upper_sum = 0, lower_sum = 0;
#pragma unroll
            for (int j = 0; j < D / WARP; ++j) {
                const int whole = __float2int_rn(x[j] * inverse), high = (whole + 128) >> 8, low = whole - high * 256;
                const int channel = j * WARP + lane_id(), quarter = channel / (D / 4), place = channel % (D / 4);
                char* const operand = operands + plane_of(place) * 128 + quarter * 4 + column_of(place);
                operand[0] = high;
                operand[16] = low;
                upper_sum += high;
                lower_sum += low;
            }
            upper_sum = __reduce_add_sync(ALL_LANES, upper_sum);
            lower_sum = __reduce_add_sync(ALL_LANES, lower_sum);
            if (lane_id() == 0)
                tile[PLANES * WARP / 4 + i % 4] = {__float_as_uint(MAGIC_FLOAT + 64.f * upper_sum),
                                                   __float_as_uint(MAGIC_FLOAT + 64.f * lower_sum),
                                                   __float_as_uint(unit / 64.f), 0};
        }
    }

    __device__ void use(const uint4* staged) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const u32* const operands = reinterpret_cast<const u32*>(staged + tile * TILE_WORDS);
#pragma unroll
            for (int p = 0; p < PLANES; ++p) query[tile][p] = operands[p * WARP + lane_id()];
            const uint4 of_head = staged[tile * TILE_WORDS + PLANES * WARP / 4 + lane_id() % 4];
            upper[tile] = __uint_as_float(of_head.x);
            lower[tile] = __uint_as_float(of_head.y);
            scale[tile] = __uint_as_float(of_head.z);
        }
    }

    // This lane's two pages of the next tile.
    __device__ void aim(int low_id, int high_id) {
        const i64 low_item = (i64(low_id) * num_kv_heads + head) << page_shift;
        const i64 high_item = (i64(high_id) * num_kv_heads + head) << page_shift;
        low_page = signs + low_item * (D / 8);
        high_page = signs + high_item * (D / 8);
        low_factor = factors + low_item;
        high_factor = factors + high_item;
    }

    __device__ void load_first() {
        unrolled<VECTORS>([&](auto i) { load<i.value>(); });
        load_factors<0>();
        load_factors<1>();
        __syncwarp();  // all are under way before the first is used
    }

    // The tile whose first sixteen tokens are under way; `next(*this)` aims at the one after.
    template <typename Next>
    __device__ void score(float (&scores)[HEAD_TILES][4], Next next) {
        float best[TILES][2];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) best[tile][0] = best[tile][1] = -infinity();
        const int groups = 1 << page_shift >> 4;
#pragma unroll 1
        for (int group = 1; group <= groups; ++group) {
            if (group == groups) {
                next(*this);
            } else {
                low_page += GROUP * D / 8, high_page += GROUP * D / 8;
                low_factor += GROUP, high_factor += GROUP;
            }
            unrolled<GROUP / 2>([&](auto pair) { score_pair<2 * pair.value>(best); });
        }
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES * 2; ++tile) {
            float (&both)[4] = scores[tile / 2];
            both[tile % 2] = tile < TILES ? best[tile % TILES][0] * scale[tile % TILES] : 0.f;
            both[2 + tile % 2] = tile < TILES ? best[tile % TILES][1] * scale[tile % TILES] : 0.f;
        }
    }

  private:
    // Where a channel of a lane's part goes: the plane and the byte of it that hold its bit.
    __device__ static int plane_of(int place) {
        const int plane = 7 - place % 8;
        return D == 64 ? plane % 4 : D == 256 ? place / 32 * 8 + plane : plane;
    }
    __device__ static int column_of(int place) {
        return D == 64 ? place / 8 + (place % 8 < 4 ? 2 : 0) : place / 8 % 4;
    }

    template <int I>
    __device__ void load() {
        const uint4 a = load16_of_line<Layout::vector(I)>(low_page), b = load16_of_line<Layout::vector(I)>(high_page);
        low[4 * I] = a.x, low[4 * I + 1] = a.y, low[4 * I + 2] = a.z, low[4 * I + 3] = a.w;
        high[4 * I] = b.x, high[4 * I + 1] = b.y, high[4 * I + 2] = b.z, high[4 * I + 3] = b.w;
    }
    template <int I>
    __device__ void load_factors() {
        const uint4 a = load16_of_line<I * 16>(low_factor), b = load16_of_line<I * 16>(high_factor);
        low_factors[4 * I] = a.x, low_factors[4 * I + 1] = a.y, low_factors[4 * I + 2] = a.z,
                        low_factors[4 * I + 3] = a.w;
        high_factors[4 * I] = b.x, high_factors[4 * I + 1] = b.y, high_factors[4 * I + 2] = b.z,
                         high_factors[4 * I + 3] = b.w;
    }

    // The bits of a token from which planes 8 I to 8 I + 7 are taken; of d 64, all four planes from one word: its two
    // bytes, and behind them the same with the lower halves of both shifted up.
    template <int TOKEN, int I>
    __device__ static u32 word_of(const u32 (&bits)[4 * VECTORS]) {
        if constexpr (D == 64) return (TOKEN % 2 ? bits[TOKEN / 2] >> 16 : bits[TOKEN / 2] & 0xFFFF) * 0x00100001u;
        if constexpr (D == 96) {
            constexpr int FIRST = TOKEN * 24 / 32, SHIFT = TOKEN * 24 % 32;
            if constexpr (SHIFT <= 8)
                return bits[FIRST] >> SHIFT;
            else
                return __funnelshift_r(bits[FIRST], bits[FIRST + 1], SHIFT);
        }
        if constexpr (D == 128) return bits[TOKEN];
        if constexpr (D == 256) return bits[2 * TOKEN + I];
    }
    template <int TOKEN>
    __device__ static float factor_of(const u32 (&pairs)[8]) {
        return fp16::to_float(TOKEN % 2 ? pairs[TOKEN / 2] >> 16 : pairs[TOKEN / 2] & 0xFFFF);
    }

    // Adds the products of a token's planes P and P + 1.
    template <int TOKEN, int P>
    __device__ void multiply(int (&sums)[TILES][4]) const {
        const u32 a = word_of<TOKEN, P / 8>(low), b = word_of<TOKEN, P / 8>(high);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
            mma_bytes(sums[tile], bit_plane(a, P % 8), bit_plane(b, P % 8), bit_plane(a, P % 8 + 1),
                      bit_plane(b, P % 8 + 1), query[tile][P], query[tile][P + 1]);
    }

    // Two tokens of every page; then loads what was used.
    template <int TOKEN>
    __device__ void score_pair(float (&best)[TILES][2]) {
        int sums[2][TILES][4];
#pragma unroll
        for (int i = 0; i < 2 * TILES * 4; ++i) sums[i / (TILES * 4)][i / 4 % TILES][i % 4] = MAGIC;
        unrolled<PLANES / 2>([&](auto step) {  // by turns: they do not wait for one another
            multiply<TOKEN, 2 * step.value>(sums[0]);
            multiply<TOKEN + 1, 2 * step.value>(sums[1]);
        });
        unrolled<2>([&](auto second) {
            const float a = factor_of<TOKEN + second.value>(low_factors);
            const float b = factor_of<TOKEN + second.value>(high_factors);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const int (&sum)[4] = sums[second.value][tile];
                best[tile][0] = fmaxf(best[tile][0], a * whole(tile, sum[0], sum[1]));  // a NaN is never the largest
                best[tile][1] = fmaxf(best[tile][1], b * whole(tile, sum[2], sum[3]));
            }
        });
        constexpr int FROM = TOKEN * D / 512, TO = (TOKEN + 2) * D / 512;
        unrolled<TO - FROM>([&](auto i) { load<FROM + i.value>(); });
        if constexpr (TOKEN % 8 == 6) load_factors<TOKEN / 8>();
    }

    // 64 times the sum of +-q of this lane's head, in units of `scale` / 64.
    __device__ float whole(int tile, int high, int low) const {
        return (__int_as_float(high) - upper[tile]) * 256.f + (__int_as_float(low) - lower[tile]);
    }
};

template <int MOST_HEADS>
struct Sketch {
    template <typename T, int D>
    using Summary = SketchSummary<T, D>;
    template <typename T, int D, int HEAD_TILES>
    using Scorer = SketchScorer<T, D, HEAD_TILES, MOST_HEADS>;
};
