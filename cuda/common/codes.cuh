// Keys and values as whole numbers of a few bits (sparsekv/pages/codes.py, which says why): a channel is
// scale * (code + zero). Codes of eight bits have one scale (a bfloat16) and zero (of 16 bits) for a token of a kv
// head, others for every group of 32 channels, a byte each.
//
// In a page of a kv head the codes come first, then the factors. Both lie as the lanes 4 r + c of a warp hold them:
// code_keys.cuh and code_values.cuh. Where codes of keys and of values have as many bits, pages lie as plain ones do;
// else a kv head's keys before its values.
#pragma once
#include "common/digest.cuh"
#include "common/format.cuh"

__device__ constexpr int code_groups(int d, int bits) { return bits == 8 ? 1 : d / 32; }
__device__ constexpr int code_pairs(int d) { return (d + 63) / 64; }  // of 32 channels; the last may be half empty
// Bytes of a token's codes and of their factors.
__device__ constexpr int code_bytes(int d, int bits) {
    return bits == 8 ? d : bits == 4 ? d / 2 : d / 2 + 16 * code_pairs(d);
}
__device__ constexpr int factor_bytes(int d, int bits) { return bits == 8 ? 4 : 2 * code_groups(d, bits); }

// A scale in a byte has five bits of exponent and three of mantissa. Under these bits it is a float; what is missing
// is put where it costs nothing.
constexpr u32 SHORT_SCALE = 0x30000000u;
constexpr int SHORT_EXPONENT = 11;  // 2^SHORT_EXPONENT times that float is the scale

__device__ inline u32& word_of(uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
__device__ inline u32 word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// (x & mask) | bits, in one instruction.
__device__ inline u32 masked(u32 x, u32 mask, u32 bits) {
    asm("lop3.b32 %0, %0, %1, %2, 0xEA;" : "+r"(x) : "r"(mask), "r"(bits));
    return x;
}

// ---- factors

struct Factors {
    float scale;
    int zero;

    // Of channels from `low` to `high`.
    template <int BITS>
    static __device__ Factors of(float low, float high) {
        constexpr float MOST = (1 << BITS) - 1, MAX_ZERO = BITS == 8 ? 800 : 127;
        constexpr int DROPPED = BITS == 8 ? 16 : 20;
        constexpr float MIN_SCALE = BITS == 8 ? 9.094947017729282e-13f : 9.5367431640625e-07f;  // 2^-40, 2^-20
        float reach = fmaxf(__fmul_rn(__fsub_rn(high, low), 1.f / MOST),
                            __fmul_rn(fmaxf(fabsf(low), fabsf(high)), 1.f / MAX_ZERO));
        reach = fmaxf(reach, MIN_SCALE);
        float scale = __uint_as_float(__float_as_uint(reach) + ((1u << DROPPED) - 1) >> DROPPED << DROPPED);
        if constexpr (BITS < 8) scale = fminf(scale, 3840.f);
        return {scale, __float2int_rn(__fmul_rn(low, __frcp_rn(scale)))};
    }
    template <int BITS>
    __device__ u32 code(float x) const {
        return max(min(__float2int_rn(__fmul_rn(x, __frcp_rn(scale))) - zero, (1 << BITS) - 1), 0);
    }
    __device__ float number(int code) const { return __fmul_rn(float(code + zero), scale); }
};

// Those of a lane's four tokens (`value_token`), of GROUPS groups.
template <int BITS, int GROUPS>
struct LaneFactors {
    static constexpr int EXPONENT = SHORT_EXPONENT;  // that `scale` leaves out
    u32 scales[GROUPS], zeros[GROUPS];               // a byte to a token

    __device__ void load(const unsigned char* from) {
        unrolled<GROUPS>([&](auto g) {
            const uint2 both = load8<g.value * 8>(from);
            scales[g.value] = both.x;
            zeros[g.value] = both.y;
        });
    }
    __device__ float scale(int g, int i) const {
        return __uint_as_float(masked(i < 3 ? scales[g] << (20 - i * 8) : scales[g] >> 4, 0x0FF00000u, SHORT_SCALE));
    }
    __device__ int zero(int g, int i) const {
        int zero;
        asm("prmt.b32 %0, %1, 0, %2;" : "=r"(zero) : "r"(zeros[g]), "r"(0x8880 + i * 0x1111));  // and its sign
        return zero;
    }
    // The zeros of tokens i and i + 1 less 1024 in fp16, exactly.
    __device__ u32 zeros_below(int g, int i) const {
        u32 two = __byte_perm(zeros[g] ^ 0x80808080u, 0x64646464u, i == 0 ? 0x4140 : 0x4342);  // 1024 + 128 + zero
        asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(two) : "r"(0x68406840u));                        // 2176
        return two;
    }
    __device__ void clear(int) {}  // any bytes are finite numbers
};

template <int GROUPS>
struct LaneFactors<8, GROUPS> {
    static constexpr int EXPONENT = 0;
    uint4 both;  // a word to a token

    __device__ void load(const unsigned char* from) { both = load16(from); }
    __device__ float scale(int, int i) const { return __uint_as_float(word_of(both, i) << 16); }
    __device__ int zero(int, int i) const { return int(word_of(both, i)) >> 16; }
    __device__ u32 zeros_below(int g, int i) const { return fp16::pack(zero(g, i) - 1024, zero(g, i + 1) - 1024); }
    __device__ void clear(int i) { word_of(both, i) = 0x3F80u; }  // of a token that is not there: 1 and 0
};

// ---- where things lie in a page, in bytes from the first of a kv head's keys, or values

template <int D, int BITS>
struct CodePage {
    static constexpr int CODES = code_bytes(D, BITS), FACTORS = factor_bytes(D, BITS);

    static __device__ int own(int token) { return token / 8 % 2 * 2 + token % 2; }  // of a lane's four tokens
    static __device__ int unit(int token) { return token / UNIT * (UNIT * CODES); }
    // Those of lanes 4 r + c.
    static __device__ int factors(int page_shift, int unit, int c) {
        return (CODES << page_shift) + (unit * 4 + c) * (4 * FACTORS);
    }
    static __device__ Factors load(const unsigned char* page, int page_shift, int token, int group) {
        const unsigned char* const lane = page + factors(page_shift, token / UNIT, token % 8 / 2);
        if constexpr (BITS == 8) {
            const u32 word = load4(lane + own(token) * 4);
            return {__uint_as_float(word << 16), int(word) >> 16};
        }
        const u32 bits = lane[group * 8 + own(token)] << 20 | SHORT_SCALE;
        return {__uint_as_float(bits + (SHORT_EXPONENT << 23)),
                static_cast<signed char>(lane[group * 8 + 4 + own(token)])};
    }
    static __device__ void store(unsigned char* page, int page_shift, int token, int group, const Factors& x) {
        unsigned char* const lane = page + factors(page_shift, token / UNIT, token % 8 / 2);
        if constexpr (BITS == 8) {
            reinterpret_cast<u32*>(lane)[own(token)] = __float_as_uint(x.scale) >> 16 | u32(x.zero) << 16;
        } else {
            lane[group * 8 + own(token)] = (__float_as_uint(x.scale) - (SHORT_EXPONENT << 23) - SHORT_SCALE) >> 20;
            lane[group * 8 + 4 + own(token)] = x.zero;
        }
    }
};

// ---- the lanes that hold a token, eight channels each

// f over all of a token's channels, or over 32 of them, which four lanes hold: the same in all of these. All lanes of
// the token call it.
template <int D, bool ALL, typename F>
__device__ inline float over_channels(float x, F f) {
    constexpr int LANES = D / 8, POWER = ALL ? LANES & -LANES : 4;
    const int first = lane_id() / LANES * LANES;
    const u32 lanes = ALL_LANES >> (WARP - LANES) << first;
#pragma unroll
    for (int step = 1; step < POWER; step *= 2) x = f(x, __shfl_xor_sync(lanes, x, step));
    const float own = x;
#pragma unroll
    for (int i = POWER; ALL && i < LANES; i += POWER)
        x = f(x, __shfl_sync(lanes, own, first + (lane_id() - first + i) % LANES));
    return x;
}
// What lane `other` of the same token has, counted from the token's first; anything if there is none.
template <int D, typename X>
__device__ inline X from_lane(X x, int other) {
    constexpr int LANES = D / 8;
    const int first = lane_id() / LANES * LANES;
    return __shfl_sync(ALL_LANES >> (WARP - LANES) << first, x, first + min(other, LANES - 1));
}
struct Least {
    __device__ float operator()(float a, float b) const { return fminf(a, b); }
};
struct Greatest {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The bytes of four codes.
template <int BITS>
__device__ inline u32 codes_of(const Factors& factors, const float* x /* [4] */) {
    u32 codes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) codes |= factors.code<BITS>(x[i]) << i * 8;
    return codes;
}
