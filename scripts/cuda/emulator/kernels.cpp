// Kernels: candle's, compiled for the host, and ours in Triton's interpreter.

#include "emulator.h"
#include <chrono>
#include <dlfcn.h>
#include <set>

namespace emulator {

Index thread, block, block_size, grid_size;

static std::string entry_body(const std::string &ptx, size_t from) {
    size_t open = ptx.find("\n{", from), close = ptx.find("\n}", open);
    return open == std::string::npos ? "" : ptx.substr(open, close - open);
}

// The functions of a module of candle, from its PTX.
Module *candle_module(const std::string &ptx) {
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

static void run_on_host(const Function &function, const std::vector<uint64_t> &values, Index grid, Index size) {
    if (!function.host) fail("kernel " + function.name + " was not compiled for the host");
    grid_size = grid, block_size = size;
    for (block.z = 0; block.z < grid.z; block.z++)
        for (block.y = 0; block.y < grid.y; block.y++)
            for (block.x = 0; block.x < grid.x; block.x++) run_block(function.name, function.waits, [&] { call(function, values); });
}

static std::set<std::string> launched;

void launch(Function *function, std::vector<uint64_t> values, Index grid, Index size) {
    auto began = std::chrono::steady_clock::now();
    if (!computes) {
        if (!function->triton && !function->host) fail("kernel " + function->name + " was not compiled for the host");
    } else if (function->triton) triton_launch(function->name, values.data(), values.size(), grid.x, grid.y, grid.z);
    else run_on_host(*function, values, grid, size);
    launched.insert(function->name);
    if (traces) {
        double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
        size_t bytes = 0;
        for (size_t p = 0; p < values.size(); p++)
            if (function->parameters[p].size == 8) bytes += room(values[p]);
        fprintf(stderr, "launch %s %.3f s, %.3f MB in its tensors, grid (%u, %u, %u) of %u\n", function->name.c_str(), seconds,
                bytes / 1e6, grid.x, grid.y, grid.z, size.x * size.y * size.z);
    }
    for (size_t p = 0; p < values.size(); p++)
        if (function->parameters[p].size == 8) check_guards(values[p], function->name);
}

Module *triton_module(const std::string &name, const std::string &kinds) {
    auto *function = new Function{name};
    function->triton = true;
    for (char c : kinds) function->parameters.push_back({c, c == 'i' || c == 'f' ? 4u : 8u});
    return new Module{{{triton_entry(name), function}}};
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
