// Which pages a step reads: the k best, by the priorities of all of them. Where these do not fit shared memory, they
// are selected in two stages: the best pages lie in the k tiles of sixteen whose best pages are best, so a CTA
// selects tiles by the largest priority of each, and then among the pages of those tiles alone, however many pages
// there are:
//
//   priorities (largest of each tile) ── select_largest ─> tiles
//   page_priorities of these tiles ──────────────────────> candidates ── select_largest ─> chosen ─> slots of pages
#pragma once
#include "common/digest.cuh"
#include "common/radix_select.cuh"

// Which pages are read whatever their score: those of the first `sink_tokens` and of the last `recent_tokens`.
struct Forced {
    int sink_end, recent_begin;  // slots

    __device__ Forced(int length, int page_shift, int sink_tokens, int recent_tokens)
        : sink_end((sink_tokens + (1 << page_shift) - 1) >> page_shift),
          recent_begin(max(length - max(recent_tokens, 1), 0) >> page_shift) {}
    __device__ bool has(int slot) const { return slot < sink_end || slot >= recent_begin; }
};

// Where a selection happens, in shared memory.
struct SelectBuffers {
    u32* priorities;  // of the pages; in two stages, the largest of each tile
    int* tiles;       // [k] in two stages, the best tiles
    u32* candidates;  // [16 k] in two stages, priorities of the best tiles' pages
    int* chosen;      // [k] the result
};

// The `limit` best of `count` pages, slots ascending; returns how many those are. In two stages if `page_priorities`
// (in memory, [count]) is given.
__device__ inline int choose_pages(const SelectBuffers& buffers, const u32* page_priorities, int count, int k,
                                   int limit, SelectScratch& scratch) {
    u32* priorities = buffers.priorities;
    int* chosen = buffers.chosen;
    int n = count, wanted = min(limit, count), found = 0;
    if (page_priorities) {
        chosen = buffers.tiles;
        n = ceil_div(count, TILE);
        wanted = k;
    }
#pragma unroll 1
    while (true) {  // a loop, so that the selection's code is there once
        found = select_largest(priorities, n, wanted, chosen, scratch);
        if (chosen == buffers.chosen) break;
        n = found * TILE;
        wanted = min(limit, count);
#pragma unroll 4
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            const int slot = buffers.tiles[i / TILE] * TILE + i % TILE;
            buffers.candidates[i] = slot < count ? page_priorities[slot] : NO_PAGE;
        }
        __syncthreads();
        priorities = buffers.candidates;
        chosen = buffers.chosen;
    }
    if (page_priorities == nullptr) return found;
#pragma unroll 1
    for (int i = threadIdx.x; i < found; i += blockDim.x)
        chosen[i] = buffers.tiles[chosen[i] / TILE] * TILE + chosen[i] % TILE;
    __syncthreads();
    return found;
}
