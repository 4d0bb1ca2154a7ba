// select_pages: the k pages to read of every sequence and kv head, one CTA for each. Forced pages first, then the
// best scores; of equal scores the earlier page.
#include "common/select.cuh"

__global__ void __launch_bounds__(512)
    select_pages(const float* scores,  // [b, hkv, max_pages]
                 const int* seq_lens,  // [b]
                 const int* limits,    // [b] fewer than k for some; null: k
                 int* slots,           // [b, hkv, k] ascending, then -1
                 u32* priorities,      // [b, hkv, max_pages] scratch
                 int page_shift, int max_pages, int k, int sink_tokens, int recent_tokens,
                 int whole_tokens,  // sequences of up to so many have no least score
                 float min_score) {
    extern __shared__ __align__(16)
        u32 base[];  // tiles' priorities [ceil(max_pages / 16)], candidates [16 k], tiles [k], chosen [k]
    __shared__ SelectScratch scratch;
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int head = blockIdx.x, num_kv_heads = gridDim.x, row = blockIdx.y;
    const i64 item = i64(row) * num_kv_heads + head;
    const int length = seq_lens[row], count = min((length + (1 << page_shift) - 1) >> page_shift, max_pages);
    const Forced forced(length, page_shift, sink_tokens, recent_tokens);
    SelectBuffers buffers;
    buffers.priorities = base;  // each part at a multiple of 16 bytes
    buffers.candidates = base + ceil_div(max_pages, TILE * 4) * 4;
    buffers.tiles = reinterpret_cast<int*>(buffers.candidates + k * TILE);
    buffers.chosen = buffers.tiles + k;
    check_shared_end(buffers.chosen + k);
    const int limit = limits ? limits[row] : k;
    const u32 least = length > whole_tokens ? priority_of(min_score) : NO_PAGE;
#pragma unroll 4
    for (int base = warp_id() * WARP * 4; base < count;
         base += blockDim.x * 4) {  // four pages to a lane, a tile to four
        const int first = base + lane_id() * 4;
        u32 best = NO_PAGE;
#pragma unroll
        for (int slot = first; slot < first + 4; ++slot) {
            if (slot >= count) continue;
            u32 priority = priority_of(scores[item * max_pages + slot]);
            priority = forced.has(slot) ? FORCED : priority < least ? NO_PAGE : priority;
            priorities[item * max_pages + slot] = priority;
            best = max(best, priority);
        }
        best = max(best, __shfl_xor_sync(ALL_LANES, best, 1));
        best = max(best, __shfl_xor_sync(ALL_LANES, best, 2));
        if (lane_id() % 4 == 0 && first < count) buffers.priorities[first / TILE] = best;
    }
    __syncthreads();
    const int found = choose_pages(buffers, priorities + item * max_pages, count, k, limit, scratch);
    for (int i = threadIdx.x; i < k; i += blockDim.x) slots[item * k + i] = i < found ? buffers.chosen[i] : -1;
}
