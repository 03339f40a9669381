// nvrtc.cu: compiles CUDA C++ with NVRTC, a library of the CUDA toolkit that is looked for at each call, since few machines that run
// kernels have it.
#include <dlfcn.h>

#include <memory>
#include <string>
#include <vector>

#include "runtime.cuh"

// What a compiler made.
struct fkv_program {
  static constexpr uint64_t kMagic = 0x666b762070726732;
  uint64_t magic = kMagic;
  std::vector<char> image{};
  std::string log{};

  ~fkv_program() { magic = 0; }
};

namespace fkv {
namespace {

// NVRTC's interface, of which its header says no more than this.
using Program = struct _nvrtcProgram*;
constexpr int kSuccess = 0, kInvalidOption = 5, kDoesNotCompile = 6;

struct Nvrtc {
  int (*create)(Program*, const char* source, const char* name, int n, const char* const* headers, const char* const* includes);
  int (*compile)(Program, int n, const char* const* options);
  int (*log_size)(Program, size_t*);
  int (*log)(Program, char*);
  int (*cubin_size)(Program, size_t*);
  int (*cubin)(Program, char*);
  int (*ptx_size)(Program, size_t*);
  int (*ptx)(Program, char*);
  int (*destroy)(Program*);
  const char* (*error_text)(int);
};

struct Close {
  void operator()(void* library) const { dlclose(library); }
};
using Library = std::unique_ptr<void, Close>;

Library open(const char* path) {
  // Its threads outlive a compilation: it stays loaded, and a second call finds it there.
  return Library(dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE));
}

// FKV_UNSUPPORTED, with each name tried, unless NVRTC is there.
int32_t open_nvrtc(Library* library, const std::string& path) {
  std::string tried;
  const auto attempt = [&](const char* name) {
    *library = open(name);
    if (*library) return true;
    const char* reason = dlerror();
    tried += std::string("; ") + (reason ? reason : name);
    return false;
  };
  if (!path.empty() ? attempt(path.c_str())
                    : attempt("libnvrtc.so.13") || attempt("libnvrtc.so.12") || attempt("libnvrtc.so") ||
                          attempt("/usr/local/cuda/lib64/libnvrtc.so")) {
    return FKV_OK;
  }
  return fail(FKV_UNSUPPORTED,
              "no NVRTC could be loaded; install the CUDA toolkit's, or give its path, or compile with nvcc and load the result%s",
              tried.c_str());
}

template <class Entry>
bool find(Entry* entry, void* library, const char* symbol) {
  *entry = reinterpret_cast<Entry>(dlsym(library, symbol));
  return *entry != nullptr;
}

int32_t bind(Nvrtc* nvrtc, void* library) {
  const bool found = find(&nvrtc->create, library, "nvrtcCreateProgram") && find(&nvrtc->compile, library, "nvrtcCompileProgram") &&
                     find(&nvrtc->log_size, library, "nvrtcGetProgramLogSize") && find(&nvrtc->log, library, "nvrtcGetProgramLog") &&
                     find(&nvrtc->cubin_size, library, "nvrtcGetCUBINSize") && find(&nvrtc->cubin, library, "nvrtcGetCUBIN") &&
                     find(&nvrtc->ptx_size, library, "nvrtcGetPTXSize") && find(&nvrtc->ptx, library, "nvrtcGetPTX") &&
                     find(&nvrtc->destroy, library, "nvrtcDestroyProgram") && find(&nvrtc->error_text, library, "nvrtcGetErrorString");
  FKV_REQUIRE(found, FKV_UNSUPPORTED, "the NVRTC that was found lacks entries of CUDA 11.2 and later; install a newer one");
  return FKV_OK;
}

std::vector<std::string> split(const char* texts) {
  std::vector<std::string> all;
  for (const char* at = texts; *at != '\0'; at += all.back().size() + 1) all.emplace_back(at);
  return all;
}

bool names_architecture(const std::string& option) { return option.rfind("--gpu-architecture", 0) == 0 || option.rfind("-arch", 0) == 0; }

// sm_90 and later have instructions of their own, which only the architecture with an `a` has.
std::string architecture_of(const cudaDeviceProp& device) {
  return "--gpu-architecture=sm_" + std::to_string(device.major) + std::to_string(device.minor) + (device.major >= 9 ? "a" : "");
}

template <class Size, class Read>
bool read(std::vector<char>* bytes, Program program, Size size, Read content) {
  size_t n = 0;
  if (size(program, &n) != kSuccess || n == 0) return false;
  bytes->resize(n);
  return content(program, bytes->data()) == kSuccess;
}

int32_t check(const fkv_program* program) {
  FKV_REQUIRE(program != nullptr, FKV_BAD_ARGUMENT, "program: null");
  FKV_REQUIRE(reinterpret_cast<uintptr_t>(program) % alignof(fkv_program) == 0 && program->magic == fkv_program::kMagic, FKV_BAD_ARGUMENT,
              "program: not a live handle of this library");
  return FKV_OK;
}

}  // namespace
}  // namespace fkv

using namespace fkv;

int32_t fkv_program_compile_sync(fkv_program** program, const char* source, const char* name, const char* options, const char* library,
                                 fkv_device* device) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = fkv::check(device)) return status;
    FKV_REQUIRE(program && source && name && options && library, FKV_BAD_ARGUMENT, "program, source, name, options or library: null");
    Library opened;
    if (const int32_t status = open_nvrtc(&opened, library)) return status;
    Nvrtc nvrtc{};
    if (const int32_t status = bind(&nvrtc, opened.get())) return status;

    std::vector<std::string> words = split(options);
    bool named = false;
    for (const std::string& word : words) named = named || names_architecture(word);
    if (!named) words.push_back(architecture_of(device->properties));
    std::vector<const char*> list;
    for (const std::string& word : words) list.push_back(word.c_str());

    Program made = nullptr;
    if (const int error = nvrtc.create(&made, source, name, 0, nullptr, nullptr); error != kSuccess) {
      return fail(FKV_BAD_ARGUMENT, "fkv_program_compile_sync: %s", nvrtc.error_text(error));
    }
    const auto destroy = [&](Program each) { nvrtc.destroy(&each); };
    const std::unique_ptr<std::remove_pointer_t<Program>, decltype(destroy)> owned(made, destroy);
    const int result = nvrtc.compile(made, static_cast<int>(list.size()), list.data());
    const bool wrong_source = result == kDoesNotCompile || result == kInvalidOption;
    FKV_REQUIRE(result == kSuccess || wrong_source, FKV_UNSUPPORTED, "fkv_program_compile_sync: NVRTC failed: %s", nvrtc.error_text(result));

    auto kept = std::make_unique<fkv_program>();
    std::vector<char> log;
    if (read(&log, made, nvrtc.log_size, nvrtc.log)) kept->log = log.data();  // it ends with a zero byte
    if (wrong_source && kept->log.empty()) kept->log = nvrtc.error_text(result);
    const bool has_image = result == kSuccess && (read(&kept->image, made, nvrtc.cubin_size, nvrtc.cubin) ||
                                                  read(&kept->image, made, nvrtc.ptx_size, nvrtc.ptx));
    FKV_REQUIRE(has_image || wrong_source, FKV_UNSUPPORTED, "fkv_program_compile_sync: these options make neither a cubin nor PTX");
    *program = kept.release();
    return FKV_OK;
  });
}

int32_t fkv_program_sizes(uint64_t* image_bytes, uint64_t* log_bytes, fkv_program* program) {
  if (const int32_t status = check(program)) return status;
  FKV_REQUIRE(image_bytes && log_bytes, FKV_BAD_ARGUMENT, "%s: null", image_bytes ? "log_bytes" : "image_bytes");
  *image_bytes = program->image.size();
  *log_bytes = program->log.size();
  return FKV_OK;
}

int32_t fkv_program_read(void* image, char* log, fkv_program* program) {
  if (const int32_t status = check(program)) return status;
  if (image != nullptr) std::copy(program->image.begin(), program->image.end(), static_cast<char*>(image));
  if (log != nullptr) std::copy(program->log.begin(), program->log.end(), log);
  return FKV_OK;
}

int32_t fkv_program_destroy(fkv_program* program) {
  if (const int32_t status = check(program)) return status;
  delete program;
  return FKV_OK;
}
