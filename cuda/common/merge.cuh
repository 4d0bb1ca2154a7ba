// Partial attention results put together: weights relative to different largest logits are brought to the largest of
// all.
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

// Part of a result, in memory: outputs of some of the tokens as words (below), and their log-sum-exp in base 2.
template <int D, int HEAD_TILES>
struct Partial {
    float4 sums[HEAD_TILES * (D / 16) * WARP];
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
    __device__ void write_lse(int head, float base2) const {
        if (partial)
            partial->lse[head] = base2;
        else if (head < group)
            lse[head] = base2 * LN_2;
    }
};

// The weighted sums come in words of 16 bytes, one lane's registers for one tile of sixteen channels: two heads' sums
// of two channels. Words of heads that the group does not have are left out.
template <typename T, int D, int HEAD_TILES>
struct Words {
    static constexpr int ROWS = D / 16;
    int columns;  // pairs of heads in a tile

    __device__ explicit Words(int group) : columns(min((min(group, MMA_HEADS) + 1) / 2, MMA_HEADS / 2)) {}
    __device__ int count() const { return HEAD_TILES * ROWS * 8 * columns; }
    // This lane's word of a row of a tile, if its column is left in.
    __device__ int at(int tile, int row) const {
        return ((tile * ROWS + row) * 8 + lane_id() / 4) * columns + lane_id() % 4;
    }
    __device__ bool has_lane() const { return lane_id() % 4 < columns; }

    // The heads of a word are this one (.x, .z) and the next (.y, .w).
    __device__ int head_of(int word) const { return word / (ROWS * 8 * columns) * MMA_HEADS + word % columns * 2; }

    __device__ void write(const Result<D, HEAD_TILES>& result, int word, const float4& sum) const {
        if (result.partial) result.partial->sums[word] = sum;
        if (result.partial) return;
        const int head = head_of(word), row = word / columns;
        const int channel = Attention<T, D, HEAD_TILES>::channel_of(row / 8 % ROWS, row % 8);
        u32* const out = reinterpret_cast<u32*>(result.out + head * D + channel);
        if (head < result.group) out[0] = T::pack(sum.x, sum.z);
        if (head + 1 < result.group) out[D / 2] = T::pack(sum.y, sum.w);
    }
};

// Numbers of a part for each head.
template <int HEADS>
struct Heads {
    float peak[HEADS], mass[HEADS];
};

// Room in a CTA's shared memory to merge in. What other CTAs write, and what a warp writes while others still attend,
// has a place of its own; the warps' sums may take one that was used until then.
template <int D, int HEAD_TILES>
struct MergeRoom {
    static constexpr int HEADS = HEAD_TILES * MMA_HEADS;

    Heads<HEADS>* of_cta;   // [cluster_size], written by all CTAs of the cluster
    float4* slices;         // [cluster_size][width + 1], too: this CTA's slice of every CTA's sums
    int width;              // words of a slice; the one more spreads parts over the banks
    Heads<HEADS>* of_warp;  // [num_warps]
    float4* sums;           // [num_warps][words]

    __device__ MergeRoom(void* own, void* reused, int ctas, int words) : width(ceil_div(words, ctas)) {
        of_cta = static_cast<Heads<HEADS>*>(own);
        slices = reinterpret_cast<float4*>(of_cta + ctas);
        of_warp = reinterpret_cast<Heads<HEADS>*>(slices + ctas * (width + 1));
        sums = static_cast<float4*>(reused);
        check_shared_end(of_warp + num_warps());
    }
};

// Words [first, first + words) of a result out of `count` parts, and the log-sum-exp. `heads_of(part, head)` has a
// part's largest logits (.x, .z) and weights' sums (.y, .w) of this head and the next, `sum_of(part, word)` its
// weighted values. Sixteen lanes share a word and a sixteenth of the parts each.
template <typename T, int D, int HEAD_TILES, typename HeadsOf, typename SumOf>
__device__ void write_merged(int count, int first, int words, const Result<D, HEAD_TILES>& result, HeadsOf heads_of,
                             SumOf sum_of) {
    constexpr int LANES = 16;
    const Words<T, D, HEAD_TILES> shape(result.group);
#pragma unroll 1
    for (int base = warp_id() * 2; base < words; base += num_warps() * 2) {
        const int word = first + min(base + lane_id() / LANES, words - 1), head = shape.head_of(word);
        const float2 sink = result.template sink<T>(head);
        float2 most = {fmaxf(LOWEST, sink.x), fmaxf(LOWEST, sink.y)}, mass = {0.f, 0.f};
        float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
        for (int part = lane_id() % LANES; part < count; part += LANES) {
            const float4 some = heads_of(part, head), more = sum_of(part, word);
            const float2 peak = {fmaxf(most.x, some.x), fmaxf(most.y, some.z)};
            const float2 old = {exp2_fast(most.x - peak.x), exp2_fast(most.y - peak.y)};
            const float2 add = {exp2_fast(some.x - peak.x), exp2_fast(some.z - peak.y)};
            mass = {mass.x * old.x + some.y * add.x, mass.y * old.y + some.w * add.y};
            sum = {sum.x * old.x + more.x * add.x, sum.y * old.y + more.y * add.y, sum.z * old.x + more.z * add.x,
                   sum.w * old.y + more.w * add.y};
            most = peak;
        }
        float2 peak = most;
#pragma unroll
        for (int step = 1; step < LANES; step *= 2) {
            peak.x = fmaxf(peak.x, __shfl_xor_sync(ALL_LANES, peak.x, step));
            peak.y = fmaxf(peak.y, __shfl_xor_sync(ALL_LANES, peak.y, step));
        }
        const float2 weight = {exp2_fast(most.x - peak.x), exp2_fast(most.y - peak.y)};
        mass = {mass.x * weight.x, mass.y * weight.y};
        sum = {sum.x * weight.x, sum.y * weight.y, sum.z * weight.x, sum.w * weight.y};
#pragma unroll
        for (int step = 1; step < LANES; step *= 2) {
            mass.x += __shfl_xor_sync(ALL_LANES, mass.x, step);
            mass.y += __shfl_xor_sync(ALL_LANES, mass.y, step);
            sum.x += __shfl_xor_sync(ALL_LANES, sum.x, step);
            sum.y += __shfl_xor_sync(ALL_LANES, sum.y, step);
            sum.z += __shfl_xor_sync(ALL_LANES, sum.z, step);
            sum.w += __shfl_xor_sync(ALL_LANES, sum.w, step);
        }
        mass = {mass.x + exp2_fast(sink.x - peak.x), mass.y + exp2_fast(sink.y - peak.y)};
        if (lane_id() % LANES || base + lane_id() / LANES >= words) continue;
        const float2 scale = {mass.x > 0.f ? reciprocal(mass.x) : 0.f, mass.y > 0.f ? reciprocal(mass.y) : 0.f};
        shape.write(result, word, {sum.x * scale.x, sum.y * scale.y, sum.z * scale.x, sum.w * scale.y});
        if (word % (shape.count() / HEAD_TILES) >= shape.columns)
            continue;  // a tile's first words have all its heads
        result.write_lse(head, mass.x > 0.f ? peak.x + __log2f(mass.x) : -infinity());
        result.write_lse(head + 1, mass.y > 0.f ? peak.y + __log2f(mass.y) : -infinity());
    }
}

// The warps of a cluster put their results together and write the output: first the warps of each CTA, then every CTA
// sends slices of its sums to the CTAs that will write them, so that one cluster barrier is all there is to wait for.
// `own` is the same place in every CTA and used for nothing else: a CTA that is ahead writes into those behind.
// `reused` may be what this CTA's warps read while they attended. `meanwhile()` is done before the barrier is waited
// for.
template <typename T, int D, int HEAD_TILES, typename Format, typename Meanwhile>
__device__ void merge_cluster(Attention<T, D, HEAD_TILES, Format>& mine, void* own, void* reused,
                              const Result<D, HEAD_TILES>& result, Meanwhile meanwhile) {
    const Words<T, D, HEAD_TILES> shape(result.group);
    const int rank = cluster_rank(), size = cluster_size(), words = shape.count();
    const MergeRoom<D, HEAD_TILES> room(own, reused, size, words);
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
        float mass = mine.mass[tile];
        mass += __shfl_xor_sync(ALL_LANES, mass, 1);
        mass += __shfl_xor_sync(ALL_LANES, mass, 2);
        room.of_warp[warp_id()].peak[tile * MMA_HEADS + lane_id() / 4] = mine.peak[tile];
        room.of_warp[warp_id()].mass[tile * MMA_HEADS + lane_id() / 4] = mass;
    }
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
        const int head = tile * MMA_HEADS + lane_id() / 4;
        float peak = LOWEST, mass = 0.f;
#pragma unroll 4
        for (int warp = lane_id() % 4; warp < num_warps(); warp += 4) {
            const Heads<HEAD_TILES * MMA_HEADS>& some = room.of_warp[warp];
            const float largest = fmaxf(peak, some.peak[head]);
            mass = mass * exp2_fast(peak - largest) + some.mass[head] * exp2_fast(some.peak[head] - largest);
            peak = largest;
        }
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
            const float other = __shfl_xor_sync(ALL_LANES, peak, step), largest = fmaxf(peak, other);
            const float more = __shfl_xor_sync(ALL_LANES, mass, step);
            mass = mass * exp2_fast(peak - largest) + more * exp2_fast(other - largest);
            peak = largest;
        }
        if (warp_id() == tile)
#pragma unroll 1
            for (int to = lane_id() % 4; to < size; to += 4) {
                store_remote(remote_address(&room.of_cta[rank].peak[head], to), __float_as_uint(peak));
                store_remote(remote_address(&room.of_cta[rank].mass[head], to), __float_as_uint(mass));
            }
        mine.rescale(tile, exp2_fast(mine.peak[tile] - peak));
    }
    float4* const sums = room.sums + warp_id() * words;
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile)
#pragma unroll
        for (int row = 0; row < D / 16; ++row) {
            const float (&some)[4] = mine.out[tile][row];
            if (shape.has_lane()) sums[shape.at(tile, row)] = {some[0], some[1], some[2], some[3]};
        }
    __syncthreads();
#pragma unroll 1
    for (int word = threadIdx.x; word < words; word += blockDim.x) {
        float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
        for (int warp = 0; warp < num_warps(); ++warp) {
            const float4 some = room.sums[warp * words + word];
            sum = {sum.x + some.x, sum.y + some.y, sum.z + some.z, sum.w + some.w};
        }
        const int owner = word / room.width;
        store_remote4(remote_address(room.slices + rank * (room.width + 1) + word - owner * room.width, owner), sum);
    }
    cluster_arrive();
    meanwhile();
    cluster_wait();
    const int first = rank * room.width;
    write_merged<T>(
        size, first, min(room.width, words - first), result,
        [&](int part, int head) {
            const Heads<HEAD_TILES * MMA_HEADS>& some = room.of_cta[part];
            return float4{some.peak[head], some.mass[head], some.peak[head + 1], some.mass[head + 1]};
        },
        [&](int part, int word) { return room.slices[part * (room.width + 1) + word - first]; });
}
