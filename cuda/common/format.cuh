// What a page of keys and values looks like, and how it comes into registers and back: the kernels' side of a
// PageFormat (sparsekv/ops/formats.py). A page of one kv head has a record for every token. A format is a type with,
// for element type T and head size D,
//
// - `Element`, of a record; `key_record<D>(page_shift)` and `value_record<D>(page_shift)`, how many of them one has,
//   in pages of 1 << page_shift tokens; `PARTS`, 2 if a page has all kv heads' keys before all their values, as must
//   be where both are as many, or 1 if each head's keys come before its values;
// - `query_words<D>(tiles)`, words of 16 bytes that a query of so many tiles of heads takes in shared memory, where
//   `stage<T, D, HEAD_TILES>(query, group, staged)` puts it, called by all threads of a CTA;
// - `Keys<T, D, STEP>` and `Values<T, D, STEP>`: what a lane holds of sixteen tokens, in the order of the matrix
//   products in attend.cuh. `load` asks for it, the other functions use it: loads should be under way meanwhile.
//   `SCALED` values are numbers that each token's weight is to be scaled for, 32 channels a time, by 2^EXPONENT more;
// - `pack_key<T, D>` and `pack_value<T, D>`, which the lanes of a token, eight channels each, call together, and
//   `unpack_key<T, D>` and `unpack_value<T, D>`, what is left; `store_key<D>`, `load_key<D>`, the same of values, and
//   `load1<T, D>`, one channel of a key, take a page and a token in it. `AS_IS`: channels are left as they are.
//
// `ByChannel` makes a format out of how channels are packed and unpacked, where each is stored by itself.
#pragma once
#include "common/pages.cuh"

// The dot products of sixteen keys: [tile of 8 tokens] x (heads r: 2 tokens, heads r + 8: 2 tokens).
struct Dots {
    float tiles[2][4] = {};
};

// ---- a query as it is: its words of 16 bytes, in the order the lanes want them

template <int D>
__device__ inline uint4 query_word(const u16* query /* [group, d] */, int group, int word) {
    const int lane = word % WARP, chunk = word / WARP % (D / 32), head = word / (WARP * (D / 32)) * 8 + lane / 4;
    if (head >= group) return {0, 0, 0, 0};
    return load16(query + head * D + chunk * 32 + lane % 4 * 8);
}

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

    // Adds the products with a step's channels; `dots` is what they come to.
    template <int HEAD_TILES>
    using Sums = Dots;
    template <int HEAD_TILES>
    __device__ void multiply(Dots& sums, const uint4* query, int step) const {
#pragma unroll
        for (int j = 0; j < STEP / 32; ++j) {
            const uint4 low = query[(step * (STEP / 32) + j) * WARP + lane_id()];
            const uint4 high =
                HEAD_TILES == 2 ? query[(D / 32 + step * (STEP / 32) + j) * WARP + lane_id()] : uint4{0, 0, 0, 0};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint4 key = Format::template unpack8<T>(words[half][j]);
                T::mma(sums.tiles[half], low.x, high.x, low.y, high.y, key.x, key.y);
                T::mma(sums.tiles[half], low.z, high.z, low.w, high.w, key.z, key.w);
            }
        }
    }
    template <int HEAD_TILES>
    __device__ Dots dots(const Dots& sums, const uint4*) const {
        return sums;
    }
};

// Of the values of four tokens (`value_token`), channels 8r to 8r + 7 of every 64 of a step; where 32 are left, 4r to
// 4r + 3 of these.
template <typename Format, typename T, int D, int STEP>
struct ValueWords {
    static constexpr int BLOCKS = STEP / 64, TAIL = STEP % 64 / 32;
    static constexpr bool SCALED = false;
    using Number = T;  // of the operands

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

    // Operands of the matrix products, sixteen channels a time: `add(row, four words)`.
    template <typename Add>
    __device__ void rows(Add add) const {
        const auto row = [&](int i, u32 a, u32 b, u32 c, u32 d) {
            add(i, low_halves(a, b), high_halves(a, b), low_halves(c, d), high_halves(c, d));
        };
#pragma unroll
        for (int i = 0; i < BLOCKS; ++i) {
            const uint4 a = get(0, i), b = get(1, i), c = get(2, i), d = get(3, i);
            row(i * 4, a.x, b.x, c.x, d.x);
            row(i * 4 + 1, a.y, b.y, c.y, d.y);
            row(i * 4 + 2, a.z, b.z, c.z, d.z);
            row(i * 4 + 3, a.w, b.w, c.w, d.w);
        }
        if constexpr (TAIL != 0) {
            const uint2 a = get_tail(0), b = get_tail(1), c = get_tail(2), d = get_tail(3);
            row(BLOCKS * 4, a.x, b.x, c.x, d.x);
            row(BLOCKS * 4 + 1, a.y, b.y, c.y, d.y);
        }
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

    static constexpr int PARTS = 2;
    static __device__ constexpr int bytes(int channels) { return channels * (BITS / 8); }
    template <int D>
    static __device__ constexpr int key_record(int /* page_shift */) {
        return D;
    }
    template <int D>
    static __device__ constexpr int value_record(int /* page_shift */) {
        return D;
    }
    template <int D>
    static __device__ constexpr int query_words(int tiles) {
        return tiles * D;
    }
    template <typename T, int D, int HEAD_TILES>
    static __device__ void stage(const u16* query, int group, uint4* staged) {
        for (int i = threadIdx.x; i < query_words<D>(HEAD_TILES); i += blockDim.x)
            staged[i] = query_word<D>(query, group, i);
    }

    template <typename T>
    static __device__ uint4 unpack8(Eight v) {
        return eight(Self::template unpack<T>(first_four(v)), Self::template unpack<T>(last_four(v)));
    }
    template <typename T, int D>
    static __device__ Eight pack_key(uint4 v) {
        return eight(Self::template pack<T>(first_four(v)), Self::template pack<T>(last_four(v)));
    }
    template <typename T, int D>
    static __device__ Eight pack_value(uint4 v) {
        return pack_key<T, D>(v);
    }
    template <typename T, int D>
    static __device__ uint4 unpack_key(Eight v) {
        return unpack8<T>(v);
    }
    template <typename T, int D>
    static __device__ uint4 unpack_value(Eight v) {
        return unpack8<T>(v);
    }
    template <int D>
    static __device__ Eight load_key(const Element* page, int /* page_shift */, int token, int channel) {
        Eight v;
        load_words<0>(v, page + i64(token) * D + channel);
        return v;
    }
    template <int D>
    static __device__ Eight load_value(const Element* page, int page_shift, int token, int channel) {
        return load_key<D>(page, page_shift, token, channel);
    }
    template <typename T, int D>
    static __device__ u16 load1(const Element* page, int /* page_shift */, int token, int channel) {
        return Self::template unpack<T>(page[token * D + channel]);
    }
    template <int D>
    static __device__ void store_key(Element* page, int /* page_shift */, int token, int channel, Eight v) {
        *reinterpret_cast<Eight*>(page + i64(token) * D + channel) = v;
    }
    template <int D>
    static __device__ void store_value(Element* page, int page_shift, int token, int channel, Eight v) {
        store_key<D>(page, page_shift, token, channel, v);
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

// Keys as they are, which are the values, too.
struct Latents : Plain {
    static constexpr int PARTS = 1;

    template <int D>
    static __device__ constexpr int value_record(int /* page_shift */) {
        return 0;
    }
    template <int D>
    static __device__ void store_value(Element*, int, int, int, Eight) {}
};
