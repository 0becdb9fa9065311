// The threads of a block, one after another; where they wait for each other, as fibers. A fiber is begun with `makecontext` and
// continued with jumps, which unlike `swapcontext` do not ask the system each time.

#include "emulator.h"
#include <csetjmp>
#include <ucontext.h>
#include <vector>

namespace emulator {

namespace {
enum class State { Runs, AtBarrier, AtExchange, Done };
const size_t STACK = 128 << 10;

struct Fiber {
    ucontext_t context;
    jmp_buf at;
    bool begun;
    std::vector<char> stack = std::vector<char>(STACK);
    State state;
    Index index;
    unsigned exchanges;
};

std::vector<Fiber *> fibers;
ucontext_t scheduler_context;
jmp_buf scheduler;
Fiber *current;
const std::function<void()> *work;
// Two turns: a thread may give its next value while others still read this one.
std::vector<uint64_t> given[2];

void enter() {
    (*work)();
    current->state = State::Done;
    _longjmp(scheduler, 1);
}

void wait(State state) {
    Fiber *fiber = current;
    fiber->state = state;
    if (!_setjmp(fiber->at)) _longjmp(scheduler, 1);
}

void resume(Fiber &fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.at, 1);
    fiber.begun = true;
    swapcontext(&scheduler_context, &fiber.context);
}

size_t linear(Index at) { return at.x + block_size.x * (at.y + (size_t)block_size.y * at.z); }
} // namespace

void barrier() {
    if (!current) fail("a barrier in a kernel without barriers");
    wait(State::AtBarrier);
}

uint64_t exchange(uint64_t mine, unsigned from_lane) {
    if (!current) fail("an exchange in a kernel without exchanges");
    size_t self = linear(thread), turn = current->exchanges++ % 2;
    given[turn][self] = mine;
    wait(State::AtExchange);
    return given[turn][self / 32 * 32 + from_lane];
}

void run_block(const std::string &name, bool waits, const std::function<void()> &body) {
    size_t count = (size_t)block_size.x * block_size.y * block_size.z;
    auto index = [&](size_t i) {
        return Index{(unsigned)(i % block_size.x), (unsigned)(i / block_size.x % block_size.y),
                     (unsigned)(i / block_size.x / block_size.y)};
    };
    if (!waits) {
        for (size_t i = 0; i < count; i++) thread = index(i), body();
        return;
    }
    while (fibers.size() < count) fibers.push_back(new Fiber);
    for (auto &turn : given) turn.assign((count + 31) / 32 * 32, 0);
    work = &body;
    for (size_t i = 0; i < count; i++) {
        Fiber &fiber = *fibers[i];
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
        fiber.context.uc_link = nullptr;
        fiber.state = State::Runs, fiber.begun = false, fiber.index = index(i), fiber.exchanges = 0;
        makecontext(&fiber.context, enter, 0);
    }
    for (bool all_at_barrier = false;;) {
        size_t done = 0, at_barrier = 0, ran = 0;
        for (size_t i = 0; i < count; i++) {
            Fiber &fiber = *fibers[i];
            if (fiber.state == State::AtBarrier && !all_at_barrier) at_barrier++;
            else if (fiber.state == State::Done) done++;
            else {
                current = &fiber, thread = fiber.index, ran++;
                resume(fiber);
            }
        }
        if (done == count) break;
        all_at_barrier = at_barrier + done == count;
        if (!ran && !all_at_barrier) fail(name + ": its threads wait for each other for ever");
    }
    current = nullptr;
}

} // namespace emulator
