// What only sm_90a has: copies of boxes of a tensor by hardware (TMA), barriers that count their bytes, and products
// by four warps together (wgmma), whose second factor, or both, lie in shared memory.
//
// Boxes are 64 channels wide, rows of 128 bytes, and swizzled: word w (16 bytes) of row r lies in place w ^ r % 8, so
// every panel of rows begins at a multiple of 1024 bytes. Both TMA and wgmma count so by themselves.
#pragma once
#include "common/device.cuh"

using u64 = unsigned long long;

// CUtensorMap, which the driver makes: four dimensions, channels, tokens, heads and rows of a batch.
struct alignas(64) TensorMap {
    u64 words[16];
};

__device__ inline u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// ---- barriers in shared memory: a phase ends when so many have arrived and all bytes that were announced are there

__device__ inline void init_barrier(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes them known to the hardware that copies; then __syncthreads makes them known to the CTA.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline void arrive_expecting(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Phases are numbered 0, 1, 0, 1, ...; of the one before the first it is known that it has ended.
__device__ inline void wait_for_phase(u64* barrier, u32 parity) {
    for (u32 done = 0; !done;)
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
}

// The box of a tensor from this channel and token on; what is outside of the tensor comes as zeros.
__device__ inline void copy_box(void* to, const TensorMap* map, u64* barrier, int channel, int token, int head,
                                int row) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(channel), "r"(token), "r"(head), "r"(row)
        : "memory");
}

// ---- products by a warpgroup

// A factor in shared memory: eight rows are a piece of 1024 bytes, and the next piece follows. Where rows are the
// product's inner dimension, 64 channels are followed by the next 64 so many bytes later.
__device__ inline u64 factor_at(const void* shared, int panel_bytes = 16) {
    return u64((shared_address(shared) & 0x3FFFF) >> 4) | u64(panel_bytes >> 4) << 16 | u64(1024 >> 4) << 32 |
           u64(1) << 62;
}

// Before a product whose registers something else has written; after the last of a group; and until all but the last
// PENDING groups have ended.
__device__ inline void before_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ inline void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Nobody reads or moves these registers across this place.
template <int N>
__device__ inline void hold(float (&c)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; ++j)
        asm volatile("" : "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])::"memory");
}

// Registers move from a warpgroup that needs few to those that need many.
template <int COUNT>
__device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

#define SPARSEKV_C1(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define SPARSEKV_C8(j)                                                                              \
    SPARSEKV_C1(j), SPARSEKV_C1(j + 1), SPARSEKV_C1(j + 2), SPARSEKV_C1(j + 3), SPARSEKV_C1(j + 4), \
        SPARSEKV_C1(j + 5), SPARSEKV_C1(j + 6), SPARSEKV_C1(j + 7)
#define SPARSEKV_C16(j) SPARSEKV_C8(j), SPARSEKV_C8(j + 8)
#define SPARSEKV_R32                                                                                                 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define SPARSEKV_R64                                                                                              \
    SPARSEKV_R32                                                                                                  \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// c[64 x 8 N] = a b^T, or += : of both factors the rows are the outer dimension. Or c += a b with a [64 x 16] in
// registers, and rows of b are the inner dimension. A lane holds of c and a what mma.m16n8k16 would give it.
#define SPARSEKV_PRODUCTS(type, n, registers, outputs, i0, i1, i2, i3, i4)                                      \
    static __device__ void multiply(float (&c)[n / 8][4], u64 a, u64 b, bool add) {                             \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %" i2 ", 0; wgmma.mma_async.sync.aligned.m64n" #n           \
                     "k16.f32." type "." type " {" registers "}, %" i0 ", %" i1 ", p, 1, 1, 0, 0;}"             \
                     : outputs                                                                                  \
                     : "l"(a), "l"(b), "r"(int(add)));                                                          \
    }                                                                                                           \
    static __device__ void multiply(float (&c)[n / 8][4], const u32(&a)[4], u64 b) {                            \
        asm volatile("{.reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type \
                     "." type " {" registers "}, {%" i0 ", %" i1 ", %" i2 ", %" i3 "}, %" i4 ", p, 1, 1, 1;}"   \
                     : outputs                                                                                  \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                     \
    }
#define SPARSEKV_WARPGROUP(element, type)                                                         \
    template <>                                                                                   \
    struct Warpgroup<element> {                                                                   \
        SPARSEKV_PRODUCTS(type, 64, SPARSEKV_R32, SPARSEKV_C8(0), "32", "33", "34", "35", "36")   \
        SPARSEKV_PRODUCTS(type, 128, SPARSEKV_R64, SPARSEKV_C16(0), "64", "65", "66", "67", "68") \
    };

template <typename T>
struct Warpgroup;
SPARSEKV_WARPGROUP(bf16, "bf16")
SPARSEKV_WARPGROUP(fp16, "f16")

#undef SPARSEKV_WARPGROUP
#undef SPARSEKV_PRODUCTS
#undef SPARSEKV_R64
#undef SPARSEKV_R32
#undef SPARSEKV_C16
#undef SPARSEKV_C8
#undef SPARSEKV_C1
