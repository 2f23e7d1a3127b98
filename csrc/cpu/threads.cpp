// The thread team: torch's own OpenMP pool, entered through GOMP_parallel, the call that gcc itself emits and that libgomp,
// libomp and libiomp5 all export. It is found among the libraries already mapped, so that nothing is linked, a wheel carries
// no second runtime, and torch and fastllm never fight over the cores with two pools.
#include "runtime.h"

#include <new>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#endif

namespace fastllm {
namespace {

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  int (*torch_threads)() = nullptr;    // at::get_num_threads; it also tells OpenMP, in a thread that is new to torch
  char path[4096] = "";
};

// A forked child has the pool's book-keeping without its threads: entering it would hang, so a child runs serially.
bool forked = false;
thread_local int thread_limit = 0;

#if defined(__linux__)
struct Names {
  char* path[16];
  int count = 0;
};

int collect(dl_phdr_info* info, size_t, void* context) {    // names only: dlopen is not allowed under the loader's lock
  Names* names = static_cast<Names*>(context);
  if (!info->dlpi_name || !*info->dlpi_name || names->count == 16) return 0;
  const char* base = strrchr(info->dlpi_name, '/');
  base = base ? base + 1 : info->dlpi_name;
  if (!strncmp(base, "libgomp", 7) || !strncmp(base, "libomp", 6) || !strncmp(base, "libiomp5", 8) ||
      !strncmp(base, "libtorch_cpu", 12))
    names->path[names->count++] = strdup(info->dlpi_name);
  return 0;
}

template <class F> bool resolve(void* library, const char* name, F& f) {
  f = reinterpret_cast<F>(dlsym(library, name));
  return f != nullptr;
}

OpenMP find() {
  Names names;
  dl_iterate_phdr(collect, &names);
  OpenMP best;
  int (*torch_threads)() = nullptr;
  for (int i = 0; i < names.count; ++i) {
    const char* path = names.path[i];
    OpenMP o;
    void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (library && strstr(path, "/libtorch_cpu")) {
      resolve(library, "_ZN2at15get_num_threadsEv", torch_threads);
    } else if (library && resolve(library, "GOMP_parallel", o.parallel) && resolve(library, "omp_get_thread_num", o.thread_num) &&
               resolve(library, "omp_get_num_threads", o.num_threads) && resolve(library, "omp_get_max_threads", o.max_threads) &&
               resolve(library, "omp_in_parallel", o.in_parallel)) {
      strncpy(o.path, path, sizeof(o.path) - 1);
      if (!best.parallel || strstr(o.path, "/torch")) best = o;    // where several are mapped, torch's own
    }
    free(names.path[i]);
  }
  best.torch_threads = torch_threads;
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  return best;
}
#else
OpenMP find() { return OpenMP(); }    // elsewhere: one thread, stated by `fastllm info`
#endif

const OpenMP& openmp() {
  static const OpenMP found = find();
  return found;
}

struct Job {
  void (*body)(void*, Team&);
  void* context;
  char* scratch;
  int32_t* status;
  Barrier barrier;
  unsigned modes;    // the caller's: whether denormals are 0, say, by which a row must not differ
};

#if defined(__x86_64__)
unsigned float_modes() { return __builtin_ia32_stmxcsr(); }
void set_float_modes(unsigned modes) { __builtin_ia32_ldmxcsr(modes); }
#else
unsigned float_modes() { return 0; }
void set_float_modes(unsigned) {}
#endif

void enter(void* p) {
  Job* job = static_cast<Job*>(p);
  Team team{openmp().thread_num(), openmp().num_threads(), &job->barrier, job->scratch, job->status};
  const unsigned own = float_modes();
  set_float_modes(job->modes);
  job->body(job->context, team);
  set_float_modes(own);
}

struct Arena {
  char* data = nullptr;
  int64_t size = 0;
  ~Arena() { free(data); }
};
thread_local Arena arena;
constexpr uint64_t kBehind[2] = {0x9e3779b97f4a7c15u, 0xd1b54a32d192ed03u};    // what lies behind scratch memory, and is left alone
thread_local int64_t most_scratch = 0;

}  // namespace

const char* openmp_path() { return openmp().path; }

int max_threads() {
  const OpenMP& o = openmp();
  if (!o.parallel || forked || o.in_parallel()) return 1;
  int n = o.torch_threads ? o.torch_threads() : o.max_threads();
  return thread_limit > 0 && thread_limit < n ? thread_limit : n;
}

int set_thread_limit(int n) {
  int previous = thread_limit;
  thread_limit = n > 0 ? n : 0;
  return previous;
}

void parallel(int threads, char* scratch, int32_t* status, void (*body)(void*, Team&), void* context) {
  Job job{body, context, scratch, status, {0, 0}, float_modes()};
  if (threads <= 1) {
    Team team{0, 1, &job.barrier, scratch, status};
    body(context, team);
  } else {
    openmp().parallel(enter, &job, unsigned(threads), 0);
  }
}

int64_t take_most_scratch() {
  const int64_t most = most_scratch;
  most_scratch = 0;
  return most;
}

char* scratch(int64_t bytes) {
  if (bytes > most_scratch) most_scratch = bytes;
  const int64_t whole = bytes + int64_t(sizeof(kBehind));
  if (whole > arena.size) {
    int64_t size = (whole + whole / 4 + 4095) / 4096 * 4096;    // grows by a quarter: few reallocations, little waste
    free(arena.data);
    arena.data = static_cast<char*>(aligned_alloc(4096, size_t(size)));
    arena.size = arena.data ? size : 0;
  }
  if (arena.data) memcpy(arena.data + bytes, kBehind, sizeof(kBehind));
  return arena.data;
}

void check_scratch(int64_t bytes, const char* kernel) {
  if (!memcmp(arena.data + bytes, kBehind, sizeof(kBehind))) return;
  fprintf(stderr, "fastllm: %s has written behind its %lld bytes of scratch memory; this is a bug of fastllm\n", kernel,
          static_cast<long long>(bytes));
  abort();    // what lies there is somebody's
}

}  // namespace fastllm
