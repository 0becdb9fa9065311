// Our kernels in Triton's interpreter: a Python inside the process, which works on the emulated device memory in place.

#include "emulator.h"
#include <Python.h>

namespace emulator {

namespace {
PyObject *module_() {
    static PyObject *module = [] {
        Py_InitializeEx(0);
        PyObject *loaded = PyImport_ImportModule("on_host");
        if (!loaded) PyErr_Print(), fail("Triton's interpreter does not start");
        PyEval_SaveThread();
        return loaded;
    }();
    return module;
}

struct Lock {
    PyObject *module = module_();
    PyGILState_STATE state = PyGILState_Ensure();
    ~Lock() { PyGILState_Release(state); }

    template <typename... A> PyObject *call(const char *function, const char *format, A... arguments) {
        PyObject *result = PyObject_CallMethod(module, function, format, arguments...);
        if (!result) PyErr_Print(), fail(std::string("in ") + function);
        return result;
    }
};
} // namespace

std::optional<std::string> triton_kernel(const void *image, std::string &kinds) {
    Lock lock;
    PyObject *found = lock.call("kernel_of", "K", (unsigned long long)image);
    std::optional<std::string> name;
    if (found != Py_None) {
        name = PyUnicode_AsUTF8(PyTuple_GetItem(found, 0));
        kinds = PyUnicode_AsUTF8(PyTuple_GetItem(found, 1));
    }
    Py_DECREF(found);
    return name;
}

std::string triton_entry(const std::string &kernel) {
    Lock lock;
    PyObject *entry = lock.call("entry_of", "s", kernel.c_str());
    std::string text = PyUnicode_AsUTF8(entry);
    Py_DECREF(entry);
    return text;
}

bool triton_fits(const std::string &kernel, unsigned threads, unsigned shared) {
    Lock lock;
    PyObject *fits = lock.call("fits", "sII", kernel.c_str(), threads, shared);
    bool yes = fits == Py_True;
    Py_DECREF(fits);
    return yes;
}

void triton_launch(const std::string &kernel, const uint64_t *values, size_t count, unsigned x, unsigned y, unsigned z) {
    Lock lock;
    Py_DECREF(lock.call("launch", "sKnIII", kernel.c_str(), (unsigned long long)values, (Py_ssize_t)count, x, y, z));
}

} // namespace emulator

// For the interpreter: bytes that are allocated from an address on.
extern "C" __attribute__((visibility("default"))) uint64_t emulator_room(uint64_t address) { return emulator::room(address); }
