// Matrix instructions of a warpgroup (sm_90a): 64 rows by N columns by 16, operands in shared memory with 128-byte panels.
#pragma once
#include "common.cuh"

// Where an operand of atoms (8 rows of 128 bytes, their chunks exchanged) lies. For K-major operands `groups` is the distance of
// groups of 8 rows; for the other order `panels` is the distance of panels and `groups` that of groups of 8 along K.
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t panels, uint32_t groups) {
    constexpr uint64_t SWIZZLE_128 = 1ull << 62;
    return (address & 0x3FFFF) >> 4 | static_cast<uint64_t>(panels >> 4) << 16 | static_cast<uint64_t>(groups >> 4) << 32 | SWIZZLE_128;
}

// The operand that lies that many bytes on: its low half holds the address, so that this is one sum of 32 bits.
__device__ __forceinline__ uint64_t further(uint64_t operand, uint32_t bytes) {
    return (operand & 0xFFFFFFFF00000000ull) | static_cast<uint32_t>(static_cast<uint32_t>(operand) + (bytes >> 4));
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most LEFT committed groups are on their way.
template <int LEFT> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory");
}
// Keeps the compiler from moving uses of results over a wait.
template <int N> __device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}

// d = a b^T, or added to d where `keep`: both operands in shared memory, K-major.
template <int N, typename T> __device__ __forceinline__ void multiply_shared(float (&d)[N / 2], uint64_t a, uint64_t b, int keep);
// d += a b: a in registers, b in shared memory with N contiguous.
template <int N, typename T> __device__ __forceinline__ void multiply_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b);

// The results of an instruction as PTX names them, and as it is given them: in eights.
#define NAMES_1 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_2 NAMES_1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_3 NAMES_2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NAMES_4 NAMES_3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_5 NAMES_4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NAMES_6 NAMES_5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_7 NAMES_6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define NAMES_8 NAMES_7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_9 NAMES_8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define NAMES_10 NAMES_9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES_11 NAMES_10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define NAMES_12 NAMES_11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_13 NAMES_12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define NAMES_14 NAMES_13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define NAMES_15 NAMES_14 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define NAMES_16 NAMES_15 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define EIGHT(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define NUMBERS_1 EIGHT(0)
#define NUMBERS_2 NUMBERS_1, EIGHT(8)
#define NUMBERS_3 NUMBERS_2, EIGHT(16)
#define NUMBERS_4 NUMBERS_3, EIGHT(24)
#define NUMBERS_5 NUMBERS_4, EIGHT(32)
#define NUMBERS_6 NUMBERS_5, EIGHT(40)
#define NUMBERS_7 NUMBERS_6, EIGHT(48)
#define NUMBERS_8 NUMBERS_7, EIGHT(56)
#define NUMBERS_9 NUMBERS_8, EIGHT(64)
#define NUMBERS_10 NUMBERS_9, EIGHT(72)
#define NUMBERS_11 NUMBERS_10, EIGHT(80)
#define NUMBERS_12 NUMBERS_11, EIGHT(88)
#define NUMBERS_13 NUMBERS_12, EIGHT(96)
#define NUMBERS_14 NUMBERS_13, EIGHT(104)
#define NUMBERS_15 NUMBERS_14, EIGHT(112)
#define NUMBERS_16 NUMBERS_15, EIGHT(120)

// NAME is PTX's word for the dtype; RESULTS the eights of results; A, B, KEEP the numbers of the operands behind them.
#define PRODUCT_SHARED(T, NAME, N, RESULTS, A, B, KEEP) \
template <> __device__ __forceinline__ void multiply_shared<N, T>(float (&d)[N / 2], uint64_t a, uint64_t b, int keep) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #KEEP ", 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" NAMES_##RESULTS "}, %" #A ", %" #B ", p, 1, 1, 0, 0;\n}\n" \
                 : NUMBERS_##RESULTS : "l"(a), "l"(b), "r"(keep)); \
}
#define PRODUCT_REGISTERS(T, NAME, N, RESULTS, A0, A1, A2, A3, B) \
template <> __device__ __forceinline__ void multiply_registers<N, T>(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" NAMES_##RESULTS "}, " \
                 "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", 1, 1, 1, 1;\n" \
                 : NUMBERS_##RESULTS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
}
#define PRODUCTS(T, NAME) \
    PRODUCT_SHARED(T, NAME, 32, 2, 16, 17, 18) \
    PRODUCT_SHARED(T, NAME, 48, 3, 24, 25, 26) \
    PRODUCT_SHARED(T, NAME, 64, 4, 32, 33, 34) \
    PRODUCT_SHARED(T, NAME, 96, 6, 48, 49, 50) \
    PRODUCT_SHARED(T, NAME, 128, 8, 64, 65, 66) \
    PRODUCT_SHARED(T, NAME, 192, 12, 96, 97, 98) \
    PRODUCT_SHARED(T, NAME, 224, 14, 112, 113, 114) \
    PRODUCT_SHARED(T, NAME, 256, 16, 128, 129, 130) \
    PRODUCT_REGISTERS(T, NAME, 64, 4, 32, 33, 34, 35, 36) \
    PRODUCT_REGISTERS(T, NAME, 128, 8, 64, 65, 66, 67, 68)

PRODUCTS(__nv_bfloat16, "bf16")
PRODUCTS(__half, "f16")
