// attend_pages: attention of one query per sequence over listed pages, or over all of them (dense decode).
//
// The CTAs of a cluster share a (sequence, kv head) and merge through one another's shared memory, in the same launch.
// Where clusters of up to sixteen CTAs would leave most of the GPU idle (few kv heads, a long context), a grid without
// clusters leaves its parts in memory and `merge_attention` puts them together.
#include "common/merge.cuh"

template <typename T, int D, int HEAD_TILES>
__global__ void __launch_bounds__(D* HEAD_TILES <= 128 ? 512 : 256)
attend_pages(const u16* query,                     // [b, hq, d]
             const u16* kv_pool,                   // [num_pages, 2, hkv, page_size, d]
             const int* block_table,               // [b, max_pages]
             const int* seq_lens,                  // [b]
             const int* slots,                     // [b, hkv, k], -1: none; null: all pages
             const void* sinks,                    // [hq] or null, float32 or as the query
             u16* out,                             // [b, hq, d]
             float* lse,                           // [b, hq]
             Partial<D, HEAD_TILES>* partials,     // [b, hkv, gridDim.x]; null: the CTAs of a row are one cluster
             int group, int page_size, int max_pages, int k, float scaling, float softcap,
              int wide_sinks) {
    extern __shared__ uint4 room[];
    __shared__ Partial<D, HEAD_TILES> total;
    __shared__ int used;
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int head = blockIdx.y, num_kv_heads = gridDim.y, row = blockIdx.z, item = row * num_kv_heads + head;
    const Pages pages = {kv_pool, block_table + i64(row) * max_pages, seq_lens[row], num_kv_heads, page_size, head};
    const int* const mine = slots ? slots + i64(item) * k : nullptr;
    stage_query<D, HEAD_TILES>(room, query + i64(item) * group * D, group);
    if (threadIdx.x == 0) used = mine ? 0 : min(pages.count(), max_pages);
    __syncthreads();
    for (int i = threadIdx.x; mine && i < k; i += blockDim.x)
        if (mine[i] >= 0) atomicMax(&used, i + 1);
    __syncthreads();

    Attention<T, D, HEAD_TILES> attention;
    const UnitMap map(pages);
    attention.attend(kv_pool, map.values_after(), room, blockIdx.x * num_warps() + warp_id(), gridDim.x * num_warps(),
                     used * map.units, Logits{scaling, softcap}, [&](int i) {
                         return map.locate(mine ? mine[i / map.units] : i / map.units, i % map.units);
                     });
    __syncthreads();  // the query's room is free
    merge_warps(attention, *reinterpret_cast<WarpMerge<D, HEAD_TILES>*>(room), total);
    if (partials) {
        Partial<D, HEAD_TILES>& part = partials[i64(item) * gridDim.x + blockIdx.x];
        for (int i = threadIdx.x; i < Partial<D, HEAD_TILES>::WORDS; i += blockDim.x) part.out[i] = total.out[i];
        for (int i = threadIdx.x; i < Partial<D, HEAD_TILES>::HEADS; i += blockDim.x) {
            part.peak[i] = total.peak[i];
            part.mass[i] = total.mass[i];
        }
        return;
    }
    merge_cluster<T, D, HEAD_TILES>(total, result_of<D>(out, lse, Sinks{sinks, wide_sinks}, item, head, group));
}

// One CTA per (sequence, kv head).
template <typename T, int D, int HEAD_TILES>
__global__ void __launch_bounds__(256)
merge_attention(const Partial<D, HEAD_TILES>* partials,  // [b, hkv, count]
                const void* sinks,                       // [hq] or null, float32 or as the query
                u16* out,                                // [b, hq, d]
                float* lse,                              // [b, hq]
                int count, int group, int wide_sinks) {
    constexpr int HEADS = Partial<D, HEAD_TILES>::HEADS;
    __shared__ Parts<HEADS, MAX_SPLITS> parts;
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int head = blockIdx.x, item = blockIdx.y * gridDim.x + head;
    const Partial<D, HEAD_TILES>* const mine = partials + i64(item) * count;
    const Result result = result_of<D>(out, lse, Sinks{sinks, wide_sinks}, item, head, group);
    weigh_parts<T>(parts, count, result, true, [&](int part, int head) { return mine[part].peak[head]; },
                [&](int part, int head) { return mine[part].mass[head]; });
    for (int word = threadIdx.x; word < Partial<D, HEAD_TILES>::WORDS; word += blockDim.x) {
        const int first = Partial<D, HEAD_TILES>::head_of(word);
        float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
        for (int part = 0; part < count; ++part)
            add_scaled(sum, mine[part].out[word], parts.peak[part][first], parts.peak[part][first + 1]);
        write_word<T, D, HEAD_TILES>(result, word, sum);
    }
}
