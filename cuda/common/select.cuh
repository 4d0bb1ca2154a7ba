// The k best of many, exactly, by one CTA, keys in shared memory. A histogram over the range of the keys tells the
// bin in which the k-th largest lies; the few keys in it are ranked one by one, or it becomes the next range. Of
// equal keys the earlier wins, so a selection is the same on every run, and the same as the reference's.
#pragma once
#include "common/digest.cuh"

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
    u32 sums[32];                                   // a number of each warp
    u32 largest[32], smallest[32], num_forced[32];  // of each warp's keys
    u32 bin, above, inside;                         // the bin that holds the k-th largest; keys above it, and in it
    u32 num_listed;
    int listed[WARP];  // indices of the keys in the last bin

    __device__ void clear() {
        uint4* const words = reinterpret_cast<uint4*>(histogram);
#pragma unroll 1
        for (int i = threadIdx.x; i < BINS / 4; i += blockDim.x) words[i] = {0, 0, 0, 0};
    }
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

// Finds the bin in which, counted from the top, the `need`-th key lies. A thread sums its bins, the warps' sums tell
// in which warp the bin lies, and that warp alone looks closer.
__device__ inline void find_bin(u32 need, SelectScratch& scratch) {
    const int bins = BINS / blockDim.x,
              top = BINS - 1 - threadIdx.x * bins;  // this thread's bins, downwards from top
    u32 mine = 0;
#pragma unroll 1
    for (int i = 0; i < bins; i += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(scratch.histogram + top - i - 3);
        mine += four.x + four.y + four.z + four.w;
    }
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

// A thread's keys, four consecutive ones at a time; a warp's lie together. Up to QUADS times four are held in
// registers; with QUADS 0 they are read again at every visit. Past the n-th, keys are NO_PAGE.
template <int QUADS>
struct Mine {
    u32* keys;
    int n, first, quads;  // `first` of this lane; the next quad is 4 * WARP keys further
    uint4 held[QUADS ? QUADS : 1];

    __device__ Mine(u32* keys, int n) : keys(keys), n(n) {
        const int per_quad = blockDim.x * 4, shift = 31 - __clz(per_quad);  // a power of two: no division
        quads = (n + per_quad - 1) >> shift;
        first = warp_id() * run() + lane_id() * 4;
        load();
    }
    __device__ int run() const { return quads * WARP * 4; }  // keys of a warp
    __device__ void load() {
#pragma unroll
        for (int q = 0; q < QUADS; ++q) held[q] = quad(q);
    }
    __device__ uint4 quad(int q) const {
        const int index = first + q * WARP * 4;
        if (q >= quads || index >= n) return {NO_PAGE, NO_PAGE, NO_PAGE, NO_PAGE};
        uint4 four = *reinterpret_cast<const uint4*>(keys + index);
        if (index + 1 >= n) four.y = NO_PAGE;
        if (index + 2 >= n) four.z = NO_PAGE;
        if (index + 3 >= n) four.w = NO_PAGE;
        return four;
    }
    // visit(four keys, index of the first), by all lanes of a warp together.
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

// Narrows down where the k-th largest key lies, until all keys there are chosen, or so few that they can be ranked
// one by one, or all equal.
template <int QUADS>
__device__ inline Range find_range(const Mine<QUADS>& mine, int k, SelectScratch& scratch) {
    u32 largest = 0, smallest = FORCED, forced = 0;
    mine.each([&](u32 key, int) {
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
    scratch.clear();
    if (threadIdx.x == 0) scratch.num_listed = 0;
    __syncthreads();
    const bool exists = lane_id() < num_warps();
    largest = __reduce_max_sync(ALL_LANES, exists ? scratch.largest[lane_id()] : 0);
    smallest = __reduce_min_sync(ALL_LANES, exists ? scratch.smallest[lane_id()] : FORCED);
    forced = sum_of_warps(scratch.num_forced);
    if (forced >= k) return {FORCED, FORCED, u32(k), forced};
    Range range = {smallest, largest, k - forced, 0};
#pragma unroll 1
    while (true) {
        const int shift = max(32 - __clz(range.last - range.first) - BIN_BITS, 0);
        mine.each([&](u32 key, int) {
            if (range.has(key)) atomicAdd(&scratch.histogram[(key - range.first) >> shift], 1u);
        });
        __syncthreads();
        find_bin(range.need, scratch);
        range.first += scratch.bin << shift;
        range.last = min(range.last, range.first + (1u << shift) - 1);
        range.need -= scratch.above;
        range.inside = scratch.inside;
        if (range.inside == range.need || range.first == range.last || range.inside <= WARP) return range;
        scratch.clear();
        __syncthreads();
    }
}

// By one warp: marks the chosen keys of the range, and counts them for the warps that they belong to.
__device__ inline void resolve(u32* keys, int n, int run, const Range& range, SelectScratch& scratch) {
    if (range.inside <= WARP) {  // they are listed: their ranks decide
        const u32 members = range.inside == WARP ? ALL_LANES : (1u << range.inside) - 1;
        if (lane_id() >= range.inside) return;
        const int index = scratch.listed[lane_id()];
        const u32 key = keys[index];
        u32 rank = 0;
        for (int i = 0; i < range.inside; ++i) {
            const int other = scratch.listed[i];
            rank += keys[other] > key || (keys[other] == key && other < index);
        }
        __syncwarp(members);
        if (rank >= range.need) return;
        keys[index] = CHOSEN;
        atomicAdd(&scratch.sums[index / run], 1u);
        return;
    }
    u32 left = range.need;  // they are equal: the first are chosen
#pragma unroll 1
    for (int base = 0; base < n && left > 0; base += WARP) {
        const int index = base + lane_id();
        const u32 equal = __ballot_sync(ALL_LANES, index < n && range.has(keys[index]));
        if ((equal >> lane_id() & 1) && __popc(equal & ((1u << lane_id()) - 1)) < left) {
            keys[index] = CHOSEN;
            atomicAdd(&scratch.sums[index / run], 1u);
        }
        left -= min(left, u32(__popc(equal)));
    }
}

template <int QUADS>
__device__ inline void choose_from(u32* keys, int n, int k, int* chosen, SelectScratch& scratch) {
    Mine<QUADS> mine(keys, n);
    const Range range = find_range(mine, k, scratch);
    const bool all = range.inside == range.need;  // of the range
    const u32 above = all ? range.first - 1 : range.last;
    u32 count = 0;
    mine.each([&](u32 key, int index) {
        count += key > above;
        if (!all && range.inside <= WARP && range.has(key))
            scratch.listed[atomicAdd(&scratch.num_listed, 1u)] = index;
    });
    count = __reduce_add_sync(ALL_LANES, count);
    if (lane_id() == 0) scratch.sums[warp_id()] = count;
    __syncthreads();
    if (!all) {
        if (warp_id() == 0) resolve(keys, n, mine.run(), range, scratch);
        __syncthreads();
        mine.load();
    }
    u32 position = __reduce_add_sync(ALL_LANES, lane_id() < warp_id() ? scratch.sums[lane_id()] : 0);
    const u32 earlier = (1u << lane_id()) - 1;
    mine.each_quad([&](const uint4& four, int index) {
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
    __syncthreads();
}

// The indices of the k largest of keys[n], ascending, to chosen[k]; all if n <= k. Returns how many. Keys are lost.
// By a whole CTA of a power of two of threads, after a barrier that follows the writing of the keys; ends with one.
__device__ inline int choose_largest(u32* keys, int n, int k, int* chosen, SelectScratch& scratch) {
    if (k <= 0) return 0;
    if (n <= k) {
#pragma unroll 1
        for (int i = threadIdx.x; i < n; i += blockDim.x) chosen[i] = i;
        __syncthreads();
        return n;
    }
    if (n <= 4 * blockDim.x)
        choose_from<1>(keys, n, k, chosen, scratch);
    else if (n <= 16 * blockDim.x)
        choose_from<4>(keys, n, k, chosen, scratch);
    else
        choose_from<0>(keys, n, k, chosen, scratch);
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
