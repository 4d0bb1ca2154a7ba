// sparse_decode, after score_keys (score_pages.cu): select, append and attend in one launch.
//
// A cluster of CTAs takes one (sequence, kv head). Every CTA makes the same selection for itself, attends to its share of
// it, and the cluster merges. The new token's page is read whatever its score, so the token need not be there when the
// pages are scored: the warp that will attend to it writes it.
//
// Everything up to wait_for_previous_kernel runs while score_keys still does: score_keys starts this kernel only when
// all before it is done, and what is written here early is a page's digest whose score is not looked at.
#include "common/append.cuh"
#include "common/merge.cuh"
#include "common/select.cuh"

// What a CTA works with in shared memory. Other CTAs write into the room of the merge.
template <int D, int HEAD_TILES>
struct Room {
    uint4* query;
    SelectRoom select;
    int* table;  // [max_pages] the pages' ids, where there is room for all pages' keys
    void* merge;

    // `direct`: there is.
    __device__ Room(uint4* base, int max_pages, int k, bool direct) {
        const auto padded = [](int n) { return (n + 3) & ~3; };
        query = base;
        select.chosen = reinterpret_cast<int*>(query + QUERY_WORDS<D, HEAD_TILES>);
        select.keys = reinterpret_cast<u32*>(select.chosen + padded(k));
        table = select.tiles = reinterpret_cast<int*>(select.keys + padded(direct ? max_pages : ceil_div(max_pages, TILE)));
        select.candidates = reinterpret_cast<u32*>(select.tiles + padded(k));
        merge = direct ? reinterpret_cast<u32*>(table + padded(max_pages)) : select.candidates + TILE * k;
    }
};

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
              const u32* keys,         // [b, hkv, max_pages] by score_keys
              const u32* tile_keys,    // [b, hkv, ceil(max_pages / 16)] by score_keys; null: `keys` fit shared memory
              int* slots,              // [b, hkv, k] what was read
              u16* out,                // [b, hq, d]
              float* lse,              // [b, hq]
              i64 key_batch, i64 key_head, i64 value_batch, i64 value_head, int group, int page_shift, int max_pages,
              int k, float scaling, float softcap, int wide_sinks) {
    extern __shared__ uint4 base[];
    __shared__ SelectScratch scratch;
    cluster_arrive();  // "this CTA runs": the merge writes into others
    const int head = blockIdx.y, num_kv_heads = gridDim.y, row = blockIdx.z, item = row * num_kv_heads + head;
    const Pages pages = {block_table + i64(row) * max_pages, seq_lens[row], page_shift, num_kv_heads, head};
    const bool direct = tile_keys == nullptr;
    const Room<D, HEAD_TILES> room(base, max_pages, k, direct);
    const int count = min(pages.count(), max_pages), most = min(limits ? limits[row] : k, k);
    const bool choose = count > most;
    const int warps = cluster_size() * num_warps(), first = cluster_rank() * num_warps() + warp_id();

#pragma unroll 1
    for (int i = threadIdx.x; direct && choose && i < count; i += blockDim.x)
        copy_async(room.table + i, pages.block_table + i);
    for (int i = threadIdx.x; i < QUERY_WORDS<D, HEAD_TILES>; i += blockDim.x)
        room.query[i] = query_word<D, HEAD_TILES>(query + i64(item) * group * D, group, i);
    const int newest = pages.length - 1, offset = newest & ((1 << page_shift) - 1);
    const int newest_unit = ((min(count, most) - 1) << pages.unit_shift()) + offset / UNIT;
    if (key && newest >= 0 && newest_unit % warps == first) {
        const Page page(kv_pool, digests, pages.block_table[newest >> page_shift], head, num_kv_heads, page_shift, D);
        append_token<T, D>(page, key + row * key_batch + head * key_head, value + row * value_batch + head * value_head,
                           offset);
    }
    wait_for_previous_kernel();
    let_next_kernel_start();

    int found = count;
    if (choose) {
        const u32* const my_keys = keys + i64(item) * max_pages;
        const u32* const from = direct ? my_keys : tile_keys + i64(item) * ceil_div(max_pages, TILE);
#pragma unroll 8
        for (int i = threadIdx.x; i < (direct ? count : ceil_div(count, TILE)); i += blockDim.x)
            room.select.keys[i] = from[i];
        __syncthreads();
        found = choose_pages(room.select, direct ? nullptr : my_keys, count, k, most, scratch);
    }
    if (cluster_rank() == 0)
#pragma unroll 1
        for (int i = threadIdx.x; i < k; i += blockDim.x)
            slots[i64(item) * k + i] = i >= found ? -1 : choose ? room.select.chosen[i] : i;
    wait_for_copies();
    __syncthreads();

    const int* const table = direct && choose ? room.table : pages.block_table;
    Attention<T, D, HEAD_TILES> attention;
    attention.attend(kv_pool, pages.values_after(), room.query, first, warps, found << pages.unit_shift(),
                     Logits(scaling, softcap),
                     [&](int i) { return pages.locate(choose ? room.select.chosen : nullptr, table, i); });
    const Result<D, HEAD_TILES> result(out, lse, Sinks{sinks, wide_sinks}, item, head, group);
    cluster_wait();
    merge_cluster(attention, room.merge, result);
}
