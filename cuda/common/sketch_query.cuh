// A query as sketches are scored by it (sketch_score.cuh), staged in shared memory in the order in which lanes hold
// the tensor core's operands: rotated, and rounded to whole numbers from -40 to 40. Such a number has four balanced
// digits at base 3, n = t0 + 3 t1 + 9 t2 + 27 t3, each -1, 0 or 1, and a digit becomes two bits: whether it is 1, and
// whether it is -1. The product of signs and digits has eight columns, a pair of digits of four heads, so there are
// two products.
#pragma once
#include "common/sketch.cuh"

constexpr int QUERY_LIMIT = 40;  // the largest number: four digits of 1
constexpr int DIGIT_PAIRS = 2;   // a product each
constexpr int TILE_HEADS = 4;    // of a product

// What is counted is read as a float (sketch_score.cuh), and a count of 1 is then worth this.
constexpr float COUNT_UNIT = 0x1p-37f;

// A tile, four heads, of a staged query. It consists of words of 32 bits:
//
//   digits   [DIGIT_PAIRS][WORDS][WARP]  bits, by lane
//   offsets  [DIGIT_PAIRS][TILE_HEADS]   half the sum of 3^i over the digits that are not 0, in COUNT_UNIT
//   units    [TILE_HEADS]                what a number of 1 adds to a logit in base 2, divided by COUNT_UNIT / 2
template <int D>
struct SketchQuery {
    static constexpr int N = D / WARP;
    static constexpr int WORDS = D == 256 ? 4 : 2;  // half of them say where the digit is 1, half where it is -1
    static constexpr int OFFSETS = DIGIT_PAIRS * WORDS * WARP;
    static constexpr int TILE_WORDS = (OFFSETS + TILE_HEADS * (DIGIT_PAIRS + 1)) / 4;  // of 16 bytes

    // A pair of digits of head `i`, rotated, with their offset. Lane l of the warp has channels l, l + 32, ...
    __device__ static void stage_digits(u32* tile, int i, int pair, const float (&x)[N], float scaling) {
        float largest = 0.f;
#pragma unroll
        for (int j = 0; j < N; ++j) largest = fmaxf(largest, fabsf(x[j]));
        largest = largest_of_warp(largest);
        const float inverse = largest > 0.f ? QUERY_LIMIT / largest : 0.f;
        int nonzero[2] = {0, 0};
#pragma unroll
        for (int second = 0; second < 2; ++second) {
            u32 plus[N], minus[N];
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const u32 number = __float2int_rn(x[j] * inverse) + QUERY_LIMIT,
                          two_digits = pair ? number / 9 : number % 9;
                const u32 digit = second ? two_digits / 3 : two_digits % 3;  // 0 to 2 for -1 to 1
                plus[j] = __ballot_sync(ALL_LANES, digit == 2);
                minus[j] = __ballot_sync(ALL_LANES, digit == 0);
                nonzero[second] += __popc(plus[j]) + __popc(minus[j]);
            }
            u32* const operands = tile + pair * WORDS * WARP + (2 * i + second) * 4;
            store_bits(operands, plus);
            store_bits(operands + WORDS / 2 * WARP, minus);
        }
        if (lane_id() > 0) return;
        float* const constants = reinterpret_cast<float*>(tile + OFFSETS) + i;
        constants[TILE_HEADS * pair] = 0.5f * COUNT_UNIT * (pair ? 9 : 1) * (nonzero[0] + 3 * nonzero[1]);
        constants[TILE_HEADS * DIGIT_PAIRS] = largest / QUERY_LIMIT * scaling * (LOG2_E * 2.f / COUNT_UNIT);
    }

  private:
    // A bit of every channel as the operands of the four lanes that share a column.
    __device__ static void store_bits(u32* operands, const u32 (&bits)[N]) {
        unrolled<4>([&](auto part) {
            if (lane_id() != part.value) return;
            constexpr int FIRST = part.value * (D / 4) / 32, SHIFT = part.value * (D / 4) % 32;
            if constexpr (D == 64) {
                operands[part.value] = bits[FIRST] >> SHIFT & 0xFFFF;
            } else if constexpr (D == 96) {
                operands[part.value] =
                    __funnelshift_r(bits[FIRST], bits[FIRST < 2 ? FIRST + 1 : 2], SHIFT) & 0xFFFFFF;
            } else {
#pragma unroll
                for (int j = 0; j < N / 4; ++j) operands[j * WARP + part.value] = bits[FIRST + j];
            }
        });
    }
};
