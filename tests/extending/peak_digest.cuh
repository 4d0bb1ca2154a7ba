// The largest magnitude of every channel of a page's keys, [num_pages, hkv, d], and the bound sum |q| * peak.
#pragma once
#include "common/digest.cuh"

// A lane takes 8 channels of a token, so D / 8 lanes take a token.
template <typename T, int D>
struct PeakSummary {
    static constexpr bool WHOLE = true, SHARED = false;
    uint4 peak = {0, 0, 0, 0};

    __device__ void raise(uint4 v) {
        peak = {T::max2(peak.x, v.x), T::max2(peak.y, v.y), T::max2(peak.z, v.z), T::max2(peak.w, v.w)};
    }
    __device__ void take(uint4 key) {
        constexpr u32 NO_SIGN = 0x7FFF7FFFu;
        raise({key.x & NO_SIGN, key.y & NO_SIGN, key.z & NO_SIGN, key.w & NO_SIGN});
    }
    __device__ void store(const Page& page, const Digests& digests, int, int, int, int) {
        constexpr int LANES = D / 8;
        const uint4 own = peak;
        for (int other = 1; other < WARP / LANES; ++other) {
            const int lane = lane_id() % LANES + other * LANES;
            raise({__shfl_sync(ALL_LANES, own.x, lane), __shfl_sync(ALL_LANES, own.y, lane),
                   __shfl_sync(ALL_LANES, own.z, lane), __shfl_sync(ALL_LANES, own.w, lane)});
        }
        if (lane_id() < LANES) store16(digests.at<u16>(0) + page.item * D + lane_id() * 8, peak);
    }
};

// One warp scores sixteen pages: of lane l, pages l / 4 and l / 4 + 8, and two heads of every eight.
template <typename T, int D, int HEAD_TILES>
struct PeakScorer {
    static constexpr int STAGED = HEAD_TILES * MMA_HEADS * D / 4, ROOM = 0;

    const u16 *peaks, *low_page, *high_page;
    const float* query;  // magnitudes, [HEAD_TILES * 8, d]
    int num_kv_heads, head;
    float scaling;

    __device__ PeakScorer(const Digests& digests, int num_kv_heads, int head, int, float scaling, uint4*)
        : peaks(digests.at<u16>(0)), num_kv_heads(num_kv_heads), head(head), scaling(scaling) {}
    __device__ static int head_of(int tile, int i) { return tile * MMA_HEADS + lane_id() % 4 * 2 + i; }

    template <typename Begin>
    __device__ void stage(uint4* staged, const u16* query, int group, int first, int stride, Begin begin) {
        float* const magnitudes = reinterpret_cast<float*>(staged);
        for (int i = first * WARP + lane_id(); i < HEAD_TILES * MMA_HEADS * D; i += stride * WARP)
            magnitudes[i] = i < group * D ? fabsf(T::to_float(query[i])) : 0.f;
        begin();
    }
    __device__ void use(const uint4* staged) { query = reinterpret_cast<const float*>(staged); }
    __device__ void aim(int low_id, int high_id) {
        low_page = peaks + (i64(max(low_id, 0)) * num_kv_heads + head) * D;
        high_page = peaks + (i64(max(high_id, 0)) * num_kv_heads + head) * D;
    }
    __device__ void load_first() const {}

    template <typename Next>
    __device__ void score(float (&scores)[HEAD_TILES][4], Next next) {
        for (int tile = 0; tile < HEAD_TILES; ++tile)
            for (int i = 0; i < 4; ++i) {
                const float* const q = query + head_of(tile, i % 2) * D;
                const u16* const peak = i < 2 ? low_page : high_page;
                float sum = 0.f;
                for (int channel = 0; channel < D; ++channel) sum += q[channel] * T::to_float(peak[channel]);
                scores[tile][i] = sum * scaling;
            }
        next();
    }
};

struct Peak {
    template <typename T, int D>
    using Summary = PeakSummary<T, D>;
    template <typename T, int D, int HEAD_TILES>
    using Scorer = PeakScorer<T, D, HEAD_TILES>;
};
