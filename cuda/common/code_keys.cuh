// Keys in codes of eight bits or six (codes.cuh).
//
// The tensor core multiplies bytes, so that codes need nothing but their bits put together: lane 4 r + c has channels
// 8 c to 8 c + 7 of every 32, of tokens r and r + 8. A query is two numbers of a byte for each channel, 256 times the
// upper one and the lower one, whose products fill the rows of eight heads and the other eight; the sum of a group's
// numbers stands for what its zeros add. Of six bits the lower four lie apart from the upper two: in a byte those of
// channels k and k + 4 of the eight, and those of the same four times two channels of two groups of 32.
#pragma once
#include "common/codes.cuh"

// c[16 x 8] += a[16 x 32] b[32 x 8], of bytes, those of a with signs. Of lane l, r = l / 4 and c = l % 4: a0, a2 hold
// row r, a1, a3 row r + 8, b0, b1 column r; of a0, a1, b0 the columns (rows of b) are 4 c to 4 c + 3, of the others
// those 16 later. c as in device.cuh.
__device__ inline void multiply_codes(int (&c)[4], const uint4& a, const uint2& b) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

// ---- a query in shared memory: its numbers in the order of the products; behind them, for every head, what 1 is
// worth, then for every group of channels the numbers' sum, a float, or of less than eight bits a whole number

template <int D, int BITS>
struct CodeQuery {
    static constexpr int GROUPS = code_groups(D, BITS);

    static __device__ constexpr int words(int tiles) { return tiles * (D + 2 + 2 * GROUPS); }  // of 16 bytes
    static __device__ const float* scalars(const uint4* staged, int tiles) {
        return reinterpret_cast<const float*>(staged + tiles * D);
    }

    template <typename T, int HEAD_TILES>
    static __device__ void stage(const u16* query, int group, uint4* staged) {
        constexpr int LANES = D / 8, AT_ONCE = WARP / LANES;  // lanes of a head, heads of a warp
        constexpr float LIMIT = 127 * 256;                    // of a number whose upper byte has a sign
        const int lane = lane_id() % LANES, mine = lane_id() / LANES;
        float* const scalars = reinterpret_cast<float*>(staged + HEAD_TILES * D);
#pragma unroll 1
        for (int head = warp_id() * AT_ONCE + mine; mine < AT_ONCE && head < HEAD_TILES * 8;
             head += num_warps() * AT_ONCE) {
            float x[8], largest = 0.f, sum = 0.f;
            ::unpack8<T>(head < group ? load16(query + head * D + lane * 8) : uint4{0, 0, 0, 0}, x);
#pragma unroll
            for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(x[i]));
            largest = over_channels<D, true>(largest, Greatest{});
            const float inverse = largest > SMALLEST * LIMIT ? LIMIT / largest : 0.f;
            u32 words[4] = {};  // upper bytes, lower bytes, upper bytes, lower bytes
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int number = __float2int_rn(x[i] * inverse), lower = (number + 128 & 255) - 128;
                sum += number;
                words[i / 4 * 2] |= u32(number - lower >> 8 & 255) << i % 4 * 8;
                words[i / 4 * 2 + 1] |= u32(lower & 255) << i % 4 * 8;
            }
            sum = over_channels<D, BITS == 8>(sum, [](float a, float b) { return a + b; });
            const int chunk = (head / 8 * (D / 32) + lane / 4) * WARP;
            staged[chunk + head % 8 * 4 + lane % 4] = {words[0], words[1], words[2], words[3]};
            if (lane == 0) scalars[head] = largest / LIMIT * (1 << LaneFactors<BITS, 1>::EXPONENT);
            if (BITS == 8 ? lane == 0 : lane % 4 == 0)
                scalars[(1 + lane / 4) * (HEAD_TILES * 8) + head] = BITS == 8 ? sum : __int_as_float(int(sum));
        }
    }
};

// ---- where keys lie

template <int D, int BITS>
struct KeyPage : CodePage<D, BITS> {
    using Base = CodePage<D, BITS>;
    static constexpr int TOGETHER = code_pairs(D) < 2 ? 1 : 2;  // pairs of groups whose upper bits are loaded at once

    // Eight channels of a token: of eight bits their bytes, else four bytes of their lower bits.
    static __device__ int place(int token, int channel) {
        const int lane = token % 8 * 4 + channel % 32 / 8, half = token / 8 % 2;
        if (BITS == 8) return Base::unit(token) + channel / 32 * 512 + lane * 16 + half * 8;
        return Base::unit(token) + channel / 64 * 512 + lane * (channel < D / 64 * 64 ? 16 : 8) +
               channel % 64 / 32 * 8 + half * 4;
    }
    // Their upper bits, beside those of the other 32 channels of the pair.
    static __device__ int upper(int token, int channel) {
        const int pair = channel / 64, lane = token % 8 * 4 + channel % 32 / 8;
        return Base::unit(token) + UNIT * D / 2 + pair / 2 * 512 + lane * TOGETHER * 8 + pair % 2 * 8 +
               token / 8 % 2 * 4;
    }
};

// The codes of a step's channels that a lane holds, loaded from `unit`, where those of sixteen tokens begin; `get`
// gives those of token r or r + 8 in the j-th 32 channels.
template <int D, int BITS, int STEP>
struct KeyCodes;

template <int D, int STEP>
struct KeyCodes<D, 8, STEP> {
    uint4 words[STEP / 32];

    __device__ void load(const unsigned char* unit, int step) {
        const unsigned char* const from = unit + step * (UNIT * STEP) + lane_id() * 16;
        unrolled<STEP / 32>([&](auto j) { words[j.value] = load16<j.value * 512>(from); });
    }
    __device__ uint2 get(int half, int j) const {
        return half ? uint2{words[j].z, words[j].w} : uint2{words[j].x, words[j].y};
    }
};

template <int D, int STEP>
struct KeyCodes<D, 6, STEP> {
    static constexpr int WHOLE = STEP / 64, PAIRS = code_pairs(STEP);
    uint4 lower[PAIRS], upper;

    __device__ void load(const unsigned char* unit, int step) {
        const unsigned char* const from = unit + step * (UNIT * STEP / 2) + lane_id() * 16;
        unrolled<WHOLE>([&](auto i) { lower[i.value] = load16<i.value * 512>(from); });
        if constexpr (PAIRS > WHOLE) {
            const uint2 rest = load8<WHOLE * 512>(from - lane_id() * 8);
            lower[WHOLE] = {rest.x, rest.y, 0, 0};
        }
        const unsigned char* const above = unit + UNIT * D / 2 + step * (UNIT * 16 * PAIRS);
        if constexpr (PAIRS == 2) {
            upper = load16(above + lane_id() * 16);
        } else {
            const uint2 two = load8(above + lane_id() * 8);
            upper = {two.x, two.y, 0, 0};
        }
    }
    __device__ uint2 get(int half, int j) const {
        const u32 low = word_of(lower[j / 2], j % 2 * 2 + half), high = word_of(upper, j / 2 * 2 + half) >> j % 2 * 4;
        return {(low & 0x0F0F0F0Fu) | (high << 4 & 0x30303030u),
                (low >> 4 & 0x0F0F0F0Fu) | (high << 2 & 0x30303030u)};
    }
};

// ---- what attention asks for (format.cuh)

template <int D, int STEP, typename Format>
struct CodeKeys {
    static constexpr int BITS = Format::KEY_BITS, GROUP = D / code_groups(D, BITS);
    static constexpr int OF_STEP = BITS == 8 ? 1 : STEP / 32;  // groups
    using Page = KeyPage<D, BITS>;
    using Query = CodeQuery<D, BITS>;

    KeyCodes<D, BITS, STEP> codes;
    LaneFactors<BITS, OF_STEP> factors;

    __device__ void load(const unsigned char* pool, int block, int step, int page_shift) {
        const int units = page_shift - UNIT_SHIFT, unit = block & ((1 << units) - 1);
        const unsigned char* const page = Format::template keys_at<D>(pool, block >> units, page_shift);
        codes.load(page + unit * (UNIT * Page::CODES), step);
        if (BITS < 8 || step == 0)
            factors.load(page + Page::factors(page_shift, unit, lane_id() % 4) + step * (OF_STEP * 8));
    }

    template <int HEAD_TILES>
    struct Sums {
        Dots dots;                            // of groups that are done
        int products[HEAD_TILES][2][4] = {};  // of this one
    };

    template <int HEAD_TILES>
    __device__ void multiply(Sums<HEAD_TILES>& sums, const uint4* query, int step) const {
#pragma unroll
        for (int j = 0; j < STEP / 32; ++j) {
            const uint2 low = codes.get(0, j), high = codes.get(1, j);
#pragma unroll
            for (int tile = 0; tile < HEAD_TILES; ++tile) {
                const uint4 q = query[(tile * (D / 32) + step * (STEP / 32) + j) * WARP + lane_id()];
                multiply_codes(sums.products[tile][0], q, low);
                multiply_codes(sums.products[tile][1], q, high);
            }
            if ((step * STEP + j * 32 + 32) % GROUP == 0) add_group<HEAD_TILES>(sums, query, step, BITS == 8 ? 0 : j);
        }
    }

    // Scales a group's products and adds them to the sums.
    template <int HEAD_TILES>
    __device__ void add_group(Sums<HEAD_TILES>& sums, const uint4* query, int step, int g) const {
        const int group = BITS == 8 ? 0 : step * OF_STEP + g;
        const float* const totals =
            Query::scalars(query, HEAD_TILES) + (1 + group) * (HEAD_TILES * 8) + lane_id() / 4;
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile) {
            const float total = totals[tile * 8];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int (&products)[4] = sums.products[tile][i / 2];
                const int sum = products[i % 2] * 256 + products[2 + i % 2], zero = factors.zero(g, i);
                // All of a token's channels together may be more than a whole number holds.
                const float all = BITS == 8 ? sum + zero * total : float(sum + zero * __float_as_int(total));
                sums.dots.tiles[i / 2][tile * 2 + i % 2] += all * factors.scale(g, i);
                products[i % 2] = products[2 + i % 2] = 0;
            }
        }
    }

    template <int HEAD_TILES>
    __device__ Dots dots(const Sums<HEAD_TILES>& sums, const uint4* query) const {
        Dots dots = sums.dots;
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile) {
            const float unit = Query::scalars(query, HEAD_TILES)[tile * 8 + lane_id() / 4];
#pragma unroll
            for (int i = 0; i < 4; ++i) dots.tiles[i / 2][tile * 2 + i % 2] *= unit;
        }
        return dots;
    }
};

// ---- eight channels of a token, in the lanes that hold it together

template <int D, int BITS>
struct PackedKey {
    uint2 codes;  // bytes
    u32 upper;    // of six bits, for both groups of a pair, in the lanes of the first
    Factors factors;

    template <typename T>
    static __device__ PackedKey of(uint4 v) {
        float x[8];
        ::unpack8<T>(v, x);
        float low = x[0], high = x[0];
#pragma unroll
        for (int i = 1; i < 8; ++i) {
            low = fminf(low, x[i]);
            high = fmaxf(high, x[i]);
        }
        low = over_channels<D, BITS == 8>(low, Least{});
        high = over_channels<D, BITS == 8>(high, Greatest{});
        PackedKey packed;
        packed.factors = Factors::of<BITS>(low, high);
        packed.codes = {codes_of<BITS>(packed.factors, x), codes_of<BITS>(packed.factors, x + 4)};
        if constexpr (BITS == 6) {
            const int lane = lane_id() % (D / 8);
            packed.upper = (packed.codes.x >> 4 & 0x03030303u) | (packed.codes.y >> 4 & 0x03030303u) << 2;
            const u32 other = from_lane<D>(packed.upper, lane + 4);
            if (lane + 4 < D / 8) packed.upper |= other << 4;
        }
        return packed;
    }

    __device__ void store(unsigned char* page, int page_shift, int token, int channel) const {
        using Page = KeyPage<D, BITS>;
        unsigned char* const place = page + Page::place(token, channel);
        if constexpr (BITS == 8) {
            *reinterpret_cast<uint2*>(place) = codes;
        } else {
            *reinterpret_cast<u32*>(place) = (codes.x & 0x0F0F0F0Fu) | (codes.y & 0x0F0F0F0Fu) << 4;
            if (channel / 32 % 2 == 0) *reinterpret_cast<u32*>(page + Page::upper(token, channel)) = upper;
        }
        if (channel % (BITS == 8 ? D : 32) == 0) Page::store(page, page_shift, token, channel / 32, factors);
    }
    static __device__ PackedKey load(const unsigned char* page, int page_shift, int token, int channel) {
        using Page = KeyPage<D, BITS>;
        PackedKey packed;
        packed.factors = Page::load(page, page_shift, token, channel / 32);
        const unsigned char* const place = page + Page::place(token, channel);
        if constexpr (BITS == 8) {
            packed.codes = load8(place);
        } else {
            const u32 low = load4(place), high = load4(page + Page::upper(token, channel)) >> channel / 32 % 2 * 4;
            packed.codes = {(low & 0x0F0F0F0Fu) | (high << 4 & 0x30303030u),
                            (low >> 4 & 0x0F0F0F0Fu) | (high << 2 & 0x30303030u)};
        }
        return packed;
    }
    __device__ float number(int i) const { return factors.number((i < 4 ? codes.x : codes.y) >> i % 4 * 8 & 255); }
};
