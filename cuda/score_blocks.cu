// score_blocks: how much attention of some queries each block of keys gets, on any tensor core.
//
// The heads of a group share keys, so a CTA's rows are pairs of a query and a head of the group, and it scores some
// whole blocks of keys for them: each score is one warp's, and nothing is left to combine. Keys come in tiles of 64,
// the next one while this one is multiplied. Tiles later than the last of the queries are not even asked for.
#include "common/prompt.cuh"
#include "common/shared_rows.cuh"

struct ScoreParams {
    const u16* query;      // [b, hq, m, d]
    const u16* key;        // [b, hkv, n, d]
    const int* positions;  // [m], of the queries among the n tokens, ascending
    float* out;            // [b, hq, m, num_key_blocks]
    i64 strides[2][3];     // of query and key, from row to row, head to head, token to token, in elements
    int m, n, block_size;
    int kv_heads, group;
    int blocks;    // of a CTA
    float factor;  // on dot products: the logits' scale, in base 2
};

// What a CTA does. The grid is [ceil(m * group / ROWS), ceil(num_key_blocks / blocks), b * hkv], the heads of a query
// side by side: then the CTA's queries are neighbours, and CTAs that read the same keys run together.
template <int ROWS>
struct ScoreShare {
    int row, kv_head;
    int first, end;                  // of the rows: this CTA's first one, and behind the last of all
    int num_blocks;                  // of all keys
    int first_block, behind_blocks;  // those of the CTA

    __device__ explicit ScoreShare(const ScoreParams& params) {
        row = blockIdx.z / params.kv_heads;
        kv_head = blockIdx.z % params.kv_heads;
        first = blockIdx.x * ROWS;
        end = params.m * params.group;
        num_blocks = ceil_div(params.n, params.block_size);
        first_block = blockIdx.y * params.blocks;
        behind_blocks = min(first_block + params.blocks, num_blocks);
    }
    // For an item behind the end the last one stands in, as nobody looks.
    __device__ const u16* query_at(const ScoreParams& params, int item) const {
        item = min(item, end - 1);
        const i64* const strides = params.strides[0];
        const int head = kv_head * params.group + item % params.group;
        return params.query + row * strides[0] + head * strides[1] + item / params.group * strides[2];
    }
    __device__ int position_of(const ScoreParams& params, int item) const {
        return min(params.positions[min(item, end - 1) / params.group], params.n - 1);
    }
    __device__ float* scores_of(const ScoreParams& params, int item) const {
        const i64 heads = i64(row) * params.kv_heads + kv_head;
        const i64 query = (heads * params.group + item % params.group) * params.m + item / params.group;
        return params.out + query * num_blocks;
    }
};

// Sixteen rows, of which a lane holds two.
struct ScoredRows {
    PromptRows sums;
    int position[2];
    float* to[2];  // null behind the end

    template <int ROWS>
    __device__ void begin(const ScoreParams& params, const ScoreShare<ROWS>& share, int first) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int item = first + lane_id() / 4 + half * 8;
            position[half] = share.position_of(params, item);
            to[half] = item < share.end ? share.scores_of(params, item) : nullptr;
        }
    }
    template <int N>
    __device__ void weigh(float (&dots)[N][4], int start, bool is_masked, float factor) {
        const int column = start + lane_id() % 4 * 2;
        if (is_masked) hide_later_keys(dots, position[0] - column, position[1] - column);
        float shrink[2];
        sums.weigh(dots, factor, shrink);
    }
    // Of a block without keys that these queries may see, -inf. Then the next block begins.
    __device__ void write(int block) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = sums.l[half] + __shfl_xor_sync(ALL_LANES, sums.l[half], 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            if (lane_id() % 4 == 0 && to[half] != nullptr) to[half][block] = (sums.m[half] + log2_fast(sum)) * LN_2;
        }
        sums = {};
    }
};

template <typename T, int D, int TILES /* of sixteen rows, of a warp */>
__global__ void __launch_bounds__(PROMPT_WARPS* WARP, D <= 128 ? 3 : 2) score_blocks(ScoreParams params) {
    extern __shared__ uint4 shared[];  // queries, and two tiles of keys
    wait_for_previous_kernel();
    let_next_kernel_start();
    constexpr int ROWS = PROMPT_WARPS * TILES * 16, THREADS = PROMPT_WARPS * WARP, WORDS = PROMPT_TILE * D / 8;
    const ScoreShare<ROWS> share(params);
    const SharedRows<D> queries{shared};
    check_shared_end(shared + ROWS * D / 8 + 2 * WORDS);
    const auto keys = [&](int which) { return SharedRows<D>{shared + ROWS * D / 8 + which * WORDS}; };
    const u16* const key = params.key + share.row * params.strides[1][0] + share.kv_head * params.strides[1][1];
    const auto ask_keys = [&](int which, int start) {
        keys(which).template ask<PROMPT_TILE, THREADS>(key, params.strides[1][2], start, params.n);
    };

    int start = share.first_block * params.block_size, block = share.first_block, left = params.block_size;
    const int end =
        min(share.behind_blocks * params.block_size, share.position_of(params, share.first + ROWS - 1) + 1);
    if (start < end) {
        queries.template ask_each<ROWS, THREADS>([&](int row) { return share.query_at(params, share.first + row); });
        ask_keys(0, start);
    }
    const int first_row = warp_id() * TILES * 16;
    const int seen_by_all = share.position_of(params, share.first + first_row) + 1;
    ScoredRows rows[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) rows[tile].begin(params, share, share.first + first_row + tile * 16);
    const auto write = [&](int which) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) rows[tile].write(which);
    };
#pragma unroll 1
    for (int which = 0; start < end; start += PROMPT_TILE, which ^= 1) {
        wait_for_copies();
        __syncthreads();  // the keys are here, and nobody reads those of before
        if (start + PROMPT_TILE < end) ask_keys(which ^ 1, start + PROMPT_TILE);
        float dots[TILES][PROMPT_TILE / 8][4];
        multiply_rows<T>(dots, queries, keys(which), first_row);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
            rows[tile].weigh(dots[tile], start, start + PROMPT_TILE > seen_by_all, params.factor);
        left -= PROMPT_TILE;
        if (left > 0 && start + PROMPT_TILE < end) continue;
        write(block++);
        left = params.block_size;
    }
#pragma unroll 1
    for (; block < share.behind_blocks; ++block) write(block);
}
