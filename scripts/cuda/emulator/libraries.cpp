// The calls of cuBLAS and cuRAND that candle and the trainer make.

#include "emulator.h"
#include <cmath>
#include <cublas_v2.h>
#include <curand.h>
#include <random>
#include <vector>

using namespace emulator;

#define CALL(TYPE) extern "C" __attribute__((visibility("default"))) TYPE
#define ALONE std::lock_guard<std::recursive_mutex> alone(everything)

namespace {
struct Blas {
    void *stream = nullptr;
};

size_t width(cudaDataType type) {
    switch (type) {
    case CUDA_R_16BF:
    case CUDA_R_16F: return 2;
    case CUDA_R_32F: return 4;
    case CUDA_R_64F: return 8;
    default: fail("a product of type " + std::to_string(type));
    }
}

double read(uintptr_t base, size_t i, cudaDataType type) {
    if (type == CUDA_R_32F) return ((const float *)base)[i];
    if (type == CUDA_R_64F) return ((const double *)base)[i];
    if (type == CUDA_R_16F) return (double)((const _Float16 *)base)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)base)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

void write(uintptr_t base, size_t i, cudaDataType type, double wide) {
    float value = (float)wide;
    if (type == CUDA_R_32F) ((float *)base)[i] = value;
    else if (type == CUDA_R_64F) ((double *)base)[i] = wide;
    else if (type == CUDA_R_16F) ((_Float16 *)base)[i] = (_Float16)value;
    else {
        uint32_t bits;
        memcpy(&bits, &value, 4);
        ((uint16_t *)base)[i] = std::isnan(value) ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    }
}

// A matrix by columns, `rows` x `columns` after its operation, as floats.
struct Operand {
    uintptr_t base;
    cudaDataType type;
    bool transposed;
    int leading;
    long long stride;
    int rows, columns;

    size_t extent() const {
        int inner = transposed ? columns : rows, outer = transposed ? rows : columns;
        return inner == 0 || outer == 0 ? 0 : (size_t)leading * (outer - 1) + inner;
    }
    bool fits() const { return leading >= std::max(1, transposed ? columns : rows); }
    uintptr_t at(int batch) const { return base + batch * stride * (ptrdiff_t)width(type); }
    bool is_there(int batch) const { return does(at(batch), extent() * width(type), "a product"); }
    // By rows.
    std::vector<float> load(int batch) const {
        std::vector<float> values((size_t)rows * columns);
        uintptr_t at = this->at(batch);
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++)
                values[(size_t)r * columns + c] =
                    (float)read(at, transposed ? (size_t)r * leading + c : (size_t)c * leading + r, type);
        return values;
    }
};

void product(const Operand &a, const Operand &b, const Operand &c, float alpha, float beta, int batches) {
    if (traces) {
        double bytes = a.extent() * width(a.type) + b.extent() * width(b.type) + c.extent() * width(c.type);
        fprintf(stderr, "launch gemm 0 s, %.3f MB in its tensors, %d x %d x %d, %d of them, %.3f TFLOP\n", batches * bytes / 1e6, a.rows,
                a.columns, b.columns, batches, 2e-12 * batches * a.rows * a.columns * b.columns);
    }
    for (int batch = 0; batch < batches; batch++) {
        if (!(a.is_there(batch) & b.is_there(batch) & c.is_there(batch))) continue;
        auto left = a.load(batch), right = b.load(batch);
        uintptr_t out = c.at(batch);
        std::vector<float> row(c.columns);
        for (int r = 0; r < c.rows; r++) {
            std::fill(row.begin(), row.end(), 0.0f);
            for (int k = 0; k < a.columns; k++) {
                float factor = left[(size_t)r * a.columns + k];
                const float *from = &right[(size_t)k * c.columns];
                for (int j = 0; j < c.columns; j++) row[j] += factor * from[j];
            }
            for (int j = 0; j < c.columns; j++) {
                size_t i = (size_t)j * c.leading + r;
                double before = beta == 0.0f ? 0.0 : beta * read(out, i, c.type);
                write(out, i, c.type, alpha * row[j] + before);
            }
        }
    }
}
} // namespace

CALL(cublasStatus_t) cublasCreate_v2(cublasHandle_t *out) { return *out = (cublasHandle_t) new Blas, CUBLAS_STATUS_SUCCESS; }
CALL(cublasStatus_t) cublasDestroy_v2(cublasHandle_t handle) { return delete (Blas *)handle, CUBLAS_STATUS_SUCCESS; }
CALL(cublasStatus_t) cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    return ((Blas *)handle)->stream = stream, CUBLAS_STATUS_SUCCESS;
}
CALL(cublasStatus_t)
cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t a_op, cublasOperation_t b_op, int m, int n, int k,
                           const void *alpha, const void *a, cudaDataType a_type, int lda, long long a_stride, const void *b,
                           cudaDataType b_type, int ldb, long long b_stride, const void *beta, void *c, cudaDataType c_type,
                           int ldc, long long c_stride, int batches, cublasComputeType_t compute, cublasGemmAlgo_t) {
    ALONE;
    // The combinations of https://docs.nvidia.com/cuda/cublas/#cublasgemmstridedbatchedex that sum in f32.
    bool f32_sum = compute == CUBLAS_COMPUTE_32F || compute == CUBLAS_COMPUTE_32F_FAST_TF32;
    bool types = a_type == b_type && (c_type == a_type || c_type == CUDA_R_32F) && a_type != CUDA_R_64F;
    if (!f32_sum || !types) return CUBLAS_STATUS_NOT_SUPPORTED;
    Operand left{(uintptr_t)a, a_type, a_op != CUBLAS_OP_N, lda, a_stride, m, k};
    Operand right{(uintptr_t)b, b_type, b_op != CUBLAS_OP_N, ldb, b_stride, k, n};
    Operand result{(uintptr_t)c, c_type, false, ldc, c_stride, m, n};
    if (m < 0 || n < 0 || k < 0 || batches < 0 || !left.fits() || !right.fits() || !result.fits()) return CUBLAS_STATUS_INVALID_VALUE;
    float factor = *(const float *)alpha, kept = *(const float *)beta;
    give(((Blas *)handle)->stream, [=] { product(left, right, result, factor, kept, batches); });
    return CUBLAS_STATUS_SUCCESS;
}

CALL(cublasStatus_t)
cublasDgemmStridedBatched(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const double *, const double *, int,
                          long long, const double *, int, long long, const double *, double *, int, long long, int) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
}

namespace {
struct Random {
    void *stream = nullptr;
    std::mt19937_64 bits;
};
} // namespace

CALL(curandStatus_t) curandCreateGenerator(curandGenerator_t *out, curandRngType_t) {
    return *out = (curandGenerator_t) new Random, CURAND_STATUS_SUCCESS;
}
CALL(curandStatus_t) curandDestroyGenerator(curandGenerator_t handle) { return delete (Random *)handle, CURAND_STATUS_SUCCESS; }
CALL(curandStatus_t) curandSetPseudoRandomGeneratorSeed(curandGenerator_t handle, unsigned long long seed) {
    return ((Random *)handle)->bits.seed(seed), CURAND_STATUS_SUCCESS;
}
CALL(curandStatus_t) curandSetGeneratorOffset(curandGenerator_t, unsigned long long) { return CURAND_STATUS_SUCCESS; }
CALL(curandStatus_t) curandSetStream(curandGenerator_t handle, cudaStream_t stream) {
    return ((Random *)handle)->stream = stream, CURAND_STATUS_SUCCESS;
}

template <typename T, typename D> static curandStatus_t fill(curandGenerator_t handle, T *out, size_t n, D distribution) {
    ALONE;
    auto *random = (Random *)handle;
    give(random->stream, [=]() mutable {
        if (!does((uintptr_t)out, n * sizeof(T), "random numbers")) return;
        for (size_t i = 0; i < n; i++) out[i] = distribution(random->bits);
    });
    return CURAND_STATUS_SUCCESS;
}
CALL(curandStatus_t) curandGenerateUniform(curandGenerator_t handle, float *out, size_t n) {
    return fill(handle, out, n, std::uniform_real_distribution<float>());
}
CALL(curandStatus_t) curandGenerateUniformDouble(curandGenerator_t handle, double *out, size_t n) {
    return fill(handle, out, n, std::uniform_real_distribution<double>());
}
// Pairs are made at once: an odd number is refused.
CALL(curandStatus_t) curandGenerateNormal(curandGenerator_t handle, float *out, size_t n, float mean, float deviation) {
    return n % 2 ? CURAND_STATUS_LENGTH_NOT_MULTIPLE : fill(handle, out, n, std::normal_distribution<float>(mean, deviation));
}
CALL(curandStatus_t) curandGenerateNormalDouble(curandGenerator_t handle, double *out, size_t n, double mean, double deviation) {
    return n % 2 ? CURAND_STATUS_LENGTH_NOT_MULTIPLE : fill(handle, out, n, std::normal_distribution<double>(mean, deviation));
}
