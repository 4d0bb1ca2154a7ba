// The sign sketch (sparsekv/digests/sign_sketch.py, which has the source): one bit per channel of every key, the sign
// of the rotated key, and a factor. Here is how it is made and where it lies; sketch_score.cuh scores it.
#pragma once
#include "common/digest.cuh"

__device__ inline float sum_of_warp(float x) {
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

// The rotation of one kv head: two rounds of flipped signs, a Hadamard transform of every 32 channels and one across
// them (for d 96 a reflection). Lane l holds channels l, l + 32, ...
template <int D>
struct Rotation {
    static constexpr int N = D / WARP;
    static constexpr float SCALE = D == 64    ? 0.125f  // 1 / sqrt(channels that are transformed together)
                                   : D == 96  ? 0.17677669529663687f
                                   : D == 128 ? 0.08838834764831845f
                                              : 0.0625f;

    float flips[2 * N];

    __device__ explicit Rotation(const float* source /* [2, d] */) {
#pragma unroll
        for (int i = 0; i < 2 * N; ++i) flips[i] = source[i * WARP + lane_id()];
    }

    __device__ void operator()(float (&x)[N]) const {
#pragma unroll
        for (int round = 0; round < 2; ++round) {
#pragma unroll
            for (int i = 0; i < N; ++i) x[i] *= flips[round * N + i] * SCALE;
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
};

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
        const float* const mean = digests.mean + page.head * D;
        const Rotation<D> rotate(digests.flips + page.head * 2 * D);
#pragma unroll 1
        for (int token = stale; token < count; ++token) {
            float x[D / WARP], squares = 0.f, sizes = 0.f;
#pragma unroll
            for (int i = 0; i < D / WARP; ++i) {
                const int channel = i * WARP + lane_id();
                x[i] = T::to_float(page.keys[token * D + channel]) - mean[channel];
                squares += x[i] * x[i];
            }
            rotate(x);
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
