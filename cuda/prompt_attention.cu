// prompt_attention: attention of a prompt's queries to listed blocks of keys, on any tensor core.
//
// A CTA is four warps, each with sixteen queries or twice as many: then every word that is read from shared memory
// serves two products, without which reading would take as long as multiplying. Keys and values come in tiles of 64,
// the values while the logits are made and the next keys while the values are multiplied. With the queries they take
// 64 KB at d 128, so two CTAs run on an SM, and one multiplies while the other waits.
#include "common/prompt.cuh"
#include "common/shared_rows.cuh"

template <typename T, int D, int TILES /* of sixteen queries, of a warp */>
struct PromptProducts {
    static constexpr int KEY_TILES = PROMPT_TILE / 8;

    float dots[TILES][KEY_TILES][4], out[TILES][D / 8][4];
    PromptRows rows[TILES];

    __device__ PromptProducts() {
#pragma unroll
        for (int i = 0; i < TILES * D / 2; ++i) (&out[0][0][0])[i] = 0.f;
    }
    __device__ void weigh(float factor) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            float shrink[2];
            rows[tile].weigh(dots[tile], factor, shrink);
            shrink_rows(out[tile], shrink);
        }
    }
    __device__ void multiply_values(const SharedRows<D>& values) {
#pragma unroll
        for (int k = 0; k < PROMPT_TILE / 16; ++k) {
            u32 a[TILES][4];
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* const two = dots[tile][k * 2 + i / 2] + i % 2 * 2;
                    a[tile][i] = T::pack(two[0], two[1]);
                }
#pragma unroll
            for (int j = 0; j < D / 16; ++j) {
                u32 b[4];
                values.right_transposed(b, k * 16, j);
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile)
                    multiply<T>(out[tile][j * 2], out[tile][j * 2 + 1], a[tile], b);
            }
        }
    }
};

template <typename T, int D, int TILES>
__global__ void __launch_bounds__(PROMPT_WARPS* WARP, D <= 128 ? 2 : 1) prompt_attention(PromptParams params) {
    extern __shared__ uint4 shared[];  // queries, keys, values
    wait_for_previous_kernel();
    let_next_kernel_start();
    constexpr int ROWS = PROMPT_WARPS * TILES * 16, THREADS = PROMPT_WARPS * WARP;
    const PromptShare<ROWS> share(params);
    if (share.is_empty(params)) return;
    const auto base = [&](const u16* data, int which, int head) {
        return data + share.row * params.strides[which][0] + head * params.strides[which][1];
    };
    const u16 *const key = base(params.key, 1, share.kv_head), *const value = base(params.value, 2, share.kv_head);
    const SharedRows<D> queries{shared}, keys{queries.words + ROWS * D / 8}, values{keys.words + PROMPT_TILE * D / 8};
    check_shared_end(values.words + PROMPT_TILE * D / 8);
    const auto ask_keys = [&](int start) {
        keys.template ask<PROMPT_TILE, THREADS>(key, params.strides[1][2], start, params.n);
    };

    PromptTiles<PROMPT_TILE> tiles(share.list, share.count, share.own, min(share.first + ROWS, params.n),
                                   params.block_size);
    queries.template ask<ROWS, THREADS>(base(params.query, 0, share.head), params.strides[0][2],
                                        share.first - share.past, params.t);
    ask_keys(tiles.start());
    PromptProducts<T, D, TILES> products;
    const int first_row = warp_id() * TILES * 16, own_row = first_row + lane_id() / 4 - lane_id() % 4 * 2;
#pragma unroll 1
    for (bool more = true; more;) {
        const int start = tiles.start();
        more = tiles.has_next();
        if (more) tiles.next();
        wait_for_copies();
        __syncthreads();  // the keys are here, and nobody reads the values of before
        values.template ask<PROMPT_TILE, THREADS>(value, params.strides[2][2], start, params.n);
        multiply_rows<T>(products.dots, queries, keys, first_row);
        if (start >= share.first)
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const int ahead = share.first + own_row + tile * 16 - start;
                hide_later_keys(products.dots[tile], ahead, ahead + 8);
            }
        products.weigh(params.factor);
        wait_for_copies();
        __syncthreads();  // the values are here, and nobody reads the keys
        if (more) ask_keys(tiles.start());
        products.multiply_values(values);
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
        products.rows[tile].template write<T, D>(products.out[tile], params, share,
                                                 share.first + first_row + tile * 16);
}
