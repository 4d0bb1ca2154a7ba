// attend_pages: attention of one query per sequence over listed pages, or over all of them (dense decode).
//
// The CTAs of a cluster share a (sequence, kv head) and merge in the same launch. Where there is much to read, a grid
// without clusters fills the GPU more evenly: each CTA merges its warps, leaves its part in memory, and
// `merge_attention` puts the parts together.
#include "common/merge.cuh"

template <typename T, int D, int HEAD_TILES, typename Format>
__global__ void __launch_bounds__(D* HEAD_TILES <= 128 ? 512 : 256)
    attend_pages(const u16* query,                  // [b, hq, d]
                 const void* kv_pool,               // [num_pages, 2, hkv, page_size, record]
                 const int* block_table,            // [b, max_pages]
                 const int* seq_lens,               // [b]
                 const int* first,                  // [b] the first token that is seen, or null
                 const int* slots,                  // [b, hkv, k], -1: none; null: all pages
                 const void* sinks,                 // [hq] or null, float32 or as the query
                 u16* out,                          // [b, hq, d]
                 float* lse,                        // [b, hq]
                 Partial<D, HEAD_TILES>* partials,  // [b, hkv, gridDim.x]; null: the CTAs of a row are one cluster
                 int group, int page_shift, int max_pages, int k, float scaling, float softcap, int wide_sinks) {
    extern __shared__ uint4 staged[];  // the query, later the warps' sums; then the merge's own room
    __shared__ int used;
    cluster_arrive();  // "this CTA runs": the merge writes into others
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int head = blockIdx.y, num_kv_heads = gridDim.y, row = blockIdx.z, item = row * num_kv_heads + head;
    const int* const own_table = block_table + i64(row) * max_pages;
    Pages pages = {own_table, seq_lens[row], page_shift, num_kv_heads, head, Format::PARTS};
    if (first) pages.first = first[row];
    const int* const mine = slots ? slots + i64(item) * k : nullptr;
    if (threadIdx.x == 0) used = mine ? 0 : min(pages.count(), max_pages);
    Format::template stage<T, D, HEAD_TILES>(query + i64(item) * group * D, group, staged);
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; mine && i < k; i += blockDim.x)
        if (mine[i] >= 0) atomicMax(&used, i + 1);
    __syncthreads();

    const int unseen = mine ? 0 : pages.first >> UNIT_SHIFT;  // units before all that is seen
    Attention<T, D, HEAD_TILES, Format> attention;
    attention.attend(static_cast<const typename Format::Element*>(kv_pool), pages, staged,
                     unseen + blockIdx.x * num_warps() + warp_id(), gridDim.x * num_warps(),
                     used << pages.unit_shift(), Logits(scaling, softcap),
                     [&](int i) { return pages.locate(mine, pages.block_table, i); });
    Partial<D, HEAD_TILES>* const part = partials ? partials + i64(item) * gridDim.x + blockIdx.x : nullptr;
    const Result<D, HEAD_TILES> result(out, lse, Sinks{sinks, wide_sinks}, item, head, group, part);
    cluster_wait();
    const int sums = num_warps() * OutputFragments<T, D, HEAD_TILES>(group).count();
    merge_cluster(attention, staged + max(sums, Format::template query_words<D>(HEAD_TILES)), staged, result, [] {});
}

// Puts the parts of a (sequence, kv head) together; the CTAs of a row share its words.
template <typename T, int D, int HEAD_TILES>
__global__ void __launch_bounds__(256) merge_attention(const Partial<D, HEAD_TILES>* partials,  // [b, hkv, count]
                                                       const void* sinks,  // [hq] or null, float32 or as the query
                                                       u16* out,           // [b, hq, d]
                                                       float* lse,         // [b, hq]
                                                       int count, int group, int wide_sinks) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int head = blockIdx.y, item = blockIdx.z * gridDim.y + head;
    const int all = OutputFragments<T, D, HEAD_TILES>(group).count(), words = ceil_div(all, gridDim.x),
              first = blockIdx.x * words;
    const Partial<D, HEAD_TILES>* const mine = partials + i64(item) * count;
    const Result<D, HEAD_TILES> result(out, lse, Sinks{sinks, wide_sinks}, item, head, group);
    write_merged<T>(
        count, first, min(words, all - first), result,
        [&](int part, int head) {  // their outputs are divided by l already: m is the log-sum-exp, l is 1, or 0
            const float lse = mine[part].lse[head];
            return HeadStats{fmaxf(lse, LOWEST), float(lse > LOWEST)};
        },
        [&](int part, int fragment) { return mine[part].out[fragment]; });
}
