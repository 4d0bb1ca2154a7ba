// Min/max digests: the channel-wise minimum and maximum of a page's keys, in the keys' type, [num_pages, hkv, 2, d].
//
// They give Quest's bound of a page's best dot product: sum over channels of max(q * min, q * max), which is q- * min
// + q+ * max and hence a matrix product on the tensor cores: pages [16, 2 d] x query heads [2 d, 8]. Products of
// 16-bit floats are exact in float32, so nothing is lost by it.
//
// A lane loads 16 bytes, 8 consecutive channels of one page, and uses them as the columns the tensor core wants it to
// hold (2c, 2c + 1, 2c + 8, 2c + 9 of two products). Which channel is called which column does not matter to a dot
// product as long as the query is staged in the same order. Two loads, of neighbouring 16 bytes, make the four lanes
// of a page fetch a whole line of 128 bytes: by halves of lines, requests to L2 are the limit, not memory.
#pragma once
#include "common/digest.cuh"

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

// A lane takes 8 channels of a token, so D / 8 lanes take a token.
template <typename T, int D>
struct MinMaxSummary {
    static constexpr bool WHOLE = true, SHARED = false;

    uint4 low = {T::INF2, T::INF2, T::INF2, T::INF2};
    uint4 high = {T::NEG_INF2, T::NEG_INF2, T::NEG_INF2, T::NEG_INF2};

    __device__ void take(uint4 key) {
        low = min8<T>(low, key);
        high = max8<T>(high, key);
    }

    __device__ void store(const Page& page, const Digests& digests, int, int, int, int) {
        constexpr int LANES = D / 8, TOKENS = WARP / LANES;
#pragma unroll
        for (int other = 1; other < TOKENS; ++other) {
            low = min8<T>(low, shuffle8(low, lane_id() % LANES + other * LANES));
            high = max8<T>(high, shuffle8(high, lane_id() % LANES + other * LANES));
        }
        if (lane_id() >= LANES) return;
        u16* const digest = digests.at<u16>(0) + page.item * 2 * D + lane_id() * 8;
        store16(digest, low);
        store16(digest + D, high);
    }
};

__device__ inline u32 negative_part(u32 two) { return two & (two >> 15 & 0x00010001u) * 0xFFFFu; }

// Where in a digest [2, d] the 8 channels of a lane's word begin.
__device__ inline int digest_channel(int chunk, int lane) { return chunk / 2 * 64 + lane % 4 * 16 + chunk % 2 * 8; }

// One warp scores tiles of 16 pages, one after the other, for all query heads of a group. Registers are loaded with
// the next tile as soon as they were used, so a warp always has loads in flight.
template <typename T, int D, int HEAD_TILES>
struct MinMaxScorer {
    static constexpr int CHUNKS = 2 * D / 32, BATCH = CHUNKS < 8 ? CHUNKS : 8;
    static constexpr int STAGED = HEAD_TILES * CHUNKS * WARP;  // words of 16 bytes of a staged query
    static constexpr int ROOM = 0;

    const u16* digests;
    int num_kv_heads, head;
    float scaling;
    const uint4* query;             // staged
    uint4 low[BATCH], high[BATCH];  // 16 bytes of the digests of pages lane / 4 and lane / 4 + 8
    const u16 *low_page, *high_page;

    __device__ MinMaxScorer(const Digests& digests, int num_kv_heads, int head, int, float scaling, uint4*)
        : digests(digests.at<u16>(0)), num_kv_heads(num_kv_heads), head(head), scaling(scaling) {}

    // The query head that this lane's scores[tile][i] and scores[tile][2 + i] belong to.
    __device__ static int head_of(int tile, int i) { return tile * MMA_HEADS + lane_id() % 4 * 2 + i; }

    // Stages a query in shared memory: its negative parts for the minimum, its positive parts for the maximum. Warps
    // first, first + stride, ... of those that share the work call it, or one does all with 0 and 1. `begin` is
    // called when it is best to load pages.
    template <typename Begin>
    __device__ void stage(uint4* staged /* [STAGED] */, const u16* query /* [group, d] */, int group, int first,
                          int stride, Begin begin) {
#pragma unroll 2
        for (int i = first; i < HEAD_TILES * CHUNKS; i += stride) {
            const int channel = digest_channel(i % CHUNKS, lane_id());
            const int in_group = i / CHUNKS * MMA_HEADS + lane_id() / 4;
            uint4 q = {0, 0, 0, 0};
            if (in_group < group) q = load16(query + in_group * D + channel % D);
            const uint4 below = {negative_part(q.x), negative_part(q.y), negative_part(q.z), negative_part(q.w)};
            staged[i * WARP + lane_id()] =
                channel < D ? below : uint4{q.x ^ below.x, q.y ^ below.y, q.z ^ below.z, q.w ^ below.w};
        }
        begin();
    }
    __device__ void use(const uint4* staged) { query = staged; }

    // This lane's two pages of the next tile.
    __device__ void aim(int low_id, int high_id) {
        low_page = digests + (i64(max(low_id, 0)) * num_kv_heads + head) * 2 * D + digest_channel(0, lane_id());
        high_page = digests + (i64(max(high_id, 0)) * num_kv_heads + head) * 2 * D + digest_channel(0, lane_id());
    }

    template <int CHUNK>
    __device__ void load() {
        constexpr int OFFSET = (CHUNK / 2 * 64 + CHUNK % 2 * 8) * 2;  // of digest_channel, in bytes
        low[CHUNK % BATCH] = load16_of_line<OFFSET>(low_page);
        high[CHUNK % BATCH] = load16_of_line<OFFSET>(high_page);
    }

    __device__ void load_first() {
        unrolled<BATCH>([&](auto chunk) { load<chunk.value>(); });
        __syncwarp();  // all are under way before the first is used: else ptxas saves registers and waits often
    }

    template <int CHUNK>
    __device__ void multiply(float (&scores)[HEAD_TILES][4]) const {
        const uint4 &a = low[CHUNK % BATCH], &b = high[CHUNK % BATCH];
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile) {
            const uint4 q = query[(tile * CHUNKS + CHUNK) * WARP + lane_id()];
            T::mma(scores[tile], a.x, b.x, a.y, b.y, q.x, q.y);
            T::mma(scores[tile], a.z, b.z, a.w, b.w, q.z, q.w);
        }
    }

    // The tile whose first chunks are under way; `next()` aims at the one after. Scores come as the tensor core
    // leaves them (device.cuh).
    template <typename Next>
    __device__ void score(float (&scores)[HEAD_TILES][4], Next next) {
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile)
            scores[tile][0] = scores[tile][1] = scores[tile][2] = scores[tile][3] = 0.f;
        unrolled<CHUNKS - BATCH>([&](auto chunk) {
            multiply<chunk.value>(scores);
            load<chunk.value + BATCH>();
        });
        next();
        unrolled<BATCH>([&](auto chunk) {
            multiply<CHUNKS - BATCH + chunk.value>(scores);
            load<chunk.value>();
        });
#pragma unroll
        for (int i = 0; i < HEAD_TILES * 4; ++i) scores[i / 4][i % 4] *= scaling;
    }
};

struct MinMax {
    template <typename T, int D>
    using Summary = MinMaxSummary<T, D>;
    template <typename T, int D, int HEAD_TILES>
    using Scorer = MinMaxScorer<T, D, HEAD_TILES>;
};
