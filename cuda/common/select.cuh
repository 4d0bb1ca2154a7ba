// The k best of many, exactly: a radix selection by one CTA, keys in shared memory. Of equal keys the earlier wins, so
// a selection is the same on every run, and the same as the reference's.
#pragma once
#include "common/score.cuh"

// A score's bits as an unsigned integer that sorts like the score. NaN counts as -inf, -0 as 0.
__device__ inline u32 sort_key(float score) {
    const u32 bits = __float_as_uint(score + 0.f);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x007FFFFFu;  // NaN: the key of -inf
    return bits ^ (bits & 0x80000000u ? 0xFFFFFFFFu : 0x80000000u);
}

constexpr u32 FORCED = 0xFFFFFFFFu;  // above the key of +inf
constexpr u32 NO_PAGE = 0u;          // below the key of -inf

// Which pages are read whatever their score: those of the first `sink_tokens` and of the last `recent_tokens`.
struct Forced {
    int sink_end, recent_begin;  // slots

    __device__ Forced(int length, int page_size, int sink_tokens, int recent_tokens)
        : sink_end(ceil_div(sink_tokens, page_size)), recent_begin(max(length - max(recent_tokens, 1), 0) / page_size) {}
    __device__ bool has(int slot) const { return slot < sink_end || slot >= recent_begin; }
};

constexpr int RADIX_BITS = 11, BINS = 1 << RADIX_BITS;

struct SelectScratch {
    u32 histogram[BINS];
    u32 warp_sums[32];
    u32 bin, above, inside;  // the bin that holds the k-th largest; keys above it, and in it
};

// Sums of the values of all threads before this one; `warp_sums` of the scratch is free again after the next barrier.
__device__ inline u32 sum_before(u32 value, SelectScratch& scratch) {
    u32 inclusive = value;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const u32 other = __shfl_up_sync(ALL_LANES, inclusive, step);
        if (lane_id() >= step) inclusive += other;
    }
    if (lane_id() == WARP - 1) scratch.warp_sums[warp_id()] = inclusive;
    __syncthreads();
    u32 before = lane_id() < warp_id() ? scratch.warp_sums[lane_id()] : 0;
    before = __reduce_add_sync(ALL_LANES, before);
    return before + inclusive - value;
}

// Finds the bin in which, counted from the top, the `need`-th key lies. Called by all threads, the histogram complete.
__device__ inline void find_bin(u32 need, SelectScratch& scratch) {
    const int bins = BINS / blockDim.x, top = BINS - 1 - threadIdx.x * bins;  // this thread's bins, downwards from top
    u32 mine = 0;
    for (int i = 0; i < bins; ++i) mine += scratch.histogram[top - i];
    u32 above = sum_before(mine, scratch);
    if (above < need && need <= above + mine) {
        int bin = top;
        while (above + scratch.histogram[bin] < need) above += scratch.histogram[bin--];
        scratch.bin = bin;
        scratch.above = above;
        scratch.inside = scratch.histogram[bin];
    }
    __syncthreads();
}

// The prefix that the k-th largest key has, as far as needed: keys above it are chosen, and of the keys that match it
// under the mask the first `need`.
struct Threshold {
    u32 prefix, mask, need;
};

__device__ inline Threshold find_threshold(const u32* keys, int n, int k, SelectScratch& scratch) {
    Threshold found = {0, 0, u32(k)};
    for (int shift = 32 - RADIX_BITS; found.mask != ALL_LANES; shift = max(shift - RADIX_BITS, 0)) {
        for (int i = threadIdx.x; i < BINS; i += blockDim.x) scratch.histogram[i] = 0;
        __syncthreads();
        const u32 digit = ~found.mask >> shift & (BINS - 1);  // the last digit has fewer bits
        for (int i = threadIdx.x; i < n; i += blockDim.x)
            if ((keys[i] & found.mask) == found.prefix) atomicAdd(&scratch.histogram[keys[i] >> shift & digit], 1u);
        __syncthreads();
        find_bin(found.need, scratch);
        found.prefix |= scratch.bin << shift;
        found.mask |= digit << shift;
        found.need -= scratch.above;
        if (scratch.inside == found.need) break;  // all that match are chosen: no need to tell them apart
    }
    return found;
}

// The indices of the k largest of keys[n], ascending, to chosen[k]; all if n <= k. Returns how many. A whole CTA, of a
// power of two of threads; n <= 32 per thread.
__device__ inline int choose_largest(const u32* keys, int n, int k, int* chosen, SelectScratch& scratch) {
    if (k <= 0) return 0;
    if (n <= k) {
        for (int i = threadIdx.x; i < n; i += blockDim.x) chosen[i] = i;
        __syncthreads();
        return n;
    }
    const Threshold threshold = find_threshold(keys, n, k, scratch);
    const int share = ceil_div(n, blockDim.x), first = threadIdx.x * share;  // consecutive keys of this thread
    u32 better = 0, equal = 0;                                               // one bit per key
    for (int i = 0; i < share; ++i) {
        const int j = (i + threadIdx.x) % share;  // another order in each thread: fewer bank conflicts
        const u32 key = first + j < n ? keys[first + j] & threshold.mask : 0;
        if (first + j < n && key > threshold.prefix) better |= 1u << j;
        if (first + j < n && key == threshold.prefix) equal |= 1u << j;
    }
    const u32 before = sum_before(__popc(better) | __popc(equal) << 16, scratch);
    u32 equal_before = before >> 16;
    u32 position = (before & 0xFFFF) + min(equal_before, threshold.need);
    for (u32 left = better | equal; left; left &= left - 1) {
        const int j = __ffs(left) - 1;
        if (equal >> j & 1 && equal_before++ >= threshold.need) continue;
        chosen[position++] = first + j;
    }
    __syncthreads();
    return k;
}

// Selection in two stages. The k best pages lie in the k tiles of sixteen whose best pages are best, so only those
// tiles' keys are looked at, however many pages there are.
struct Selection {
    SelectScratch scratch;

    // `tile_keys` [ceil(count / 16)] holds each tile's largest key; `keys` the pages' (a function of the slot). Needs
    // room for `tiles` [k], `candidates` [k * 16] and `chosen` [k] in shared memory; returns how many were chosen.
    template <typename Keys>
    __device__ int choose_pages(const u32* tile_keys, Keys keys, int count, int k, int limit, int* tiles,
                                u32* candidates, int* chosen) {
        const int num_tiles = choose_largest(tile_keys, ceil_div(count, TILE), k, tiles, scratch);
        for (int i = threadIdx.x; i < num_tiles * TILE; i += blockDim.x) {
            const int slot = tiles[i / TILE] * TILE + i % TILE;
            candidates[i] = slot < count ? keys(slot) : NO_PAGE;
        }
        __syncthreads();
        const int num_chosen = choose_largest(candidates, num_tiles * TILE, min(limit, min(k, count)), chosen, scratch);
        for (int i = threadIdx.x; i < num_chosen; i += blockDim.x)
            chosen[i] = tiles[chosen[i] / TILE] * TILE + chosen[i] % TILE;
        __syncthreads();
        return num_chosen;
    }
};
