// CUDA C++ for the host's compiler: enough of the language for candle's kernels, whose sources are compiled with this header
// before them.
//
// The headers of the toolkit come first, while `__CUDA_ARCH__` is not defined: they then bring their types with host code.

#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <type_traits>

namespace emulator {
struct Index {
    unsigned x, y, z;
};
// Of the thread that runs; set by the driver.
extern Index thread, block, block_size, grid_size;
// Gives way to the other threads of the block until all have come here.
void barrier();
// 8 bytes of every thread of the warp, exchanged.
uint64_t exchange(uint64_t mine, unsigned from_lane);
} // namespace emulator

#define __CUDA_ARCH__ 900
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#undef __global__
#define __global__
#undef __device__
#define __device__
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline
#define threadIdx emulator::thread
#define blockIdx emulator::block
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

inline void __syncthreads() { emulator::barrier(); }

template <typename T> T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = emulator::exchange(bits, (emulator::thread.x + emulator::block_size.x * emulator::thread.y) % 32 ^ mask);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

template <typename A, typename B> std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <typename A, typename B> std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
using std::isnan;
using std::signbit;

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double normcdf(double x) { return 0.5 * erfc(-x * M_SQRT1_2); }
inline float normcdff(float x) { return (float)normcdf(x); }

template <typename To, typename From> To bits_as(From from) {
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return bits_as<double>(x); }

// One thread runs at a time.
template <typename T> T atomicAdd(T *at, T value) {
    T old = *at;
    *at = old + value;
    return old;
}
template <typename T> T atomicCAS(T *at, T expected, T value) {
    T old = *at;
    if (std::memcmp(&old, &expected, sizeof(T)) == 0) *at = value;
    return old;
}
template <typename T> T atomicMax(T *at, std::common_type_t<T> value) {
    T old = *at;
    *at = old < value ? value : old;
    return old;
}
template <typename T> T atomicMin(T *at, std::common_type_t<T> value) {
    T old = *at;
    *at = value < old ? value : old;
    return old;
}

// Functions that the toolkit's headers have for GPUs only.
#define THROUGH_F32(NAME, EXPRESSION)                                                                                          \
    inline __half NAME(__half h) {                                                                                             \
        float x = __half2float(h);                                                                                             \
        return __float2half(EXPRESSION);                                                                                       \
    }                                                                                                                          \
    inline __nv_bfloat16 NAME(__nv_bfloat16 h) {                                                                               \
        float x = __bfloat162float(h);                                                                                         \
        return __float2bfloat16(EXPRESSION);                                                                                   \
    }
THROUGH_F32(hsqrt, sqrtf(x))
THROUGH_F32(hcos, cosf(x))
THROUGH_F32(hsin, sinf(x))
THROUGH_F32(hlog, logf(x))
THROUGH_F32(hexp, expf(x))
