// New tokens into one page, and the digest of what it then holds. By one warp; a lane holds 8 channels of a token, so
// D / 8 lanes hold a token.
#pragma once
#include "common/digest.cuh"
#include "common/format.cuh"

// A page, and where its keys and values lie.
template <typename T, int D, typename Format>
struct StoredPage : Page {
    using Element = typename Format::Element;
    Element *keys, *values;  // [page_size, record]

    __device__ StoredPage(Element* kv_pool, i64 page, int head, int num_kv_heads, int page_shift)
        : Page{head, page * num_kv_heads + head},
          keys(kv_pool + (((page * 2 * num_kv_heads + head) << page_shift) * Format::template record<D>(page_shift))),
          values(keys + ((i64(num_kv_heads) << page_shift) * Format::template record<D>(page_shift))) {}

    __device__ u16 key(int token, int channel) const { return Format::template load1<T, D>(keys, token, channel); }
    __device__ uint4 key8(int token, int channel) const { return Format::template load8<T, D>(keys, token, channel); }
    __device__ void store_key8(int token, int channel, uint4 key) const {
        Format::template store8<T, D>(keys, token, channel, key);
    }
    __device__ void store_value8(int token, int channel, uint4 value) const {
        Format::template store8<T, D>(values, token, channel, value);
    }
};

struct NewTokens {
    const u16* key;      // [t, d] of one sequence and kv head, tokens `key_stride` elements apart
    const u16* value;    // [t, d], tokens `value_stride` elements apart
    const int* columns;  // [t] which of the t is the i-th to be stored; null: the i-th
    i64 key_stride, value_stride;

    __device__ int column(int i) const { return columns ? columns[i] : i; }
};

// Any number of tokens. The page holds positions [first, first + page_size); those from `start` on are new, the
// sequence ends at `length`. The digest is made by `parts` warps, of which this is number `part`.
template <typename Kind, typename T, int D, typename Format>
__device__ void append_to_page(const StoredPage<T, D, Format>& page, const Digests& digests, const NewTokens& fresh,
                               int first, int start, int length, int page_size, int part = 0, int parts = 1) {
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
            const bool is_new = position >= start;
            if constexpr (Format::AS_IS) {  // one load, from here or there
                const u16* const old = page.keys + i64(position - first) * D;
                loaded[j] =
                    load16((is_new ? fresh.key + fresh.column(position - start) * fresh.key_stride : old) + channel);
            } else {
                loaded[j] = is_new ? load16(fresh.key + fresh.column(position - start) * fresh.key_stride + channel)
                                   : page.key8(position - first, channel);
            }
        }
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            const int position = base + j * TOKENS;
            if (!active || position >= end) continue;
            summary.take(position < start ? loaded[j] : Format::template rounded8<T>(loaded[j]));
            if (position < start) continue;
            page.store_key8(position - first, channel, loaded[j]);
            page.store_value8(position - first, channel,
                              load16(fresh.value + fresh.column(position - start) * fresh.value_stride + channel));
        }
    }
    __syncwarp();
    summary.store(page, digests, end - first, page_size, part, parts);
}

// One new token into a page, at `offset` tokens from its start. The digest is left as it is.
template <typename T, int D, typename Format>
__device__ void store_token(const StoredPage<T, D, Format>& page, int offset, const u16* key /* [d] */,
                            const u16* value /* [d] */) {
    const int channel = lane_id() * 8;
    if (channel >= D) return;
    const uint4 k = load16(key + channel), v = load16(value + channel);
    page.store_key8(offset, channel, k);
    page.store_value8(offset, channel, v);
}

// The digest of a page that holds `count` tokens. All warps of a CTA call it, `part` counts them from any of them on.
template <typename Kind, typename T, int D, typename Format>
__device__ void summarize_page(const StoredPage<T, D, Format>& page, const Digests& digests, int count, int page_size,
                               int part) {
    constexpr bool SHARED = Kind::template Summary<T, D>::SHARED;
    if (!SHARED && part) return;
    append_to_page<Kind>(page, digests, NewTokens{}, 0, count, count, page_size, part, SHARED ? num_warps() : 1);
}
