// A CUDA driver that computes on the host: libcuda.so.1, libcublas.so.13 and libcurand.so.10 in one (see README.md).
//
// Device memory is host memory between guards. Streams are queues, drained late or at once (EMULATOR_STREAMS), so that a
// missing wait shows. Candle's kernels are their sources compiled for the host; ours run in Triton's interpreter.

#include "emulator.h"
#include <chrono>
#include <cuda.h>
#include <dlfcn.h>
#include <map>
#include <set>
#include <string>
#include <sys/syscall.h>
#include <unistd.h>
#include <vector>

namespace emulator {

std::recursive_mutex everything;

[[noreturn]] void fail(const std::string &what) {
    fprintf(stderr, "emulator: %s\n", what.c_str());
    fflush(stderr);
    abort();
}

static std::string setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value ? value : otherwise;
}

// --- memory -----------------------------------------------------------------------------------------------------------------

static const size_t GUARD = 256;
static const unsigned char GUARD_BYTE = 0xA5, UNWRITTEN = 0xFF; // 0xFF.. is a NaN in every float type

struct Block {
    unsigned char *raw;
    size_t size;
};
static std::map<uintptr_t, Block> live; // by address
static std::map<uintptr_t, size_t> pinned;
// `EMULATOR_COMPUTE=no`: nothing is computed or copied and no memory is touched, so that the published model runs in no time and
// its memory can be counted. What comes back from the device is zeros.
static const bool computes = setting("EMULATOR_COMPUTE", "yes") != "no";
static size_t in_use, peak, total = std::stoull(setting("EMULATOR_MEMORY_MB", "8192")) << 20;

static void check_guards(uintptr_t address, const Block &block, const std::string &who) {
    if (!computes) return;
    auto *at = (unsigned char *)address;
    for (size_t i = 1; i <= GUARD; i++)
        if (at[-(ptrdiff_t)i] != GUARD_BYTE) fail(who + ": wrote before an allocation of " + std::to_string(block.size) + " bytes");
    for (size_t i = 0; i < GUARD; i++)
        if (at[block.size + i] != GUARD_BYTE) fail(who + ": wrote beyond an allocation of " + std::to_string(block.size) + " bytes");
}

static bool allocate(CUdeviceptr *out, size_t size) {
    if (in_use + size > total) return false;
    uintptr_t address;
    if (computes) {
        void *raw = nullptr;
        if (posix_memalign(&raw, 256, size + 2 * GUARD)) return false;
        memset(raw, GUARD_BYTE, size + 2 * GUARD);
        address = (uintptr_t)raw + GUARD;
        memset((void *)address, UNWRITTEN, size);
        live[address] = {(unsigned char *)raw, size};
    } else {
        // Addresses alone.
        static uintptr_t next = 1ul << 46;
        address = next;
        next += (size + 511) / 512 * 512;
        live[address] = {nullptr, size};
    }
    in_use += size;
    peak = std::max(peak, in_use);
    *out = address;
    return true;
}

static void release(uintptr_t address) {
    auto at = live.find(address);
    if (at == live.end()) fail("freed what is not allocated");
    check_guards(address, at->second, "at its end");
    in_use -= at->second.size;
    if (computes) memset((void *)address, UNWRITTEN, at->second.size), free(at->second.raw);
    live.erase(at);
}

size_t room(uintptr_t address) {
    auto after = live.upper_bound(address);
    if (after == live.begin()) return 0;
    auto &[start, block] = *std::prev(after);
    return address < start + block.size ? start + block.size - address : 0;
}

bool does(uintptr_t address, size_t bytes, const std::string &who) {
    expect(address, bytes, who);
    return computes;
}

void expect(uintptr_t address, size_t bytes, const std::string &who) {
    if (bytes && room(address) < bytes)
        fail(who + " touches " + std::to_string(bytes) + " bytes where " + std::to_string(room(address)) + " are allocated");
}

static void check_all_guards(const std::string &who) {
    for (auto &[address, block] : live) check_guards(address, block, who);
}

// --- streams ----------------------------------------------------------------------------------------------------------------

// `EMULATOR_STREAMS`: `in-order` (all work is done when it is given), `copies-late` (what other streams than the thread's own
// were given is done when somebody waits for it), `copies-early` (it is the thread's own stream that is late).
static const std::string order = setting("EMULATOR_STREAMS", "in-order");

struct Stream {
    bool late;
    std::deque<std::function<void()>> queue;
    uint64_t given = 0, done = 0;

    void drain(uint64_t until) {
        while (done < until && !queue.empty()) {
            auto work = std::move(queue.front());
            queue.pop_front();
            done++;
            work();
        }
    }
};

struct Event {
    Stream *stream = nullptr;
    uint64_t at = 0;
};

static std::set<Stream *> streams;

static Stream *stream_of(CUstream handle) {
    if (handle == nullptr) {
        static Stream *null_stream = *streams.insert(new Stream{false}).first;
        return null_stream;
    }
    if (handle == CU_STREAM_PER_THREAD) {
        thread_local Stream *own = nullptr;
        if (!own) streams.insert(own = new Stream{order == "copies-early"});
        return own;
    }
    auto *stream = (Stream *)handle;
    if (!streams.count(stream)) fail("a stream that does not exist");
    return stream;
}

void give(void *handle, std::function<void()> work) {
    auto *stream = stream_of((CUstream)handle);
    stream->queue.push_back(std::move(work));
    stream->given++;
    if (!stream->late) stream->drain(stream->given);
}

static void synchronise(CUstream handle) {
    auto *stream = stream_of(handle);
    stream->drain(stream->given);
}

static void synchronise_all() {
    // Work may wait for work of other streams, which drains them.
    for (auto *stream : streams) stream->drain(stream->given);
}

// --- kernels ----------------------------------------------------------------------------------------------------------------

Index thread, block, block_size, grid_size;

struct Parameter {
    char kind; // p address, i integer, f f32, d f64
    unsigned size;
};

struct Function {
    std::string name;
    std::vector<Parameter> parameters;
    void *host = nullptr;   // candle's, compiled for the host
    bool waits = false;     // it has barriers or exchanges values
    bool triton = false;    // ours
    int shared_limit = 48 << 10;
};

struct Module {
    std::map<std::string, Function *> functions;
};

static std::string entry_body(const std::string &ptx, size_t from) {
    size_t open = ptx.find("\n{", from), close = ptx.find("\n}", open);
    return open == std::string::npos ? "" : ptx.substr(open, close - open);
}

// The functions of a module of candle, from its PTX.
static Module *candle_module(const std::string &ptx) {
    auto *module = new Module;
    static void *kernels = dlopen(setting("EMULATOR_CANDLE", "libcandle_on_host.so").c_str(), RTLD_NOW);
    if (!kernels) fail(dlerror());
    const std::string entry = ".entry ";
    for (size_t at = ptx.find(entry); at != std::string::npos; at = ptx.find(entry, at + 1)) {
        size_t name = at + entry.size(), open = ptx.find('(', name), close = ptx.find(')', open);
        auto *function = new Function{ptx.substr(name, open - name)};
        std::string list = ptx.substr(open, close - open);
        for (size_t p = list.find(".param"); p != std::string::npos; p = list.find(".param", p + 1)) {
            std::string type = list.substr(p + 7, 40);
            if (type.starts_with(".u64") || type.starts_with(".b64")) function->parameters.push_back({'i', 8});
            else if (type.starts_with(".u32") || type.starts_with(".b32") || type.starts_with(".s32")) function->parameters.push_back({'i', 4});
            else if (type.starts_with(".u16") || type.starts_with(".b16") || type.starts_with(".s16")) function->parameters.push_back({'i', 2});
            else if (type.starts_with(".u8") || type.starts_with(".b8") || type.starts_with(".s8")) function->parameters.push_back({'i', 1});
            else if (type.starts_with(".f32")) function->parameters.push_back({'f', 4});
            else if (type.starts_with(".f64")) function->parameters.push_back({'d', 8});
            else if (type.starts_with(".align 2 .b8")) function->parameters.push_back({'i', 2}); // f16 and bf16
            else if (type.starts_with(".align 1 .b8")) function->parameters.push_back({'i', 1}); // f8
            else fail(function->name + " has a parameter " + type);
        }
        std::string body = entry_body(ptx, close);
        function->waits = body.find("bar.sync") != std::string::npos || body.find("shfl") != std::string::npos ||
                          body.find("barrier") != std::string::npos;
        function->host = dlsym(kernels, function->name.c_str());
        module->functions[function->name] = function;
    }
    return module;
}

// Calls a function of the host with any parameters: integers go into six registers, floats into eight, the rest onto the
// stack in order (System V, x86-64).
static void call(const Function &function, const std::vector<uint64_t> &values) {
    uint64_t integers[6] = {}, stack[16] = {};
    double floats[8] = {};
    size_t i = 0, f = 0, s = 0;
    for (size_t p = 0; p < values.size(); p++) {
        bool is_float = function.parameters[p].kind == 'f' || function.parameters[p].kind == 'd';
        if (is_float && f < 8) memcpy(&floats[f++], &values[p], 8);
        else if (!is_float && i < 6) integers[i++] = values[p];
        else if (s < 16) stack[s++] = values[p];
        else fail(function.name + " has too many parameters");
    }
    using Any = void (*)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, double, double, double, double, double,
                         double, double, double, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                         uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);
    ((Any)function.host)(integers[0], integers[1], integers[2], integers[3], integers[4], integers[5], floats[0], floats[1],
                         floats[2], floats[3], floats[4], floats[5], floats[6], floats[7], stack[0], stack[1], stack[2],
                         stack[3], stack[4], stack[5], stack[6], stack[7], stack[8], stack[9], stack[10], stack[11], stack[12],
                         stack[13], stack[14], stack[15]);
}

void run_block(const std::string &name, bool waits, const std::function<void()> &body);

static void run_on_host(const Function &function, const std::vector<uint64_t> &values, Index grid, Index size) {
    if (!function.host) fail("kernel " + function.name + " was not compiled for the host");
    grid_size = grid, block_size = size;
    for (block.z = 0; block.z < grid.z; block.z++)
        for (block.y = 0; block.y < grid.y; block.y++)
            for (block.x = 0; block.x < grid.x; block.x++) run_block(function.name, function.waits, [&] { call(function, values); });
}

static std::set<std::string> launched;

static void launch(Function *function, std::vector<uint64_t> values, Index grid, Index size) {
    static const bool trace = getenv("EMULATOR_TRACE");
    auto began = std::chrono::steady_clock::now();
    if (!computes) {
        if (!function->triton && !function->host) fail("kernel " + function->name + " was not compiled for the host");
    } else if (function->triton) triton_launch(function->name, values.data(), values.size(), grid.x, grid.y, grid.z);
    else run_on_host(*function, values, grid, size);
    launched.insert(function->name);
    if (trace) {
        double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
        size_t bytes = 0;
        for (size_t p = 0; p < values.size(); p++)
            if (function->parameters[p].size == 8) bytes += room(values[p]);
        fprintf(stderr, "launch %s %.3f s, %.3f MB in its tensors, grid (%u, %u, %u) of %u\n", function->name.c_str(), seconds,
                bytes / 1e6, grid.x, grid.y, grid.z, size.x * size.y * size.z);
    }
    for (size_t p = 0; p < values.size(); p++) {
        if (function->parameters[p].size != 8) continue;
        auto after = live.upper_bound(values[p]);
        if (after == live.begin()) continue;
        auto &[start, block] = *std::prev(after);
        if (values[p] < start + block.size) check_guards(start, block, function->name);
    }
}

// What has been launched, for a look at what has not.
struct AtEnd {
    ~AtEnd() {
        const char *path = getenv("EMULATOR_LAUNCHED");
        if (!path) return;
        FILE *file = fopen(path, "a");
        for (auto &name : launched) fprintf(file, "%s\n", name.c_str());
        fclose(file);
    }
} at_end;

} // namespace emulator

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
    return allocate(out, size) ? OK : CUDA_ERROR_OUT_OF_MEMORY;
}
CALL cuMemFree(CUdeviceptr address) {
    ALONE;
    synchronise_all();
    return release(address), OK;
}
CALL cuMemAllocAsync(CUdeviceptr *out, size_t size, CUstream) {
    ALONE;
    return size == 0 ? CUDA_ERROR_INVALID_VALUE : allocate(out, size) ? OK : CUDA_ERROR_OUT_OF_MEMORY;
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
    auto *stream = *streams.insert(new Stream{order == "copies-late"}).first;
    return *out = (CUstream)stream, OK;
}
CALL cuStreamIsCapturing(CUstream, CUstreamCaptureStatus *status) { return *status = CU_STREAM_CAPTURE_STATUS_NONE, OK; }
CALL cuStreamDestroy(CUstream handle) {
    ALONE;
    synchronise(handle);
    return streams.erase((Stream *)handle), OK;
}
CALL cuStreamSynchronize(CUstream stream) {
    ALONE;
    return synchronise(stream), OK;
}
CALL cuEventCreate(CUevent *out, unsigned) { return *out = (CUevent) new Event, OK; }
CALL cuEventDestroy(CUevent event) { return delete (Event *)event, OK; }
CALL cuEventRecord(CUevent event, CUstream handle) {
    ALONE;
    auto *stream = stream_of(handle);
    *(Event *)event = {stream, stream->given};
    return OK;
}
CALL cuEventSynchronize(CUevent event) {
    ALONE;
    auto [stream, at] = *(Event *)event;
    if (stream) stream->drain(at);
    return OK;
}
CALL cuEventQuery(CUevent event) { return cuEventSynchronize(event); }
CALL cuEventElapsedTime(float *, CUevent, CUevent) { return CUDA_ERROR_NOT_SUPPORTED; }
CALL cuStreamWaitEvent(CUstream stream, CUevent event, unsigned) {
    ALONE;
    // To see that a run without its waits goes wrong.
    static const bool ignored = getenv("EMULATOR_WITHOUT_WAITS");
    auto [recorded_on, at] = *(Event *)event; // as it is now: a later record does not change this wait
    if (recorded_on && !ignored) give(stream, [=] { recorded_on->drain(at); });
    return OK;
}

CALL cuModuleLoadData(CUmodule *out, const void *image) {
    ALONE;
    std::string kind;
    if (auto name = triton_kernel(image, kind)) {
        auto *module = new Module;
        auto *function = new Function{*name};
        function->triton = true;
        for (char c : kind) function->parameters.push_back({c, c == 'i' || c == 'f' ? 4u : 8u});
        // By the kernel's entry, whatever it is.
        module->functions[""] = function;
        *out = (CUmodule)module;
    } else {
        *out = (CUmodule)candle_module((const char *)image);
    }
    return OK;
}
CALL cuModuleLoad(CUmodule *, const char *) { return CUDA_ERROR_NOT_SUPPORTED; }
CALL cuModuleUnload(CUmodule) { return OK; }
CALL cuModuleGetFunction(CUfunction *out, CUmodule handle, const char *name) {
    ALONE;
    auto &functions = ((Module *)handle)->functions;
    auto at = functions.find(name);
    if (at == functions.end()) at = functions.find("");
    if (at == functions.end()) return CUDA_ERROR_NOT_FOUND;
    if (at->first.empty() && triton_entry(at->second->name) != name) return CUDA_ERROR_NOT_FOUND;
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
