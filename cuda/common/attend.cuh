// Attention of the query heads of one kv head over listed tokens, sixteen tokens (a unit) to a warp at a time.
//
// Logits are the product Q [16 heads, d] K^T [d, 8 tokens], twice; what the tensor core leaves in a lane's registers
// (a head's weights of tokens 2c, 2c + 1) is, rounded to 16 bits, just what it wants there for the second product,
// V^T [d, 16 tokens] P [16 tokens, 8 heads]. So keys and values go from memory to registers, 16 bytes at a time, and
// nothing passes through shared memory until the warps merge. As in minmax.cuh, channels may be called any column.
// With up to 8 query heads the upper half of Q's rows is zero; with up to 16 there is a second tile of heads.
#pragma once
#include "common/digest.cuh"
#include "common/format.cuh"

// The logits' scale, softcap and the base 2 of the exponentials in one place.
struct Logits {
    float factor, cap;  // cap 0: none

    __device__ Logits(float scaling, float softcap)
        : factor(softcap > 0.f ? 2.f * LOG2_E * scaling / softcap : scaling * LOG2_E), cap(softcap * LOG2_E) {}
    __device__ float operator()(float dot) const {
        const float x = dot * factor;
        return cap > 0.f ? cap - 2.f * cap * reciprocal(exp2_fast(x) + 1.f) : x;  // cap * tanh
    }
};

// A lane's weights of a unit: operands of the second product, or numbers of which such are still to be made.
template <typename Number, int HEAD_TILES, bool SCALED>
struct WeightsOf {
    u32 words[HEAD_TILES][2];

    __device__ void set(int tile, const float (&x)[4]) {
        words[tile][0] = Number::pack(x[0], x[1]);
        words[tile][1] = Number::pack(x[2], x[3]);
    }
};
template <typename Number, int HEAD_TILES>
struct WeightsOf<Number, HEAD_TILES, true> {
    float numbers[HEAD_TILES][4];

    __device__ void set(int tile, const float (&x)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) numbers[tile][i] = x[i];
    }
};

// What a warp has gathered so far: of head lane / 4 of a tile the largest logit and this lane's share of the weights'
// sum, and the weighted sum of the values as channels [16 to a row] x heads [8], not divided by the weights yet.
template <int HEAD_TILES, int ROWS>
struct WeightedSums {
    float out[HEAD_TILES][ROWS][4];
    float m[HEAD_TILES], l[HEAD_TILES];  // largest logit, share of the weights' sum

    __device__ WeightedSums() {
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile) {
            m[tile] = LOWEST;
            l[tile] = 0.f;
#pragma unroll
            for (int row = 0; row < ROWS; ++row)
                out[tile][row][0] = out[tile][row][1] = out[tile][row][2] = out[tile][row][3] = 0.f;
        }
    }

    // Turns dot products into weights relative to the largest logit so far, as the second product wants them;
    // `size(logit, i)` of a lane's i-th token is what that is the largest of.
    template <typename Weights, typename Size>
    __device__ void weigh(Weights& weights, const Dots& dots, const Unit& unit, const Logits& logits, Size size) {
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile) {
            float x[4];
            float largest = m[tile];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool is_seen = value_token(i) < unit.count && (unit.skip <= 0 || value_token(i) >= unit.skip);
                x[i] = is_seen ? logits(dots.tiles[i / 2][tile * 2 + i % 2]) : -infinity();
                largest = fmaxf(largest, size(x[i], i));
            }
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
            const float shrink = exp2_fast(m[tile] - largest);
            m[tile] = largest;
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < 4; ++i) sum += x[i] = exp2_fast(x[i] - largest);
            l[tile] = l[tile] * shrink + sum;
            weights.set(tile, x);
            if (__any_sync(ALL_LANES, shrink != 1.f)) rescale(tile, shrink);
        }
    }

    // The sums' columns are heads 2c and 2c + 1, whose factors lie in the lanes of those rows.
    __device__ void rescale(int tile, float shrink) {
        const float even = __shfl_sync(ALL_LANES, shrink, lane_id() % 4 * 8);
        const float odd = __shfl_sync(ALL_LANES, shrink, lane_id() % 4 * 8 + 4);
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            out[tile][row][0] *= even;
            out[tile][row][1] *= odd;
            out[tile][row][2] *= even;
            out[tile][row][3] *= odd;
        }
    }

    // The sum of a head's weights, in all four lanes that have a share of it.
    __device__ float mass(int tile) const {
        float sum = l[tile];
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        return sum + __shfl_xor_sync(ALL_LANES, sum, 2);
    }
};

// Head sizes above 128 go in steps of 128 channels, so that loads in flight fit the registers.
template <int D>
struct Steps {
    static constexpr int CHANNELS = D <= 128 ? D : 128, COUNT = D / CHANNELS;
    static constexpr int ROWS = CHANNELS / 16;  // tiles of sixteen channels
};

// The channel of `out[tile][row][0]`, and how far behind it that of [2] is.
template <int D>
struct OutputChannels {
    static constexpr bool IS_LATENT = D > 256;
    static constexpr int NEXT = IS_LATENT ? 8 : 1;

    __device__ static int of(int row, int r /* lane / 4 */) {
        if (IS_LATENT) return row * 16 + r;
        constexpr int BLOCKS = Steps<D>::CHANNELS / 64;  // of 64 channels; for d 96 there is one of 32, too
        const int step = row / Steps<D>::ROWS, inner = row % Steps<D>::ROWS;
        const int channel = inner < BLOCKS * 4 ? inner / 4 * 64 + r * 8 + inner % 4 * 2
                                               : BLOCKS * 64 + r * 4 + (inner - BLOCKS * 4) * 2;
        return step * Steps<D>::CHANNELS + channel;
    }
};

template <typename T, int D, int HEAD_TILES, typename Format = Plain>
struct Attention : WeightedSums<HEAD_TILES, D / 16> {
    static constexpr int STEP = Steps<D>::CHANNELS, STEPS = Steps<D>::COUNT, STEP_ROWS = Steps<D>::ROWS;

    using Keys = typename Format::template Keys<T, D, STEP>;
    using Values = typename Format::template Values<T, D, STEP>;
    using Weights = WeightsOf<typename Values::Number, HEAD_TILES, Values::SCALED>;

    Keys keys;
    Values values;

    // Memory no token was written to may hold NaN, and 0 * NaN is NaN.
    __device__ void clear_missing_values(int count) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (value_token(i) >= count) values.clear(i);
    }

    __device__ void multiply_values(const Weights& weights, int step) {
        using Number = typename Values::Number;
        const auto add = [&](const u32(&scaled)[HEAD_TILES][2], int row, u32 a, u32 b, u32 c, u32 d) {
#pragma unroll
            for (int tile = 0; tile < HEAD_TILES; ++tile)
                Number::mma(this->out[tile][step * STEP_ROWS + row], a, b, c, d, scaled[tile][0], scaled[tile][1]);
        };
        if constexpr (Values::SCALED) {
#pragma unroll
            for (int j = 0; j < STEP / 32; ++j) {
                u32 scaled[HEAD_TILES][2];
#pragma unroll
                for (int i = 0; i < HEAD_TILES * 2; ++i) {
                    const float* const two = weights.numbers[i / 2] + i % 2 * 2;
                    scaled[i / 2][i % 2] = Number::pack(two[0] * values.scale(step, j, i % 2 * 2),
                                                        two[1] * values.scale(step, j, i % 2 * 2 + 1));
                }
                values.rows(step, j,
                            [&](int row, u32 a, u32 b, u32 c, u32 d) { add(scaled, j * 2 + row, a, b, c, d); });
            }
        } else {
            values.rows([&](int row, u32 a, u32 b, u32 c, u32 d) { add(weights.words, row, a, b, c, d); });
        }
    }

    // Units first, first + stride, ... below `end`; `locate(i)` says where the i-th lies. Registers are loaded again
    // as soon as they were used, so a warp always has loads in flight.
    template <typename Locate>
    __device__ void attend(const typename Format::Element* pool, const Pages& pages, const uint4* query, int first,
                           int stride, int end, const Logits& logits, Locate locate) {
        if (first >= end) return;
        const int values_after = pages.values_after(), page_shift = pages.page_shift;
        Unit now = locate(first);
        keys.load(pool, now.block, 0, page_shift);
        values.load(pool, now.block + values_after, 0, page_shift);
#pragma unroll 1
        for (int i = first; i < end; i += stride) {
            const bool more = i + stride < end;
            const Unit next = locate(more ? i + stride : i);
            typename Keys::template Sums<HEAD_TILES> sums;
#pragma unroll
            for (int step = 0; step + 1 < STEPS; ++step) {
                keys.template multiply<HEAD_TILES>(sums, query, step);
                keys.load(pool, now.block, step + 1, page_shift);
            }
            keys.template multiply<HEAD_TILES>(sums, query, STEPS - 1);
            const Dots dots = keys.template dots<HEAD_TILES>(sums, query);
            if (more) keys.load(pool, next.block, 0, page_shift);
            Weights weights;
            if (Values::SCALED && now.count < UNIT) clear_missing_values(now.count);
            // Weights that are still to be scaled for their values are relative to the largest that this makes, which
            // is as good and keeps them within the range of 16 bits.
            this->weigh(weights, dots, now, logits, [&](float logit, int i) {
                if constexpr (Values::SCALED) return logit + values.log2_scale(i);
                return logit;
            });
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                if (!Values::SCALED && now.count < UNIT) clear_missing_values(now.count);
                multiply_values(weights, step);
                if (step + 1 < STEPS)
                    values.load(pool, now.block + values_after, step + 1, page_shift);
                else if (more)
                    values.load(pool, next.block + values_after, 0, page_shift);
            }
            now = next;
        }
        if constexpr (Values::SCALED) {  // the scales are 2^EXPONENT times what they were taken for
#pragma unroll
            for (int tile = 0; tile < HEAD_TILES; ++tile) {
                this->m[tile] += Values::EXPONENT;
                this->l[tile] *= 1.f / (1 << Values::EXPONENT);
            }
        }
    }
};
