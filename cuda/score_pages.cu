// score_pages: a score per (sequence, kv head, page), -inf past a sequence's end. A warp takes sixteen pages at a time;
// the CTAs split the pages of every sequence and head.
#include "common/score.cuh"

template <typename T, int D, int HEAD_TILES>
__global__ void __launch_bounds__(256)
score_pages(const u16* query,        // [b, hq, d]
            const u16* digests,      // [num_pages, hkv, 2, d]
            const int* block_table,  // [b, max_pages]
            const int* seq_lens,     // [b]
            float* scores,           // [b, hkv, max_pages]; POOL_NONE: [b, hq, max_pages]
            int group, int page_size, int max_pages, int pooling) {
    extern __shared__ uint4 staged[];
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int head = blockIdx.x, num_kv_heads = gridDim.x, row = blockIdx.z;
    const int first_head = (row * num_kv_heads + head) * group;
    stage_signed_query<D, HEAD_TILES>(staged, query + i64(first_head) * D, group);
    __syncthreads();

    const int count = ceil_div(seq_lens[row], page_size), stride = gridDim.y * num_warps();
    const int* const table = block_table + i64(row) * max_pages;
    // Past the end the last page is scored again: its digest is near, and nobody looks at the score.
    const auto digest_of = [&](int slot) {
        return digests + (i64(table[max(min(slot, count - 1), 0)]) * num_kv_heads + head) * 2 * D;
    };
    Scorer<T, D, HEAD_TILES> scorer;
    int tile = blockIdx.y * num_warps() + warp_id();
    if (tile * TILE >= max_pages) return;
    scorer.aim(digest_of(tile * TILE + lane_id() / 4), digest_of(tile * TILE + lane_id() / 4 + 8));
    scorer.load_first();
    for (; tile * TILE < max_pages; tile += stride) {
        const int slot = tile * TILE + lane_id() / 4;
        float by_head[HEAD_TILES][4];
        if (tile * TILE < count)
            scorer.score(by_head, staged, [&](auto& scorer) {
                scorer.aim(digest_of(slot + stride * TILE), digest_of(slot + stride * TILE + 8));
            });
        if (pooling == POOL_NONE) {
#pragma unroll
            for (int i = 0; i < HEAD_TILES * 4; ++i) {
                const int in_group = i / 4 * MMA_HEADS + lane_id() % 4 * 2 + i % 2, page = slot + i % 4 / 2 * 8;
                if (in_group < group && page < max_pages)
                    scores[i64(first_head + in_group) * max_pages + page] =
                        page < count ? by_head[i / 4][i % 4] : -infinity();
            }
            continue;
        }
        const float2 pooled = pool_heads<HEAD_TILES>(by_head, group, GroupPooling(pooling));
        const int page = slot + lane_id() % 4 * 8;  // lanes 0 and 1 of a page's four write its two scores
        if (lane_id() % 4 < 2 && page < max_pages)
            scores[i64(row * num_kv_heads + head) * max_pages + page] =
                page >= count ? -infinity() : lane_id() % 4 ? pooled.y : pooled.x;
    }
}
