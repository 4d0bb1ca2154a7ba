// The k best of many, exactly, by one CTA, keys in shared memory. A histogram over the range of the keys tells the bin
// in which the k-th largest lies; the few keys in it are ranked one by one, or it becomes the next range. Of equal keys
// the earlier wins, so a selection is the same on every run, and the same as the reference's.
#pragma once
#include "common/score.cuh"

// A score's bits as an unsigned integer that sorts like the score. NaN counts as -inf, -0 as 0.
__device__ inline u32 sort_key(float score) {
    const u32 bits = __float_as_uint(score + 0.f);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x007FFFFFu;  // NaN: the key of -inf
    return bits ^ (bits & 0x80000000u ? 0xFFFFFFFFu : 0x80000000u);
}

constexpr u32 CHOSEN = 0xFFFFFFFFu;  // above all
constexpr u32 FORCED = 0xFFFFFFFEu;  // above the key of +inf
constexpr u32 NO_PAGE = 0u;          // below the key of -inf

// Which pages are read whatever their score: those of the first `sink_tokens` and of the last `recent_tokens`.
struct Forced {
    int sink_end, recent_begin;  // slots

    __device__ Forced(int length, int page_shift, int sink_tokens, int recent_tokens)
        : sink_end((sink_tokens + (1 << page_shift) - 1) >> page_shift),
          recent_begin(max(length - max(recent_tokens, 1), 0) >> page_shift) {}
    __device__ bool has(int slot) const { return slot < sink_end || slot >= recent_begin; }
};

constexpr int BIN_BITS = 11, BINS = 1 << BIN_BITS;

struct alignas(16) SelectScratch {
    u32 histogram[BINS];
    u32 sums[32];                                    // a number of each warp
    u32 largest[32], smallest[32], num_forced[32];  // of each warp's keys
    u32 bin, above, inside;  // the bin that holds the k-th largest; keys above it, and in it
    u32 num_listed;
    int listed[WARP];  // indices of the keys in the last bin
};

__device__ inline u32 sum_of_warps(const u32* of_warp) {
    return __reduce_add_sync(ALL_LANES, lane_id() < num_warps() ? of_warp[lane_id()] : 0);
}

// The sum over lanes up to and including this one.
__device__ inline u32 sum_to_lane(u32 value) {
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const u32 other = __shfl_up_sync(ALL_LANES, value, step);
        if (lane_id() >= step) value += other;
    }
    return value;
}

// Finds the bin in which, counted from the top, the `need`-th key lies. A thread sums its bins, the warps' sums tell in
// which warp the bin lies, and that warp alone looks closer.
__device__ inline void find_bin(u32 need, SelectScratch& scratch) {
    const int bins = BINS / blockDim.x, top = BINS - 1 - threadIdx.x * bins;  // this thread's bins, downwards from top
    u32 mine = 0;
#pragma unroll 4
    for (int i = 0; i < bins; ++i) mine += scratch.histogram[top - i];
    const u32 warp_sum = __reduce_add_sync(ALL_LANES, mine);
    if (lane_id() == 0) scratch.sums[warp_id()] = warp_sum;
    __syncthreads();
    const u32 before = __reduce_add_sync(ALL_LANES, lane_id() < warp_id() ? scratch.sums[lane_id()] : 0);
    if (before < need && need <= before + warp_sum) {
        u32 above = before + sum_to_lane(mine) - mine;
        if (above < need && need <= above + mine) {
            int bin = top;
            while (above + scratch.histogram[bin] < need) above += scratch.histogram[bin--];
            scratch.bin = bin;
            scratch.above = above;
            scratch.inside = scratch.histogram[bin];
        }
    }
    __syncthreads();
}

// Keys from `first` to `last` hold the k-th largest: of them `need` are chosen, `inside` there are; all above are.
struct Range {
    u32 first, last, need, inside;

    __device__ bool has(u32 key) const { return first <= key && key <= last; }
};

// A warp's keys: n keys are dealt to the warps in runs of consecutive ones.
struct Run {
    u32* keys;
    int length, first, end;

    __device__ Run(u32* keys, int n) : keys(keys) {
        const int threads_log2 = 31 - __clz(blockDim.x);  // a power of two: no division
        length = (n + blockDim.x - 1) >> threads_log2 << 5;
        first = warp_id() * length;
        end = min(first + length, n);
    }
    template <typename Visit>
    __device__ void each(Visit visit) const {
#pragma unroll 4
        for (int i = first + lane_id(); i < end; i += WARP) visit(keys[i], i);
    }
};

// Narrows down where the k-th largest key lies, until all keys there are chosen, or so few that they can be ranked one
// by one, or all equal.
__device__ inline Range find_range(const Run& run, int n, int k, SelectScratch& scratch) {
    u32 largest = 0, smallest = FORCED, forced = 0;
    run.each([&](u32 key, int) {
        forced += key == FORCED;
        largest = max(largest, key == FORCED ? 0 : key);
        smallest = min(smallest, key == NO_PAGE ? FORCED : key);
    });
    largest = __reduce_max_sync(ALL_LANES, largest);
    smallest = __reduce_min_sync(ALL_LANES, smallest);
    forced = __reduce_add_sync(ALL_LANES, forced);
    if (lane_id() == 0) {
        scratch.largest[warp_id()] = largest;
        scratch.smallest[warp_id()] = smallest;
        scratch.num_forced[warp_id()] = forced;
    }
#pragma unroll 4
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) scratch.histogram[i] = 0;
    if (threadIdx.x == 0) scratch.num_listed = 0;
    __syncthreads();
    const bool exists = lane_id() < num_warps();
    largest = __reduce_max_sync(ALL_LANES, exists ? scratch.largest[lane_id()] : 0);
    smallest = __reduce_min_sync(ALL_LANES, exists ? scratch.smallest[lane_id()] : FORCED);
    forced = sum_of_warps(scratch.num_forced);
    if (forced >= k) return {FORCED, FORCED, u32(k), forced};
    Range range = {smallest, largest, k - forced, u32(n) - forced};
#pragma unroll 1
    while (true) {
        const int shift = max(32 - __clz(range.last - range.first) - BIN_BITS, 0);
        run.each([&](u32 key, int) {
            if (range.has(key)) atomicAdd(&scratch.histogram[(key - range.first) >> shift], 1u);
        });
        __syncthreads();
        find_bin(range.need, scratch);
        range.first += scratch.bin << shift;
        range.last = min(range.last, range.first + (1u << shift) - 1);
        range.need -= scratch.above;
        range.inside = scratch.inside;
        if (range.inside == range.need || range.first == range.last || range.inside <= WARP) return range;
#pragma unroll 1
        for (int i = threadIdx.x; i < BINS; i += blockDim.x) scratch.histogram[i] = 0;
        __syncthreads();
    }
}

// By one warp: marks the chosen keys of the range, and counts them for the warps whose runs they lie in.
__device__ inline void resolve(const Run& run, int n, const Range& range, SelectScratch& scratch) {
    if (range.inside <= WARP) {  // they are listed: their ranks decide
        const u32 members = range.inside == WARP ? ALL_LANES : (1u << range.inside) - 1;
        if (lane_id() >= range.inside) return;
        const int index = scratch.listed[lane_id()];
        const u32 key = run.keys[index];
        u32 rank = 0;
        for (int i = 0; i < range.inside; ++i) {
            const int other = scratch.listed[i];
            rank += run.keys[other] > key || (run.keys[other] == key && other < index);
        }
        __syncwarp(members);
        if (rank >= range.need) return;
        run.keys[index] = CHOSEN;
        atomicAdd(&scratch.sums[index / run.length], 1u);
        return;
    }
    u32 left = range.need;  // they are equal: the first are chosen
#pragma unroll 1
    for (int base = 0; base < n && left > 0; base += WARP) {
        const int index = base + lane_id();
        const u32 equal = __ballot_sync(ALL_LANES, index < n && range.has(run.keys[index]));
        if ((equal >> lane_id() & 1) && __popc(equal & ((1u << lane_id()) - 1)) < left) {
            run.keys[index] = CHOSEN;
            atomicAdd(&scratch.sums[index / run.length], 1u);
        }
        left -= min(left, u32(__popc(equal)));
    }
}

// The indices of the k largest of keys[n], ascending, to chosen[k]; all if n <= k. Returns how many. Keys are lost. By a
// whole CTA of a power of two of threads, after a barrier that follows the writing of the keys; ends with one.
__device__ inline int choose_largest(u32* keys, int n, int k, int* chosen, SelectScratch& scratch) {
    if (k <= 0) return 0;
    if (n <= k) {
#pragma unroll 1
        for (int i = threadIdx.x; i < n; i += blockDim.x) chosen[i] = i;
        __syncthreads();
        return n;
    }
    const Run run(keys, n);
    const Range range = find_range(run, n, k, scratch);
    const bool all = range.inside == range.need;  // of the range
    const u32 above = all ? range.first - 1 : range.last;
    u32 count = 0;
    run.each([&](u32 key, int i) {
        count += key > above;
        if (!all && range.inside <= WARP && range.has(key)) scratch.listed[atomicAdd(&scratch.num_listed, 1u)] = i;
    });
    count = __reduce_add_sync(ALL_LANES, count);
    if (lane_id() == 0) scratch.sums[warp_id()] = count;
    __syncthreads();
    if (!all) {
        if (warp_id() == 0) resolve(run, n, range, scratch);
        __syncthreads();
    }
    u32 position = __reduce_add_sync(ALL_LANES, lane_id() < warp_id() ? scratch.sums[lane_id()] : 0);
    const u32 earlier = (1u << lane_id()) - 1;
#pragma unroll 4
    for (int i = run.first + lane_id(); i - lane_id() < run.end; i += WARP) {
        const bool mine = i < run.end && keys[i] > above;
        const u32 all_mine = __ballot_sync(ALL_LANES, mine);
        if (mine) chosen[position + __popc(all_mine & earlier)] = i;
        position += __popc(all_mine);
    }
    __syncthreads();
    return k;
}

// Where a selection happens, in shared memory.
struct SelectRoom {
    u32* keys;        // the pages' keys, or the best key of each tile of sixteen
    int* tiles;       // [k] with the tiles' keys
    u32* candidates;  // [16 k] with the tiles' keys
    int* chosen;      // [k] the result
};

// The `most` best of `count` pages, from the keys of all of them or, if `page_keys` (in memory, [count]) is given, in
// two stages: the best pages lie in the k tiles whose best pages are best, so only those tiles' keys are looked at,
// however many pages there are. Returns how many were chosen.
__device__ inline int choose_pages(const SelectRoom& room, const u32* page_keys, int count, int k, int most,
                                   SelectScratch& scratch) {
    u32* keys = room.keys;
    int* chosen = room.chosen;
    int n = count, want = min(most, count), found = 0;
    if (page_keys) {
        chosen = room.tiles;
        n = ceil_div(count, TILE);
        want = k;
    }
#pragma unroll 1
    while (true) {  // a loop, so that the selection's code is there once
        found = choose_largest(keys, n, want, chosen, scratch);
        if (chosen == room.chosen) break;
        n = found * TILE;
        want = min(most, count);
#pragma unroll 4
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            const int slot = room.tiles[i / TILE] * TILE + i % TILE;
            room.candidates[i] = slot < count ? page_keys[slot] : NO_PAGE;
        }
        __syncthreads();
        keys = room.candidates;
        chosen = room.chosen;
    }
    if (page_keys == nullptr) return found;
#pragma unroll 1
    for (int i = threadIdx.x; i < found; i += blockDim.x)
        chosen[i] = room.tiles[chosen[i] / TILE] * TILE + chosen[i] % TILE;
    __syncthreads();
    return found;
}
