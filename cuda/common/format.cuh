// What a page of keys and values looks like, and how it comes into registers and back: the kernels' side of a
// PageFormat (sparsekv/ops/formats.py). A page of one kv head has a record for every token. A format is a type with,
// for element type T and head size D,
//
// - `Element`, of a record, and `record<D>(page_shift)`, how many of them one has in pages of 1 << page_shift tokens;
// - `Keys<T, D, STEP>` and `Values<T, D, STEP>`: what a lane holds of sixteen tokens, in the order of the matrix
//   products in attend.cuh. `load` asks for it, the other functions turn it into 16-bit floats when it is used: loads
//   should be under way meanwhile;
// - `load8`, `load1`: channels of one token of a page, for digests; `store8`: new ones; `rounded8`: what is left of
//   these; `AS_IS`, whether all of them leave channels as they are.
//
// `ByChannel` makes a format out of how channels are packed and unpacked, where each is stored by itself.
#pragma once
#include "common/pages.cuh"

// ---- channels as they lie in memory

template <int BITS>
struct Stored;
template <>
struct Stored<16> {
    using Element = u16;
    using Four = uint2;
    using Eight = uint4;
};
template <>
struct Stored<8> {
    using Element = unsigned char;
    using Four = u32;
    using Eight = uint2;
};

template <int OFFSET>
__device__ inline void load_words(uint4& v, const void* p) {
    v = load16<OFFSET>(p);
}
template <int OFFSET>
__device__ inline void load_words(uint2& v, const void* p) {
    v = load8<OFFSET>(p);
}
template <int OFFSET>
__device__ inline void load_words(u32& v, const void* p) {
    v = load4<OFFSET>(p);
}
__device__ inline uint2 first_four(uint4 v) { return {v.x, v.y}; }
__device__ inline uint2 last_four(uint4 v) { return {v.z, v.w}; }
__device__ inline u32 first_four(uint2 v) { return v.x; }
__device__ inline u32 last_four(uint2 v) { return v.y; }
__device__ inline uint4 eight(uint2 first, uint2 last) { return {first.x, first.y, last.x, last.y}; }
__device__ inline uint2 eight(u32 first, u32 last) { return {first, last}; }

// ---- sixteen tokens of a page, as the matrix products of attend.cuh want them; r is lane / 4 and c lane % 4

// Of the keys of tokens r and r + 8, channels 8c to 8c + 7 of every 32 of a step.
template <typename Format, typename T, int D, int STEP>
struct KeyWords {
    using Element = typename Format::Element;
    typename Format::Eight words[2][STEP / 32];

    __device__ void load(const Element* pool, int block, int step, int /* page_shift */) {
        const Element* const from =
            pool + i64(block) * (UNIT * D) + lane_id() / 4 * D + step * STEP + lane_id() % 4 * 8;
        unrolled<STEP / 32>([&](auto j) {
            load_words<Format::bytes(j.value * 32)>(words[0][j.value], from);
            load_words<Format::bytes(j.value * 32 + 8 * D)>(words[1][j.value], from);
        });
    }
    __device__ uint4 get(int half, int j) const { return Format::template unpack8<T>(words[half][j]); }
};

// Of the values of four tokens (`value_token`), channels 8r to 8r + 7 of every 64 of a step; where 32 are left, 4r to
// 4r + 3 of these.
template <typename Format, typename T, int D, int STEP>
struct ValueWords {
    static constexpr int BLOCKS = STEP / 64, TAIL = STEP % 64 / 32;

    using Element = typename Format::Element;
    typename Format::Eight words[4][BLOCKS ? BLOCKS : 1];
    typename Format::Four tail[4];

    __device__ void load(const Element* pool, int block, int step, int /* page_shift */) {
        const Element* const from = pool + i64(block) * (UNIT * D) + value_token(0) * D + step * STEP;
        unrolled<4>([&](auto i) {
            constexpr int token = i.value % 2 + i.value / 2 * 8;  // value_token(i) - value_token(0)
            unrolled<BLOCKS>([&](auto j) {
                load_words<Format::bytes(token * D + j.value * 64)>(words[i.value][j.value],
                                                                    from + lane_id() / 4 * 8);
            });
            if constexpr (TAIL != 0)
                load_words<Format::bytes(token * D + BLOCKS * 64)>(tail[i.value], from + lane_id() / 4 * 4);
        });
    }
    __device__ uint4 get(int i, int block) const { return Format::template unpack8<T>(words[i][block]); }
    __device__ uint2 get_tail(int i) const { return Format::template unpack<T>(tail[i]); }
    __device__ void clear(int i) {
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) words[i][block] = {};
        tail[i] = {};
    }
};

// ---- formats

// One that stores every channel by itself, in 16 or 8 bits, of which all 0 are a 0. `Self` has, for element type T,
// `unpack<T>(Four) -> uint2`, `unpack<T>(Element) -> u16` and `pack<T>(uint2) -> Four`.
template <typename Self, int BITS>
struct ByChannel {
    static constexpr bool AS_IS = false;
    using Element = typename Stored<BITS>::Element;
    using Four = typename Stored<BITS>::Four;
    using Eight = typename Stored<BITS>::Eight;
    template <typename T, int D, int STEP>
    using Keys = KeyWords<Self, T, D, STEP>;
    template <typename T, int D, int STEP>
    using Values = ValueWords<Self, T, D, STEP>;

    static __device__ constexpr int bytes(int channels) { return channels * (BITS / 8); }
    template <int D>
    static __device__ constexpr int record(int /* page_shift */) {
        return D;
    }
    template <typename T>
    static __device__ uint4 unpack8(Eight v) {
        return eight(Self::template unpack<T>(first_four(v)), Self::template unpack<T>(last_four(v)));
    }
    template <typename T>
    static __device__ Eight pack8(uint4 v) {
        return eight(Self::template pack<T>(first_four(v)), Self::template pack<T>(last_four(v)));
    }
    template <typename T>
    static __device__ uint4 rounded8(uint4 v) {
        return unpack8<T>(pack8<T>(v));
    }
    template <typename T, int D>
    static __device__ uint4 load8(const Element* page, int token, int channel) {
        Eight v;
        load_words<0>(v, page + i64(token) * D + channel);
        return unpack8<T>(v);
    }
    template <typename T, int D>
    static __device__ u16 load1(const Element* page, int token, int channel) {
        return Self::template unpack<T>(page[token * D + channel]);
    }
    template <typename T, int D>
    static __device__ void store8(Element* page, int token, int channel, uint4 v) {
        *reinterpret_cast<Eight*>(page + i64(token) * D + channel) = pack8<T>(v);
    }
};

// Keys and values as they are.
struct Plain : ByChannel<Plain, 16> {
    static constexpr bool AS_IS = true;

    template <typename T>
    static __device__ uint2 unpack(uint2 v) {
        return v;
    }
    template <typename T>
    static __device__ u16 unpack(u16 x) {
        return x;
    }
    template <typename T>
    static __device__ uint2 pack(uint2 v) {
        return v;
    }
};
