// score_pages: a score per (sequence, kv head, page), -inf past a sequence's end. A warp takes sixteen pages at a
// time; the CTAs split the pages of every sequence and head.
#include "common/score.cuh"

// What a warp scores: tiles first, first + stride, ... of one sequence and kv head. The digests of a page's heads lie
// side by side, and the warps of a CTA take neighbouring heads of the same pages, which memory likes.
template <int D, int HEAD_TILES>
struct Share {
    int row, head, num_kv_heads, first, stride;
    int of_head, warps;  // this warp's number among the CTA's warps with the same head, and theirs
    uint4* query;        // staged, of this warp's head

    // Heads of a CTA: a power of two that divides the number of kv heads and the number of warps.
    __device__ Share(uint4* staged, int heads, int num_kv_heads) : num_kv_heads(num_kv_heads) {
        const int of_cta = warp_id() & (heads - 1);
        warps = num_warps() / heads;
        of_head = warp_id() / heads;
        row = blockIdx.z;
        head = blockIdx.x * heads + of_cta;
        first = blockIdx.y * warps + of_head;
        stride = gridDim.y * warps;
        query = staged + of_cta * 2 * QUERY_WORDS<D, HEAD_TILES>;
    }
    __device__ int item() const { return row * num_kv_heads + head; }
};

// Scores a warp's share; `take(tile, scores by head)` gets them, a tile at a time, tiles without pages too.
template <typename T, int D, int HEAD_TILES, typename Take>
__device__ void score_share(const Share<D, HEAD_TILES>& share, const u16* query, int group, const u16* digests,
                            const int* table, int count, int max_pages, Take take) {
    const auto id_of = [&](int slot) { return table[min(slot, max_pages - 1)]; };
    const auto digest_of = [&](int slot, int page) {  // entries past the end exist but may be anything
        return digests + (i64(slot < count ? page : 0) * share.num_kv_heads + share.head) * 2 * D;
    };
    const int slot = share.first * TILE + lane_id() / 4;
    const int low = id_of(slot), high = id_of(slot + 8);  // on their way while the query is staged
    stage_query<D, HEAD_TILES>(share.query, query + i64(share.item()) * group * D, group, share.of_head, share.warps);
    Scorer<T, D, HEAD_TILES> scorer;
    scorer.aim(digest_of(slot, low), digest_of(slot + 8, high));
    if (share.first * TILE < count) scorer.load_first();
    __syncthreads();  // the query is staged
#pragma unroll 1
    for (int tile = share.first; tile * TILE < max_pages; tile += share.stride) {
        const int next = (tile + share.stride) * TILE + lane_id() / 4;
        float by_head[HEAD_TILES][4];
        if (tile * TILE < count)
            scorer.score(by_head, share.query, [&](auto& scorer) {
                scorer.aim(digest_of(next, id_of(next)), digest_of(next + 8, id_of(next + 8)));
            });
        take(tile, by_head);
    }
}

template <typename T, int D, int HEAD_TILES>
__global__ void __launch_bounds__(256)
    score_pages(const u16* query,        // [b, hq, d]
                const u16* digests,      // [num_pages, hkv, 2, d]
                const int* block_table,  // [b, max_pages]
                const int* seq_lens,     // [b]
                float* scores,           // [b, hkv, max_pages]; POOL_NONE: [b, hq, max_pages]
                int num_kv_heads, int heads, int group, int page_shift, int max_pages, int pooling) {
    extern __shared__ uint4 staged[];
    wait_for_previous_kernel();
    let_next_kernel_start();
    const Share<D, HEAD_TILES> share(staged, heads, num_kv_heads);
    const i64 item = share.item();
    const int count = (seq_lens[share.row] + (1 << page_shift) - 1) >> page_shift;
    const auto take = [&](int tile, const float (&by_head)[HEAD_TILES][4]) {
        const int slot = tile * TILE + lane_id() / 4;
        if (pooling == POOL_NONE) {
#pragma unroll
            for (int i = 0; i < HEAD_TILES * 4; ++i) {
                const int in_group = i / 4 * MMA_HEADS + lane_id() % 4 * 2 + i % 2, page = slot + i % 4 / 2 * 8;
                if (in_group < group && page < max_pages)
                    scores[(item * group + in_group) * max_pages + page] =
                        page < count ? by_head[i / 4][i % 4] : -infinity();
            }
            return;
        }
        const float2 pooled = pool_heads<HEAD_TILES>(by_head, group, GroupPooling(pooling));
        const int page = slot + lane_id() % 4 * 8;  // lanes 0 and 1 of a page's four write its two scores
        if (lane_id() % 4 < 2 && page < max_pages)
            scores[item * max_pages + page] = page >= count ? -infinity() : lane_id() % 4 ? pooled.y : pooled.x;
    };
    score_share<T>(share, query, group, digests, block_table + i64(share.row) * max_pages, count, max_pages, take);
}
