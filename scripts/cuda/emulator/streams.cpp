// Streams: queues, drained at once or late.

#include "emulator.h"
#include <cuda.h>
#include <set>

namespace emulator {

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

static std::set<Stream *> streams;

static Stream *stream_of(void *handle) {
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
    auto *stream = stream_of(handle);
    stream->queue.push_back(std::move(work));
    stream->given++;
    if (!stream->late) stream->drain(stream->given);
}

void synchronise(void *handle) {
    auto *stream = stream_of(handle);
    stream->drain(stream->given);
}

void synchronise_all() {
    // Work may wait for work of other streams, which drains them.
    for (auto *stream : streams) stream->drain(stream->given);
}

void *make_stream() { return *streams.insert(new Stream{order == "copies-late"}).first; }

void end_stream(void *handle) {
    synchronise(handle);
    streams.erase((Stream *)handle);
}

Moment now(void *handle) {
    auto *stream = stream_of(handle);
    return {stream, stream->given};
}

void reach(Moment moment) {
    if (moment.stream) moment.stream->drain(moment.at);
}

} // namespace emulator
