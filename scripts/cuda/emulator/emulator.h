// What the parts of the emulator share.

#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace emulator {

struct Index {
    unsigned x, y, z;
};
// Of the thread of a kernel that runs.
extern Index thread, block, block_size, grid_size;

// Held by whoever is in a call.
extern std::recursive_mutex everything;

// A variable of the environment.
std::string setting(const char *name, const char *otherwise);

// Says what is wrong and ends the process.
[[noreturn]] void fail(const std::string &what);

// `EMULATOR_COMPUTE=no`: nothing is computed or copied and no memory is touched, so that the published model runs in no time and
// its memory can be counted. What comes back from the device is zeros.
extern const bool computes;
// `EMULATOR_TRACE`: every launch, copy and wait is printed.
extern const bool traces;

// Bytes of the device.
extern size_t in_use, peak, total;
// False if there is no room.
bool allocate(uintptr_t *out, size_t size);
void release(uintptr_t address);
// Bytes that are allocated from this address on.
size_t room(uintptr_t address);
// Fails if fewer than that are.
void expect(uintptr_t address, size_t bytes, const std::string &who);
// The same; whether the bytes are then to be read or written.
bool does(uintptr_t address, size_t bytes, const std::string &who);
// Fails if something was written beside the allocation that the address is in, if it is in one; or beside any.
void check_guards(uintptr_t address, const std::string &who);
void check_all_guards(const std::string &who);

// A place in the work of a stream.
struct Stream;
struct Moment {
    Stream *stream = nullptr;
    uint64_t at = 0;
};
// After all that the stream has been given so far.
Moment now(void *stream);
// Does the work up to there.
void reach(Moment moment);
// Puts work into a stream.
void give(void *stream, std::function<void()> work);
void synchronise(void *stream);
void synchronise_all();
void *make_stream();
void end_stream(void *stream);

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

// The functions of a module of candle, by its PTX; and that of one of ours.
Module *candle_module(const std::string &ptx);
Module *triton_module(const std::string &name, const std::string &kinds);
void launch(Function *function, std::vector<uint64_t> values, Index grid, Index size);

// Runs the threads of one block.
void run_block(const std::string &name, bool waits, const std::function<void()> &body);

// The kernel of ours that this machine code or PTX is, and its parameters' kinds; nothing for others.
std::optional<std::string> triton_kernel(const void *image, std::string &kinds);
// The name of its function.
std::string triton_entry(const std::string &kernel);
bool triton_fits(const std::string &kernel, unsigned threads, unsigned shared);
void triton_launch(const std::string &kernel, const uint64_t *values, size_t count, unsigned x, unsigned y, unsigned z);

} // namespace emulator
