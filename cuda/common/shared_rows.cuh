// Rows of D channels in shared memory, as words of 16 bytes, and from there into the tensor core's registers.
//
// ldmatrix reads the same word of eight rows at once, so these must lie in different banks: words change places
// within a row, by the row's number. Rows of 64 channels fill all banks; those of 96 begin in two places in turn.
#pragma once
#include "common/device.cuh"

template <int D>
struct SharedRows {
    static constexpr int WORDS = D / 8;

    uint4* words;

    __device__ static int place(int row, int word) { return row * WORDS + (word ^ (D % 64 ? row / 2 % 4 : row % 8)); }

    // Asks for rows first, first + 1, ...; for those outside of 0 to end - 1 the nearest one comes, as nobody looks.
    template <int ROWS, int THREADS>
    __device__ void ask(const u16* from, int stride, int first, int end) const {
        ask_each<ROWS, THREADS>([=](int row) { return from + i64(max(0, min(first + row, end - 1))) * stride; });
    }
    // Asks for rows that lie where at(0), at(1), ... say.
    template <int ROWS, int THREADS, typename F>
    __device__ void ask_each(F at) const {
        static_assert(ROWS * WORDS % THREADS == 0);
#pragma unroll 4  // the addresses of more would not fit the registers
        for (int i = 0; i < ROWS * WORDS / THREADS; ++i) {
            const u32 index = i * THREADS + threadIdx.x;  // divided by shifts, being unsigned
            const int row = index / WORDS, word = index % WORDS;
            copy_async<16>(words + place(row, word), at(row) + word * 8);
        }
    }

    // Of 16 rows from `row` on, words 2k and 2k + 1, as mma.m16n8k16 wants its first factor.
    __device__ void left(u32 (&a)[4], int row, int k) const {
        load_matrices<false>(a, words + place(row + lane_id() % 16, k * 2 + lane_id() / 16));
    }
    // The same rows and words as two second factors, [16 channels x 8 rows]: of the rows' first and second half.
    __device__ void right(u32 (&b)[4], int row, int k) const {
        load_matrices<false>(b, words + place(row + lane_id() / 16 * 8 + lane_id() % 8, k * 2 + lane_id() / 8 % 2));
    }
    // The same as two second factors [16 rows x 8 channels]: word 2k and word 2k + 1.
    __device__ void right_transposed(u32 (&b)[4], int row, int k) const {
        load_matrices<true>(b, words + place(row + lane_id() % 16, k * 2 + lane_id() / 16));
    }
};

// One first factor by two second ones.
template <typename T>
__device__ inline void multiply(float (&c)[4], float (&d)[4], const u32 (&a)[4], const u32 (&b)[4]) {
    T::mma(c, a[0], a[1], a[2], a[3], b[0], b[1]);
    T::mma(d, a[0], a[1], a[2], a[3], b[2], b[3]);
}

// Dot products of TILES times sixteen queries, from `first_row` on, with N times eight keys.
template <typename T, int TILES, int N, int D>
__device__ inline void multiply_rows(float (&dots)[TILES][N][4], const SharedRows<D>& queries,
                                     const SharedRows<D>& keys, int first_row) {
#pragma unroll
    for (int i = 0; i < TILES * N * 4; ++i) (&dots[0][0][0])[i] = 0.f;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        u32 a[TILES][4];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) queries.left(a[tile], first_row + tile * 16, k);
#pragma unroll
        for (int j = 0; j < N / 2; ++j) {
            u32 b[4];
            keys.right(b, j * 16, k);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
                multiply<T>(dots[tile][j * 2], dots[tile][j * 2 + 1], a[tile], b);
        }
    }
}
