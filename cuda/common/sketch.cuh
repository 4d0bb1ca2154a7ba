// Sketches (sparsekv/digests/sign_sketch.py and sketch2.py, which have the sources): one bit or two per channel of
// every key, of what is left of it, rotated, after its page's mean, and a factor; and the mean, in two bits and a
// factor. Here is how they are made and where they lie; sketch_query.cuh stages a query for them, sketch_score.cuh
// scores them.
//
// A bit stands for +1 or -1. The first plane of bits has a vector's signs s. A second one has u: s of the channels
// that are larger than the vector's root mean square, -s of the others. So the code c = 2 s + u is -3, -1, 1 or 3.
#pragma once
#include "common/digest.cuh"

constexpr int MEAN_PLANES = 2;

// The tensors of SignSketch, in its order. Kernels rotate by the flips alone, without the matrix.
struct SketchTensors {
    char* signs;         // [num_pages, hkv, page_size * planes * d / 8]
    u16* factors;        // [num_pages, hkv, page_size]
    char* means;         // [num_pages, hkv, MEAN_PLANES * d / 8]
    float* units;        // [num_pages, hkv], the factors of the means
    const float* flips;  // [hkv, 2, d]; before it lies the rotation, [hkv, d, d]

    __device__ SketchTensors(const Digests& digests)
        : signs(digests.at<char>(0)),
          factors(digests.at<u16>(1)),
          means(digests.at<char>(2)),
          units(digests.at<float>(3)),
          flips(digests.at<float>(5)) {}
};

__device__ inline float sum_of_warp(float x) {
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

// The largest over a warp's lanes of numbers that are not negative: their bits sort as they do.
__device__ inline float largest_of_warp(float x) {
    return __uint_as_float(__reduce_max_sync(ALL_LANES, __float_as_uint(x)));
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

// `SHARE`: bytes that lie side by side for one of the four lanes of a page.
template <int D, int PLANES, int SHARE = D == 96 ? 48 : 32>
struct SketchLayout {
    static constexpr int BYTES = D / 32;                     // of a plane of a token that one lane scores, a quarter
    static constexpr int TOKENS = SHARE / (PLANES * BYTES);  // whose quarters, all planes of them, are a share

    // Where byte `i` of a token's plane lies in its page.
    __device__ static int place(int token, int plane, int i) {
        return (token / TOKENS * 4 + i / BYTES) * SHARE + (token % TOKENS * PLANES + plane) * BYTES + i % BYTES;
    }
    // Where the lane's 16 bytes number `i` begin: for whole lines of 128 bytes, two by two.
    __device__ static constexpr int vector(int i) { return i * 16 / SHARE * 4 * SHARE + i * 16 % SHARE; }
    __device__ static int lane_offset(int lane) { return lane % 4 * SHARE; }
};

// As that of a page of one token.
template <int D>
using MeanLayout = SketchLayout<D, MEAN_PLANES, D / 16>;

// The code of a vector x. Lane l has channels l, l + 32, ...
template <int D, int PLANES>
struct SketchCode {
    static_assert(PLANES <= 2);
    static constexpr int N = D / WARP;

    float numbers[N];        // c
    float squares, along;    // |x|^2, <c, x>
    u32 bytes[PLANES] = {};  // of lanes below D / 8, the byte of their number

    __device__ explicit SketchCode(const float (&x)[N]) : squares(dot(x, x)) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const bool positive = x[i] > 0.f, large = PLANES == 2 && x[i] * x[i] * D > squares;
            numbers[i] = (positive ? 1.f : -1.f) * (large ? 3.f : 1.f);
#pragma unroll
            for (int plane = 0; plane < PLANES; ++plane) {
                const u32 word = __ballot_sync(ALL_LANES, plane ? positive == large : positive);
                if (lane_id() / 4 == i) bytes[plane] = word >> lane_id() % 4 * 8;
            }
        }
        along = dot(numbers, x);
    }
    __device__ static float dot(const float (&a)[N], const float (&b)[N]) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < N; ++i) sum += a[i] * b[i];
        return sum_of_warp(sum);
    }
    template <typename Layout>
    __device__ void store(char* page, int token) const {
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane)
            if (lane_id() < D / 8) page[Layout::place(token, plane, lane_id())] = bytes[plane];
    }
};

template <typename T, int D, int PLANES>
struct SketchSummary : KeySums<T, D> {
    static constexpr bool WHOLE = true, SHARED = true;
    static constexpr int N = D / WARP;

    // Every warp makes the mean, and the bits of every `parts`-th token. Lane l has channels l, l + 32, ...
    template <typename StoredPage>
    __device__ void store(const StoredPage& page, const Digests& digests, int count, int page_size, int part,
                          int parts) {
        const SketchTensors tensors(digests);
        const Rotation<D> rotate(tensors.flips + page.head * 2 * D);
        float mean[N];
        take_mean(count, mean);
        rotate(mean);
        const SketchCode<D, MEAN_PLANES> code(mean);
        const float unit = code.along / code.dot(code.numbers, code.numbers);  // of the nearest multiple of the code
#pragma unroll
        for (int i = 0; i < N; ++i) mean[i] = unit * code.numbers[i];
        u16* const factors = tensors.factors + page.item * page_size;
        if (part == 0) {
            code.template store<MeanLayout<D>>(tensors.means + page.item * (MEAN_PLANES * D / 8), 0);
            if (lane_id() == 0) tensors.units[page.item] = unit;
            for (int token = count + lane_id(); token < page_size; token += WARP)
                factors[token] = 0x7FFF;  // NaN: none
        }
        char* const signs = tensors.signs + page.item * page_size * (PLANES * D / 8);
#pragma unroll 1
        for (int token = part; token < count; token += parts) {
            float x[N];
#pragma unroll
            for (int i = 0; i < N; ++i) x[i] = T::to_float(page.key(token, i * WARP + lane_id()));
            rotate(x);
#pragma unroll
            for (int i = 0; i < N; ++i) x[i] -= mean[i];
            const SketchCode<D, PLANES> code(x);
            code.template store<SketchLayout<D, PLANES>>(signs, token);
            const float factor = code.squares / fmaxf(code.along, 1e-20f);
            if (lane_id() == 0) factors[token] = fp16::pack(factor, 0.f);
        }
    }

  private:
    __device__ void take_mean(int count, float (&mean)[N]) const {
#pragma unroll
        for (int i = 0; i < N; ++i) mean[i] = 0.f;
#pragma unroll
        for (int channel = 0; channel < 8; ++channel) {
            const float sum = this->total(this->sums[channel]) / count;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float channel_mean = __shfl_sync(ALL_LANES, sum, i * 4 + lane_id() / 8);
                if (lane_id() % 8 == channel) mean[i] = channel_mean;
            }
        }
    }
};
