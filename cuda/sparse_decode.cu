// sparse_decode: append, score, select and attend in one launch, for the policy top_k.
//
// A cluster of CTAs takes one (sequence, kv head). Its warps score the pages and tell every CTA their priorities
// in the selection; after one cluster barrier every CTA makes the same selection for itself, attends to its share of
// it, and the cluster merges. Where a page's priority is its largest share of a head's attention, what all pages of a
// head come to must be known first: scores are kept until, after a cluster barrier more, they can become shares.
//
// The new token's page is read whatever its score, so the token need not be there when the pages are scored, and
// nobody waits for it: it is written long before it is read. For the same reason a page needs no digest before it is
// full; then it is made while the cluster waits to merge.
#include "common/append.cuh"
#include "common/merge.cuh"
#include "common/select.cuh"
#include "common/share.cuh"

// What a step is handed: `StepArguments` of sparsekv/ops/step.py, and what a launch adds to it.
struct StepParams {
    const u16* query;        // [b, hq, d]
    const u16* key;          // [b, hkv, d] of the new token, strides in elements; null: it is in its page
    const u16* value;        // [b, hkv, d]
    const int* block_table;  // [b, max_pages]
    const int* seq_lens;     // [b] the new token counted
    void* kv_pool;           // [num_pages, 2, hkv, page_size, record]
    Digests digests;
    const int* limits;  // [b] fewer than k pages for some; null: k
    const void* sinks;  // [hq] or null, float32 or as the query
    u32* priorities;    // [b, hkv, max_pages] scratch; null: they fit shared memory
    float* kept;  // [b, hkv, tiles, 16, heads] scratch for scores by head; null: shared memory has room, or none
    int* slots;   // [b, hkv, k] what was read
    u16* out;     // [b, hq, d]
    float* lse;   // [b, hq]
    i64 key_batch, key_head, value_batch, value_head;
    int group, page_shift, max_pages, k, sink_tokens, recent_tokens, pooling, wide_sinks, whole_tokens;
    float scaling, softcap, min_score;
};

// The least score of a page that is read, in a sequence of so many tokens; -inf: any.
__device__ float least_score(const StepParams& p, int length) {
    return length > p.whole_tokens ? p.min_score : -infinity();
}

// What a CTA works with in shared memory, as `step_bytes` of sparsekv/ops/rooms.py counts it. Other CTAs write into
// `select.priorities` and the room of the merge.
template <typename T, int D, int HEAD_TILES, typename Scorer, typename Format>
struct StepShared {
    uint4 *query, *score_query;  // as attention and as scoring want it
    uint4* scorer;               // this warp's
    SelectBuffers select;
    int* table;          // [max_pages] the pages' ids, where there is room for all pages' keys
    float* kept;         // [tiles of this CTA, 16, heads] scores that will be shares
    void *merge, *sums;  // the merge's own room; the warps' sums, in the place of what selecting needed

    // `direct`: there is room; `kept_tiles`: of this CTA, whose scores are kept here.
    __device__ StepShared(uint4* base, int max_pages, int k, bool direct, int group, int kept_tiles) {
        const auto words = [](int n) { return (n + 3) >> 2; };  // of 16 bytes
        query = base;
        score_query = query + Format::template query_words<D>(HEAD_TILES);
        uint4* const reused = score_query + Scorer::STAGED;
        scorer = reused + warp_id() * Scorer::ROOM;
        uint4* const chosen = reused + num_warps() * Scorer::ROOM;
        uint4* const priorities = chosen + words(k);
        uint4* const ids = priorities + words(direct ? max_pages : ceil_div(max_pages, TILE));
        uint4* const scores = ids + (direct ? words(max_pages) : words(k) + words(TILE * k));
        uint4* const end = scores + kept_tiles * (TILE / 4) * kept_heads(group);
        select.chosen = reinterpret_cast<int*>(chosen);
        select.priorities = reinterpret_cast<u32*>(priorities);
        table = select.tiles = reinterpret_cast<int*>(ids);
        select.candidates = reinterpret_cast<u32*>(ids + words(k));
        kept = reinterpret_cast<float*>(scores);
        sums = reused;
        merge = reused +
                max(static_cast<int>(end - reused), num_warps() * OutputFragments<T, D, HEAD_TILES>(group).count());
    }
};

// Tells the priorities of a tile's pages, of which a lane has the scores of two: to every CTA if all have room for
// those of all pages (`priorities` is null); else they go there, and to the CTAs the best of each tile.
template <typename Shared>
__device__ void tell_priorities(const Shared& room, u32* priorities, int tile, int count, const Forced& forced,
                                const float2& scores, float least) {
    const int size = cluster_size();
    const int mine =
        tile * TILE + lane_id() / 4 + lane_id() % 2 * 8;  // even lanes their first page, odd ones the other
    u32 priority = priority_of(lane_id() % 2 ? scores.y : scores.x);
    priority = forced.has(mine) ? FORCED : priority < priority_of(least) ? NO_PAGE : priority;
    if (priorities == nullptr) {  // four lanes share the two pages: two lanes to a page, each serves half of the CTAs
#pragma unroll 1
        for (int to = lane_id() % 4 / 2; to < size && mine < count; to += 2)
            store_remote(remote_address(room.select.priorities + mine, to), priority);
        return;
    }
    if (mine >= count) priority = NO_PAGE;
    if (lane_id() % 4 < 2 && mine < count) priorities[mine] = priority;
    priority = __reduce_max_sync(ALL_LANES, priority);
    if (lane_id() < size) store_remote(remote_address(room.select.priorities + tile, lane_id()), priority);
}

// Scores this CTA's share of the pages and tells their priorities; `meanwhile` is called once, before that ends. The
// first store to another CTA waits until all of them run.
template <typename T, int D, typename Scorer, int HEAD_TILES, typename Shared, typename Meanwhile>
__device__ void score_own_pages(const StepParams& p, const Pages& pages, const Shared& room, u32* priorities,
                                float* kept, const u16* query, const Forced& forced, Meanwhile meanwhile) {
    const int count = pages.count(), stride = cluster_size() * num_warps();
    const int first = cluster_rank() * num_warps() + warp_id();
    TileIds ids(pages.block_table, count, p.max_pages, first * TILE, stride * TILE);
    Scorer scorer(p.digests, pages.num_kv_heads, pages.kv_head, pages.page_shift, p.scaling, room.scorer);
    scorer.stage(room.score_query, query, p.group, warp_id(), num_warps(), [&] {
        ids.aim(scorer);
        if (first * TILE < count) scorer.load_first();
    });
    __syncthreads();  // the query is staged
    scorer.use(room.score_query);
    const bool share = p.pooling == POOL_SHARE;
    const float least = least_score(p, pages.length);
    KeptScores<Scorer, HEAD_TILES> keeper(kept ? kept : room.kept, kept ? first : warp_id(),
                                          kept ? stride : num_warps(), p.group);
    bool waited = false;
#pragma unroll 1
    for (int tile = first; tile * TILE < count; tile += stride) {
        float by_head[HEAD_TILES][4];
        scorer.score(by_head, [&] { ids.aim(scorer); });
        if (share) {
            keeper.keep(by_head, count - 1 - tile * TILE);
            continue;
        }
        const float2 pooled = pool_heads<Scorer>(by_head, p.group, GroupPooling(p.pooling));
        if (!waited) cluster_wait();
        waited = true;
        tell_priorities(room, priorities, tile, count, forced, pooled, least);
    }
    if (!waited) cluster_wait();
    if (share) {
        keeper.template merge<T, D>(room.merge, room.sums, meanwhile);
#pragma unroll 1
        for (int tile = first; tile * TILE < count; tile += stride)
            tell_priorities(room, priorities, tile, count, forced, keeper.next(), least);
    }
}

template <typename T, int D, int HEAD_TILES, typename Kind, typename Format>
__global__ void __launch_bounds__(D* HEAD_TILES <= 128 ? 512 : 256) sparse_decode(const StepParams p) {
    using Scorer = typename Kind::template Scorer<T, D, HEAD_TILES>;
    extern __shared__ uint4 base[];
    __shared__ SelectScratch scratch;
    cluster_arrive();  // "this CTA runs": others write into it
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int head = blockIdx.y, num_kv_heads = gridDim.y, row = blockIdx.z, item = row * num_kv_heads + head;
    const int* const own_table = p.block_table + i64(row) * p.max_pages;
    const Pages pages = {own_table, p.seq_lens[row], p.page_shift, num_kv_heads, head, Format::PARTS};
    auto* const pool = static_cast<typename Format::Element*>(p.kv_pool);
    const bool direct = p.priorities == nullptr;
    const bool share = p.pooling == POOL_SHARE;
    const int tiles = ceil_div(p.max_pages, TILE);
    const int kept_tiles = share && !p.kept ? ceil_div(tiles, cluster_size() * num_warps()) * num_warps() : 0;
    const StepShared<T, D, HEAD_TILES, Scorer, Format> room(base, p.max_pages, p.k, direct, p.group, kept_tiles);
    const int count = min(pages.count(), p.max_pages), limit = min(p.limits ? p.limits[row] : p.k, p.k);
    const bool choose = count > limit || least_score(p, pages.length) > -infinity();
    const int warps = cluster_size() * num_warps(), first = cluster_rank() * num_warps() + warp_id();
    const u16* const my_query = p.query + i64(item) * p.group * D;
    u32* const my_priorities = direct ? nullptr : p.priorities + i64(item) * p.max_pages;

    const int newest = pages.length - 1, offset = newest & ((1 << p.page_shift) - 1);
    const int newest_unit = ((max(min(count, limit), 1) - 1) << pages.unit_shift()) + offset / UNIT;
    const auto newest_page = [&] {
        const i64 page = pages.block_table[newest >> p.page_shift];
        return StoredPage<T, D, Format>(pool, page, head, num_kv_heads, p.page_shift);
    };
    // Which of the cluster's warps appends, counted from this CTA's first.
    const int appending = p.key && newest >= 0 ? newest_unit % warps - (first - warp_id()) : -1;
    const auto append = [&] {
        if (appending == warp_id())
            store_token(newest_page(), offset, p.key + row * p.key_batch + head * p.key_head,
                        p.value + row * p.value_batch + head * p.value_head);
        __syncwarp();
    };
    // If shares are asked for, how many pages are chosen is not known, nor who attends to the last: it is written
    // before the barrier. Else the warp that attends to it writes it, and nobody waits.
    if (choose) {
        const Forced forced(pages.length, p.page_shift, p.sink_tokens, p.recent_tokens);
        float* const kept = p.kept ? p.kept + i64(item) * tiles * TILE * kept_heads(p.group) : nullptr;
        score_own_pages<T, D, Scorer, HEAD_TILES>(p, pages, room, my_priorities, kept, my_query, forced, append);
        cluster_arrive();
    }
    Format::template stage<T, D, HEAD_TILES>(my_query, p.group, room.query);
#pragma unroll 1
    for (int i = threadIdx.x; direct && choose && i < count; i += blockDim.x)
        copy_async<4>(room.table + i, pages.block_table + i);
    if (!(choose && share)) append();
    cluster_wait();  // for all priorities, or if nothing is chosen for all CTAs to run
    __syncthreads();

    int found = count;
    if (choose) found = choose_pages(room.select, my_priorities, count, p.k, limit, scratch);
    if (cluster_rank() == 0)
#pragma unroll 1
        for (int i = threadIdx.x; i < p.k; i += blockDim.x)
            p.slots[i64(item) * p.k + i] = i >= found ? -1 : choose ? room.select.chosen[i] : i;
    wait_for_copies();
    __syncthreads();

    const int* const table = direct && choose ? room.table : pages.block_table;
    Attention<T, D, HEAD_TILES, Format> attention;
    attention.attend(pool, pages, room.query, first, warps, found << pages.unit_shift(), Logits(p.scaling, p.softcap),
                     [&](int i) { return pages.locate(choose ? room.select.chosen : nullptr, table, i); });
    const Result<D, HEAD_TILES> result(p.out, p.lse, Sinks{p.sinks, p.wide_sinks}, item, head, p.group);
    merge_cluster(attention, room.merge, room.sums, result, [&] {
        if (appending < 0 || appending >= num_warps() || offset + 1 < 1 << p.page_shift) return;
        const int part = (warp_id() - appending + num_warps()) % num_warps();
        summarize_page<Kind>(newest_page(), p.digests, offset + 1, 1 << p.page_shift, part);
    });
}
