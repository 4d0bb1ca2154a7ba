// prompt_attention on sm_90a: the same as prompt_attention.cu, with copies by TMA and products by warpgroups.
//
// A CTA is three warpgroups. A thread of the first asks for keys and values, two tiles of each ahead; the others
// attend for 64 queries each. The tensor core makes the next tile's logits and multiplies this one's values while a
// warpgroup waits for neither: it turns logits into weights meanwhile. The other warpgroup fills what is left.
#include "common/hopper.cuh"
#include "common/prompt.cuh"

constexpr int WARPGROUP = 128, PROMPT_STAGES = 2, PROMPT_PANEL = 64;  // threads; tiles; channels

template <int D>
struct PromptStage {
    static constexpr int ROWS = 128, TILE = D <= 128 ? 128 : 64;  // queries of a CTA; keys that come at a time
    static constexpr int PANELS = D / PROMPT_PANEL, TILE_WORDS = TILE * D;

    u16* queries;  // [panels, ROWS, 64]
    u16* keys;     // [stages, panels, TILE, 64]
    u16* values;   // [stages, panels, TILE, 64]
    u64* barriers;

    __device__ explicit PromptStage(u16* shared)
        : queries(shared), keys(queries + ROWS * D), values(keys + PROMPT_STAGES * TILE * D) {
        barriers = reinterpret_cast<u64*>(values + PROMPT_STAGES * TILE * D);
        check_shared_end(barriers + 2 + 4 * PROMPT_STAGES);
    }
    __device__ u64* queries_here() const { return barriers; }
    __device__ u64* keys_here(int stage) const { return barriers + 2 + stage; }
    __device__ u64* values_here(int stage) const { return barriers + 2 + PROMPT_STAGES + stage; }
    __device__ u64* keys_free(int stage) const { return barriers + 2 + 2 * PROMPT_STAGES + stage; }
    __device__ u64* values_free(int stage) const { return barriers + 2 + 3 * PROMPT_STAGES + stage; }

    __device__ void init() const {
        init_barrier(queries_here(), 1);
        for (int stage = 0; stage < PROMPT_STAGES; ++stage) {
            init_barrier(keys_here(stage), 1);
            init_barrier(values_here(stage), 1);
            init_barrier(keys_free(stage), ROWS / 16);  // warps
            init_barrier(values_free(stage), ROWS / 16);
        }
        publish_barriers();
    }
    template <int COUNT>
    __device__ void ask(u16* to, const TensorMap* map, u64* barrier, int token, int head, int row) const {
        arrive_expecting(barrier, COUNT * D * 2);
#pragma unroll
        for (int panel = 0; panel < PANELS; ++panel)
            copy_box(to + panel * COUNT * PROMPT_PANEL, map, barrier, panel * PROMPT_PANEL, token, head, row);
    }
};

// The maps of query, key and value.
struct PromptMaps {
    TensorMap query, key, value;
};

// What one thread asks for, all the time.
template <int D>
__device__ void ask_for_tiles(const PromptStage<D>& stage, const PromptMaps& maps,
                              const PromptShare<PromptStage<D>::ROWS>& share,
                              PromptTiles<PromptStage<D>::TILE> tiles) {
    using Stage = PromptStage<D>;
    stage.template ask<Stage::ROWS>(stage.queries, &maps.query, stage.queries_here(), share.first - share.past,
                                    share.head, share.row);
#pragma unroll 1
    for (int i = 0;; ++i) {
        const int place = i % PROMPT_STAGES, start = tiles.start();
        const u32 freed = i / PROMPT_STAGES % 2 ^ 1;
        wait_for_phase(stage.keys_free(place), freed);
        stage.template ask<Stage::TILE>(stage.keys + place * Stage::TILE_WORDS, &maps.key, stage.keys_here(place),
                                        start, share.kv_head, share.row);
        wait_for_phase(stage.values_free(place), freed);
        stage.template ask<Stage::TILE>(stage.values + place * Stage::TILE_WORDS, &maps.value,
                                        stage.values_here(place), start, share.kv_head, share.row);
        if (!tiles.has_next()) return;
        tiles.next();
    }
}

// A warpgroup's 64 queries; `first_row`: of the CTA's.
template <typename T, int D>
struct PromptWarpgroup {
    using Stage = PromptStage<D>;
    static constexpr int TILE = Stage::TILE, WIDTH = D < 128 ? D : 128;  // channels of a product

    const Stage& stage;
    const int first_row;
    float dots[TILE / 8][4], out[D / WIDTH][WIDTH / 8][4];
    u32 weights[TILE / 16][4];
    PromptRows rows;

    __device__ PromptWarpgroup(const Stage& stage, int first_row) : stage(stage), first_row(first_row) {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) (&out[0][0][0])[i] = 0.f;
    }
    // Begins the logits of tile i, as soon as its keys are here.
    __device__ void begin_logits(int i) {
        const int place = i % PROMPT_STAGES;
        wait_for_phase(stage.keys_here(place), i / PROMPT_STAGES % 2);
        const u16* const queries = stage.queries + first_row * PROMPT_PANEL;
        const u16* const keys = stage.keys + place * Stage::TILE_WORDS;
        before_products();
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            const int panel = k / 4, inside = k % 4 * 16;
            Warpgroup<T>::multiply(dots, factor_at(queries + panel * Stage::ROWS * PROMPT_PANEL + inside),
                                   factor_at(keys + panel * TILE * PROMPT_PANEL + inside), k > 0);
        }
        commit_products();
    }
    // The same of its weights times its values.
    __device__ void begin_values(int i) {
        const int place = i % PROMPT_STAGES;
        wait_for_phase(stage.values_here(place), i / PROMPT_STAGES % 2);
        const u16* const values = stage.values + place * Stage::TILE_WORDS;
        before_products();
#pragma unroll
        for (int k = 0; k < TILE / 16; ++k)
#pragma unroll
            for (int part = 0; part < D / WIDTH; ++part)
                Warpgroup<T>::multiply(
                    out[part], weights[k],
                    factor_at(values + part * TILE * WIDTH + k * 16 * PROMPT_PANEL, TILE * PROMPT_PANEL * 2));
        commit_products();
    }
    // `ahead`: by how much the lane's first row is later than the tile's first column.
    __device__ void weigh(float factor, int ahead, bool is_masked, float (&shrink)[2]) {
        hold(dots);
        if (is_masked) hide_later_keys(dots, ahead, ahead + 8);
        rows.weigh(dots, factor, shrink);
    }
    __device__ void end_values(const float (&shrink)[2]) {
#pragma unroll
        for (int part = 0; part < D / WIDTH; ++part) {
            hold(out[part]);
            shrink_rows(out[part], shrink);
        }
    }
    __device__ void pack() {
#pragma unroll
        for (int k = 0; k < TILE / 16; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* const two = dots[k * 2 + i / 2] + i % 2 * 2;
                weights[k][i] = T::pack(two[0], two[1]);
            }
    }
    // All `count` tiles, the first of which begins `ahead` tokens before this lane's first query.
    __device__ void attend(int count, int ahead, float factor) {
        float shrink[2];
        wait_for_phase(stage.queries_here(), 0);
        begin_logits(0);
        wait_for_products<0>();
        free(stage.keys_free(0));
        weigh(factor, ahead, true, shrink);
        pack();
#pragma unroll 1
        for (int i = 1; i < count; ++i) {
            begin_logits(i);
            begin_values(i - 1);
            wait_for_products<1>();
            free(stage.keys_free(i % PROMPT_STAGES));
            ahead += TILE;
            weigh(factor, ahead, TILE < Stage::ROWS && i < Stage::ROWS / TILE, shrink);
            wait_for_products<0>();
            free(stage.values_free((i - 1) % PROMPT_STAGES));
            end_values(shrink);
            pack();
        }
        begin_values(count - 1);
        wait_for_products<0>();
        shrink[0] = shrink[1] = 1.f;
        end_values(shrink);
    }
    __device__ static void free(u64* barrier) {
        if (lane_id() == 0) arrive(barrier);
    }
};

template <typename T, int D>
__global__ void __launch_bounds__(3 * WARPGROUP, 1)
    prompt_attention_sm90([[maybe_unused]] const __grid_constant__ PromptMaps maps,
                          [[maybe_unused]] PromptParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // or nothing: it is never launched
    extern __shared__ __align__(1024) u16 shared_tiles[];
    using Stage = PromptStage<D>;
    wait_for_previous_kernel();
    let_next_kernel_start();
    const PromptShare<Stage::ROWS> share(params);
    if (share.is_empty(params)) return;
    const Stage stage(shared_tiles);
    if (threadIdx.x == 0) stage.init();
    __syncthreads();
    const PromptTiles<Stage::TILE> tiles(share.list, share.count, share.own, min(share.first + Stage::ROWS, params.n),
                                         params.block_size);
    if (threadIdx.x < WARPGROUP) {
        give_registers<24>();
        if (threadIdx.x == 0) ask_for_tiles(stage, maps, share, tiles);
        return;
    }
    take_registers<240>();
    const int first_row = (threadIdx.x / WARPGROUP - 1) * 64, first = share.first + first_row + warp_id() % 4 * 16;
    PromptWarpgroup<T, D> warpgroup(stage, first_row);
    warpgroup.attend(tiles.count(), first + lane_id() / 4 - lane_id() % 4 * 2 - tiles.start(), params.factor);
#pragma unroll
    for (int part = 0; part < D / warpgroup.WIDTH; ++part)
        warpgroup.rows.template write<T, D>(warpgroup.out[part], params, share, first, part * warpgroup.WIDTH);
#endif
}
