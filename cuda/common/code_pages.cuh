// Pages of keys and values in codes (codes.cuh): the format that attention and appending ask for.
#pragma once
#include "common/code_keys.cuh"
#include "common/code_values.cuh"

template <int BITS_OF_KEYS, int BITS_OF_VALUES>
struct Codes {
    static constexpr bool AS_IS = false;
    static constexpr int KEY_BITS = BITS_OF_KEYS, VALUE_BITS = BITS_OF_VALUES;
    static constexpr int PARTS = KEY_BITS == VALUE_BITS ? 2 : 1;
    using Element = unsigned char;
    template <typename T, int D, int STEP>
    using Keys = CodeKeys<D, STEP, Codes>;
    template <typename T, int D, int STEP>
    using Values = CodeValues<D, STEP, Codes>;
    template <int D>
    using Key = PackedKey<D, KEY_BITS>;
    template <int D>
    using Value = PackedValue<D, VALUE_BITS>;

    template <int D>
    static __device__ constexpr int key_record(int /* page_shift */) {
        return code_bytes(D, KEY_BITS) + factor_bytes(D, KEY_BITS);
    }
    template <int D>
    static __device__ constexpr int value_record(int /* page_shift */) {
        return code_bytes(D, VALUE_BITS) + factor_bytes(D, VALUE_BITS);
    }
    // The i-th page of a kv head, counted as units are (`Pages`).
    template <int D>
    static __device__ const Element* keys_at(const Element* pool, int i, int page_shift) {
        return pool + (i64(i) << page_shift) * (key_record<D>(0) + (PARTS == 1 ? value_record<D>(0) : 0));
    }
    template <int D>
    static __device__ const Element* values_at(const Element* pool, int i, int page_shift) {
        return keys_at<D>(pool, i, page_shift) + (PARTS == 1 ? key_record<D>(0) << page_shift : 0);
    }

    template <int D>
    static __device__ constexpr int query_words(int tiles) {
        return CodeQuery<D, KEY_BITS>::words(tiles);
    }
    template <typename T, int D, int HEAD_TILES>
    static __device__ void stage(const u16* query, int group, uint4* staged) {
        CodeQuery<D, KEY_BITS>::template stage<T, HEAD_TILES>(query, group, staged);
    }

    template <typename T, int D>
    static __device__ Key<D> pack_key(uint4 v) {
        return Key<D>::template of<T>(v);
    }
    template <typename T, int D>
    static __device__ Value<D> pack_value(uint4 v) {
        return Value<D>::template of<T>(v);
    }
    template <typename T, typename Packed>
    static __device__ uint4 unpack(const Packed& packed) {
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = T::pack(packed.number(2 * i), packed.number(2 * i + 1));
        return {words[0], words[1], words[2], words[3]};
    }
    template <typename T, int D>
    static __device__ uint4 unpack_key(const Key<D>& key) {
        return unpack<T>(key);
    }
    template <typename T, int D>
    static __device__ uint4 unpack_value(const Value<D>& value) {
        return unpack<T>(value);
    }
    template <int D>
    static __device__ Key<D> load_key(const Element* page, int page_shift, int token, int channel) {
        return Key<D>::load(page, page_shift, token, channel);
    }
    template <int D>
    static __device__ Value<D> load_value(const Element* page, int page_shift, int token, int channel) {
        return Value<D>::load(page, page_shift, token, channel);
    }
    template <typename T, int D>
    static __device__ u16 load1(const Element* page, int page_shift, int token, int channel) {
        return T::pack(Key<D>::load(page, page_shift, token, channel / 8 * 8).number(channel % 8), 0.f);
    }
    template <int D>
    static __device__ void store_key(Element* page, int page_shift, int token, int channel, const Key<D>& key) {
        key.store(page, page_shift, token, channel);
    }
    template <int D>
    static __device__ void store_value(Element* page, int page_shift, int token, int channel, const Value<D>& value) {
        value.store(page, page_shift, token, channel);
    }
};
