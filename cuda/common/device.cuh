// What every kernel here stands on: element types, tensor-core products, loads, warps, clusters. No CUDA header is
// included anywhere, so NVRTC needs nothing but these files; what C++ lacks is a line of PTX.
//
// A decode step runs most instructions once in every warp: loops are unrolled only where registers or loads in flight
// need it, and integer divisions by run-time numbers are avoided.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xFFFFFFFFu;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
constexpr float LOWEST = -1e30f;             // below every logit, and finite: LOWEST - LOWEST is 0, not NaN
constexpr float SMALLEST = 1.17549435e-38f;  // of normal floats above 0

__device__ inline float infinity() { return __int_as_float(0x7F800000); }
__device__ inline int lane_id() { return threadIdx.x % WARP; }
__device__ inline int warp_id() { return threadIdx.x / WARP; }
__device__ inline int num_warps() { return blockDim.x / WARP; }
__device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// What a kernel lays out in its dynamic shared memory ends here, and nowhere else: sparsekv/ops/rooms.py has counted
// the same. A debug build (SPARSEKV_DEBUG=1) stops where that is not so.
__device__ inline void check_shared_end([[maybe_unused]] const void* end) {
#ifdef SPARSEKV_DEBUG
    extern __shared__ char dynamic_shared[];
    u32 bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    if (end != dynamic_shared + bytes) __trap();
#endif
}

// The hardware's own: one instruction each, good to about two units in the last place.
__device__ inline float exp2_fast(float x) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
__device__ inline float log2_fast(float x) {
    asm("lg2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
__device__ inline float reciprocal(float x) {
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

// ---- element types: 16-bit floats, two to a 32-bit word

// c[16 x 8] += a[16 x 16] b[16 x 8] in float32. Of lane l, r = l / 4 and c = l % 4: a.x, a.z hold row r, a.y, a.w row
// r + 8; b holds column r; of both, the first two words' columns (rows of b) are 2c, 2c + 1 and the last's 2c + 8,
// 2c + 9. c[0], c[1] are row r, columns 2c and 2c + 1; c[2], c[3] are row r + 8.
#define SPARSEKV_MMA(type)                                              \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "  \
                 "{%0, %1, %2, %3};"                                    \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])       \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))

struct bf16 {
    static constexpr u32 INF2 = 0x7F807F80u, NEG_INF2 = 0xFF80FF80u;

    static __device__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
        SPARSEKV_MMA("bf16");
    }
    static __device__ u32 pack(float low, float high) {
        u32 packed;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
        return packed;
    }
    static __device__ u32 min2(u32 a, u32 b) {
        asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
        return a;
    }
    static __device__ u32 max2(u32 a, u32 b) {
        asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
        return a;
    }
    static __device__ float to_float(u16 x) { return __uint_as_float(u32(x) << 16); }
};

struct fp16 {
    static constexpr u32 INF2 = 0x7C007C00u, NEG_INF2 = 0xFC00FC00u;

    static __device__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { SPARSEKV_MMA("f16"); }
    static __device__ u32 pack(float low, float high) {
        u32 packed;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
        return packed;
    }
    static __device__ u32 min2(u32 a, u32 b) {
        asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
        return a;
    }
    static __device__ u32 max2(u32 a, u32 b) {
        asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
        return a;
    }
    static __device__ float to_float(u16 x) {
        float wide;
        asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
        return wide;
    }
};

#undef SPARSEKV_MMA

// The words of two tokens regrouped: the low halves of both, or the high halves of both.
__device__ inline u32 low_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
__device__ inline u32 high_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }

// ---- memory

// Pointers are never __restrict__: it would let the compiler read ahead of wait_for_previous_kernel and of barriers.
// What is read once is kept out of L1. OFFSET, in bytes, is part of the instruction: no arithmetic per load.
template <int OFFSET = 0>
__device__ inline uint4 load16(const void* p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p), "n"(OFFSET)
                 : "memory");
    return v;
}
// The same, but kept: when several loads each want a part of a line, the first fetches it for all.
template <int OFFSET>
__device__ inline uint4 load16_of_line(const void* p) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p), "n"(OFFSET)
                 : "memory");
    return v;
}
template <int OFFSET = 0>
__device__ inline uint2 load8(const void* p) {
    uint2 v;
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2 + %3];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(p), "n"(OFFSET)
                 : "memory");
    return v;
}
template <int OFFSET = 0>
__device__ inline u32 load4(const void* p) {
    u32 v;
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1 + %2];" : "=r"(v) : "l"(p), "n"(OFFSET) : "memory");
    return v;
}

// 4, 8 or 16 bytes from memory to shared memory that nobody waits for until wait_for_copies.
template <int BYTES>
__device__ inline void copy_async(void* shared, const void* global) {
    const u32 to = static_cast<u32>(__cvta_generic_to_shared(shared));
    if constexpr (BYTES == 16)  // such are kept out of L1
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(BYTES) : "memory");
}
// What this thread has asked for since it last did so is a group. It waits for all but its last PENDING groups.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four matrices of 8 x 8 numbers of 16 bits: lane 8 i + j says where row j of matrix i lies. In words[i] lane l gets
// of matrix i row l / 4, columns 2 (l % 4) and the next; TRANSPOSED: column l / 4, of these rows.
template <bool TRANSPOSED>
__device__ inline void load_matrices(u32 (&words)[4], const void* shared) {
    const u32 from = static_cast<u32>(__cvta_generic_to_shared(shared));
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(from)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(from)
                     : "memory");
}

// f(Index<0>), ..., f(Index<N - 1>): a loop whose index is a constant.
template <int I>
struct Index {
    static constexpr int value = I;
};
template <int N, int I = 0, typename F>
__device__ inline void unrolled(F f) {
    if constexpr (I < N) {
        f(Index<I>{});
        unrolled<N, I + 1>(f);
    }
}

// ---- clusters: CTAs that run together and can reach one another's shared memory (sm_90 and later; else of one)

#if __CUDA_ARCH__ >= 900
__device__ inline u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ inline u32 cluster_size() {
    u32 size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The address, in the window of the whole cluster, of a variable in the shared memory of CTA `rank`.
__device__ inline u32 remote_address(const void* shared, u32 rank) {
    u32 address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"(static_cast<u32>(__cvta_generic_to_shared(shared))), "r"(rank));
    return address;
}
__device__ inline void store_remote(u32 address, u32 value) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
__device__ inline void store_remote4(u32 address, float4 v) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z),
                 "f"(v.w)
                 : "memory");
}
// A kernel launched early (programmatic dependent launch) waits here for the results of the one before.
__device__ inline void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ inline void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;"); }
#else
__device__ inline u32 cluster_rank() { return 0; }
__device__ inline u32 cluster_size() { return 1; }
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_wait() { __syncthreads(); }
__device__ inline u32 remote_address(const void* shared, u32) {
    return static_cast<u32>(__cvta_generic_to_shared(shared));
}
__device__ inline void store_remote(u32 address, u32 value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
__device__ inline void store_remote4(u32 address, float4 v) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}
__device__ inline void wait_for_previous_kernel() {}
__device__ inline void let_next_kernel_start() {}
#endif
