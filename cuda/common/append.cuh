// New tokens into one page, and the channel-wise minimum and maximum of the keys it then holds. By one warp; a lane
// holds 8 channels of a token, so D / 8 lanes hold a token.
#pragma once
#include "common/device.cuh"

template <typename T>
__device__ inline uint4 min8(uint4 a, uint4 b) {
    return {T::min2(a.x, b.x), T::min2(a.y, b.y), T::min2(a.z, b.z), T::min2(a.w, b.w)};
}
template <typename T>
__device__ inline uint4 max8(uint4 a, uint4 b) {
    return {T::max2(a.x, b.x), T::max2(a.y, b.y), T::max2(a.z, b.z), T::max2(a.w, b.w)};
}
__device__ inline uint4 shuffle8(uint4 v, int lane) {
    return {__shfl_sync(ALL_LANES, v.x, lane), __shfl_sync(ALL_LANES, v.y, lane), __shfl_sync(ALL_LANES, v.z, lane),
            __shfl_sync(ALL_LANES, v.w, lane)};
}
__device__ inline void store16(u16* p, uint4 v) { *reinterpret_cast<uint4*>(p) = v; }

// A page of one kv head.
struct Page {
    u16 *keys, *values;  // [page_size, d]
    u16* digest;         // [2, d] minimum and maximum, or null

    __device__ Page(u16* kv_pool, u16* digests, i64 page, int head, int num_kv_heads, int page_shift, int d)
        : keys(kv_pool + (((page * 2 * num_kv_heads + head) << page_shift) * d)),
          values(keys + ((i64(num_kv_heads) << page_shift) * d)),
          digest(digests ? digests + (page * num_kv_heads + head) * 2 * d : nullptr) {}
};

struct NewTokens {
    const u16* key;      // [t, d] of one sequence and kv head, tokens `key_stride` elements apart
    const u16* value;    // [t, d], tokens `value_stride` elements apart
    const int* columns;  // [t] which of the t is the i-th to be stored; null: the i-th
    i64 key_stride, value_stride;

    __device__ int column(int i) const { return columns ? columns[i] : i; }
};

// Any number of tokens. The page holds positions [first, first + page_size); those from `start` on are new, the
// sequence ends at `length`. The digest is made from all the page's keys.
template <typename T, int D>
__device__ void append_to_page(const Page& page, const NewTokens& fresh, int first, int start, int length,
                               int page_size) {
    constexpr int LANES = D / 8, TOKENS = WARP / LANES, BATCH = 8;  // TOKENS at once, BATCH loads in flight
    const int token = lane_id() / LANES, channel = lane_id() % LANES * 8;
    const int end = min(first + page_size, length);
    const bool active = token < TOKENS;
    uint4 low = {T::INF2, T::INF2, T::INF2, T::INF2};
    uint4 high = {T::NEG_INF2, T::NEG_INF2, T::NEG_INF2, T::NEG_INF2};
#pragma unroll 1
    for (int base = first + token; base < end; base += TOKENS * BATCH) {
        uint4 loaded[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            const int position = base + j * TOKENS;
            if (!active || position >= end) continue;
            const u16* const old = page.keys + i64(position - first) * D;
            const bool is_new = position >= start;
            loaded[j] =
                load16((is_new ? fresh.key + fresh.column(position - start) * fresh.key_stride : old) + channel);
        }
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            const int position = base + j * TOKENS;
            if (!active || position >= end) continue;
            low = min8<T>(low, loaded[j]);
            high = max8<T>(high, loaded[j]);
            if (position < start) continue;
            const i64 offset = i64(position - first) * D + channel;
            store16(page.keys + offset, loaded[j]);
            store16(page.values + offset,
                    load16(fresh.value + fresh.column(position - start) * fresh.value_stride + channel));
        }
    }
    __syncwarp();
    if (page.digest == nullptr) return;
#pragma unroll
    for (int other = 1; other < TOKENS; ++other) {
        low = min8<T>(low, shuffle8(low, lane_id() % LANES + other * LANES));
        high = max8<T>(high, shuffle8(high, lane_id() % LANES + other * LANES));
    }
    if (lane_id() >= LANES) return;
    store16(page.digest + channel, low);
    store16(page.digest + D + channel, high);
}

// One new token into a page, at `offset` tokens from its start. The digest is left as it is.
template <int D>
__device__ void store_token(const Page& page, int offset, const u16* key /* [d] */, const u16* value /* [d] */) {
    const int channel = lane_id() * 8;
    if (channel >= D) return;
    const uint4 k = load16(key + channel), v = load16(value + channel);
    store16(page.keys + offset * D + channel, k);
    store16(page.values + offset * D + channel, v);
}

// The digest of a page that holds `count` tokens.
template <typename T, int D>
__device__ void summarize_page(const Page& page, int count) {
    append_to_page<T, D>(page, NewTokens{}, 0, count, count, count);
}
