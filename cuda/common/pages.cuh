// Where the tokens of one sequence and kv head lie.
#pragma once
#include "common/device.cuh"

struct Pages {
    const u16* kv_pool;      // [num_pages, 2, hkv, page_size, d]
    const int* block_table;  // [max_pages], this sequence's row
    int length;              // tokens of this sequence
    int num_kv_heads, page_size, kv_head;

    __device__ int count() const { return ceil_div(length, page_size); }
};
