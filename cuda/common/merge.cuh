// Partial attention results of several warps, CTAs or clusters put together: weights relative to different largest
// logits are brought to the largest of all.
#pragma once
#include "common/attend.cuh"

// One partial result: largest logit and sum of weights per head, and the weighted values as the lanes hold them.
template <int D, int HEAD_TILES>
struct Partial {
    static constexpr int HEADS = HEAD_TILES * MMA_HEADS, WORDS = HEAD_TILES * (D / 16) * WARP;

    float peak[HEADS], mass[HEADS];
    float4 out[WORDS];

    // The word's two heads are this one (.x, .z) and the next (.y, .w).
    __device__ static int head_of(int word) { return word / (D / 16 * WARP) * MMA_HEADS + word % 4 * 2; }
};

__device__ inline void add_scaled(float4& sum, const float4& part, float even, float odd) {
    sum.x += part.x * even;
    sum.y += part.y * odd;
    sum.z += part.z * even;
    sum.w += part.w * odd;
}

// Room for the warps of a CTA to merge in: the sums pass through in slices.
template <int D, int HEAD_TILES>
struct WarpMerge {
    static constexpr int MAX_WARPS = 16, SLICE = 8;  // rows of sixteen channels
    static constexpr int HEADS = HEAD_TILES * MMA_HEADS;

    float peak[MAX_WARPS][HEADS], mass[MAX_WARPS][HEADS];
    float4 slice[1];  // [num_warps][SLICE][WARP], as many as there are warps

};

// The sum over the warps of a CTA, to `total` in shared memory.
template <typename T, int D, int HEAD_TILES>
__device__ void merge_warps(Attention<T, D, HEAD_TILES>& mine, WarpMerge<D, HEAD_TILES>& room,
                            Partial<D, HEAD_TILES>& total) {
    constexpr int ROWS = D / 16, SLICE = WarpMerge<D, HEAD_TILES>::SLICE, HEADS = HEAD_TILES * MMA_HEADS;
#pragma unroll
    for (int tile = 0; tile < HEAD_TILES; ++tile) {
        float mass = mine.mass[tile];
        mass += __shfl_xor_sync(ALL_LANES, mass, 1);
        mass += __shfl_xor_sync(ALL_LANES, mass, 2);
        if (lane_id() % 4) continue;
        room.peak[warp_id()][tile * MMA_HEADS + lane_id() / 4] = mine.peak[tile];
        room.mass[warp_id()][tile * MMA_HEADS + lane_id() / 4] = mass;
    }
    __syncthreads();
    if (threadIdx.x < HEADS) {
        float peak = LOWEST, mass = 0.f;
        for (int warp = 0; warp < num_warps(); ++warp) peak = fmaxf(peak, room.peak[warp][threadIdx.x]);
        for (int warp = 0; warp < num_warps(); ++warp) {
            const float weight = exp2f(room.peak[warp][threadIdx.x] - peak);
            mass += room.mass[warp][threadIdx.x] * weight;
            room.peak[warp][threadIdx.x] = weight;  // from here on: the warp's weight
        }
        total.peak[threadIdx.x] = peak;
        total.mass[threadIdx.x] = mass;
    }
#pragma unroll
    for (int base = 0; base < HEAD_TILES * ROWS; base += SLICE) {
        if (base) __syncthreads();
#pragma unroll
        for (int i = 0; i < SLICE; ++i) {
            if (base + i >= HEAD_TILES * ROWS) break;
            const float(&row)[4] = mine.out[(base + i) / ROWS][(base + i) % ROWS];
            room.slice[(warp_id() * SLICE + i) * WARP + lane_id()] = {row[0], row[1], row[2], row[3]};
        }
        __syncthreads();
        const int words = min(SLICE, HEAD_TILES * ROWS - base) * WARP;
        for (int word = threadIdx.x; word < words; word += blockDim.x) {
            const int head = Partial<D, HEAD_TILES>::head_of(base * WARP + word);
            float4 sum = {0.f, 0.f, 0.f, 0.f};
            for (int warp = 0; warp < num_warps(); ++warp)
                add_scaled(sum, room.slice[warp * SLICE * WARP + word], room.peak[warp][head], room.peak[warp][head + 1]);
            total.out[base * WARP + word] = sum;
        }
    }
    __syncthreads();
}

// Logits that take weight but have no value (gpt-oss), in float32 or in the element type.
struct Sinks {
    const void* logits;  // [hq] or null
    int wide;            // whether they are float32

    template <typename T>
    __device__ float of(int head) const {
        if (logits == nullptr) return -infinity();
        const float logit = wide ? static_cast<const float*>(logits)[head]
                                 : T::to_float(static_cast<const u16*>(logits)[head]);
        return logit * LOG2_E;
    }
};

// Where the final result of one sequence and kv head goes.
struct Result {
    u16* out;    // [group, d]
    float* lse;  // [group] natural logarithm, the sink in it
    Sinks sinks;
    int first_head, group;
};

template <int D>
__device__ Result result_of(u16* out, float* lse, Sinks sinks, int item, int head, int group) {
    return {out + i64(item) * group * D, lse + i64(item) * group, sinks, head * group, group};
}

constexpr int MAX_SPLITS = 64;  // parts that merge_attention can put together

// What weigh_parts works on, in shared memory; `peak` becomes each part's weight in the output.
template <int HEADS, int MAX_PARTS>
struct Parts {
    float peak[MAX_PARTS][HEADS], mass[MAX_PARTS][HEADS];
};

// Every part's weight in the output, and the log-sum-exp. `peak_of(part, head)` and `mass_of(part, head)` may lie far
// away (another SM's memory), so each is fetched by a thread of its own.
template <typename T, int HEADS, int MAX_PARTS, typename Peak, typename Mass>
__device__ void weigh_parts(Parts<HEADS, MAX_PARTS>& parts, int count, const Result& result, bool write_lse,
                            Peak peak_of, Mass mass_of) {
    for (int i = threadIdx.x; i < count * HEADS; i += blockDim.x) {
        parts.peak[i / HEADS][i % HEADS] = peak_of(i / HEADS, i % HEADS);
        parts.mass[i / HEADS][i % HEADS] = mass_of(i / HEADS, i % HEADS);
    }
    __syncthreads();
    const int head = threadIdx.x;
    if (head < HEADS) {
        const bool exists = head < result.group;
        const float sink = exists ? result.sinks.of<T>(result.first_head + head) : -infinity();
        float peak = fmaxf(LOWEST, sink);
#pragma unroll 8
        for (int part = 0; part < count; ++part) peak = fmaxf(peak, parts.peak[part][head]);
        float mass = exp2f(sink - peak);
#pragma unroll 8
        for (int part = 0; part < count; ++part) mass += parts.mass[part][head] * exp2f(parts.peak[part][head] - peak);
        const float scale = mass > 0.f ? 1.f / mass : 0.f;
#pragma unroll 8
        for (int part = 0; part < count; ++part) parts.peak[part][head] = exp2f(parts.peak[part][head] - peak) * scale;
        if (write_lse && exists) result.lse[head] = mass > 0.f ? (peak + log2f(mass)) * LN_2 : -infinity();
    }
    __syncthreads();
}

template <typename T, int D, int HEAD_TILES>
__device__ void write_word(const Result& result, int word, const float4& sum) {
    const int head = Partial<D, HEAD_TILES>::head_of(word);
    const int channel = Attention<T, D, HEAD_TILES>::channel_of(word / WARP % (D / 16), word % WARP);
    u32* const out = reinterpret_cast<u32*>(result.out + head * D + channel);
    if (head < result.group) out[0] = T::pack(sum.x, sum.z);
    if (head + 1 < result.group) out[D / 2] = T::pack(sum.y, sum.w);
}

// The CTAs of a cluster put their parts together, each CTA a slice of the output, and write it.
template <typename T, int D, int HEAD_TILES>
__device__ void merge_cluster(Partial<D, HEAD_TILES>& mine, const Result& result) {
    constexpr int HEADS = HEAD_TILES * MMA_HEADS, MAX_CTAS = 16, WORDS = Partial<D, HEAD_TILES>::WORDS;
    __shared__ Parts<HEADS, MAX_CTAS> parts;
    const int rank = cluster_rank(), size = cluster_size();
    cluster_arrive();
    cluster_wait();
    weigh_parts<T>(parts, size, result, rank == 0,
                [&](int part, int head) { return load_remote(remote_address(&mine.peak[head], part)); },
                [&](int part, int head) { return load_remote(remote_address(&mine.mass[head], part)); });
    const int share = ceil_div(WORDS, size), end = min((rank + 1) * share, WORDS);
    for (int word = rank * share + threadIdx.x; word < end; word += blockDim.x) {
        const int head = Partial<D, HEAD_TILES>::head_of(word);
        float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
        for (int part = 0; part < size; ++part)
            add_scaled(sum, load_remote4(remote_address(&mine.out[word], part)), parts.peak[part][head],
                       parts.peak[part][head + 1]);
        write_word<T, D, HEAD_TILES>(result, word, sum);
    }
    cluster_arrive();  // no CTA may leave while another reads its shared memory
    cluster_wait();
}
