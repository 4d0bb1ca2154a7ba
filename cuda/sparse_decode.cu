// sparse_decode: append, score, select and attend in one launch, for the policy top_k.
//
// A cluster of CTAs takes one (sequence, kv head). Its warps score the pages and tell every CTA their priorities
// in the selection; after one cluster barrier every CTA makes the same selection for itself, attends to its share of
// it, and the cluster merges. The new token's page is read whatever its score, so the token need not be there when
// the pages are scored: the warp that will attend to it writes it, and nobody waits for it. For the same reason a
// page needs no digest before it is full; then it is made while the cluster waits to merge.
#include "common/append.cuh"
#include "common/merge.cuh"
#include "common/select.cuh"

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
    int* slots;         // [b, hkv, k] what was read
    u16* out;           // [b, hq, d]
    float* lse;         // [b, hq]
    i64 key_batch, key_head, value_batch, value_head;
    int group, page_shift, max_pages, k, sink_tokens, recent_tokens, pooling, wide_sinks;
    float scaling, softcap;
};

// What a CTA works with in shared memory, as `step_bytes` of sparsekv/ops/rooms.py counts it. Other CTAs write into
// `select.priorities` and the room of the merge.
template <typename T, int D, int HEAD_TILES, int STAGED>
struct StepShared {
    uint4 *query, *score_query;  // as attention and as scoring want it
    SelectBuffers select;
    int* table;          // [max_pages] the pages' ids, where there is room for all pages' keys
    void *merge, *sums;  // the merge's own room; the warps' sums, in the place of what selecting needed

    // `direct`: there is room.
    __device__ StepShared(uint4* base, int max_pages, int k, bool direct, int group) {
        const auto words = [](int n) { return (n + 3) >> 2; };  // of 16 bytes
        query = base;
        score_query = query + QUERY_WORDS<D, HEAD_TILES>;
        uint4* const reused = score_query + STAGED;
        uint4* const priorities = reused + words(k);
        uint4* const ids = priorities + words(direct ? max_pages : ceil_div(max_pages, TILE));
        uint4* const end = ids + (direct ? words(max_pages) : words(k) + words(TILE * k));
        select.chosen = reinterpret_cast<int*>(reused);
        select.priorities = reinterpret_cast<u32*>(priorities);
        table = select.tiles = reinterpret_cast<int*>(ids);
        select.candidates = reinterpret_cast<u32*>(ids + words(k));
        sums = reused;
        merge = reused +
                max(static_cast<int>(end - reused), num_warps() * OutputFragments<T, D, HEAD_TILES>(group).count());
    }
};

// Scores this CTA's share of the pages. `priorities` is null if every CTA has room for those of all pages; else they
// go there, and to the CTAs the best of each tile. The first store to another CTA waits until all of them run.
template <typename Scorer, int HEAD_TILES, typename Shared>
__device__ void score_own_pages(const StepParams& p, const Pages& pages, const Shared& room, u32* priorities,
                                const u16* query, const Forced& forced) {
    const int size = cluster_size(), count = pages.count(), stride = size * num_warps();
    int tile = cluster_rank() * num_warps() + warp_id();
    TileIds ids(pages.block_table, count, p.max_pages, tile * TILE, stride * TILE);
    Scorer scorer(p.digests, pages.num_kv_heads, pages.kv_head, pages.page_shift);
    scorer.stage(room.score_query, query, p.group, warp_id(), num_warps(), [&] {
        ids.aim(scorer);
        if (tile * TILE < count) scorer.load_first();
    });
    __syncthreads();  // the query is staged
    scorer.use(room.score_query);
    bool waited = false;
#pragma unroll 1
    for (; tile * TILE < count; tile += stride) {
        const int slot = tile * TILE + lane_id() / 4;
        float by_head[HEAD_TILES][4];
        scorer.score(by_head, [&] { ids.aim(scorer); });
        const float2 pooled = pool_heads<Scorer>(by_head, p.group, GroupPooling(p.pooling));
        const int mine =
            slot + lane_id() % 2 * 8;  // even lanes hold the page's score, odd ones that of the page 8 later
        u32 priority = forced.has(mine) ? FORCED : priority_of(lane_id() % 2 ? pooled.y : pooled.x);
        if (!waited) cluster_wait();
        waited = true;
        if (priorities ==
            nullptr) {  // four lanes share the two pages: two lanes to a page, each serves half of the CTAs
#pragma unroll 1
            for (int to = lane_id() % 4 / 2; to < size && mine < count; to += 2)
                store_remote(remote_address(room.select.priorities + mine, to), priority);
            continue;
        }
        if (mine >= count) priority = NO_PAGE;
        if (lane_id() % 4 < 2 && mine < count) priorities[mine] = priority;
        priority = __reduce_max_sync(ALL_LANES, priority);
        if (lane_id() < size) store_remote(remote_address(room.select.priorities + tile, lane_id()), priority);
    }
    if (!waited) cluster_wait();
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
    const Pages pages = {p.block_table + i64(row) * p.max_pages, p.seq_lens[row], p.page_shift, num_kv_heads, head};
    auto* const pool = static_cast<typename Format::Element*>(p.kv_pool);
    const bool direct = p.priorities == nullptr;
    const StepShared<T, D, HEAD_TILES, Scorer::STAGED> room(base, p.max_pages, p.k, direct, p.group);
    const int count = min(pages.count(), p.max_pages), limit = min(p.limits ? p.limits[row] : p.k, p.k);
    const bool choose = count > limit;
    const int warps = cluster_size() * num_warps(), first = cluster_rank() * num_warps() + warp_id();
    const u16* const my_query = p.query + i64(item) * p.group * D;
    u32* const my_priorities = direct ? nullptr : p.priorities + i64(item) * p.max_pages;

    if (choose) {
        const Forced forced(pages.length, p.page_shift, p.sink_tokens, p.recent_tokens);
        score_own_pages<Scorer, HEAD_TILES>(p, pages, room, my_priorities, my_query, forced);
        cluster_arrive();
    }
    for (int i = threadIdx.x; i < QUERY_WORDS<D, HEAD_TILES>; i += blockDim.x)
        room.query[i] = query_word<D, HEAD_TILES>(my_query, p.group, i);
#pragma unroll 1
    for (int i = threadIdx.x; direct && choose && i < count; i += blockDim.x)
        copy_async(room.table + i, pages.block_table + i);
    const int newest = pages.length - 1, offset = newest & ((1 << p.page_shift) - 1);
    const int newest_unit = ((max(min(count, limit), 1) - 1) << pages.unit_shift()) + offset / UNIT;
    const auto newest_page = [&] {
        const i64 page = pages.block_table[newest >> p.page_shift];
        return StoredPage<T, D, Format>(pool, page, head, num_kv_heads, p.page_shift);
    };
    // Which of the cluster's warps appends, counted from this CTA's first.
    const int appending = p.key && newest >= 0 ? newest_unit % warps - (first - warp_id()) : -1;
    if (appending == warp_id())
        store_token(newest_page(), offset, p.key + row * p.key_batch + head * p.key_head,
                    p.value + row * p.value_batch + head * p.value_head);
    __syncwarp();
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
