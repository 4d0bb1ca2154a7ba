// Digests of mean and deviation: mean - std and mean + std of a page's keys, by channel, in the keys' type,
// [num_pages, hkv, 2, d]. That is a box, and scored as that of min/max (minmax.cuh).
#pragma once
#include "common/minmax.cuh"

template <typename T, int D>
struct MeanStdSummary : KeySums<T, D> {
    static constexpr bool WHOLE = true, SHARED = false;

    // Squares are summed about the mean, in a second pass over the keys: about zero, where a mean is large, the
    // deviation would be lost in rounding.
    template <typename StoredPage>
    __device__ void store(const StoredPage& page, const Digests& digests, int count, int, int, int) const {
        constexpr int LANES = D / 8, TOKENS = WARP / LANES;
        const int channel = lane_id() % LANES * 8;
        float mean[8], squares[8] = {};
#pragma unroll
        for (int i = 0; i < 8; ++i) mean[i] = this->total(this->sums[i]) / count;
#pragma unroll 1
        for (int token = lane_id() / LANES; token < count; token += TOKENS) {
            float key[8];
            unpack8<T>(page.key8(token, channel), key);
#pragma unroll
            for (int i = 0; i < 8; ++i) squares[i] += (key[i] - mean[i]) * (key[i] - mean[i]);
        }
        float std[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) std[i] = sqrtf(this->total(squares[i]) / count);
        if (lane_id() >= LANES) return;
        u32 low[4], high[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            low[i] = T::pack(mean[2 * i] - std[2 * i], mean[2 * i + 1] - std[2 * i + 1]);
            high[i] = T::pack(mean[2 * i] + std[2 * i], mean[2 * i + 1] + std[2 * i + 1]);
        }
        u16* const digest = digests.at<u16>(0) + page.item * 2 * D + channel;
        store16(digest, {low[0], low[1], low[2], low[3]});
        store16(digest + D, {high[0], high[1], high[2], high[3]});
    }
};

struct MeanStd {
    template <typename T, int D>
    using Summary = MeanStdSummary<T, D>;
    template <typename T, int D, int HEAD_TILES>
    using Scorer = MinMaxScorer<T, D, HEAD_TILES>;
};
