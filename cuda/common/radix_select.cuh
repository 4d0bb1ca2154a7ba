// The k largest of many, exactly, by one CTA, from priorities in shared memory. A priority is a number that sorts
// like the score it was made from. Of equal ones the earlier wins, so a selection is the same on every run, and the
// same as the reference's.
//
// It is a radix select. The k-th largest priority is the threshold, and a histogram tells the bin that it lies in.
// That bin becomes the next range that a histogram is made of, until its members are so few that each can be compared
// with each. Who writes what, where and when (`select_from`), `scratch` being in shared memory as well:
//
//    each warp    its largest, smallest, number of FORCED ─> scratch.largest, smallest, num_forced [warp]
//    ──────────── __syncthreads
//    each thread  the first range: all between the CTA's smallest and largest
// ┌> each thread  its priorities in the range ─────────────> scratch.histogram, by atomic additions
// │  ──────────── __syncthreads
// │  each warp    the sum of its threads' bins ────────────> scratch.counts[warp]
// │  ──────────── __syncthreads
// │  one thread   the bin in which the threshold lies ─────> scratch.bin, above, inside
// │  ──────────── __syncthreads
// └─ each thread  that bin is the next range, until all in it are chosen, or equal, or no more than a warp's lanes
//    each thread  indices of its priorities in that bin ───> scratch.members
//    each warp    how many of its priorities are above ────> scratch.counts[warp]
//    ──────────── __syncthreads (and on to the last step if all in the bin are chosen)
//    warp 0       CHOSEN in place of the best members ─────> priorities, and counts[their warp] + 1
//    ──────────── __syncthreads
//    each warp    indices of what is chosen of its part ───> chosen, behind those of the warps before
//    ──────────── __syncthreads
#pragma once
#include "common/device.cuh"

// A score's bits as an unsigned integer that sorts like the score. NaN counts as -inf, -0 as 0.
__device__ inline u32 priority_of(float score) {
    const u32 bits = __float_as_uint(score + 0.f);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x007FFFFFu;  // NaN: as -inf
    return bits ^ (bits & 0x80000000u ? 0xFFFFFFFFu : 0x80000000u);
}

constexpr u32 CHOSEN = 0xFFFFFFFFu;  // above all
constexpr u32 FORCED = 0xFFFFFFFEu;  // above that of +inf
constexpr u32 NO_PAGE = 0u;          // below that of -inf

constexpr int BIN_BITS = 11, BINS = 1 << BIN_BITS;

struct alignas(16) SelectScratch {
    u32 histogram[BINS];
    u32 counts[32];                                                  // a number of each warp
    u32 largest[32], smallest[32], num_forced[32], num_present[32];  // of each warp's priorities
    u32 bin, above, inside;  // the threshold's bin; priorities above it, and in it
    u32 num_members;
    int members[WARP];  // indices of the priorities in the last bin

    __device__ void clear_histogram() {
        uint4* const words = reinterpret_cast<uint4*>(histogram);
#pragma unroll 1
        for (int i = threadIdx.x; i < BINS / 4; i += blockDim.x) words[i] = {0, 0, 0, 0};
    }
};

__device__ inline u32 sum_of_warps(const u32* of_warp) {
    return __reduce_add_sync(ALL_LANES, lane_id() < num_warps() ? of_warp[lane_id()] : 0);
}
__device__ inline u32 sum_of_earlier_warps(const u32* of_warp) {
    return __reduce_add_sync(ALL_LANES, lane_id() < warp_id() ? of_warp[lane_id()] : 0);
}

// The sum over lanes up to and including this one.
__device__ inline u32 inclusive_sum(u32 value) {
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const u32 lower = __shfl_up_sync(ALL_LANES, value, step);
        if (lane_id() >= step) value += lower;
    }
    return value;
}

// Finds the bin in which, counted from the top, the `wanted`-th priority lies. A thread sums its bins, the warps'
// sums tell in which warp the bin lies, and that warp alone looks closer.
__device__ inline void find_bin(u32 wanted, SelectScratch& scratch) {
    const int bins = BINS / blockDim.x,
              top = BINS - 1 - threadIdx.x * bins;  // this thread's bins, downwards from top
    u32 count = 0;                                  // of the priorities in them
#pragma unroll 1
    for (int i = 0; i < bins; i += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(scratch.histogram + top - i - 3);
        count += four.x + four.y + four.z + four.w;
    }
    const u32 warp_count = __reduce_add_sync(ALL_LANES, count);
    if (lane_id() == 0) scratch.counts[warp_id()] = warp_count;
    __syncthreads();
    const u32 above_warp = sum_of_earlier_warps(scratch.counts);
    if (above_warp < wanted && wanted <= above_warp + warp_count) {
        u32 above = above_warp + inclusive_sum(count) - count;
        if (above < wanted && wanted <= above + count) {
            int bin = top;
            while (above + scratch.histogram[bin] < wanted) above += scratch.histogram[bin--];
            scratch.bin = bin;
            scratch.above = above;
            scratch.inside = scratch.histogram[bin];
        }
    }
    __syncthreads();
}

// Priorities from `low` to `high`, among them the threshold: there are `inside`, of which the best `wanted` are
// chosen. All above are.
struct ThresholdRange {
    u32 low, high, wanted, inside;

    __device__ bool has(u32 priority) const { return low <= priority && priority <= high; }
    __device__ bool is_all_wanted() const { return inside == wanted; }
};

// A thread's priorities, four consecutive ones (a quad) at a time; a warp's lie together. Up to QUADS quads are held
// in registers; with QUADS 0 they are read again at every visit. Past the n-th, priorities are NO_PAGE.
template <int QUADS>
struct ThreadItems {
    u32* priorities;
    int n, first, quads;  // `first` of this lane; the next quad is 4 * WARP priorities further
    uint4 held[QUADS ? QUADS : 1];

    __device__ ThreadItems(u32* priorities, int n) : priorities(priorities), n(n) {
        const int per_quad = blockDim.x * 4, shift = 31 - __clz(per_quad);  // a power of two: no division
        quads = (n + per_quad - 1) >> shift;
        first = warp_id() * items_of_warp() + lane_id() * 4;
        load();
    }
    __device__ int items_of_warp() const { return quads * WARP * 4; }
    __device__ void load() {
#pragma unroll
        for (int q = 0; q < QUADS; ++q) held[q] = quad(q);
    }
    __device__ uint4 quad(int q) const {
        const int index = first + q * WARP * 4;
        if (q >= quads || index >= n) return {NO_PAGE, NO_PAGE, NO_PAGE, NO_PAGE};
        uint4 four = *reinterpret_cast<const uint4*>(priorities + index);
        if (index + 1 >= n) four.y = NO_PAGE;
        if (index + 2 >= n) four.z = NO_PAGE;
        if (index + 3 >= n) four.w = NO_PAGE;
        return four;
    }
    // visit(four priorities, index of the first), by all lanes of a warp together.
    template <typename Visit>
    __device__ void each_quad(Visit visit) const {
        if constexpr (QUADS > 0) {
#pragma unroll
            for (int q = 0; q < QUADS; ++q) visit(held[q], first + q * WARP * 4);
        } else {
#pragma unroll 1
            for (int q = 0; q < quads; ++q) visit(quad(q), first + q * WARP * 4);
        }
    }
    template <typename Visit>
    __device__ void each(Visit visit) const {
        each_quad([&](const uint4& four, int index) {
            visit(four.x, index);
            visit(four.y, index + 1);
            visit(four.z, index + 2);
            visit(four.w, index + 3);
        });
    }
};

// Of a CTA's priorities but FORCED and NO_PAGE, how many are FORCED, and how many are not NO_PAGE.
struct Bounds {
    u32 smallest, largest, num_forced, num_present;
};

template <int QUADS>
__device__ inline Bounds find_bounds(const ThreadItems<QUADS>& items, SelectScratch& scratch) {
    u32 largest = 0, smallest = FORCED, forced = 0, present = 0;
    items.each([&](u32 priority, int) {
        forced += priority == FORCED;
        present += priority != NO_PAGE;
        largest = max(largest, priority == FORCED ? 0 : priority);
        smallest = min(smallest, priority == NO_PAGE ? FORCED : priority);
    });
    largest = __reduce_max_sync(ALL_LANES, largest);
    smallest = __reduce_min_sync(ALL_LANES, smallest);
    forced = __reduce_add_sync(ALL_LANES, forced);
    present = __reduce_add_sync(ALL_LANES, present);
    if (lane_id() == 0) {
        scratch.largest[warp_id()] = largest;
        scratch.smallest[warp_id()] = smallest;
        scratch.num_forced[warp_id()] = forced;
        scratch.num_present[warp_id()] = present;
    }
    scratch.clear_histogram();
    if (threadIdx.x == 0) scratch.num_members = 0;
    __syncthreads();
    const bool exists = lane_id() < num_warps();
    largest = __reduce_max_sync(ALL_LANES, exists ? scratch.largest[lane_id()] : 0);
    smallest = __reduce_min_sync(ALL_LANES, exists ? scratch.smallest[lane_id()] : FORCED);
    return {smallest, largest, sum_of_warps(scratch.num_forced), sum_of_warps(scratch.num_present)};
}

// Narrows down where the threshold lies, until all priorities there are chosen, or so few that each can be compared
// with each, or all equal. Where no more than k are present, all are chosen. `found` is how many are.
template <int QUADS>
__device__ inline ThresholdRange find_threshold(const ThreadItems<QUADS>& items, int k, int& found,
                                                SelectScratch& scratch) {
    const Bounds bounds = find_bounds(items, scratch);
    found = min(u32(k), bounds.num_present);
    if (bounds.num_present <= k) return {NO_PAGE + 1, FORCED, bounds.num_present, bounds.num_present};
    if (bounds.num_forced >= k) return {FORCED, FORCED, u32(k), bounds.num_forced};
    ThresholdRange range = {bounds.smallest, bounds.largest, k - bounds.num_forced, 0};
#pragma unroll 1
    while (true) {
        const int shift = max(32 - __clz(range.high - range.low) - BIN_BITS, 0);
        items.each([&](u32 priority, int) {
            if (range.has(priority)) atomicAdd(&scratch.histogram[(priority - range.low) >> shift], 1u);
        });
        __syncthreads();
        find_bin(range.wanted, scratch);
        range.low += scratch.bin << shift;
        range.high = min(range.high, range.low + (1u << shift) - 1);
        range.wanted -= scratch.above;
        range.inside = scratch.inside;
        if (range.is_all_wanted() || range.low == range.high || range.inside <= WARP) return range;
        scratch.clear_histogram();
        __syncthreads();
    }
}

// By one warp: marks the best of the listed members of the range, and counts them for the warps whose items they are.
__device__ inline void choose_members(u32* priorities, int items_of_warp, const ThresholdRange& range,
                                      SelectScratch& scratch) {
    const u32 lanes = range.inside == WARP ? ALL_LANES : (1u << range.inside) - 1;
    if (lane_id() >= range.inside) return;
    const int index = scratch.members[lane_id()];
    const u32 priority = priorities[index];
    u32 num_better = 0;
    for (int i = 0; i < range.inside; ++i) {
        const int other = scratch.members[i];
        num_better += priorities[other] > priority || (priorities[other] == priority && other < index);
    }
    __syncwarp(lanes);
    if (num_better >= range.wanted) return;
    priorities[index] = CHOSEN;
    atomicAdd(&scratch.counts[index / items_of_warp], 1u);
}

// The same where all members are equal, and more than a warp's lanes: the first are chosen.
__device__ inline void choose_first(u32* priorities, int n, int items_of_warp, const ThresholdRange& range,
                                    SelectScratch& scratch) {
    u32 left = range.wanted;
#pragma unroll 1
    for (int base = 0; base < n && left > 0; base += WARP) {
        const int index = base + lane_id();
        const u32 equal = __ballot_sync(ALL_LANES, index < n && range.has(priorities[index]));
        if ((equal >> lane_id() & 1) && __popc(equal & ((1u << lane_id()) - 1)) < left) {
            priorities[index] = CHOSEN;
            atomicAdd(&scratch.counts[index / items_of_warp], 1u);
        }
        left -= min(left, u32(__popc(equal)));
    }
}

// Indices of the priorities above `above`, ascending; the warps' counts say where each warp's begin.
template <int QUADS>
__device__ inline void write_above(const ThreadItems<QUADS>& items, u32 above, int* chosen,
                                   const SelectScratch& scratch) {
    u32 position = sum_of_earlier_warps(scratch.counts);
    const u32 earlier = (1u << lane_id()) - 1;
    items.each_quad([&](const uint4& four, int index) {
        const bool x = four.x > above, y = four.y > above, z = four.z > above, w = four.w > above;
        const u32 xs = __ballot_sync(ALL_LANES, x), ys = __ballot_sync(ALL_LANES, y);
        const u32 zs = __ballot_sync(ALL_LANES, z), ws = __ballot_sync(ALL_LANES, w);
        if (!(xs | ys | zs | ws)) return;
        u32 place =
            position + __popc(xs & earlier) + __popc(ys & earlier) + __popc(zs & earlier) + __popc(ws & earlier);
        if (x) chosen[place++] = index;
        if (y) chosen[place++] = index + 1;
        if (z) chosen[place++] = index + 2;
        if (w) chosen[place] = index + 3;
        position += __popc(xs) + __popc(ys) + __popc(zs) + __popc(ws);
    });
}

template <int QUADS>
__device__ inline int select_from(u32* priorities, int n, int k, int* chosen, SelectScratch& scratch) {
    ThreadItems<QUADS> items(priorities, n);
    int found;
    const ThresholdRange range = find_threshold(items, k, found, scratch);
    const bool all = range.is_all_wanted();
    const u32 above = all ? range.low - 1 : range.high;
    u32 count = 0;
    items.each([&](u32 priority, int index) {
        count += priority > above;
        if (!all && range.inside <= WARP && range.has(priority))
            scratch.members[atomicAdd(&scratch.num_members, 1u)] = index;
    });
    count = __reduce_add_sync(ALL_LANES, count);
    if (lane_id() == 0) scratch.counts[warp_id()] = count;
    __syncthreads();
    if (!all) {
        if (warp_id() == 0) {
            if (range.inside <= WARP)
                choose_members(priorities, items.items_of_warp(), range, scratch);
            else
                choose_first(priorities, n, items.items_of_warp(), range, scratch);
        }
        __syncthreads();
        items.load();
    }
    write_above(items, above, chosen, scratch);
    __syncthreads();
    return found;
}

// The indices of the k largest of priorities[n], ascending, to chosen[k]; all that are present, that is not NO_PAGE,
// if no more are. Returns how many. Priorities are lost. By a whole CTA of a power of two of threads, after a barrier
// that follows the writing of the priorities; ends with one.
__device__ inline int select_largest(u32* priorities, int n, int k, int* chosen, SelectScratch& scratch) {
    if (k <= 0) return 0;
    if (n <= 4 * blockDim.x) return select_from<1>(priorities, n, k, chosen, scratch);
    if (n <= 16 * blockDim.x) return select_from<4>(priorities, n, k, chosen, scratch);
    return select_from<0>(priorities, n, k, chosen, scratch);
}
