// Values in codes of eight bits or four (codes.cuh).
//
// A few bits under the exponent of 1024 are 1024 and that number in fp16, exactly, and so is what is left when the
// zero is added and 1024 taken off. These are multiplied, in fp16 whatever the model's type, by weights in which the
// scales are. Lane 4 r + c has four channels of every group, of its four tokens (`value_token`): of every 64 channels
// the first group is the first half of 8 r to 8 r + 7, for all r, and the second the other; where 32 are left, they
// are 4 r to 4 r + 3. A word has a channel's bytes of the four tokens; or, for two channels in a byte, the bits of
// tokens 0, 2, 1, 3.
#pragma once
#include "common/codes.cuh"

template <int D, int BITS>
struct ValuePage : CodePage<D, BITS> {
    using Base = CodePage<D, BITS>;

    static __device__ bool is_whole(int channel) { return channel < D / 64 * 64; }
    static __device__ int group(int channel) { return channel / 64 * 2 + (is_whole(channel) ? channel / 4 % 2 : 0); }
    // A channel's byte, or that of the first of two channels.
    static __device__ int place(int token, int channel) {
        const int lane = (is_whole(channel) ? channel % 64 / 8 : channel % 32 / 4) * 4 + token % 8 / 2;
        const int g = group(channel), unit = Base::unit(token);
        if (BITS == 8) return unit + g * 512 + lane * 16 + channel % 4 * 4 + Base::own(token);
        return unit + g / 2 * 512 + lane * (is_whole(channel) ? 16 : 8) + g % 2 * 8 + channel % 4 / 2 * 4 +
               token % 2 * 2 + token / 8 % 2;
    }
};

// The codes of a step's channels that a lane holds, loaded from `unit`, where those of sixteen tokens begin. `rows`
// gives two tiles of sixteen channels of a group as operands, `add(tile, four words)`; `below`: the zeros less 1024
// of tokens 0 and 1, and of 2 and 3.
template <int BITS, int STEP>
struct ValueCodes;

template <int STEP>
struct ValueCodes<8, STEP> {
    uint4 words[STEP / 32];

    __device__ void load(const unsigned char* unit, int step) {
        const unsigned char* const from = unit + step * (UNIT * STEP) + lane_id() * 16;
        unrolled<STEP / 32>([&](auto j) { words[j.value] = load16<j.value * 512>(from); });
    }
    template <typename Add>
    __device__ void rows(int g, uint2 below, Add add) const {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            const u32 even = word_of(words[g], tile * 2), odd = word_of(words[g], tile * 2 + 1);
            add(tile, number(even, 0x4140, below.x), number(odd, 0x4140, below.x), number(even, 0x4342, below.y),
                number(odd, 0x4342, below.y));
        }
    }
    static __device__ u32 number(u32 codes, u32 which, u32 below) {
        u32 two = __byte_perm(codes, 0x64646464u, which);  // 1024 and the code
        asm("add.rn.f16x2 %0, %0, %1;" : "+r"(two) : "r"(below));
        return two;
    }
};

template <int STEP>
struct ValueCodes<4, STEP> {
    static constexpr int WHOLE = STEP / 64;
    uint4 words[code_pairs(STEP)];

    __device__ void load(const unsigned char* unit, int step) {
        const unsigned char* const from = unit + step * (UNIT * STEP / 2) + lane_id() * 16;
        unrolled<WHOLE>([&](auto i) { words[i.value] = load16<i.value * 512>(from); });
        if constexpr (STEP % 64 != 0) {
            const uint2 rest = load8<WHOLE * 512>(from - lane_id() * 8);
            words[WHOLE] = {rest.x, rest.y, 0, 0};
        }
    }
    template <typename Add>
    __device__ void rows(int g, uint2 below, Add add) const {
        uint2 shifted = below;                                                 // the zeros less 64
        asm("add.rn.f16x2 %0, %0, %1;" : "+r"(shifted.x) : "r"(0x63806380u));  // 960
        asm("add.rn.f16x2 %0, %0, %1;" : "+r"(shifted.y) : "r"(0x63806380u));
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            const u32 low = word_of(words[g / 2], g % 2 * 2 + tile), high = low >> 8;
            add(tile, lower(low, below.x), upper(low, shifted.x), lower(high, below.y), upper(high, shifted.y));
        }
    }
    static __device__ u32 lower(u32 codes, u32 below) {
        u32 two = masked(codes, 0x000F000Fu, 0x64006400u);  // 1024 and the code
        asm("add.rn.f16x2 %0, %0, %1;" : "+r"(two) : "r"(below));
        return two;
    }
    static __device__ u32 upper(u32 codes, u32 shifted) {
        u32 two =
            masked(codes, 0x00F000F0u, 0x64006400u);  // 1024 and 16 times the code, of which a sixteenth is taken
        asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(two) : "r"(0x2C002C00u), "r"(shifted));
        return two;
    }
};

// What attention asks for (format.cuh).
template <int D, int STEP, typename Format>
struct CodeValues {
    static constexpr bool SCALED = true;
    static constexpr int BITS = Format::VALUE_BITS, GROUPS = code_groups(D, BITS);
    static constexpr int EXPONENT = LaneFactors<BITS, GROUPS>::EXPONENT;
    using Number = fp16;
    using Page = ValuePage<D, BITS>;

    ValueCodes<BITS, STEP> codes;
    LaneFactors<BITS, GROUPS> factors;

    __device__ void load(const unsigned char* pool, int block, int step, int page_shift) {
        const int units = page_shift - UNIT_SHIFT, unit = block & ((1 << units) - 1);
        const unsigned char* const page = Format::template values_at<D>(pool, block >> units, page_shift);
        codes.load(page + unit * (UNIT * Page::CODES), step);
        if (step == 0) factors.load(page + Page::factors(page_shift, unit, lane_id() % 4));
    }
    static __device__ int group(int step, int j) { return BITS == 8 ? 0 : step * (STEP / 32) + j; }
    __device__ float scale(int step, int j, int i) const { return factors.scale(group(step, j), i); }
    template <typename Add>
    __device__ void rows(int step, int j, Add add) const {
        const int g = group(step, j);
        codes.rows(j, {factors.zeros_below(g, 0), factors.zeros_below(g, 2)}, add);
    }
    __device__ float log2_scale(int i) const {
        float largest = factors.scale(0, i);
#pragma unroll
        for (int g = 1; g < GROUPS; ++g) largest = fmaxf(largest, factors.scale(g, i));
        return log2_fast(largest);
    }
    __device__ void clear(int i) { factors.clear(i); }
};

// Eight channels of a token, in the lanes that hold it together: two groups of four each, or of eight bits one.
template <int D, int BITS>
struct PackedValue {
    uint2 codes;  // bytes
    Factors factors[2];

    template <typename T>
    static __device__ PackedValue of(uint4 v) {
        float x[8];
        ::unpack8<T>(v, x);
        const int lane = lane_id() % (D / 8);
        const bool is_whole = BITS < 8 && ValuePage<D, BITS>::is_whole(lane * 8);
        float low[2], high[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float* const y = x + half * 4;
            low[half] = fminf(fminf(y[0], y[1]), fminf(y[2], y[3]));
            high[half] = fmaxf(fmaxf(y[0], y[1]), fmaxf(y[2], y[3]));
        }
        if (!is_whole) {
            low[0] = low[1] = fminf(low[0], low[1]);
            high[0] = high[1] = fmaxf(high[0], high[1]);
        }
        PackedValue packed;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            low[half] = over_channels<D, BITS == 8>(low[half], Least{});
            high[half] = over_channels<D, BITS == 8>(high[half], Greatest{});
            if constexpr (BITS < 8) {
                const int other = is_whole ? lane ^ 4 : lane;
                low[half] = fminf(low[half], from_lane<D>(low[half], other));
                high[half] = fmaxf(high[half], from_lane<D>(high[half], other));
            }
            packed.factors[half] = Factors::of<BITS>(low[half], high[half]);
        }
        packed.codes = {codes_of<BITS>(packed.factors[0], x), codes_of<BITS>(packed.factors[1], x + 4)};
        return packed;
    }

    __device__ void store(unsigned char* page, int page_shift, int token, int channel) const {
        using Page = ValuePage<D, BITS>;
        constexpr int STEP = 8 / BITS;  // channels of a byte
#pragma unroll
        for (int i = 0; i < 8; i += STEP) {
            const u32 word = (i < 4 ? codes.x : codes.y) >> i % 4 * 8;
            page[Page::place(token, channel + i)] = BITS == 8 ? word : word | word >> 4;
        }
        if (channel % (BITS == 8 ? D : 64) != 0) return;
        Page::store(page, page_shift, token, Page::group(channel), factors[0]);
        if (BITS < 8 && Page::is_whole(channel))
            Page::store(page, page_shift, token, Page::group(channel) + 1, factors[1]);
    }
    static __device__ PackedValue load(const unsigned char* page, int page_shift, int token, int channel) {
        using Page = ValuePage<D, BITS>;
        constexpr int STEP = 8 / BITS;
        PackedValue packed = {};
#pragma unroll
        for (int i = 0; i < 8; i += STEP) {
            const u32 byte = page[Page::place(token, channel + i)];
            const u32 codes = BITS == 8 ? byte : (byte & 15u) | (byte >> 4) << 8;
            (i < 4 ? packed.codes.x : packed.codes.y) |= codes << i % 4 * 8;
        }
        const int group = BITS == 8 ? 0 : Page::group(channel);
        packed.factors[0] = packed.factors[1] = Page::load(page, page_shift, token, group);
        if (BITS < 8 && Page::is_whole(channel)) packed.factors[1] = Page::load(page, page_shift, token, group + 1);
        return packed;
    }
    __device__ float number(int i) const {
        return factors[i / 4].number((i < 4 ? codes.x : codes.y) >> i % 4 * 8 & 255);
    }
};
