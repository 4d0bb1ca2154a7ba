// New tokens into one page, and the digest of what it then holds. By one warp; a lane holds 8 channels of a token, so
// D / 8 lanes hold a token. Of latents, which are wider, by all warps of a CTA.
#pragma once
#include "common/digest.cuh"
#include "common/format.cuh"

// A page, and where its keys and values lie.
template <typename T, int D, typename Format>
struct StoredPage : Page {
    using Element = typename Format::Element;
    Element *keys, *values;  // [page_size, record]
    int page_shift;

    __device__ StoredPage(Element* kv_pool, i64 page, int head, int num_kv_heads, int page_shift)
        : Page{head, page * num_kv_heads + head}, page_shift(page_shift) {
        const int of_key = Format::template key_record<D>(page_shift);
        if constexpr (Format::PARTS == 2) {
            keys = kv_pool + ((page * 2 * num_kv_heads + head) << page_shift) * of_key;
            values = keys + (i64(num_kv_heads) << page_shift) * of_key;
        } else {
            keys = kv_pool + (this->item << page_shift) * (of_key + Format::template value_record<D>(page_shift));
            values = keys + (i64(of_key) << page_shift);
        }
    }

    __device__ u16 key(int token, int channel) const {
        return Format::template load1<T, D>(keys, page_shift, token, channel);
    }
    __device__ uint4 key8(int token, int channel) const {
        return Format::template unpack_key<T, D>(Format::template load_key<D>(keys, page_shift, token, channel));
    }
    __device__ uint4 value8(int token, int channel) const {
        return Format::template unpack_value<T, D>(
            Format::template load_value<D>(values, page_shift, token, channel));
    }
    // Eight channels of a token; gives what is left of the key. The lanes of a token call it together.
    __device__ uint4 store(int token, int channel, uint4 key, uint4 value) const {
        const auto packed = Format::template pack_key<T, D>(key);
        Format::template store_key<D>(keys, page_shift, token, channel, packed);
        const auto packed_value = Format::template pack_value<T, D>(value);
        Format::template store_value<D>(values, page_shift, token, channel, packed_value);
        return Format::template unpack_key<T, D>(packed);
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
// sequence ends at `length`. The digest is made by `parts` warps, of which this is number `part`; of latents all
// those of a CTA.
template <typename Kind, typename T, int D, typename Format>
__device__ void append_to_page(const StoredPage<T, D, Format>& page, const Digests& digests, const NewTokens& fresh,
                               int first, int start, int length, int page_size, int part = 0, int parts = 1) {
    constexpr int LANES = KeyLanes<D>::COUNT, TOKENS = KeyLanes<D>::TOKENS, ROUNDS = KeyLanes<D>::ROUNDS;
    constexpr bool TOGETHER = ROUNDS > 1;                         // all warps take all tokens, and each stores some
    constexpr int BATCH = !Format::AS_IS ? 2 : TOGETHER ? 4 : 8;  // tokens in flight; else instructions count
    using Summary = typename Kind::template Summary<T, D>;
    const int token = lane_id() / LANES, channel = lane_id() % LANES * 8;
    const int end = min(first + page_size, length);
    const bool active = token < TOKENS;
    Summary summary;
#pragma unroll 1
    for (int base = (Summary::WHOLE ? first : max(first, start)) + token; base < end; base += TOKENS * BATCH) {
        uint4 loaded[BATCH][ROUNDS];
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            const int position = base + j * TOKENS;
            if (!active || position >= end) continue;
            const bool is_new = position >= start;
            if constexpr (Format::AS_IS) {  // one load, from here or there
                const u16* const old = page.keys + i64(position - first) * D;
                const u16* const key = is_new ? fresh.key + fresh.column(position - start) * fresh.key_stride : old;
#pragma unroll
                for (int round = 0; round < ROUNDS; ++round)
                    loaded[j][round] = load16(key + channel + round * LANES * 8);
            } else {
                loaded[j][0] = is_new
                                   ? load16(fresh.key + fresh.column(position - start) * fresh.key_stride + channel)
                                   : page.key8(position - first, channel);
            }
        }
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            const int position = base + j * TOKENS;
            if (!active || position >= end) continue;
#pragma unroll
            for (int round = 0; round < ROUNDS; ++round) {
                uint4 key = loaded[j][round], value = {0, 0, 0, 0};
                const int at = channel + round * LANES * 8;
                if (position >= start && (!TOGETHER || position % parts == part)) {
                    if constexpr (Format::template value_record<D>(UNIT_SHIFT) > 0)
                        value = load16(fresh.value + fresh.column(position - start) * fresh.value_stride + at);
                    key = page.store(position - first, at, key, value);
                }
                if constexpr (TOGETHER)
                    summary.take(key, round);
                else
                    summary.take(key);
            }
        }
    }
    if constexpr (TOGETHER)
        __syncthreads();
    else
        __syncwarp();
    summary.store(page, digests, end - first, page_size, part, parts);
}

// One new token into a page, at `offset` tokens from its start. The digest is left as it is.
template <typename T, int D, typename Format>
__device__ void store_token(const StoredPage<T, D, Format>& page, int offset, const u16* key /* [d] */,
                            const u16* value /* [d] */) {
    const int channel = lane_id() * 8;
    if (channel >= D) return;
    page.store(offset, channel, load16(key + channel), load16(value + channel));
}

// The digest of a page that holds `count` tokens. All warps of a CTA call it, `part` counts them from any of them on.
template <typename Kind, typename T, int D, typename Format>
__device__ void summarize_page(const StoredPage<T, D, Format>& page, const Digests& digests, int count, int page_size,
                               int part) {
    constexpr bool SHARED = Kind::template Summary<T, D>::SHARED;
    if (!SHARED && part) return;
    append_to_page<Kind>(page, digests, NewTokens{}, 0, count, count, page_size, part, SHARED ? num_warps() : 1);
}
