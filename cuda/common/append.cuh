// New tokens into one page, and the digest of what it then holds. By one warp; a lane holds 8 channels of a token, so
// D / 8 lanes hold a token.
#pragma once
#include "common/digest.cuh"

struct NewTokens {
    const u16* key;      // [t, d] of one sequence and kv head, tokens `key_stride` elements apart
    const u16* value;    // [t, d], tokens `value_stride` elements apart
    const int* columns;  // [t] which of the t is the i-th to be stored; null: the i-th
    i64 key_stride, value_stride;

    __device__ int column(int i) const { return columns ? columns[i] : i; }
};

// Any number of tokens. The page holds positions [first, first + page_size); those from `start` on are new, the
// sequence ends at `length`. The digest is made by `parts` warps, of which this is number `part`.
template <typename T, int D, typename Kind>
__device__ void append_to_page(const Page& page, const Digests& digests, const NewTokens& fresh, int first, int start,
                               int length, int page_size, int part = 0, int parts = 1) {
    constexpr int LANES = D / 8, TOKENS = WARP / LANES, BATCH = 8;  // TOKENS at once, BATCH loads in flight
    using Summary = typename Kind::template Summary<T, D>;
    const int token = lane_id() / LANES, channel = lane_id() % LANES * 8;
    const int end = min(first + page_size, length);
    const bool active = token < TOKENS;
    Summary summary;
#pragma unroll 1
    for (int base = (Summary::WHOLE ? first : max(first, start)) + token; base < end; base += TOKENS * BATCH) {
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
            summary.take(loaded[j]);
            if (position < start) continue;
            const i64 offset = i64(position - first) * D + channel;
            store16(page.keys + offset, loaded[j]);
            store16(page.values + offset,
                    load16(fresh.value + fresh.column(position - start) * fresh.value_stride + channel));
        }
    }
    __syncwarp();
    summary.store(page, digests, end - first, page_size, part, parts);
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

// The digest of a page that holds `count` tokens. All warps of a CTA call it, `part` counts them from any of them on.
template <typename T, int D, typename Kind>
__device__ void summarize_page(const Page& page, const Digests& digests, int count, int page_size, int part) {
    constexpr bool SHARED = Kind::template Summary<T, D>::SHARED;
    if (!SHARED && part) return;
    append_to_page<T, D, Kind>(page, digests, NewTokens{}, 0, count, count, page_size, part,
                               SHARED ? num_warps() : 1);
}
