// The module fastllm._C. Every kernel of kernels.def becomes a function that takes its record field by field; adding a kernel
// adds nothing here. The functions trust their caller: shapes, dtypes and devices were checked in fastllm/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <string.h>

#include <deque>
#include <new>
#include <string>

#include "cpu/runtime.h"
#include "cuda/abi.h"

namespace py = pybind11;
using namespace fastllm;

namespace {

bool fill(const char* kinds, PyObject* const* args, int64_t* slots) {
  for (int i = 0; kinds[i]; ++i) {
    PyObject* a = args[i];
    if (kinds[i] == 'd') {
      double d = PyFloat_AsDouble(a);
      memcpy(&slots[i], &d, 8);
    } else if (kinds[i] == 'p') {
      slots[i] = a == Py_None ? 0 : int64_t(PyLong_AsUnsignedLongLong(a));
    } else {
      slots[i] = PyLong_AsLongLong(a);
    }
    if (slots[i] == -1 && PyErr_Occurred()) return false;
    if (kinds[i] == 'd' && PyErr_Occurred()) return false;
  }
  return true;
}

PyObject* call_kernel(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const int index = int(PyLong_AsLong(self));
  const Kernel& k = kKernels[index];
  if (size_t(count) != strlen(k.kinds))
    return PyErr_Format(PyExc_TypeError, "_C.%s takes %d arguments (%s), got %d", k.name, int(strlen(k.kinds)), k.kinds, int(count));
  int64_t slots[kMaxFields];
  if (!fill(k.kinds, args, slots)) return nullptr;
  int status;
  PyThreadState* state = PyEval_SaveThread();
  status = launch(index, slots);
  PyEval_RestoreThread(state);
  if (status < 0) return PyErr_NoMemory();
  return PyLong_FromLong(status);
}

struct PlanHandle {
  std::shared_ptr<Plan> plan = plan_new();

  void begin() const {
    if (!plan_begin(plan)) throw std::runtime_error("this thread or this plan records already; end that recording first");
  }
  void end() const {
    if (!plan_end(plan)) throw std::runtime_error("this thread does not record into this plan");
  }
  int replay(int threads, int64_t times, int64_t* nanoseconds = nullptr) const {
    if (plan_recording(plan.get())) throw std::runtime_error("the plan still records; end the recording before a replay");
    PyThreadState* state = PyEval_SaveThread();
    const int status = plan_replay(plan.get(), threads, times, nanoseconds);
    PyEval_RestoreThread(state);    // ends a daemon's thread as Python ends: not within gil_scoped_release, whose destructor is noexcept
    if (status < 0) throw std::bad_alloc();
    return status;
  }
  std::vector<double> profile(int threads, int64_t times) const {
    std::vector<int64_t> total(size_t(plan_size(plan.get())));
    replay(threads, times, total.data());
    std::vector<double> seconds;
    for (const int64_t t : total) seconds.push_back(double(t) * 1e-9 / double(times));
    return seconds;
  }
};

const CudaTable* cuda = nullptr;

const char* const kCudaNames[] = {
#define CUDA_KERNEL(name, Args) #name,
#include "cuda/kernels.def"
#undef CUDA_KERNEL
};

// A kernel of the CUDA library: the record of the CPU kernel of its name, then scratch and stream.
PyObject* call_cuda(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const int index = int(PyLong_AsLong(self));
  const char* name = kCudaNames[index];
  int record = 0;
  while (strcmp(kKernels[record].name, name)) ++record;
  const std::string kinds = std::string(kKernels[record].kinds) + "pp";
  if (size_t(count) != kinds.size())
    return PyErr_Format(PyExc_TypeError, "_C.cuda_%s takes %d arguments (%s), got %d", name, int(kinds.size()), kinds.c_str(), int(count));
  if (!cuda) return PyErr_Format(PyExc_RuntimeError, "the CUDA library is not loaded; see `fastllm info`");
  int64_t slots[kMaxFields + 2];
  if (!fill(kinds.c_str(), args, slots)) return nullptr;
  const auto *scratch = slots + count - 2, *stream = slots + count - 1;
  PyThreadState* state = PyEval_SaveThread();    // a full queue of launches must not hold up the other threads
  const int code = cuda->run[index](slots, reinterpret_cast<char*>(*scratch), reinterpret_cast<void*>(*stream));
  PyEval_RestoreThread(state);
  return PyLong_FromLong(code);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  openmp_path();    // finds the pool now, and with it learns of every fork from here on
  static std::deque<PyMethodDef> methods;    // PyCFunction objects keep pointers into it
  for (int i = 0; i < kKernelCount; ++i) {
    methods.push_back({kKernels[i].name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_kernel)), METH_FASTCALL, kKernels[i].kinds});
    py::object index = py::int_(i);
    m.attr(kKernels[i].name) = py::reinterpret_steal<py::object>(PyCFunction_New(&methods.back(), index.ptr()));
  }
  for (int i = 0; i < kCudaKernelCount; ++i) {
    static std::deque<std::string> names;
    names.push_back(std::string("cuda_") + kCudaNames[i]);
    methods.push_back({names.back().c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_cuda)), METH_FASTCALL, nullptr});
    py::object index = py::int_(i);
    m.attr(names.back().c_str()) = py::reinterpret_steal<py::object>(PyCFunction_New(&methods.back(), index.ptr()));
  }
  m.def("cuda_kernels", [] { return std::vector<std::string>(kCudaNames, kCudaNames + kCudaKernelCount); });
  m.def("kernels", [] {
    py::dict names;
    for (int i = 0; i < kKernelCount; ++i) names[kKernels[i].name] = kKernels[i].kinds;
    return names;
  });
  m.def("isa", [] { return isa_name(isa()); });
  m.def("isas", [] {    // what this processor can run, the best one last
    py::list names;
    for (int i = 0; i <= best_isa(); ++i) names.append(isa_name(Isa(i)));
    return names;
  });
  m.def("openmp_path", &openmp_path);
  m.def("max_threads", &max_threads);
  m.def("set_thread_limit", &set_thread_limit);
  m.def("take_most_scratch", &take_most_scratch);

  py::class_<PlanHandle>(m, "Plan")
      .def(py::init<>())
      .def("begin", &PlanHandle::begin)
      .def("end", &PlanHandle::end)
      .def("__enter__", [](py::object self) {
        self.cast<const PlanHandle&>().begin();
        return self;
      })
      .def("__exit__", [](const PlanHandle& h, const py::args&) { plan_end(h.plan); })
      .def("__len__", [](const PlanHandle& h) { return plan_size(h.plan.get()); })
      .def("kernels", [](const PlanHandle& h) {
        py::list names;
        for (int64_t i = 0; i < plan_size(h.plan.get()); ++i) names.append(plan_kernel(h.plan.get(), i));
        return names;
      })
      .def("replay", [](const PlanHandle& h, int threads, int64_t times) { return h.replay(threads, times); },
           py::arg("threads") = 0, py::arg("times") = 1)
      .def("profile", &PlanHandle::profile, py::arg("threads") = 0, py::arg("times") = 1);

  m.def("load_cuda", [](const std::string& path) {    // device count, or minus the CUDA error; throws only for a broken file
    cuda = open_cuda(path.c_str());
    return cuda->device_count();
  });
  m.def("cuda_architectures", [] { return std::string(cuda ? cuda->architectures : ""); });
  m.def("cuda_capability", [](int device) { return cuda ? cuda->capability(device) : 0; });
  m.def("cuda_error", [](int code) { return std::string(cuda ? cuda->error_string(code) : "the CUDA library is not loaded"); });
  m.def("cuda_runtime_version", [] { return cuda ? cuda->runtime_version : 0; });
  m.def("cuda_weights_rest", [](bool yes) {
    if (cuda) cuda->weights_rest(yes);
  });
  m.def("cuda_copy", [](uintptr_t to, uintptr_t from, int64_t bytes, uintptr_t stream) {
    if (!cuda) throw std::runtime_error("the CUDA library is not loaded; see `fastllm info`");
    return cuda->copy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes, reinterpret_cast<void*>(stream));
  });
}
