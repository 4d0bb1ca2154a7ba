// sparse_decode: append, score, select and attend in one launch, for the policy top_k over min/max digests.
//
// A cluster of CTAs takes one (sequence, kv head). Its warps score the pages and tell every CTA the best score of each
// tile of sixteen; after one cluster barrier every CTA makes the same selection for itself, attends to its share of
// it, and the cluster merges. The new token's page is read whatever its score, so the token is written late, by the
// warp that will attend to it: nobody waits for it.
#include "common/append.cuh"
#include "common/merge.cuh"
#include "common/select.cuh"

// Shared memory of a CTA: what lives from the start, then what the selection needs, which the merge takes over.
template <int D, int HEAD_TILES>
struct Room {
    uint4 *query, *signed_query;
    u32* tile_keys;     // [ceil(max_pages / 16)]
    int* chosen;        // [k]
    int* tiles;         // [k]
    u32* candidates;    // [16 k]
    WarpMerge<D, HEAD_TILES>* merge;

    __device__ Room(uint4* base, int max_pages, int k) {
        query = base;
        signed_query = query + QUERY_WORDS<D, HEAD_TILES>;
        tile_keys = reinterpret_cast<u32*>(signed_query + SIGNED_QUERY_WORDS<D, HEAD_TILES>);
        chosen = reinterpret_cast<int*>(tile_keys + ceil_div(max_pages, TILE * 4) * 4);
        tiles = chosen + ceil_div(k, 4) * 4;
        candidates = reinterpret_cast<u32*>(tiles + ceil_div(k, 4) * 4);
        merge = reinterpret_cast<WarpMerge<D, HEAD_TILES>*>(tiles);
    }
};

// Scores this CTA's share of the pages: keys to memory, the best of each tile to every CTA of the cluster. The first
// store to another CTA waits until all of them run.
template <typename T, int D, int HEAD_TILES>
__device__ void score_share(const Pages& pages, const u16* digests, const Room<D, HEAD_TILES>& room, u32* keys,
                            int group, GroupPooling pooling, const Forced& forced) {
    const int size = cluster_size(), count = pages.count(), stride = size * num_warps();
    const u32 remote = remote_address(room.tile_keys, min(lane_id(), size - 1));
    const auto digest_of = [&](int slot) {
        return digests + (i64(pages.block_table[min(slot, count - 1)]) * pages.num_kv_heads + pages.kv_head) * 2 * D;
    };
    bool waited = false;
    int tile = cluster_rank() * num_warps() + warp_id();
    Scorer<T, D, HEAD_TILES> scorer;
    if (tile * TILE < count) {
        scorer.aim(digest_of(tile * TILE + lane_id() / 4), digest_of(tile * TILE + lane_id() / 4 + 8));
        scorer.load_first();
    }
    for (; tile * TILE < count; tile += stride) {
        const int slot = tile * TILE + lane_id() / 4;
        float by_head[HEAD_TILES][4];
        scorer.score(by_head, room.signed_query, [&](auto& scorer) {
            scorer.aim(digest_of(slot + stride * TILE), digest_of(slot + stride * TILE + 8));
        });
        const float2 pooled = pool_heads<HEAD_TILES>(by_head, group, pooling);
        const int mine = slot + lane_id() % 2 * 8;  // even lanes hold the page's, odd ones that of the page 8 later
        u32 key = forced.has(mine) ? FORCED : sort_key(lane_id() % 2 ? pooled.y : pooled.x);
        if (mine >= count) key = NO_PAGE;
        if (lane_id() % 4 < 2 && mine < count) keys[mine] = key;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) key = max(key, __shfl_xor_sync(ALL_LANES, key, step));
        if (!waited) cluster_wait();
        waited = true;
        if (lane_id() < size) store_remote(remote + tile * 4, key);
    }
    if (!waited) cluster_wait();
}

template <typename T, int D, int HEAD_TILES>
__global__ void __launch_bounds__(D* HEAD_TILES <= 128 ? 512 : 256)
sparse_decode(const u16* query,        // [b, hq, d]
              const u16* key,          // [b, hkv, d] of the new token, strides in elements; null: it is in its page
              const u16* value,        // [b, hkv, d]
              const int* block_table,  // [b, max_pages]
              const int* seq_lens,     // [b] the new token counted
              u16* kv_pool,            // [num_pages, 2, hkv, page_size, d]
              u16* digests,            // [num_pages, hkv, 2, d]
              const int* limits,       // [b] fewer than k pages for some; null: k
              const void* sinks,       // [hq] or null, float32 or as the query
              u32* keys,               // [b, hkv, max_pages] scratch
              int* slots,              // [b, hkv, k] what was read
              u16* out,                // [b, hq, d]
              float* lse,              // [b, hq]
              i64 key_batch, i64 key_head, i64 value_batch, i64 value_head, int group, int page_size, int max_pages,
              int k, int sink_tokens, int recent_tokens, int pooling, float scaling, float softcap,
              int wide_sinks) {
    extern __shared__ uint4 base[];
    __shared__ Selection selection;
    __shared__ Partial<D, HEAD_TILES> total;
    cluster_arrive();  // "this CTA runs": score_share waits for it
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int head = blockIdx.y, num_kv_heads = gridDim.y, row = blockIdx.z, item = row * num_kv_heads + head;
    const Pages pages = {kv_pool, block_table + i64(row) * max_pages, seq_lens[row], num_kv_heads, page_size, head};
    const Room<D, HEAD_TILES> room(base, max_pages, k);
    const int count = min(pages.count(), max_pages), most = min(limits ? limits[row] : k, k);
    const UnitMap map(pages);
    const int warps = cluster_size() * num_warps();
    const bool choose = count > most;
    u32* const my_keys = keys + i64(item) * max_pages;
    stage_query<D, HEAD_TILES>(room.query, query + i64(item) * group * D, group);
    if (choose) stage_signed_query<D, HEAD_TILES>(room.signed_query, query + i64(item) * group * D, group);
    __syncthreads();

    const Forced forced(pages.length, page_size, sink_tokens, recent_tokens);
    if (choose) score_share<T, D, HEAD_TILES>(pages, digests, room, my_keys, group, GroupPooling(pooling), forced);
    else cluster_wait();
    cluster_arrive();
    const int newest = pages.length - 1, last_slot = newest / page_size;
    const int newest_unit = (min(count, most) - 1) * map.units + newest % page_size / UNIT;
    if (key && pages.length > 0 && newest_unit % warps == cluster_rank() * num_warps() + warp_id()) {
        const i64 page = pages.block_table[last_slot];
        NewTokens fresh = {key + row * key_batch + head * key_head, value + row * value_batch + head * value_head,
                           nullptr, 0, 0};
        append_to_page<T, D>(fresh, kv_pool + (page * 2 * num_kv_heads + head) * page_size * D,
                             kv_pool + ((page * 2 + 1) * num_kv_heads + head) * page_size * D,
                             digests + (page * num_kv_heads + head) * 2 * D, last_slot * page_size, newest,
                             pages.length, page_size);
    }
    __syncwarp();
    cluster_wait();

    int num_chosen = count;
    if (choose)
        num_chosen = selection.choose_pages(room.tile_keys, [&](int slot) { return my_keys[slot]; }, count, k, most,
                                            room.tiles, room.candidates, room.chosen);
    if (cluster_rank() == 0)
        for (int i = threadIdx.x; i < k; i += blockDim.x)
            slots[i64(item) * k + i] = i >= num_chosen ? -1 : choose ? room.chosen[i] : i;

    Attention<T, D, HEAD_TILES> attention;
    attention.attend(kv_pool, map.values_after(), room.query, cluster_rank() * num_warps() + warp_id(), warps,
                     num_chosen * map.units, Logits{scaling, softcap}, [&](int i) {
                         return map.locate(choose ? room.chosen[i / map.units] : i / map.units, i % map.units);
                     });
    __syncthreads();
    merge_warps(attention, *room.merge, total);
    merge_cluster<T, D, HEAD_TILES>(total, result_of<D>(out, lse, Sinks{sinks, wide_sinks}, item, head, group));
}
