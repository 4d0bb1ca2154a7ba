// New tokens into one page, and the channel-wise minimum and maximum of the keys it then holds.
#pragma once
#include "common/device.cuh"

struct NewTokens {
    const u16* key;      // [t, d] of one sequence and kv head, tokens `key_stride` elements apart
    const u16* value;    // [t, d], tokens `value_stride` elements apart
    const int* columns;  // [t] which of the t is the i-th to be stored; null: the i-th
    i64 key_stride, value_stride;

    __device__ int column(int i) const { return columns ? columns[i] : i; }
};

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

// One warp. The page holds positions [first, first + page_size); tokens from position `start` on are new, the sequence
// ends at `length`. A lane holds 8 channels of a token; D / 8 lanes hold a token.
template <typename T, int D>
__device__ void append_to_page(const NewTokens& fresh, u16* keys /* [page_size, d] */, u16* values /* the same */,
                               u16* digest /* [2, d] or null */, int first, int start, int length, int page_size) {
    constexpr int LANES = D / 8, TOKENS = WARP / LANES, BATCH = 8;  // TOKENS at once, BATCH loads in flight
    const int token = lane_id() / LANES, channel = lane_id() % LANES * 8;
    const int end = min(first + page_size, length);
    const bool active = token < TOKENS;
    uint4 low = {T::INF2, T::INF2, T::INF2, T::INF2};
    uint4 high = {T::NEG_INF2, T::NEG_INF2, T::NEG_INF2, T::NEG_INF2};
    for (int base = first + token; base < end; base += TOKENS * BATCH) {
        uint4 loaded[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            const int position = base + j * TOKENS;
            if (!active || position >= end) continue;
            const u16* old = keys + i64(position - first) * D;
            const bool is_new = position >= start;
            loaded[j] = load16((is_new ? fresh.key + fresh.column(position - start) * fresh.key_stride : old) + channel);
        }
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            const int position = base + j * TOKENS;
            if (!active || position >= end) continue;
            low = min8<T>(low, loaded[j]);
            high = max8<T>(high, loaded[j]);
            if (position < start) continue;
            const i64 offset = i64(position - first) * D + channel;
            *reinterpret_cast<uint4*>(keys + offset) = loaded[j];
            *reinterpret_cast<uint4*>(values + offset) =
                load16(fresh.value + fresh.column(position - start) * fresh.value_stride + channel);
        }
    }
    __syncwarp();
    if (digest == nullptr) return;
#pragma unroll
    for (int other = 1; other < TOKENS; ++other) {
        low = min8<T>(low, shuffle8(low, lane_id() % LANES + other * LANES));
        high = max8<T>(high, shuffle8(high, lane_id() % LANES + other * LANES));
    }
    if (lane_id() >= LANES) return;
    *reinterpret_cast<uint4*>(digest + channel) = low;
    *reinterpret_cast<uint4*>(digest + D + channel) = high;
}
