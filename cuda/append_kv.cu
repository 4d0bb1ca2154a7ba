// append_kv: writes new tokens into their pages and brings the digests of the pages they touch up to date. A warp
// takes one page of one kv head, for a prompt of any length and for one new token alike; of latents, a CTA.
#include "common/append.cuh"

template <typename T, int D, typename Kind, typename Format>
__global__ void __launch_bounds__(256)
    append_kv(const u16* key,          // [b, hkv, t, d], strides in elements
              const u16* value,        // [b, hkv, t, d], strides in elements
              const int* columns,      // [b, t] the tokens that are no padding, in order; null: all
              const int* num_new,      // [b] how many those are; null: t
              const int* block_table,  // [b, max_pages]
              const int* seq_lens,     // [b] after the append
              void* kv_pool,           // [num_pages, 2, hkv, page_size, record]
              Digests digests, i64 key_batch, i64 key_head, i64 key_token, i64 value_batch, i64 value_head,
              i64 value_token, int t, int num_kv_heads, int page_shift, int max_pages, int most_touched) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    constexpr bool TOGETHER = KeyLanes<D>::ROUNDS > 1;
    const int row = blockIdx.y, item = TOGETHER ? blockIdx.x : blockIdx.x * num_warps() + warp_id();
    const int head = item % num_kv_heads, touched = item / num_kv_heads;
    const int length = seq_lens[row], start = length - (num_new ? num_new[row] : t);
    const int slot = (start >> page_shift) + touched, first = slot << page_shift;
    if (touched >= most_touched || first >= length) return;
    const StoredPage<T, D, Format> page(static_cast<typename Format::Element*>(kv_pool),
                                        block_table[i64(row) * max_pages + slot], head, num_kv_heads, page_shift);
    const NewTokens fresh = {key + row * key_batch + head * key_head, value + row * value_batch + head * value_head,
                             columns ? columns + i64(row) * t : nullptr, key_token, value_token};
    append_to_page<Kind>(page, digests, fresh, first, start, length, 1 << page_shift, TOGETHER ? warp_id() : 0,
                         TOGETHER ? num_warps() : 1);
}
