// rms_norm: a row divided by its root mean square, times a weight per channel. A CTA takes a row; a thread, eight
// channels at a time.
#include "common/device.cuh"

constexpr int MAX_WARPS = 32;

// The sum over all threads of a CTA, known to each.
__device__ inline float cta_sum(float x) {
    __shared__ float of_warp[MAX_WARPS];
#pragma unroll
    for (int distance = WARP / 2; distance; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    if (lane_id() == 0) of_warp[warp_id()] = x;
    __syncthreads();
    x = lane_id() < num_warps() ? of_warp[lane_id()] : 0.f;
#pragma unroll
    for (int distance = WARP / 2; distance; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

template <typename T>
__device__ inline float squares(uint4 v) {
    float sum = 0.f;
#pragma unroll
    for (const u32 word : {v.x, v.y, v.z, v.w}) {
        const float low = T::to_float(u16(word)), high = T::to_float(u16(word >> 16));
        sum += low * low + high * high;
    }
    return sum;
}

// Rounded where transformers' Llama rounds: the normalised channels, then their products with the weight; with an
// offset once, as its Gemma does.
template <typename T>
__device__ inline u32 scaled(u32 x, u32 weight, float factor, float offset) {
    const auto low = [](u32 word) { return T::to_float(u16(word)); };
    const auto high = [](u32 word) { return T::to_float(u16(word >> 16)); };
    if (offset != 0.f)
        return T::pack(low(x) * factor * (offset + low(weight)), high(x) * factor * (offset + high(weight)));
    const u32 normal = T::pack(low(x) * factor, high(x) * factor);
    return T::pack(low(normal) * low(weight), high(normal) * high(weight));
}

template <typename T>
__global__ void __launch_bounds__(1024) rms_norm(const u16* x,       // [rows, d], rows `stride` elements apart
                                                 const u16* weight,  // [d]
                                                 u16* out,           // [rows, d]
                                                 i64 stride, int d, float epsilon, float offset) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int step = blockDim.x * 8;
    const u16* const row = x + blockIdx.x * stride;
    float sum = 0.f;
    for (int i = threadIdx.x * 8; i < d; i += step) sum += squares<T>(load16(row + i));
    const float factor = rsqrtf(cta_sum(sum) / d + epsilon);
    for (int i = threadIdx.x * 8; i < d; i += step) {
        const uint4 v = load16(row + i), w = load16(weight + i);
        *reinterpret_cast<uint4*>(out + i64(blockIdx.x) * d + i) = {
            scaled<T>(v.x, w.x, factor, offset), scaled<T>(v.y, w.y, factor, offset),
            scaled<T>(v.z, w.z, factor, offset), scaled<T>(v.w, w.w, factor, offset)};
    }
}
