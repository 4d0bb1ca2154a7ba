// Sketches (sparsekv/digests/sign_sketch.py and sketch2.py, which have the sources): one bit or two per channel of
// every key, of what is left of it, rotated, after its page's mean, and a factor; and the mean, in two bits and a
// factor. Here is how they are made and where they lie; sketch_score.cuh scores them.
//
// The bits of a channel are a number n that stands for its code c: 2 n + 1 - 2^bits, so -1 or 1, or -3, -1, 1 or 3.
// Of two bits the upper one is the channel's sign, and |c| is 3 where it is larger than the vector's root mean
// square.
//
// Channel 32 j + 8 y + 2 q + e, e being 0 or 1, is of register 2 j + e, byte y, of lane q: four bytes are an operand
// of the tensor core, and four lanes share a token. They come out of words of 32 bits, of which each byte has as many
// registers' bits as it has room for.
#pragma once
#include "common/digest.cuh"

constexpr int MEAN_BITS = 2;

// The tensors of SignSketch, in its order. Kernels rotate by the flips alone, without the matrix.
struct SketchTensors {
    char* records;       // [num_pages, hkv, bytes of SketchLayout]
    const float* flips;  // [hkv, 2, d]; before it lies the rotation, [hkv, d, d]

    __device__ SketchTensors(const Digests& digests) : records(digests.at<char>(0)), flips(digests.at<float>(2)) {}
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

// The rotation of one kv head: two rounds of flipped signs, a Hadamard transform of as many channels at a time as are
// a power of two, and a reflection of what is odd. Lane l holds channels l, l + 32, ...
template <int D>
struct Rotation {
    static constexpr int N = D / WARP, TRANSFORMED = D & -D;  // channels at a time
    static constexpr int ACROSS = TRANSFORMED / WARP, ODD = N / ACROSS;
    static constexpr float SCALE = TRANSFORMED == 32    ? 0.17677669529663687f  // 1 / sqrt(TRANSFORMED)
                                   : TRANSFORMED == 64  ? 0.125f
                                   : TRANSFORMED == 128 ? 0.08838834764831845f
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
#pragma unroll
            for (int step = 1; step < ACROSS; step *= 2) {
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    if (i & step) continue;
                    const float a = x[i], b = x[i + step];
                    x[i] = a + b;
                    x[i + step] = a - b;
                }
            }
#pragma unroll
            for (int first = 0; ODD > 1 && first < ACROSS; ++first) {
                float shared = 0.f;
#pragma unroll
                for (int i = first; i < N; i += ACROSS) shared += x[i];
#pragma unroll
                for (int i = first; i < N; i += ACROSS) x[i] -= shared * (2.f / ODD);
            }
        }
    }
};

__device__ constexpr int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }

// Where the parts of a page's record lie, in bytes. It is a record for every sixteen tokens, a block: a head, which
// has their factors and, in the first block, the page's mean and its factor, then rows, the codes of TOKENS tokens
// each, in which each of the four lanes has SHARE bytes. Heads and what is copied of rows AT_ONCE are whole PIECEs,
// and so is where they begin: of 128 bytes, what the cache hands out at once, or half of that where it would be too
// much; of latents, whose rows are no such, of the 32 bytes that memory hands out.
template <int D, int BITS>
struct SketchLayout {
    static constexpr int REGISTERS = D / 16, OF_WORD = 8 / BITS;  // of a token that a lane has; that a word has
    static constexpr bool IS_LATENT = D > 256;
    static constexpr int SHARE = IS_LATENT ? 36
                                 : D == 96 ? 48
                                           : 32,
                         ROW = 4 * SHARE, TOKENS = SHARE * 32 / (BITS * D);
    // Tokens that share words are made together: so many, in so many words of a lane.
    static constexpr int TOGETHER = OF_WORD / common_divisor(REGISTERS, OF_WORD);
    static constexpr int WORDS = TOGETHER * REGISTERS / OF_WORD;

    static constexpr int BLOCK_TOKENS = 16, ROWS = BLOCK_TOKENS / TOKENS, AT_ONCE = IS_LATENT ? 2 : 1;
    static constexpr int LINE = D < 128 ? 64 : 128, PIECE = IS_LATENT ? 32 : LINE;
    static constexpr int MEAN_WORDS = (D + 63) / 64;  // of a lane, one after the other
    static constexpr int UNIT = 16 * MEAN_WORDS, FACTORS = UNIT + 16;
    static constexpr int HEAD = (FACTORS + 2 * BLOCK_TOKENS + LINE - 1) / LINE * LINE, BLOCK = HEAD + ROWS * ROW;

    __device__ static int bytes(int page_size) { return page_size / BLOCK_TOKENS * BLOCK; }
    // Where the codes of `TOGETHER` tokens of a lane begin, and where a token's factor lies.
    __device__ static int place(int token, int lane) {
        return block_of(token) + HEAD + (token % BLOCK_TOKENS / TOKENS * 4 + lane) * SHARE +
               token % TOKENS * (BITS * D / 32);
    }
    __device__ static int factor_place(int token) { return block_of(token) + FACTORS + token % BLOCK_TOKENS * 2; }

  private:
    __device__ static int block_of(int token) { return token / BLOCK_TOKENS * BLOCK; }
};

// The code of a vector x. Lane l has channels l, l + 32, ...
template <int D, int BITS>
struct SketchCode {
    static_assert(BITS <= 2);
    static constexpr int N = D / WARP;

    float numbers[N];      // c
    float squares, along;  // |x|^2, <c, x>
    u32 bits[BITS][N];     // of all lanes, the upper ones first

    __device__ explicit SketchCode(const float (&x)[N]) : squares(dot(x, x)) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const bool positive = x[i] > 0.f, large = BITS == 2 && x[i] * x[i] * D > squares;
            numbers[i] = (positive ? 1.f : -1.f) * (large ? 3.f : 1.f);
            bits[0][i] = __ballot_sync(ALL_LANES, positive);
            if constexpr (BITS == 2) bits[1][i] = __ballot_sync(ALL_LANES, positive == large);
        }
        along = dot(numbers, x);
    }
    __device__ static float dot(const float (&a)[N], const float (&b)[N]) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < N; ++i) sum += a[i] * b[i];
        return sum_of_warp(sum);
    }
    __device__ float factor() const { return squares / fmaxf(along, 1e-20f); }
    // Adds lane q's share of the code to words of which FIRST registers are taken.
    template <int FIRST, int SIZE>
    __device__ void add_to(u32 (&words)[SIZE], int q) const {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int at = FIRST + 2 * i;
            words[at * BITS / 8] |= pair_of(i, q) << at * BITS % 8;
        }
    }

  private:
    // The bits of registers 2 i and 2 i + 1, from the lowest of every byte on.
    __device__ u32 pair_of(int i, int q) const {
        const u32 upper = bits[0][i] >> 2 * q & 0x03030303;
        if constexpr (BITS == 1) return upper;
        const u32 lower = bits[BITS - 1][i] >> 2 * q & 0x03030303;
        return apart(lower) | apart(upper) << 1;
    }
    __device__ static u32 apart(u32 pairs) { return (pairs & 0x01010101) | (pairs & 0x02020202) << 1; }
};

template <typename T, int D, int BITS>
struct SketchSummary : KeySums<T, D> {
    static constexpr bool WHOLE = true, SHARED = true;
    static constexpr int N = D / WARP;

    // Every warp makes the mean, and the codes of every `parts`-th few tokens. Lane l has channels l, l + 32, ...
    template <typename StoredPage>
    __device__ void store(const StoredPage& page, const Digests& digests, int count, int page_size, int part,
                          int parts) {
        using Layout = SketchLayout<D, BITS>;
        const SketchTensors tensors(digests);
        const Rotation<D> rotate(tensors.flips + page.head * 2 * D);
        float mean[N];
        take_mean(count, mean);
        rotate(mean);
        const SketchCode<D, MEAN_BITS> code(mean);
        const float unit = code.factor();
#pragma unroll
        for (int i = 0; i < N; ++i) mean[i] = unit * code.numbers[i];
        char* const record = tensors.records + page.item * Layout::bytes(page_size);
        const auto factor_of = [&](int token) -> u16& {
            return *reinterpret_cast<u16*>(record + Layout::factor_place(token));
        };
        if (part == 0) {
            u32 words[Layout::MEAN_WORDS] = {};
            code.template add_to<0>(words, lane_id() % 4);
            store_words(record + lane_id() % 4 * sizeof(words), words);
            if (lane_id() == 0) *reinterpret_cast<float*>(record + Layout::UNIT) = unit;
            for (int token = count + lane_id(); token < page_size; token += WARP)
                factor_of(token) = 0x7FFF;  // NaN: none
        }
#pragma unroll 1
        for (int first = part * Layout::TOGETHER; first < count; first += parts * Layout::TOGETHER) {
            u32 words[Layout::WORDS] = {};
            unrolled<Layout::TOGETHER>([&](auto i) {
                const int token = first + i.value;  // beyond the count, any key
                float x[N];
#pragma unroll
                for (int j = 0; j < N; ++j) x[j] = T::to_float(page.key(token, j * WARP + lane_id()));
                rotate(x);
#pragma unroll
                for (int j = 0; j < N; ++j) x[j] -= mean[j];
                const SketchCode<D, BITS> code(x);
                code.template add_to<i.value * Layout::REGISTERS>(words, lane_id() % 4);
                if (lane_id() == 0 && token < count) factor_of(token) = fp16::pack(code.factor(), 0.f);
            });
            store_words(record + Layout::place(first, lane_id() % 4), words);
        }
    }

  private:
    // By the first four lanes, which have a share each.
    template <int SIZE>
    __device__ static void store_words(char* share, const u32 (&words)[SIZE]) {
        if (lane_id() >= 4) return;
#pragma unroll
        for (int i = 0; i < SIZE; ++i) reinterpret_cast<u32*>(share)[i] = words[i];
    }

    __device__ void take_mean(int count, float (&mean)[N]) const {
#pragma unroll
        for (int i = 0; i < N; ++i) mean[i] = 0.f;
        constexpr int ROUNDS = KeyLanes<D>::ROUNDS, OF_ROUND = N / ROUNDS;
#pragma unroll
        for (int channel = 0; channel < 8 * ROUNDS; ++channel) {
            const float sum = this->total(this->sums[channel]) / count;
#pragma unroll
            for (int i = 0; i < OF_ROUND; ++i) {
                const float channel_mean = __shfl_sync(ALL_LANES, sum, i * 4 + lane_id() / 8);
                if (lane_id() % 8 == channel % 8) mean[channel / 8 * OF_ROUND + i] = channel_mean;
            }
        }
    }
};
