// Attention of a prompt's queries to listed blocks of keys: what a CTA has to do, the softmax, and the output. How
// the products are made and how keys and values come to them is the kernels' own business (prompt_attention.cu and
// prompt_attention_sm90.cu).
//
// Both leave products as mma.m16n8 does: of sixteen rows a warp, lane l holds rows r = l / 4 and r + 8 ([0], [1] and
// [2], [3]), of every eight columns 2c and 2c + 1, c = l % 4. So the weights [16 queries x 16 keys] in a lane's
// registers are, in pairs of 16 bits, just what the second product wants there.
#pragma once
#include "common/device.cuh"

constexpr int PROMPT_WARPS = 4, PROMPT_TILE = 64;  // of a CTA; keys at a time. (Hopper's own kernel has others.)

struct PromptParams {
    const u16* query;      // [b, hq, t, d]
    const u16* key;        // [b, hkv, n, d]
    const u16* value;      // [b, hkv, n, d]
    const int* counts;     // [b, lists, num_query_blocks], at least 1
    const int* indices;    // [b, lists, num_query_blocks, width], ascending, the last one the queries' own block
    u16* out;              // [b, t, hq, d]
    i64 strides[3][3];     // of query, key and value, from row to row, head to head, token to token, in elements
    int t, n, block_size;  // the last t of n tokens have queries
    int kv_heads, lists, width;  // lists: hkv or hq
    float factor;                // on dot products: the logits' scale, in base 2
};

// What a CTA does: ROWS queries of a head. The grid is [num_query_blocks * (block_size / ROWS), hq, b], the last
// queries first: they tend to have the longest lists, and what starts last should be short.
template <int ROWS>
struct PromptShare {
    int row, head, kv_head;
    int first;        // the token of the first query
    int past;         // tokens without queries
    int own;          // the first token of the queries' own block
    const int* list;  // [count]
    int count;

    __device__ explicit PromptShare(const PromptParams& params) {
        row = blockIdx.z;
        head = blockIdx.y;
        kv_head = head / (gridDim.y / params.kv_heads);
        past = params.n - params.t;
        const int parts = params.block_size / ROWS, num_blocks = gridDim.x / parts, part = gridDim.x - 1 - blockIdx.x;
        const int block = part / parts;
        own = (past / params.block_size + block) * params.block_size;
        first = own + part % parts * ROWS;
        const i64 item = (i64(row) * params.lists + head / (gridDim.y / params.lists)) * num_blocks + block;
        list = params.indices + item * params.width;
        count = params.counts[item];
    }
    // Of a block that is cut off at either end, there may be parts without a query.
    __device__ bool is_empty(const PromptParams& params) const { return first >= params.n || first + ROWS <= past; }
};

// The listed keys in tiles, from the last one to the first: those that need a mask come before all others. A list's
// entries are read one ahead.
template <int TILE>
struct PromptTiles {
    const int* list;
    int block_size, left;  // blocks that come after this one
    int block, offset;     // the first token of a block, and of the tile in it
    int following;         // the number of the next block

    // `end`: behind the last key that is needed; it lies in the last block, which begins at token `own`.
    __device__ PromptTiles(const int* list, int count, int own, int end, int block_size)
        : list(list), block_size(block_size), left(count - 1), block(own), offset((end - 1 - own) / TILE * TILE) {
        look_ahead();
    }
    __device__ int start() const { return block + offset; }
    __device__ int count() const { return left * (block_size / TILE) + offset / TILE + 1; }
    __device__ bool has_next() const { return offset > 0 || left > 0; }
    __device__ void next() {
        offset -= TILE;
        if (offset >= 0) return;
        block = following * block_size;
        offset = block_size - TILE;
        --left;
        look_ahead();
    }
    __device__ void look_ahead() { following = left > 0 ? list[left - 1] : 0; }
};

// Keys behind the query itself. `first`, `second`: by how much this lane's two rows are later than its first column.
template <int N>
__device__ inline void hide_later_keys(float (&dots)[N][4], int first, int second) {
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (j * 8 + i % 2 > (i < 2 ? first : second)) dots[j][i] = -infinity();
}

// Of a lane's two rows the largest logit so far, in base 2, and this lane's share of the weights' sum.
struct PromptRows {
    float m[2] = {LOWEST, LOWEST}, l[2] = {0.f, 0.f};

    // Turns dot products into weights relative to the largest logit so far. `shrink`: what is left of earlier ones.
    template <int N>
    __device__ void weigh(float (&dots)[N][4], float factor, float (&shrink)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float largest = -infinity(), sum = 0.f;
#pragma unroll
            for (int j = 0; j < N; ++j) largest = fmaxf(largest, fmaxf(dots[j][half * 2], dots[j][half * 2 + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
            largest = fmaxf(m[half], largest * factor);
            shrink[half] = exp2_fast(m[half] - largest);
            m[half] = largest;
#pragma unroll
            for (int j = 0; j < N; ++j)
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; ++i)
                    sum += dots[j][i] = exp2_fast(fmaf(dots[j][i], factor, -largest));
            l[half] = l[half] * shrink[half] + sum;
        }
    }

    // Sixteen queries' output, `first` being the token of the first of them, from a channel on.
    template <typename T, int D, int N, int ROWS>
    __device__ void write(const float (&out)[N][4], const PromptParams& params, const PromptShare<ROWS>& share,
                          int first, int channel = 0) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = l[half] + __shfl_xor_sync(ALL_LANES, l[half], 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            const float inverse = reciprocal(sum);
            const int token = first - share.past + lane_id() / 4 + half * 8;
            if (token < 0 || token >= params.t) continue;
            const i64 row = (i64(share.row) * params.t + token) * gridDim.y + share.head;
            u16* const to = params.out + row * D + channel + lane_id() % 4 * 2;
#pragma unroll
            for (int j = 0; j < N; ++j)
                *reinterpret_cast<u32*>(to + j * 8) =
                    T::pack(out[j][half * 2] * inverse, out[j][half * 2 + 1] * inverse);
        }
    }
};

// Multiplies what was gathered, where anything changes.
template <int N>
__device__ inline void shrink_rows(float (&out)[N][4], const float (&shrink)[2]) {
    if (!__any_sync(ALL_LANES, shrink[0] != 1.f || shrink[1] != 1.f)) return;
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[j][i] *= shrink[i / 2];
}
