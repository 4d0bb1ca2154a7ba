// rotate: rotary position embedding of query and key heads. A warp takes one head of a token; a lane, two channels of
// its first half and the two of the second half that they turn with.
#include "common/device.cuh"

// Rounded where plain torch rounds: both products, then their sum.
template <typename T>
__device__ inline u32 turned(u32 x, u32 other, u32 cos, u32 sin, float sign) {
    const auto low = [](u32 word) { return T::to_float(u16(word)); };
    const auto high = [](u32 word) { return T::to_float(u16(word >> 16)); };
    const u32 straight = T::pack(low(x) * low(cos), high(x) * high(cos));
    const u32 crossed = T::pack(sign * low(other) * low(sin), sign * high(other) * high(sin));
    return T::pack(low(straight) + low(crossed), high(straight) + high(crossed));
}

template <typename T>
__global__ void __launch_bounds__(256)
    rotate(const u16* query,  // [b, hq, t, d], strides in elements
           const u16* key,    // [b, hkv, t, d], strides in elements
           const u16* cos,    // [b or 1, t, d], or [b or 1, t, d / 2] for both halves
           const u16* sin,    // the same
           u16* query_out,    // [b, hq, t, d]
           u16* key_out,      // [b, hkv, t, d]
           i64 query_batch, i64 query_head, i64 query_token, i64 key_batch, i64 key_head, i64 key_token,
           i64 cos_batch,                                          // 0: the same for all rows
           int num_q_heads, int num_kv_heads, int d, int turns) {  // turns: channels of cos
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int row = blockIdx.z, item = blockIdx.y * num_warps() + warp_id(), half = d / 4;  // in words
    const i64 token = blockIdx.x, num_tokens = gridDim.x;
    if (item >= num_q_heads + num_kv_heads) return;
    const bool is_query = item < num_q_heads;
    const int head = is_query ? item : item - num_q_heads;
    const u16* const from = is_query ? query + row * query_batch + head * query_head + token * query_token
                                     : key + row * key_batch + head * key_head + token * key_token;
    const i64 heads_before = is_query ? i64(row) * num_q_heads + head : i64(row) * num_kv_heads + head;
    u16* const to = (is_query ? query_out : key_out) + (heads_before * num_tokens + token) * d;
    const i64 turn = row * cos_batch + token * turns;
    const u32* const x = reinterpret_cast<const u32*>(from);
    const u32* const c = reinterpret_cast<const u32*>(cos + turn);
    const u32* const s = reinterpret_cast<const u32*>(sin + turn);
    u32* const out = reinterpret_cast<u32*>(to);
    const int other = turns == d ? half : 0;
    for (int i = lane_id(); i < half; i += WARP) {
        const u32 first = x[i], second = x[i + half];
        out[i] = turned<T>(first, second, c[i], s[i], -1.f);
        out[i + half] = turned<T>(second, first, c[i + other], s[i + other], 1.f);
    }
}
