// Where the tokens of one sequence and kv head lie.
#pragma once
#include "common/device.cuh"

constexpr int UNIT = 16, UNIT_SHIFT = 4;  // tokens that a warp attends to at a time

// Sixteen tokens of one page: how many of them exist, and how many of these come before what is seen. `block` counts
// such pieces of keys and values through the whole pool; a piece of values lies `values_after` blocks behind that of
// its keys.
struct Unit {
    int block, count, skip;
};

// The tokens of a unit whose values a lane holds, i 0 to 3: 2c, 2c + 1, 2c + 8 and 2c + 9 for c = lane % 4.
__device__ inline int value_token(int i) { return lane_id() % 4 * 2 + i % 2 + i / 2 * 8; }

struct Pages {
    const int* block_table;  // [max_pages], this sequence's row
    int length;              // tokens of this sequence
    int page_shift;          // log2 of the page size
    int num_kv_heads, kv_head;
    int parts;      // of a page: 2, keys and values, or 1, in which a head's values come after its keys
    int first = 0;  // the first token that is seen

    __device__ int count() const { return (length + (1 << page_shift) - 1) >> page_shift; }
    __device__ int unit_shift() const { return page_shift - UNIT_SHIFT; }  // log2 of a page's units
    __device__ int values_after() const { return parts == 2 ? num_kv_heads << unit_shift() : 0; }

    // The i-th unit of the listed slots (null: of all), a slot of -1 being empty; `table` may be a copy of
    // block_table.
    __device__ Unit locate(const int* slots, const int* table, int i) const {
        const int index = i >> unit_shift(), unit = i - (index << unit_shift());
        const int slot = slots ? slots[index] : index;
        const int start = (slot << page_shift) + unit * UNIT;
        return {((table[max(slot, 0)] * parts * num_kv_heads + kv_head) << unit_shift()) + unit,
                slot < 0 ? 0 : min(length - start, UNIT), first > 0 ? first - start : 0};
    }
};
