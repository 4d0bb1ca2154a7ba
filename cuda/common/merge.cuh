// Softmax states of parts of the tokens, merged into the attention of all of them.
//
// The state of a part is, for every head, m, its largest logit (in base 2), l, the sum of exp2(logit - m), and acc,
// the sum of exp2(logit - m) * value. Two states become one when both are scaled to the larger m (the online
// softmax). In the end the output is acc / l, and the log-sum-exp in base 2 is m + log2(l).
//
// Who writes what, where and when (`merge_cluster`):
//
//   each warp     its m, l ───────────────────────────────> warp_stats[warp] of its CTA
//   ───────────── __syncthreads: no warp attends any more, so what the warps read then may be written over
//   warp t        m, l of the CTA's warps, merged, for
//                 tile t of the heads ────────────────────> cta_stats[its CTA] of every CTA
//   each warp     its acc, scaled to the CTA's m ─────────> warp_acc[warp] of its CTA
//   ───────────── __syncthreads
//   each thread   fragments of acc, summed over the warps > slices[its CTA] of the CTA that will write the fragment
//   ───────────── cluster_arrive, meanwhile(), cluster_wait: the only wait for other CTAs
//   each warp     its share of the CTA's slice of the fragments, merged from cta_stats and slices ──> out, lse
//
// A CTA writes into the others before that barrier and reads only its own shared memory after it, so none needs to
// stay until the others are done.
#pragma once
#include "common/attend.cuh"

// Logits that take weight but have no value (gpt-oss), in float32 or in the element type.
struct Sinks {
    const void* logits;  // [hq] or null
    int wide;            // whether they are float32

    template <typename T>
    __device__ float of(int head) const {
        const float logit =
            wide ? static_cast<const float*>(logits)[head] : T::to_float(static_cast<const u16*>(logits)[head]);
        return logit * LOG2_E;
    }
};

// The result of a part of the tokens, in memory: outputs as fragments (below), and log-sum-exps in base 2.
template <int D, int HEAD_TILES>
struct Partial {
    float4 out[HEAD_TILES * (D / 16) * WARP];
    float lse[HEAD_TILES * MMA_HEADS];
};

// Where the result of one sequence and kv head goes.
template <int D, int HEAD_TILES>
struct Result {
    u16* out;    // [group, d]
    float* lse;  // [group] natural logarithm, the sink in it
    Sinks sinks;
    int first_head, group;
    Partial<D, HEAD_TILES>* partial;  // goes there instead, without sinks, if not null

    __device__ Result(u16* out, float* lse, Sinks sinks, int item, int head, int group,
                      Partial<D, HEAD_TILES>* partial = nullptr)
        : out(out + i64(item) * group * D),
          lse(lse + i64(item) * group),
          sinks(sinks),
          first_head(head * group),
          group(group),
          partial(partial) {}
    // The sink logits of this head and the next; -inf where there is none.
    template <typename T>
    __device__ float2 sink(int head) const {
        if (partial || sinks.logits == nullptr) return {-infinity(), -infinity()};
        return {head < group ? sinks.of<T>(first_head + head) : -infinity(),
                head + 1 < group ? sinks.of<T>(first_head + head + 1) : -infinity()};
    }
    // From a log-sum-exp in base 2.
    __device__ void write_lse(int head, float base2) const {
        if (partial)
            partial->lse[head] = base2;
        else if (head < group)
            lse[head] = base2 * LN_2;
    }
};

// How acc is cut into fragments of 16 bytes, each the registers of one lane for one tile of sixteen channels: two
// channels of two heads. Fragments of heads that the group does not have are left out.
template <typename T, int D, int HEAD_TILES>
struct OutputFragments {
    static constexpr int ROWS = D / 16;
    int columns;  // pairs of heads in a tile

    __device__ explicit OutputFragments(int group) : columns(min((min(group, MMA_HEADS) + 1) / 2, MMA_HEADS / 2)) {}
    __device__ int count() const { return HEAD_TILES * ROWS * 8 * columns; }
    // This lane's fragment of a row of a tile, if its column is left in.
    __device__ int index(int tile, int row) const {
        return ((tile * ROWS + row) * 8 + lane_id() / 4) * columns + lane_id() % 4;
    }
    __device__ bool has_lane() const { return lane_id() % 4 < columns; }

    // The heads of a fragment are this one (.x, .z) and the next (.y, .w).
    __device__ int head_of(int fragment) const {
        return fragment / (ROWS * 8 * columns) * MMA_HEADS + fragment % columns * 2;
    }
    // Whether it is among the first of its tile, which have all the tile's heads.
    __device__ bool is_first_of_heads(int fragment) const { return fragment % (count() / HEAD_TILES) < columns; }

    __device__ void write(const Result<D, HEAD_TILES>& result, int fragment, const float4& out) const {
        if (result.partial) result.partial->out[fragment] = out;
        if (result.partial) return;
        const int head = head_of(fragment), row = fragment / columns;
        u16* const first = result.out + head * D + OutputChannels<D>::of(row / 8 % ROWS, row % 8);
        if (head < result.group) put(first, T::pack(out.x, out.z));
        if (head + 1 < result.group) put(first + D, T::pack(out.y, out.w));
    }

  private:
    __device__ static void put(u16* first, u32 two) {
        if constexpr (OutputChannels<D>::NEXT == 1) {
            *reinterpret_cast<u32*>(first) = two;
        } else {
            first[0] = two;
            first[OutputChannels<D>::NEXT] = two >> 16;
        }
    }
};

// m and l of one head.
struct HeadStats {
    float m, l;
};

// m and l of every head.
template <int HEADS>
struct SoftmaxStats {
    float m[HEADS], l[HEADS];
};

// One more part into the state of two neighbouring heads, of which acc is a fragment.
__device__ inline void merge_part(float2& m, float2& l, float4& acc, const HeadStats& first, const HeadStats& second,
                                  const float4& part_acc) {
    const float2 new_m = {fmaxf(m.x, first.m), fmaxf(m.y, second.m)};
    const float2 scale = {exp2_fast(m.x - new_m.x), exp2_fast(m.y - new_m.y)};
    const float2 part_scale = {exp2_fast(first.m - new_m.x), exp2_fast(second.m - new_m.y)};
    l = {l.x * scale.x + first.l * part_scale.x, l.y * scale.y + second.l * part_scale.y};
    acc = {acc.x * scale.x + part_acc.x * part_scale.x, acc.y * scale.y + part_acc.y * part_scale.y,
           acc.z * scale.x + part_acc.z * part_scale.x, acc.w * scale.y + part_acc.w * part_scale.y};
    m = new_m;
}

// The states of LANES neighbouring lanes into one, which all of them have.
template <int LANES>
__device__ inline void merge_lanes(float2& m, float2& l, float4& acc) {
    float2 new_m = m;
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
        new_m.x = fmaxf(new_m.x, __shfl_xor_sync(ALL_LANES, new_m.x, step));
        new_m.y = fmaxf(new_m.y, __shfl_xor_sync(ALL_LANES, new_m.y, step));
    }
    const float2 scale = {exp2_fast(m.x - new_m.x), exp2_fast(m.y - new_m.y)};
    l = {l.x * scale.x, l.y * scale.y};
    acc = {acc.x * scale.x, acc.y * scale.y, acc.z * scale.x, acc.w * scale.y};
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
        l.x += __shfl_xor_sync(ALL_LANES, l.x, step);
        l.y += __shfl_xor_sync(ALL_LANES, l.y, step);
        acc.x += __shfl_xor_sync(ALL_LANES, acc.x, step);
        acc.y += __shfl_xor_sync(ALL_LANES, acc.y, step);
        acc.z += __shfl_xor_sync(ALL_LANES, acc.z, step);
        acc.w += __shfl_xor_sync(ALL_LANES, acc.w, step);
    }
    m = new_m;
}

// Writes fragments [first, first + num_fragments) of a result, and log-sum-exps, merged from `count` parts, of which
// `stats_of(part, head)` has m and l, `acc_of(part, fragment)` a fragment. Sixteen lanes share a fragment and take a
// sixteenth of the parts each.
template <typename T, int D, int HEAD_TILES, typename StatsOf, typename AccOf>
__device__ void write_merged(int count, int first, int num_fragments, const Result<D, HEAD_TILES>& result,
                             StatsOf stats_of, AccOf acc_of) {
    constexpr int LANES = 16;
    const OutputFragments<T, D, HEAD_TILES> fragments(result.group);
#pragma unroll 1
    for (int base = warp_id() * 2; base < num_fragments; base += num_warps() * 2) {
        const int fragment = first + min(base + lane_id() / LANES, num_fragments - 1);
        const int head = fragments.head_of(fragment);
        const float2 sink = result.template sink<T>(head);
        float2 m = {fmaxf(LOWEST, sink.x), fmaxf(LOWEST, sink.y)}, l = {0.f, 0.f};
        float4 acc = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
        for (int part = lane_id() % LANES; part < count; part += LANES)
            merge_part(m, l, acc, stats_of(part, head), stats_of(part, head + 1), acc_of(part, fragment));
        merge_lanes<LANES>(m, l, acc);
        l = {l.x + exp2_fast(sink.x - m.x), l.y + exp2_fast(sink.y - m.y)};
        if (lane_id() % LANES || base + lane_id() / LANES >= num_fragments) continue;
        const float2 scale = {l.x > 0.f ? reciprocal(l.x) : 0.f, l.y > 0.f ? reciprocal(l.y) : 0.f};
        fragments.write(result, fragment, {acc.x * scale.x, acc.y * scale.y, acc.z * scale.x, acc.w * scale.y});
        if (!fragments.is_first_of_heads(fragment)) continue;
        result.write_lse(head, l.x > 0.f ? m.x + __log2f(l.x) : -infinity());
        result.write_lse(head + 1, l.y > 0.f ? m.y + __log2f(l.y) : -infinity());
    }
}

// A CTA's shared memory for a merge. What other CTAs write, and what a warp writes while others still attend, has a
// place of its own; the warps' acc may take one that was used until then.
template <typename T, int D, int HEAD_TILES>
struct MergeBuffers {
    static constexpr int HEADS = HEAD_TILES * MMA_HEADS;
    using Stats = SoftmaxStats<HEADS>;

    Stats* cta_stats;   // [cluster_size], written by all CTAs of the cluster
    float4* slices;     // [cluster_size][width + 1], too: this CTA's slice of every CTA's acc
    int width;          // fragments of a slice; the one more spreads parts over the banks
    Stats* warp_stats;  // [num_warps]
    float4* warp_acc;   // [num_warps][fragments]

    __device__ MergeBuffers(void* own, void* reused, int ctas, int num_fragments)
        : width(ceil_div(num_fragments, ctas)) {
        cta_stats = static_cast<Stats*>(own);
        slices = reinterpret_cast<float4*>(cta_stats + ctas);
        warp_stats = reinterpret_cast<Stats*>(slices + ctas * (width + 1));
        warp_acc = static_cast<float4*>(reused);
        check_shared_end(warp_stats + num_warps());
    }

    template <typename Format>
    __device__ void store_warp_stats(const Attention<T, D, HEAD_TILES, Format>& warp) const {
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile) {
            warp_stats[warp_id()].m[tile * MMA_HEADS + lane_id() / 4] = warp.m[tile];
            warp_stats[warp_id()].l[tile * MMA_HEADS + lane_id() / 4] = warp.mass(tile);
        }
    }

    // Of a head over all warps, by the four lanes of the head.
    __device__ HeadStats merge_warp_stats(int head) const {
        float m = LOWEST, l = 0.f;
#pragma unroll 4
        for (int warp = lane_id() % 4; warp < num_warps(); warp += 4) {
            const Stats& part = warp_stats[warp];
            const float new_m = fmaxf(m, part.m[head]);
            l = l * exp2_fast(m - new_m) + part.l[head] * exp2_fast(part.m[head] - new_m);
            m = new_m;
        }
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
            const float part_m = __shfl_xor_sync(ALL_LANES, m, step), new_m = fmaxf(m, part_m);
            const float part_l = __shfl_xor_sync(ALL_LANES, l, step);
            l = l * exp2_fast(m - new_m) + part_l * exp2_fast(part_m - new_m);
            m = new_m;
        }
        return {m, l};
    }

    __device__ void send_cta_stats(int head, const HeadStats& stats, int rank, int num_ctas) const {
#pragma unroll 1
        for (int to = lane_id() % 4; to < num_ctas; to += 4) {
            store_remote(remote_address(&cta_stats[rank].m[head], to), __float_as_uint(stats.m));
            store_remote(remote_address(&cta_stats[rank].l[head], to), __float_as_uint(stats.l));
        }
    }

    template <typename Format>
    __device__ void store_warp_acc(const Attention<T, D, HEAD_TILES, Format>& warp,
                                   const OutputFragments<T, D, HEAD_TILES>& fragments, int num_fragments) const {
        float4* const own = warp_acc + warp_id() * num_fragments;
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile)
#pragma unroll
            for (int row = 0; row < D / 16; ++row) {
                const float (&acc)[4] = warp.out[tile][row];
                if (fragments.has_lane()) own[fragments.index(tile, row)] = {acc[0], acc[1], acc[2], acc[3]};
            }
    }

    __device__ void send_slices(int num_fragments, int rank) const {
#pragma unroll 1
        for (int fragment = threadIdx.x; fragment < num_fragments; fragment += blockDim.x) {
            float4 acc = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
            for (int warp = 0; warp < num_warps(); ++warp) {
                const float4 part = warp_acc[warp * num_fragments + fragment];
                acc = {acc.x + part.x, acc.y + part.y, acc.z + part.z, acc.w + part.w};
            }
            const int writer = fragment / width;
            float4* const place = slices + rank * (width + 1) + fragment - writer * width;
            store_remote4(remote_address(place, writer), acc);
        }
    }
};

// Merges the states of all warps of a cluster, as drawn above, and writes the result. `own` is the same place in
// every CTA and used for nothing else: a CTA that is ahead writes into those behind, once all run. `reused` may be
// what this CTA's warps read while they attended.
template <typename T, int D, int HEAD_TILES, typename Format, typename Meanwhile>
__device__ void merge_cluster(Attention<T, D, HEAD_TILES, Format>& warp, void* own, void* reused,
                              const Result<D, HEAD_TILES>& result, Meanwhile meanwhile) {
    const OutputFragments<T, D, HEAD_TILES> fragments(result.group);
    const int rank = cluster_rank(), num_ctas = cluster_size(), num_fragments = fragments.count();
    const MergeBuffers<T, D, HEAD_TILES> buffers(own, reused, num_ctas, num_fragments);
    buffers.store_warp_stats(warp);
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
        const int head = tile * MMA_HEADS + lane_id() / 4;
        const HeadStats stats = buffers.merge_warp_stats(head);
        if (warp_id() == tile) buffers.send_cta_stats(head, stats, rank, num_ctas);
        warp.rescale(tile, exp2_fast(warp.m[tile] - stats.m));
    }
    buffers.store_warp_acc(warp, fragments, num_fragments);
    __syncthreads();
    buffers.send_slices(num_fragments, rank);
    cluster_arrive();
    meanwhile();
    cluster_wait();
    const int first = rank * buffers.width;
    write_merged<T>(
        num_ctas, first, min(buffers.width, num_fragments - first), result,
        [&](int cta, int head) { return HeadStats{buffers.cta_stats[cta].m[head], buffers.cta_stats[cta].l[head]}; },
        [&](int cta, int fragment) { return buffers.slices[cta * (buffers.width + 1) + fragment - first]; });
}
