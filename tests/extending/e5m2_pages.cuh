// Keys and values in 8-bit floats, e5m2: the upper byte of an fp16, rounded to nearest, ties to even.
#pragma once
#include "common/format.cuh"

struct E5M2 : ByChannel<E5M2, 8> {
    template <typename T>
    static __device__ u32 widened(u32 halves /* two fp16 */) {
        return T::pack(fp16::to_float(u16(halves)), fp16::to_float(u16(halves >> 16)));
    }
    static __device__ u32 upper_byte(u32 half) {
        const bool is_nan = (half & 0x7FFFu) > 0x7C00u;  // rounding could carry into its sign
        return (is_nan ? half : half + 0x7Fu + (half >> 8 & 1u)) >> 8;
    }
    template <typename T>
    static __device__ u32 upper_bytes(u32 two) {
        const u32 halves = fp16::pack(T::to_float(u16(two)), T::to_float(u16(two >> 16)));
        return upper_byte(halves & 0xFFFFu) | upper_byte(halves >> 16) << 8;
    }

    template <typename T>
    static __device__ uint2 unpack(u32 four) {
        return {widened<T>(__byte_perm(four, 0, 0x1404)), widened<T>(__byte_perm(four, 0, 0x3424))};
    }
    template <typename T>
    static __device__ u16 unpack(unsigned char one) {
        return u16(widened<T>(u32(one) << 8));
    }
    template <typename T>
    static __device__ u32 pack(uint2 four) {
        return upper_bytes<T>(four.x) | upper_bytes<T>(four.y) << 16;
    }
};
