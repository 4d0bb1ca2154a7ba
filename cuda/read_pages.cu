// read_pages: whole pages into keys and values as they are, for what reads them densely. A warp takes one page of one
// kv head.
#include "common/append.cuh"

template <typename T, int D, typename Format>
__global__ void __launch_bounds__(256)
    read_pages(const void* pages,  // [count, 2, hkv, page_size, record], those of a sequence one after the other
               u16* keys,          // [count / of_row, hkv, of_row, page_size, d]
               u16* values,        // the same
               int count, int of_row, int num_kv_heads, int page_shift) {
    constexpr int LANES = D / 8, TOKENS = WARP / LANES;  // TOKENS at once
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int item = blockIdx.x * num_warps() + warp_id();
    const int head = item % num_kv_heads, page = item / num_kv_heads;
    const int first = lane_id() / LANES, channel = lane_id() % LANES * 8;
    if (page >= count || first >= TOKENS) return;
    using Element = typename Format::Element;
    const StoredPage<T, D, Format> stored(const_cast<Element*>(static_cast<const Element*>(pages)), page, head,
                                          num_kv_heads, page_shift);
    const i64 start = ((i64(page / of_row) * num_kv_heads + head) * of_row + page % of_row) << page_shift;
#pragma unroll 2
    for (int token = first; token < 1 << page_shift; token += TOKENS) {
        const i64 place = (start + token) * D + channel;
        store16(keys + place, stored.key8(token, channel));
        store16(values + place, stored.value8(token, channel));
    }
}
