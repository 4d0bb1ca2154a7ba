// attend_latents: attention of one query per sequence over pages of latents: keys of hundreds of channels, which are
// the values, too, and which many query heads share.
//
// A CTA takes a slice of up to sixteen query heads and a run of units of sixteen tokens; each of its warps has 144
// channels of these, which it copies to shared memory, multiplies by its part of the queries and, weighted, sums up:
// what is a part of a key is read once and is a part of a value, too. Only the dot products are put together, through
// shared memory, by one barrier a unit; every warp then finds the same weights for itself. The CTAs of a slice leave
// their parts in memory for `merge_attention`.
#include "common/merge.cuh"

constexpr int OF_WARP = 144;  // channels
constexpr int SLOTS = 3;      // units in shared memory: one at hand, two under way

template <typename T, int D, int HEAD_TILES>
struct LatentAttention : WeightedSums<HEAD_TILES, OF_WARP / 16> {
    static constexpr int WARPS = D / OF_WARP, ROWS = OF_WARP / 16;
    static constexpr int PITCH = D + 8;  // from token to token, so that eight of them meet no other's banks
    static_assert(D % OF_WARP == 0);

    struct Shared {
        u16 slots[SLOTS][UNIT][PITCH];
        float4 dots[2][WARPS][2][WARP];  // of every warp's channels; of this unit, and of the one before or after
    };

    Shared& shared;
    u32 query[ROWS][4];  // of this warp's channels, sixteen a time
    int turn = 0;

    __device__ LatentAttention(Shared& shared, const u16* query /* [group, d] */, int group) : shared(shared) {
#pragma unroll
        for (int i = 0; i < ROWS * 4; ++i) {
            const int head = lane_id() / 4 + i % 2 * 8, channel = lane_id() % 4 * 2 + i % 4 / 2 * 8 + i / 4 * 16;
            this->query[i / 4][i % 4] = head < group ? load4(query + head * D + warp_id() * OF_WARP + channel) : 0u;
        }
    }

    // This warp's channels of a unit; zeros for tokens that are missing, as memory may hold NaN there.
    __device__ void copy(const u16* pool, const Unit& unit, int slot) {
        constexpr int PIECES = OF_WARP / 8;
        const u16* const from = pool + i64(unit.block) * (UNIT * D) + warp_id() * OF_WARP;
#pragma unroll
        for (int i = 0; i < UNIT * PIECES / WARP; ++i) {
            const int piece = i * WARP + lane_id(), token = piece / PIECES, channel = piece % PIECES * 8;
            u16* const to = shared.slots[slot][token] + warp_id() * OF_WARP + channel;
            if (token < unit.count)
                copy_async<16>(to, from + token * D + channel);
            else
                store16(to, {0, 0, 0, 0});
        }
    }

    // Four matrices of a slot: tokens 0 to 7, of this warp's `row`-th sixteen channels the first and the last eight,
    // and the same of tokens 8 to 15. As they are they are operands of the first product, transposed of the second.
    template <bool TRANSPOSED>
    __device__ void load(u32 (&words)[4], int slot, int row) const {
        const u16* const token = shared.slots[slot][lane_id() / 16 * 8 + lane_id() % 8];
        load_matrices<TRANSPOSED>(words, token + warp_id() * OF_WARP + row * 16 + lane_id() / 8 % 2 * 8);
    }

    __device__ Dots multiply_keys(int slot) const {
        Dots dots;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            const u32(&q)[4] = query[row];
            u32 key[4];
            load<false>(key, slot, row);
            T::mma(dots.tiles[0], q[0], q[1], q[2], q[3], key[0], key[1]);
            T::mma(dots.tiles[1], q[0], q[1], q[2], q[3], key[2], key[3]);
        }
        return dots;
    }

    // Over all channels. No warp is two units ahead of another, so two places for each warp's are enough.
    __device__ Dots sum_over_warps(const Dots& own) {
        float4(&parts)[WARPS][2][WARP] = shared.dots[turn];
        turn ^= 1;
#pragma unroll
        for (int i = 0; i < 2; ++i)
            parts[warp_id()][i][lane_id()] = {own.tiles[i][0], own.tiles[i][1], own.tiles[i][2], own.tiles[i][3]};
        __syncthreads();
        Dots dots;
#pragma unroll
        for (int i = 0; i < WARPS * 2; ++i) {
            const float4 part = parts[i / 2][i % 2][lane_id()];
            float (&sum)[4] = dots.tiles[i % 2];
            sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
        }
        return dots;
    }

    __device__ void attend(int slot, const Unit& unit, const Logits& logits) {
        const Dots dots = sum_over_warps(multiply_keys(slot));
        WeightsOf<T, HEAD_TILES, false> weights;
        this->weigh(weights, dots, unit, logits, [](float logit, int) { return logit; });
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            u32 v[4];
            load<true>(v, slot, row);
#pragma unroll
            for (int tile = 0; tile < HEAD_TILES; ++tile)
                T::mma(this->out[tile][row], v[0], v[1], v[2], v[3], weights.words[tile][0], weights.words[tile][1]);
        }
    }

    __device__ void store(Partial<D, HEAD_TILES>& part, int group) {
        const OutputFragments<T, D, HEAD_TILES> fragments(group);
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; ++tile) {
            const float mass = this->mass(tile);
            this->rescale(tile, mass > 0.f ? reciprocal(mass) : 0.f);
            if (warp_id() == 0 && lane_id() % 4 == 0)
                part.lse[tile * MMA_HEADS + lane_id() / 4] = mass > 0.f ? this->m[tile] + __log2f(mass) : -infinity();
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                const float (&out)[4] = this->out[tile][row];
                if (fragments.has_lane())
                    part.out[fragments.index(tile, warp_id() * ROWS + row)] = {out[0], out[1], out[2], out[3]};
            }
        }
    }
};

template <typename T, int D, int HEAD_TILES>
__global__ void __launch_bounds__(D / OF_WARP * WARP)
    attend_latents(const u16* query,                  // [b, hq, d], of every kv head `slices` times `group` heads
                   const u16* kv_pool,                // [num_pages, 1, hkv, page_size, d]
                   const int* block_table,            // [b, max_pages]
                   const int* seq_lens,               // [b]
                   const int* first,                  // [b] the first token that is seen, or null
                   const int* slots,                  // [b, hkv, k], -1: none; null: all pages
                   Partial<D, HEAD_TILES>* partials,  // [b, hkv, slices, gridDim.x]
                   int group, int slices, int page_shift, int max_pages, int k, float scaling, float softcap) {
    extern __shared__ uint4 dynamic[];
    using Attention = LatentAttention<T, D, HEAD_TILES>;
    auto& shared = *reinterpret_cast<typename Attention::Shared*>(dynamic);
    check_shared_end(&shared + 1);
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int row = blockIdx.z, num_kv_heads = gridDim.y / slices, head = blockIdx.y / slices;
    const i64 item = row * gridDim.y + blockIdx.y;
    const Pages pages = {
        block_table + i64(row) * max_pages, seq_lens[row], page_shift, num_kv_heads, head, 1, first ? first[row] : 0};
    const int* const mine = slots ? slots + i64(row * num_kv_heads + head) * k : nullptr;
    const int unseen = mine ? 0 : pages.first >> UNIT_SHIFT;  // units before all that is seen
    const int end = (mine ? k : min(pages.count(), max_pages)) << pages.unit_shift();
    const int run = ceil_div(max(end - unseen, 0), gridDim.x), begin = unseen + blockIdx.x * run;

    Attention attention(shared, query + item * group * D, group);
    const Logits logits(scaling, softcap);
    const auto ask = [&](int i) {
        Unit unit = {0, 0, 0};
        if (i < min(run, end - begin)) unit = pages.locate(mine, pages.block_table, begin + i);
        if (unit.count > 0) attention.copy(kv_pool, unit, i % SLOTS);
        commit_copies();
        return unit;
    };
    Unit now = ask(0), next = ask(1);
#pragma unroll 1
    for (int i = 0; i < min(run, end - begin); ++i) {
        __syncwarp();  // all lanes are done with the slot that is filled again
        const Unit later = ask(i + 2);
        wait_for_copies<2>();
        __syncwarp();
        if (now.count > 0) attention.attend(i % SLOTS, now, logits);
        now = next, next = later;
    }
    attention.store(partials[item * gridDim.x + blockIdx.x], group);
}
