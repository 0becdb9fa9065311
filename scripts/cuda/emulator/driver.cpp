// A CUDA driver that computes on the host: the calls of libcuda.so.1 that candle and the trainer make (see README.md).

#include "emulator.h"
#include <cuda.h>
#include <map>

std::recursive_mutex emulator::everything;

void emulator::fail(const std::string &what) {
    fprintf(stderr, "emulator: %s\n", what.c_str());
    fflush(stderr);
    abort();
}

std::string emulator::setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value ? value : otherwise;
}

using namespace emulator;

#define CALL extern "C" __attribute__((visibility("default"))) CUresult
#define ALONE std::lock_guard<std::recursive_mutex> alone(everything)
static const CUresult OK = CUDA_SUCCESS;

CALL cuInit(unsigned) { return OK; }
CALL cuDriverGetVersion(int *version) { return *version = 13000, OK; }
CALL cuDeviceGetCount(int *count) { return *count = 1, OK; }
CALL cuDeviceGet(CUdevice *device, int ordinal) { return ordinal ? CUDA_ERROR_INVALID_DEVICE : (*device = 0, OK); }
CALL cuDeviceGetName(char *name, int length, CUdevice) { return snprintf(name, length, "emulated GPU"), OK; }
CALL cuDeviceTotalMem(size_t *bytes, CUdevice) { return *bytes = total, OK; }
CALL cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) { return *context = (CUcontext)1, OK; }
CALL cuDevicePrimaryCtxRelease(CUdevice) { return OK; }
CALL cuCtxSetCurrent(CUcontext) { return OK; }
CALL cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, OK; }
CALL cuCtxDestroy(CUcontext) { return OK; }
CALL cuCtxSynchronize() {
    ALONE;
    synchronise_all();
    check_all_guards("what was running");
    return OK;
}
CALL cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
    static const int capability = std::stoi(setting("EMULATOR_CAPABILITY", "90"));
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability % 10; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 4; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    default: fail("device attribute " + std::to_string(attribute) + " is not known");
    }
    return OK;
}
CALL cuGetErrorName(CUresult error, const char **text) { return *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "an error", OK; }
CALL cuGetErrorString(CUresult error, const char **text) { return *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "an error", OK; }

CALL cuMemGetInfo(size_t *free, size_t *all) {
    ALONE;
    return *free = total - in_use, *all = total, OK;
}
CALL cuMemAlloc(CUdeviceptr *out, size_t size) {
    ALONE;
    return allocate((uintptr_t *)out, size) ? OK : CUDA_ERROR_OUT_OF_MEMORY;
}
CALL cuMemFree(CUdeviceptr address) {
    ALONE;
    synchronise_all();
    return release(address), OK;
}
CALL cuMemAllocAsync(CUdeviceptr *out, size_t size, CUstream) {
    ALONE;
    return size == 0 ? CUDA_ERROR_INVALID_VALUE : allocate((uintptr_t *)out, size) ? OK : CUDA_ERROR_OUT_OF_MEMORY;
}
CALL cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
    ALONE;
    return give(stream, [=] { release(address); }), OK;
}
CALL cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice) { return *pool = (CUmemoryPool)1, OK; }
CALL cuDeviceGetMemPool(CUmemoryPool *pool, CUdevice) { return *pool = (CUmemoryPool)1, OK; }
CALL cuMemPoolTrimTo(CUmemoryPool, size_t) { return OK; }
CALL cuMemPoolGetAttribute(CUmemoryPool, CUmemPool_attribute attribute, void *value) {
    ALONE;
    switch (attribute) {
    case CU_MEMPOOL_ATTR_USED_MEM_HIGH:
    case CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH: *(uint64_t *)value = peak; return OK;
    case CU_MEMPOOL_ATTR_USED_MEM_CURRENT:
    case CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT: *(uint64_t *)value = in_use; return OK;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
}
CALL cuMemPoolSetAttribute(CUmemoryPool, CUmemPool_attribute attribute, void *value) {
    ALONE;
    if (attribute == CU_MEMPOOL_ATTR_RELEASE_THRESHOLD) return OK;
    if (attribute != CU_MEMPOOL_ATTR_USED_MEM_HIGH || *(uint64_t *)value != 0) return CUDA_ERROR_INVALID_VALUE;
    return peak = in_use, OK;
}
static std::map<uintptr_t, size_t> pinned;

CALL cuMemHostAlloc(void **out, size_t size, unsigned) {
    ALONE;
    *out = malloc(size);
    if (!*out) return CUDA_ERROR_OUT_OF_MEMORY;
    pinned[(uintptr_t)*out] = size;
    return OK;
}
CALL cuMemFreeHost(void *address) {
    ALONE;
    if (!pinned.erase((uintptr_t)address)) fail("freed host memory that is not pinned");
    return free(address), OK;
}

static bool is_pinned(const void *address) {
    auto after = pinned.upper_bound((uintptr_t)address);
    if (after == pinned.begin()) return false;
    auto &[start, size] = *std::prev(after);
    return (uintptr_t)address < start + size;
}

CALL cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
    ALONE;
    if (traces) fprintf(stderr, "copy to the device %zu bytes%s\n", bytes, is_pinned(from) ? " from pinned memory" : "");
    if (is_pinned(from)) {
        give(stream, [=] { if (does(to, bytes, "a copy to the device")) memcpy((void *)to, from, bytes); });
    } else { // the driver has read it when the call returns
        auto *start = (const unsigned char *)from;
        if (!does(to, bytes, "a copy to the device")) return OK;
        std::vector<unsigned char> staged(start, start + bytes);
        give(stream, [to, staged = std::move(staged)] {
            if (does(to, staged.size(), "a copy to the device")) memcpy((void *)to, staged.data(), staged.size());
        });
    }
    return OK;
}
CALL cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t bytes) {
    ALONE;
    synchronise(nullptr);
    if (does(to, bytes, "a copy to the device")) memcpy((void *)to, from, bytes);
    return OK;
}
static void copy_back(void *to, CUdeviceptr from, size_t bytes) {
    if (traces) fprintf(stderr, "copy back %zu bytes\n", bytes);
    if (does(from, bytes, "a copy from the device")) memcpy(to, (void *)from, bytes);
    else memset(to, 0, bytes);
}
CALL cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ALONE;
    give(stream, [=] { copy_back(to, from, bytes); });
    // Into memory that is not pinned the call returns when the copy is done.
    if (!is_pinned(to)) synchronise(stream);
    return OK;
}
CALL cuMemcpyDtoH(void *to, CUdeviceptr from, size_t bytes) {
    ALONE;
    synchronise(nullptr);
    return copy_back(to, from, bytes), OK;
}
CALL cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ALONE;
    give(stream, [=] {
        expect(from, bytes, "a copy on the device");
        if (does(to, bytes, "a copy on the device")) memmove((void *)to, (void *)from, bytes);
    });
    return OK;
}
CALL cuMemcpyDtoD(CUdeviceptr to, CUdeviceptr from, size_t bytes) { return cuMemcpyDtoDAsync(to, from, bytes, nullptr); }
CALL cuMemcpyPeerAsync(CUdeviceptr, CUcontext, CUdeviceptr, CUcontext, size_t, CUstream) { return CUDA_ERROR_NOT_SUPPORTED; }
CALL cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream) {
    ALONE;
    return give(stream, [=] { if (does(to, bytes, "a memset")) memset((void *)to, value, bytes); }), OK;
}
CALL cuMemsetD8(CUdeviceptr to, unsigned char value, size_t bytes) { return cuMemsetD8Async(to, value, bytes, nullptr); }

CALL cuStreamCreate(CUstream *out, unsigned flags) {
    ALONE;
    if (flags != CU_STREAM_NON_BLOCKING) fail("streams that wait for the null stream are not emulated");
    return *out = (CUstream)make_stream(), OK;
}
CALL cuStreamIsCapturing(CUstream, CUstreamCaptureStatus *status) { return *status = CU_STREAM_CAPTURE_STATUS_NONE, OK; }
CALL cuStreamDestroy(CUstream handle) {
    ALONE;
    return end_stream(handle), OK;
}
CALL cuStreamSynchronize(CUstream stream) {
    ALONE;
    if (traces) fprintf(stderr, "wait for a stream\n");
    return synchronise(stream), OK;
}
CALL cuEventCreate(CUevent *out, unsigned) { return *out = (CUevent) new Moment, OK; }
CALL cuEventDestroy(CUevent event) { return delete (Moment *)event, OK; }
CALL cuEventRecord(CUevent event, CUstream handle) {
    ALONE;
    return *(Moment *)event = now(handle), OK;
}
CALL cuEventSynchronize(CUevent event) {
    ALONE;
    return reach(*(Moment *)event), OK;
}
CALL cuEventQuery(CUevent event) { return cuEventSynchronize(event); }
CALL cuEventElapsedTime(float *, CUevent, CUevent) { return CUDA_ERROR_NOT_SUPPORTED; }
CALL cuStreamWaitEvent(CUstream stream, CUevent event, unsigned) {
    ALONE;
    // To see that a run without its waits goes wrong.
    static const bool ignored = getenv("EMULATOR_WITHOUT_WAITS");
    Moment moment = *(Moment *)event; // as it is now: a later record does not change this wait
    if (!ignored) give(stream, [=] { reach(moment); });
    return OK;
}

CALL cuModuleLoadData(CUmodule *out, const void *image) {
    ALONE;
    std::string kinds;
    auto ours = triton_kernel(image, kinds);
    *out = (CUmodule)(ours ? triton_module(*ours, kinds) : candle_module((const char *)image));
    return OK;
}
CALL cuModuleLoad(CUmodule *, const char *) { return CUDA_ERROR_NOT_SUPPORTED; }
CALL cuModuleUnload(CUmodule) { return OK; }
CALL cuModuleGetFunction(CUfunction *out, CUmodule handle, const char *name) {
    ALONE;
    auto &functions = ((Module *)handle)->functions;
    auto at = functions.find(name);
    if (at == functions.end()) return CUDA_ERROR_NOT_FOUND;
    return *out = (CUfunction)at->second, OK;
}
CALL cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
    ALONE;
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) fail("a function attribute that is not known");
    if (value > 227 << 10) return CUDA_ERROR_INVALID_VALUE;
    ((Function *)handle)->shared_limit = value;
    return OK;
}
CALL cuFuncGetAttribute(int *, CUfunction_attribute, CUfunction) { return CUDA_ERROR_NOT_SUPPORTED; }
CALL cuLaunchKernel(CUfunction handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                    unsigned shared, CUstream stream, void **parameters, void **) {
    ALONE;
    auto *function = (Function *)handle;
    bool sizes = gx && gy && gz && bx && by && bz && gx < 1u << 31 && gy < 1u << 16 && gz < 1u << 16 && bx * by * bz <= 1024;
    if (!sizes || (int)shared > function->shared_limit) return CUDA_ERROR_INVALID_VALUE;
    if (function->triton && !triton_fits(function->name, bx * by * bz, shared))
        fail(function->name + " was launched with other warps or shared memory than it was compiled for");
    std::vector<uint64_t> values(function->parameters.size());
    for (size_t i = 0; i < values.size(); i++) memcpy(&values[i], parameters[i], function->parameters[i].size);
    give(stream, [=] { launch(function, values, {gx, gy, gz}, {bx, by, bz}); });
    return OK;
}
