// Quest's bound of a page's best dot product: sum over channels of max(q * min, q * max), which is q- * min + q+ *
// max and hence a matrix product on the tensor cores: pages [16, 2 d] x query heads [2 d, 8]. Products of 16-bit
// floats are exact in float32, so nothing is lost by it.
//
// A lane loads 16 bytes, 8 consecutive channels of one page, and uses them as the columns the tensor core wants it to
// hold (2c, 2c + 1, 2c + 8, 2c + 9 of two products). Which channel is called which column does not matter to a dot
// product as long as the query is staged in the same order. Two loads, of neighbouring 16 bytes, make the four lanes
// of a page fetch a whole line of 128 bytes: by halves of lines, requests to L2 are the limit, not memory.
#pragma once
#include "common/device.cuh"

constexpr int TILE = 16;      // pages that a warp scores at once
constexpr int MMA_HEADS = 8;  // query heads of one matrix product

enum GroupPooling { POOL_MAX = 0, POOL_SUM = 1, POOL_NONE = 2 };

// A query's words of 16 bytes, in the order the lanes want them.
template <int D, int HEAD_TILES>
constexpr int QUERY_WORDS = HEAD_TILES * (D / 32) * WARP;

template <int D, int HEAD_TILES>
__device__ inline uint4 query_word(const u16* query /* [group, d] */, int group, int word) {
    const int lane = word % WARP, chunk = word / WARP % (D / 32),
              head = word / (WARP * (D / 32)) * MMA_HEADS + lane / 4;
    if (head >= group) return {0, 0, 0, 0};
    return load16(query + head * D + chunk * 32 + lane % 4 * 8);
}

__device__ inline u32 negative_part(u32 two) { return two & (two >> 15 & 0x00010001u) * 0xFFFFu; }

// Where in a digest [2, d] the 8 channels of a lane's word begin.
__device__ inline int digest_channel(int chunk, int lane) { return chunk / 2 * 64 + lane % 4 * 16 + chunk % 2 * 8; }

// Stages a query in shared memory: its negative parts for the minimum, its positive parts for the maximum. Warps
// first, first + stride, ... of those that share the work call it, or one does all with 0 and 1.
template <int D, int HEAD_TILES>
__device__ void stage_query(uint4* staged /* [2 * QUERY_WORDS] */, const u16* query, int group, int first,
                            int stride) {
    constexpr int CHUNKS = 2 * D / 32;
#pragma unroll 2
    for (int i = first; i < HEAD_TILES * CHUNKS; i += stride) {
        const int channel = digest_channel(i % CHUNKS, lane_id()), head = i / CHUNKS * MMA_HEADS + lane_id() / 4;
        uint4 q = {0, 0, 0, 0};
        if (head < group) q = load16(query + head * D + channel % D);
        const uint4 below = {negative_part(q.x), negative_part(q.y), negative_part(q.z), negative_part(q.w)};
        staged[i * WARP + lane_id()] =
            channel < D ? below : uint4{q.x ^ below.x, q.y ^ below.y, q.z ^ below.z, q.w ^ below.w};
    }
}

// One warp scores tiles of 16 pages, one after the other, for all query heads of a group. Registers are loaded with
// the next tile as soon as they were used, so a warp always has loads in flight.
template <typename T, int D, int HEAD_TILES>
struct Scorer {
    static constexpr int CHUNKS = 2 * D / 32, BATCH = CHUNKS < 8 ? CHUNKS : 8;

    uint4 low[BATCH], high[BATCH];  // 16 bytes of the digests of pages lane / 4 and lane / 4 + 8
    const u16 *low_page, *high_page;

    // `low_digest` and `high_digest` [2, d]: of this lane's two pages of the next tile.
    __device__ void aim(const u16* low_digest, const u16* high_digest) {
        low_page = low_digest + digest_channel(0, lane_id());
        high_page = high_digest + digest_channel(0, lane_id());
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
    __device__ void multiply(float (&scores)[HEAD_TILES][4], const uint4* staged) const {
        const uint4 &a = low[CHUNK % BATCH], &b = high[CHUNK % BATCH];
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile) {
            const uint4 q = staged[(tile * CHUNKS + CHUNK) * WARP + lane_id()];
            T::mma(scores[tile], a.x, b.x, a.y, b.y, q.x, q.y);
            T::mma(scores[tile], a.z, b.z, a.w, b.w, q.z, q.w);
        }
    }

    // The tile whose first chunks are under way; `next(*this)` aims at the one after. Scores come as the tensor core
    // leaves them (device.cuh).
    template <typename Next>
    __device__ void score(float (&scores)[HEAD_TILES][4], const uint4* staged, Next next) {
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile)
            scores[tile][0] = scores[tile][1] = scores[tile][2] = scores[tile][3] = 0.f;
        unrolled<CHUNKS - BATCH>([&](auto chunk) {
            multiply<chunk.value>(scores, staged);
            load<chunk.value + BATCH>();
        });
        next(*this);
        unrolled<BATCH>([&](auto chunk) {
            multiply<CHUNKS - BATCH + chunk.value>(scores, staged);
            load<chunk.value>();
        });
    }
};

// Over the heads of the group: .x for page lane / 4, .y for page lane / 4 + 8, the same in the four lanes of a page.
template <int HEAD_TILES>
__device__ float2 pool_heads(const float (&scores)[HEAD_TILES][4], int group, GroupPooling pooling) {
    const bool largest = pooling == POOL_MAX;
    float2 pooled = largest ? float2{-infinity(), -infinity()} : float2{0.f, 0.f};
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (tile * MMA_HEADS + lane_id() % 4 * 2 + i >= group) continue;
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
