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

// A query's words of 16 bytes, in the order the lanes want them.
template <int D, int HEAD_TILES>
constexpr int QUERY_WORDS = HEAD_TILES * (D / 32) * WARP;

template <int D, int HEAD_TILES>
__device__ inline uint4 query_word(const u16* query /* [group, d] */, int group, int word) {
    const int lane = word % WARP, chunk = word / WARP % (D / 32),
              head = word / (WARP * (D / 32)) * MMA_HEADS + lane / 4;
    if (head >= group) return {0, 0, 0, 0};
    return load16(query + head * D + chunk * 32 + lane % 4 * 8);
}

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

// What a warp has gathered so far: of head lane / 4 of a tile the largest logit and this lane's share of the weights'
// sum, and the weighted sum of the values as d [16 channels a time] x heads [8], not divided by the weights yet.
template <typename T, int D, int HEAD_TILES, typename Format = Plain>
struct Attention {
    // Head sizes above 128 go in steps of 128 channels, so that loads in flight fit the registers.
    static constexpr int STEP = D <= 128 ? D : 128, STEPS = D / STEP;
    static constexpr int BLOCKS = STEP / 64,
                         TAIL = STEP % 64 / 32;                 // channels in blocks of 64, and one of 32 for d 96
    static constexpr int ROWS = D / 16, STEP_ROWS = STEP / 16;  // tiles of sixteen channels

    float out[HEAD_TILES][ROWS][4];
    float m[HEAD_TILES], l[HEAD_TILES];  // largest logit, share of the weights' sum
    typename Format::template Keys<T, D, STEP> keys;
    typename Format::template Values<T, D, STEP> values;

    __device__ Attention() {
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile) {
            m[tile] = LOWEST;
            l[tile] = 0.f;
#pragma unroll
            for (int row = 0; row < ROWS; ++row)
                out[tile][row][0] = out[tile][row][1] = out[tile][row][2] = out[tile][row][3] = 0.f;
        }
    }

    // Adds the dot products of a step's channels: [tile of 8 tokens] x (heads r: 2 tokens, heads r + 8: 2 tokens).
    __device__ void multiply_keys(float (&dots)[2][4], const uint4* query, int step) {
#pragma unroll
        for (int j = 0; j < STEP / 32; ++j) {
            const uint4 low = query[(step * (STEP / 32) + j) * WARP + lane_id()];
            const uint4 high =
                HEAD_TILES == 2 ? query[(D / 32 + step * (STEP / 32) + j) * WARP + lane_id()] : uint4{0, 0, 0, 0};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint4 key = keys.get(half, j);
                T::mma(dots[half], low.x, high.x, low.y, high.y, key.x, key.y);
                T::mma(dots[half], low.z, high.z, low.w, high.w, key.z, key.w);
            }
        }
    }

    // Turns dot products into weights relative to the largest logit so far, as the second product wants them.
    __device__ void weigh(u32 (&weights)[HEAD_TILES][2], const float (&dots)[2][4], const Unit& unit,
                          const Logits& logits) {
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile) {
            float x[4];
            float largest = m[tile];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool is_seen = value_token(i) < unit.count && (unit.skip <= 0 || value_token(i) >= unit.skip);
                x[i] = is_seen ? logits(dots[i / 2][tile * 2 + i % 2]) : -infinity();
                largest = fmaxf(largest, x[i]);
            }
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
            const float shrink = exp2_fast(m[tile] - largest);
            m[tile] = largest;
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < 4; ++i) sum += x[i] = exp2_fast(x[i] - largest);
            l[tile] = l[tile] * shrink + sum;
            weights[tile][0] = T::pack(x[0], x[1]);
            weights[tile][1] = T::pack(x[2], x[3]);
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

    // Memory no token was written to may hold NaN, and 0 * NaN is NaN.
    __device__ void clear_missing_values(int count) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (value_token(i) >= count) values.clear(i);
    }

    __device__ void add_row(int row, const u32 (&weights)[HEAD_TILES][2], u32 t0, u32 t1, u32 t2, u32 t3) {
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile)
            T::mma(out[tile][row], low_halves(t0, t1), high_halves(t0, t1), low_halves(t2, t3), high_halves(t2, t3),
                   weights[tile][0], weights[tile][1]);
    }

    __device__ void multiply_values(const u32 (&weights)[HEAD_TILES][2], int step) {
        int row = step * STEP_ROWS;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            const uint4 a = values.get(0, block), b = values.get(1, block), c = values.get(2, block),
                        d = values.get(3, block);
            add_row(row++, weights, a.x, b.x, c.x, d.x);
            add_row(row++, weights, a.y, b.y, c.y, d.y);
            add_row(row++, weights, a.z, b.z, c.z, d.z);
            add_row(row++, weights, a.w, b.w, c.w, d.w);
        }
        if constexpr (TAIL != 0) {
            const uint2 a = values.get_tail(0), b = values.get_tail(1), c = values.get_tail(2),
                        d = values.get_tail(3);
            add_row(row++, weights, a.x, b.x, c.x, d.x);
            add_row(row++, weights, a.y, b.y, c.y, d.y);
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
            float dots[2][4] = {};
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                multiply_keys(dots, query, step);
                if (step + 1 < STEPS)
                    keys.load(pool, now.block, step + 1, page_shift);
                else if (more)
                    keys.load(pool, next.block, 0, page_shift);
            }
            u32 weights[HEAD_TILES][2];
            weigh(weights, dots, now, logits);
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                if (now.count < UNIT) clear_missing_values(now.count);
                multiply_values(weights, step);
                if (step + 1 < STEPS)
                    values.load(pool, now.block + values_after, step + 1, page_shift);
                else if (more)
                    values.load(pool, next.block + values_after, 0, page_shift);
            }
            now = next;
        }
    }

    // The channel of `out[tile][row][0]`; [2] holds the next one.
    __device__ static int channel_of(int row, int r /* lane / 4 */) {
        const int step = row / STEP_ROWS, inner = row % STEP_ROWS;
        const int channel = inner < BLOCKS * 4 ? inner / 4 * 64 + r * 8 + inner % 4 * 2
                                               : BLOCKS * 64 + r * 4 + (inner - BLOCKS * 4) * 2;
        return step * STEP + channel;
    }
};
