// Scores by head that become shares: a page's largest share of any head's attention, as far as scores tell, is the
// largest of score - log-sum-exp of the head's scores of all pages but the last, whose digest may not be there yet.
// That sum is known when all pages of the cluster are scored, so scores are kept until then, each by the lane that
// will read it again.
#pragma once
#include "common/merge.cuh"

// Heads that are kept of a page: a power of two.
__device__ inline int kept_heads(int group) { return group <= 4 ? 4 : group <= 8 ? 8 : 16; }

template <typename Scorer, int HEAD_TILES>
struct KeptScores {
    float* page;                               // [16, heads] of the tile at hand
    float* first;                              // of the first
    int step, heads, group;                    // floats from tile to tile; heads kept of a page, and those that exist
    float m[HEAD_TILES][2], l[HEAD_TILES][2];  // of this lane's heads: largest score, sum of exp2(score - m); base 2

    // Tiles `at`, `at` + `stride`, ... of `kept`.
    __device__ KeptScores(float* kept, int at, int stride, int group)
        : step(stride * TILE * kept_heads(group)), heads(kept_heads(group)), group(group) {
        page = first = kept + (at * TILE + lane_id() / 4) * heads;
#pragma unroll
        for (int i = 0; i < HEAD_TILES * 2; ++i) m[i / 2][i % 2] = LOWEST, l[i / 2][i % 2] = 0.f;
    }

    // Scores as a `Scorer` leaves them, in base e, of a tile of which so many pages count.
    __device__ void keep(const float (&by_head)[HEAD_TILES][4], int count) {
#pragma unroll
        for (int i = 0; i < HEAD_TILES * 2; ++i) {
            const int head = Scorer::head_of(i / 2, i % 2);
            if (head >= group) continue;
            const float low = bounded(by_head[i / 2][i % 2], lane_id() / 4 < count);
            const float high = bounded(by_head[i / 2][2 + i % 2], lane_id() / 4 + 8 < count);
            page[head] = low;
            page[8 * heads + head] = high;
            add(i, fmaxf(low, high), exp2_fast(fminf(low, high) - fmaxf(low, high)) + 1.f);
        }
        page += step;
    }

    // Merges the sums of all warps of the cluster, all of which run; afterwards m are the log-sum-exps. `own` and
    // `reused` are those of `merge_cluster`, which comes later; `meanwhile` is called while others are waited for.
    template <typename T, int D, typename Meanwhile>
    __device__ void merge(void* own, void* reused, Meanwhile meanwhile) {
        const int ctas = cluster_size();
        const MergeBuffers<T, D, HEAD_TILES> buffers(own, reused, ctas,
                                                     OutputFragments<T, D, HEAD_TILES>(group).count());
#pragma unroll
        for (int i = 0; i < HEAD_TILES * 2; ++i) {
            const int head = Scorer::head_of(i / 2, i % 2);
            merge_rows(i);
            if (lane_id() < 4) buffers.warp_stats[warp_id()].m[head] = m[i / 2][i % 2];
            if (lane_id() < 4) buffers.warp_stats[warp_id()].l[head] = l[i / 2][i % 2];
        }
        __syncthreads();
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile) {
            if (warp_id() != tile) continue;
            const int head = tile * MMA_HEADS + lane_id() / 4;
            buffers.send_cta_stats(head, buffers.merge_warp_stats(head), cluster_rank(), ctas);
        }
        cluster_arrive();
        meanwhile();
        cluster_wait();
#pragma unroll
        for (int i = 0; i < HEAD_TILES * 2; ++i) {
            const int head = Scorer::head_of(i / 2, i % 2);
            m[i / 2][i % 2] = LOWEST, l[i / 2][i % 2] = 0.f;
#pragma unroll 1
            for (int cta = lane_id() / 4; cta < ctas; cta += 8)
                add(i, buffers.cta_stats[cta].m[head], buffers.cta_stats[cta].l[head]);
            merge_rows(i);
            m[i / 2][i % 2] += __log2f(l[i / 2][i % 2]);
        }
        page = first;
    }

    // The next tile's pages, of which this lane has two: logarithms of their largest shares, in base e.
    __device__ float2 next() {
        float by_head[HEAD_TILES][4];
#pragma unroll
        for (int i = 0; i < HEAD_TILES * 2; ++i) {
            const int head = Scorer::head_of(i / 2, i % 2);
            const bool exists = head < group;
            by_head[i / 2][i % 2] = exists ? (page[head] - m[i / 2][i % 2]) * LN_2 : -infinity();
            by_head[i / 2][2 + i % 2] = exists ? (page[8 * heads + head] - m[i / 2][i % 2]) * LN_2 : -infinity();
        }
        page += step;
        return pool_heads<Scorer>(by_head, group, POOL_MAX);
    }

  private:
    // In base 2 and finite; a NaN, and what does not exist, is the lowest.
    __device__ static float bounded(float score, bool exists) {
        return exists ? fminf(fmaxf(score * LOG2_E, LOWEST), -LOWEST) : LOWEST;
    }
    // Another sum into that of this lane's head `i`.
    __device__ void add(int i, float other_m, float other_l) {
        float &my_m = m[i / 2][i % 2], &my_l = l[i / 2][i % 2];
        const float new_m = fmaxf(my_m, other_m);
        my_l = my_l * exp2_fast(my_m - new_m) + other_l * exp2_fast(other_m - new_m);
        my_m = new_m;
    }
    // The sums of the eight lanes that have the same heads.
    __device__ void merge_rows(int i) {
#pragma unroll
        for (int step = 4; step < WARP; step *= 2)
            add(i, __shfl_xor_sync(ALL_LANES, m[i / 2][i % 2], step),
                __shfl_xor_sync(ALL_LANES, l[i / 2][i % 2], step));
    }
};
