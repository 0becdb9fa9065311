// Device memory: host memory between guards, or mere addresses where nothing is computed.

#include "emulator.h"
#include <map>

namespace emulator {

static const size_t GUARD = 256;
static const unsigned char GUARD_BYTE = 0xA5, UNWRITTEN = 0xFF; // 0xFF.. is a NaN in every float type

struct Block {
    unsigned char *raw;
    size_t size;
};
static std::map<uintptr_t, Block> live; // by address
const bool traces = getenv("EMULATOR_TRACE");
const bool computes = setting("EMULATOR_COMPUTE", "yes") != "no";
size_t in_use, peak, total = std::stoull(setting("EMULATOR_MEMORY_MB", "8192")) << 20;

static void check_guards(uintptr_t address, const Block &block, const std::string &who) {
    if (!computes) return;
    auto *at = (unsigned char *)address;
    for (size_t i = 1; i <= GUARD; i++)
        if (at[-(ptrdiff_t)i] != GUARD_BYTE) fail(who + ": wrote before an allocation of " + std::to_string(block.size) + " bytes");
    for (size_t i = 0; i < GUARD; i++)
        if (at[block.size + i] != GUARD_BYTE) fail(who + ": wrote beyond an allocation of " + std::to_string(block.size) + " bytes");
}

bool allocate(uintptr_t *out, size_t size) {
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

void release(uintptr_t address) {
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

void check_guards(uintptr_t address, const std::string &who) {
    auto after = live.upper_bound(address);
    if (after == live.begin()) return;
    auto &[start, block] = *std::prev(after);
    if (address < start + block.size) check_guards(start, block, who);
}

void check_all_guards(const std::string &who) {
    for (auto &[address, block] : live) check_guards(address, block, who);
}

} // namespace emulator
