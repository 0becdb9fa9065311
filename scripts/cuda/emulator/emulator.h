// What the parts of the emulator share.

#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <string>

namespace emulator {

struct Index {
    unsigned x, y, z;
};
// Of the thread of a kernel that runs.
extern Index thread, block, block_size, grid_size;

// Held by whoever is in a call.
extern std::recursive_mutex everything;

// Says what is wrong and ends the process.
[[noreturn]] void fail(const std::string &what);

// Bytes that are allocated from this address on.
size_t room(uintptr_t address);
// Fails if fewer than that are.
void expect(uintptr_t address, size_t bytes, const std::string &who);

// The same; whether the bytes are then to be read or written.
bool does(uintptr_t address, size_t bytes, const std::string &who);

// Puts work into a stream.
void give(void *stream, std::function<void()> work);

// Runs the threads of one block.
void run_block(const std::string &name, bool waits, const std::function<void()> &body);

// The kernel of ours that this machine code or PTX is, and its parameters' kinds; nothing for others.
std::optional<std::string> triton_kernel(const void *image, std::string &kinds);
// The name of its function.
std::string triton_entry(const std::string &kernel);
bool triton_fits(const std::string &kernel, unsigned threads, unsigned shared);
void triton_launch(const std::string &kernel, const uint64_t *values, size_t count, unsigned x, unsigned y, unsigned z);

} // namespace emulator
