// score_pages: a score per (sequence, kv head, page), -inf past a sequence's end. A warp takes sixteen pages at a
// time; the CTAs split the pages of every sequence and head. Where more query heads share a kv head than are scored
// at once, they are cut into slices, and what is a kv head here is a slice of one, with a score of its own.
#include "common/digest.cuh"

// What a warp scores: tiles first, first + stride, ... of one sequence and kv head. The digests of a page's heads lie
// side by side, and the warps of a CTA take neighbouring heads of the same pages, which memory likes.
struct WarpShare {
    int row, head, num_kv_heads, first, stride;
    int warp_of_head, warps;  // this warp's number among the CTA's warps with the same head, and how many those are
    uint4* query;             // staged, of this warp's head

    // Heads of a CTA: a power of two that divides the number of kv heads and the number of warps.
    __device__ WarpShare(uint4* staged, int staged_words, int heads, int num_kv_heads) : num_kv_heads(num_kv_heads) {
        const int head_of_cta = warp_id() & (heads - 1);
        warps = num_warps() / heads;
        warp_of_head = warp_id() / heads;
        row = blockIdx.z;
        head = blockIdx.x * heads + head_of_cta;
        first = blockIdx.y * warps + warp_of_head;
        stride = gridDim.y * warps;
        query = staged + head_of_cta * staged_words;
    }
    __device__ int item() const { return row * num_kv_heads + head; }
};

// Scores a warp's share; `take(tile, scores by head)` gets them, a tile at a time, tiles without pages too.
template <typename Scorer, int HEAD_TILES, typename Take>
__device__ void score_tiles(Scorer& scorer, const WarpShare& share, const u16* query /* [group, d] */, int group,
                            const int* table, int count, int max_pages, Take take) {
    TileIds ids(table, count, max_pages, share.first * TILE, share.stride * TILE);
    scorer.stage(share.query, query, group, share.warp_of_head, share.warps, [&] {
        ids.aim(scorer);
        if (share.first * TILE < count) scorer.load_first();
    });
    __syncthreads();  // the query is staged
    scorer.use(share.query);
#pragma unroll 1
    for (int tile = share.first; tile * TILE < max_pages; tile += share.stride) {
        float by_head[HEAD_TILES][4];
        if (tile * TILE < count) scorer.score(by_head, [&] { ids.aim(scorer); });
        take(tile, by_head);
    }
    wait_for_copies();  // what a scorer has asked for ahead: none may arrive after the CTA's end
}

template <typename T, int D, int HEAD_TILES, typename Kind>
__global__ void __launch_bounds__(256, D* HEAD_TILES <= 128 ? 2 : 1)
    score_pages(const u16* query,  // [b, hq, d]
                Digests digests,
                const int* block_table,  // [b, max_pages]
                const int* seq_lens,     // [b]
                float* scores,           // [b, hkv, max_pages]; POOL_NONE: [b, hq, max_pages]
                int num_kv_heads, int heads, int group, int slices, int page_shift, int max_pages, int pooling,
                float scaling) {
    extern __shared__ uint4 staged[];
    wait_for_previous_kernel();
    let_next_kernel_start();
    using Scorer = typename Kind::template Scorer<T, D, HEAD_TILES>;
    const WarpShare share(staged, Scorer::STAGED, heads, num_kv_heads);
    uint4* const rooms = staged + heads * Scorer::STAGED;
    check_shared_end(rooms + num_warps() * Scorer::ROOM);
    Scorer scorer(digests, num_kv_heads / slices, share.head / slices, page_shift, scaling,
                  rooms + warp_id() * Scorer::ROOM);
    const i64 item = share.item();
    const int count = (seq_lens[share.row] + (1 << page_shift) - 1) >> page_shift;
    const auto take = [&](int tile, const float (&by_head)[HEAD_TILES][4]) {
        const int slot = tile * TILE + lane_id() / 4;
        if (pooling == POOL_NONE) {
#pragma unroll
            for (int i = 0; i < HEAD_TILES * 4; ++i) {
                const int in_group = Scorer::head_of(i / 4, i % 2), page = slot + i % 4 / 2 * 8;
                if (in_group < group && page < max_pages)
                    scores[(item * group + in_group) * max_pages + page] =
                        page < count ? by_head[i / 4][i % 4] : -infinity();
            }
            return;
        }
        const float2 pooled = pool_heads<Scorer>(by_head, group, GroupPooling(pooling));
        const int page = slot + lane_id() % 4 * 8;  // lanes 0 and 1 of a page's four write its two scores
        if (lane_id() % 4 < 2 && page < max_pages)
            scores[item * max_pages + page] = page >= count ? -infinity() : lane_id() % 4 ? pooled.y : pooled.x;
    };
    const int* const table = block_table + i64(share.row) * max_pages;
    score_tiles<Scorer, HEAD_TILES>(scorer, share, query + item * group * D, group, table, count, max_pages, take);
}
