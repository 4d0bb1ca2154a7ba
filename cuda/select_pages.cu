// select_pages: the k pages to read of every sequence and kv head, one CTA for each. Forced pages first, then the best
// scores; of equal scores the earlier page.
#include "common/select.cuh"

__global__ void __launch_bounds__(512)
select_pages(const float* scores,  // [b, hkv, max_pages]
             const int* seq_lens,  // [b]
             const int* limits,    // [b] fewer than k for some; null: k
             int* slots,           // [b, hkv, k] ascending, then -1
             int page_size, int max_pages, int k, int sink_tokens, int recent_tokens) {
    extern __shared__ u32 room[];  // tile keys [ceil(max_pages / 16)], tiles [k], candidates [16 k], chosen [k]
    __shared__ Selection selection;
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int head = blockIdx.x, num_kv_heads = gridDim.x, row = blockIdx.y;
    const int length = seq_lens[row], count = min(ceil_div(length, page_size), max_pages);
    const float* const mine = scores + i64(row * num_kv_heads + head) * max_pages;
    const Forced forced(length, page_size, sink_tokens, recent_tokens);
    const auto key_of = [&](int slot) { return forced.has(slot) ? FORCED : sort_key(mine[slot]); };

    u32* const tile_keys = room;
    int* const tiles = reinterpret_cast<int*>(tile_keys + ceil_div(max_pages, TILE));
    u32* const candidates = reinterpret_cast<u32*>(tiles + k);
    int* const chosen = reinterpret_cast<int*>(candidates + k * TILE);
#pragma unroll 8
    for (int base = warp_id() * WARP; base < count; base += blockDim.x) {  // two tiles to a warp
        const int slot = base + lane_id();
        u32 key = slot < count ? key_of(slot) : NO_PAGE;
#pragma unroll
        for (int step = 1; step < TILE; step *= 2) key = max(key, __shfl_xor_sync(ALL_LANES, key, step));
        if (lane_id() % TILE == 0 && slot < count) tile_keys[slot / TILE] = key;
    }
    __syncthreads();
    const int limit = limits ? limits[row] : k;
    const int num_chosen = selection.choose_pages(tile_keys, key_of, count, k, limit, tiles, candidates, chosen);
    for (int i = threadIdx.x; i < k; i += blockDim.x)
        slots[i64(row * num_kv_heads + head) * k + i] = i < num_chosen ? chosen[i] : -1;
}
