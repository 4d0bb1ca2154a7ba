// What the kernels know of a digest: where its tensors lie, and the two parts of its kind. A kind is a type in a
// header that includes this one; the digest's class names both (DigestKernel of sparsekv/ops/formulas.py), and they
// are compiled into every kernel that keeps or scores digests. It has, for element type T and head size D,
//
// - `Summary<T, D>`, made by a warp while it appends to a page: `WHOLE`, whether all of the page's keys are needed,
//   `SHARED`, whether several warps may share the work, `take(8 channels of a key)`, of latents with their round
//   (`KeyLanes`), and `store(page, digests, count, page_size, part, parts)`, part of what `parts` warps store
//   together;
// - `Scorer<T, D, HEAD_TILES>`, a warp that scores tiles of sixteen pages, one after the other: `stage` and `use` a
//   query, which takes `STAGED` words of 16 bytes, `aim` at the next tile's pages, -1 for none, `load_first`, and
//   `score`, which loads the next tile as it goes. Scores are on the scale of logits, products times the `scaling`
//   that it is made with. It is made with `ROOM` words of 16 bytes of shared memory, too, that are this warp's own.
#pragma once
#include "common/device.cuh"

constexpr int TILE = 16;      // pages that a warp scores at once
constexpr int MMA_HEADS = 8;  // query heads of one matrix product

enum GroupPooling { POOL_MAX = 0, POOL_SUM = 1, POOL_NONE = 2, POOL_SHARE = 3 };

// A digest's tensors, contiguous, in the order of its class: its fields [num_pages, hkv, ...], then its fixed state
// [hkv, ...]. `digests.at<u16>(i)` is the i-th.
struct Digests {
    static constexpr int MAX_TENSORS = 8;
    void* tensors[MAX_TENSORS];

    template <typename Element>
    __device__ Element* at(int i) const {
        return static_cast<Element*>(tensors[i]);
    }
};

// A page of one kv head. Kinds that want to read its keys again take a `StoredPage` (append.cuh) instead.
struct Page {
    int head;
    i64 item;  // where its digest lies, counted in digests
};

__device__ inline void store16(void* p, uint4 v) { *reinterpret_cast<uint4*>(p) = v; }

// Of a layer whose pages are never scored.
struct NoDigest {
    template <typename T, int D>
    struct Summary {
        static constexpr bool WHOLE = false, SHARED = false;
        __device__ void take(uint4, int = 0) const {}
        __device__ void store(const Page&, const Digests&, int, int, int, int) const {}
    };
};

template <typename T>
__device__ inline void unpack8(uint4 packed, float (&x)[8]) {
    const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = T::to_float(words[i / 2] >> i % 2 * 16);
}

// How a warp takes keys: a lane 8 channels of a token at a time, so that COUNT lanes have a token after so many
// rounds.
template <int D>
struct KeyLanes {
    static constexpr int ROUNDS = D > 256 ? 3 : 1, COUNT = D / 8 / ROUNDS;
    static constexpr int TOKENS = WARP / COUNT;  // at once
};

// For a `Summary` that wants a page's mean.
template <typename T, int D>
struct KeySums {
    float sums[8 * KeyLanes<D>::ROUNDS] = {};  // of the tokens that this lane took

    __device__ void take(uint4 packed, int round = 0) {
        float key[8];
        unpack8<T>(packed, key);
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[round * 8 + i] += key[i];
    }

    // The sum of `x` over the lanes that hold the same channels, the same in all of them.
    __device__ static float total(float x) {
        constexpr int LANES = KeyLanes<D>::COUNT;
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < KeyLanes<D>::TOKENS; ++i) sum += __shfl_sync(ALL_LANES, x, lane_id() % LANES + i * LANES);
        return sum;
    }
};

// The ids of pages, tile by tile. A lane loads from two, slots lane / 4 and lane / 4 + 8. They are read a tile ahead,
// so that no load of a digest waits for one of the table.
struct TileIds {
    const int* table;       // [max_pages]
    int count, last, step;  // pages that exist, the table's last entry, slots from tile to tile
    int tile;               // the first slot of the tile that is aimed at next
    int low, high;          // the ids of its two pages

    __device__ TileIds(const int* table, int count, int max_pages, int first, int step)
        : table(table), count(count), last(max_pages - 1), step(step), tile(first) {
        read();
    }
    __device__ void read() {
        const int slot = tile + lane_id() / 4;
        low = table[min(slot, last)];
        high = table[min(slot + 8, last)];
    }
    template <typename Scorer>
    __device__ void aim(Scorer& scorer) {
        const int slot = tile + lane_id() / 4;
        scorer.aim(slot < count ? low : -1, slot + 8 < count ? high : -1);  // entries past the end may be anything
        tile += step;
        read();
    }
};

// Over the heads of the group: .x for page lane / 4, .y for page lane / 4 + 8, the same in the four lanes of a page.
// `scores` are as a `Scorer` leaves them.
template <typename Scorer, int HEAD_TILES>
__device__ float2 pool_heads(const float (&scores)[HEAD_TILES][4], int group, GroupPooling pooling) {
    const bool largest = pooling == POOL_MAX;
    float2 pooled = largest ? float2{-infinity(), -infinity()} : float2{0.f, 0.f};
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (Scorer::head_of(tile, i) >= group) continue;
            pooled.x = largest ? fmaxf(pooled.x, scores[tile][i]) : pooled.x + scores[tile][i];
            pooled.y = largest ? fmaxf(pooled.y, scores[tile][2 + i]) : pooled.y + scores[tile][2 + i];
        }
    }
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        const float x = __shfl_xor_sync(ALL_LANES, pooled.x, step), y = __shfl_xor_sync(ALL_LANES, pooled.y, step);
        pooled.x = largest ? fmaxf(pooled.x, x) : pooled.x + x;
        pooled.y = largest ? fmaxf(pooled.y, y) : pooled.y + y;
    }
    return pooled;
}
