// memory.cu: device memory, pinned memory, and their accounts. Giving memory back waits for queued work.
#include <sys/mman.h>

#include "machine.h"
#include "runtime.cuh"

namespace fkv {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kHugeBytes = uint64_t{4} << 20;  // from here on huge pages are worth asking for
constexpr unsigned kPinned = cudaHostRegisterMapped | cudaHostRegisterPortable;

uint64_t round_up(uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// What every call that takes memory requires.
int32_t may_take(const void* memory, uint64_t bytes, fkv_device* device, const char* call) {
  if (const int32_t status = check(device)) return status;
  FKV_REQUIRE(memory != nullptr, FKV_BAD_ARGUMENT, "memory: null");
  FKV_REQUIRE(bytes > 0, FKV_BAD_ARGUMENT, "bytes: 0");
  if (const int32_t status = ready(device, call)) return status;
  return refuse_while_capturing(device, call);
}

// What every call that gives memory back begins with; `bytes` is how much it is.
int32_t begin_giving_back(uint64_t* bytes, void* memory, fkv_device* device, const char* call, Ledger::Kind kind) {
  if (const int32_t status = check(device)) return status;
  FKV_REQUIRE(memory != nullptr, FKV_BAD_ARGUMENT, "memory: null");
  if (const int32_t status = refuse_while_capturing(device, call)) return status;
  if (const int32_t status = device->ledger.take_out(bytes, memory, kind)) return status;
  drain(device, call);  // a failed device still takes its memory back
  return FKV_OK;
}

int32_t pin(void* memory, uint64_t bytes, fkv_device* device, const char* call) {
  const cudaError_t error = cudaHostRegister(memory, bytes, kPinned);
  if (error == cudaErrorHostMemoryAlreadyRegistered) {
    cudaGetLastError();
    return fail(FKV_BAD_ARGUMENT, "memory: part of it is device memory or pinned already");
  }
  if (const int32_t status = status_of(device, error, call)) return status;
  void* seen = nullptr;  // by kernels; the ABI promises one address for both
  if (const int32_t status = status_of(device, cudaHostGetDevicePointer(&seen, memory, 0), call)) return status;
  if (seen == memory) return FKV_OK;
  cudaHostUnregister(memory);
  return fail(FKV_UNSUPPORTED, "%s: this system maps pinned memory at another address on the device", call);
}

}  // namespace

void release(void* memory, uint64_t bytes, Ledger::Kind kind) {
  if (kind == Ledger::Kind::kDevice) {
    cudaFree(memory);
  } else {
    cudaHostUnregister(memory);
    if (kind == Ledger::Kind::kAllocated) munmap(memory, round_up(bytes));
  }
  cudaGetLastError();  // of a failed device, whose failure is told elsewhere
}

}  // namespace fkv

using namespace fkv;

int32_t fkv_device_alloc(void** memory, uint64_t bytes, fkv_device* device) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = may_take(memory, bytes, device, "fkv_device_alloc")) return status;
    void* made = nullptr;
    if (const cudaError_t error = cudaMalloc(&made, bytes); error == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      size_t free = 0, total = 0;
      cudaMemGetInfo(&free, &total);
      return fail(FKV_OUT_OF_MEMORY, "%llu bytes of device memory: %zu of %zu are free", static_cast<unsigned long long>(bytes),
                  free, total);
    } else if (const int32_t status = status_of(device, error, "fkv_device_alloc")) {
      return status;
    }
    device->ledger.add(made, bytes, Ledger::Kind::kDevice);
    *memory = made;
    return FKV_OK;
  });
}

int32_t fkv_device_free(void* memory, fkv_device* device) {
  return guarded([&]() -> int32_t {
    uint64_t bytes = 0;
    constexpr auto kKind = Ledger::Kind::kDevice;
    if (const int32_t status = begin_giving_back(&bytes, memory, device, "fkv_device_free", kKind)) return status;
    release(memory, bytes, kKind);
    return FKV_OK;
  });
}

// Mapped, then registered: that is page-aligned and zeroed by the system, and pins several times faster than CUDA's own allocation.
int32_t fkv_host_alloc(void** memory, uint64_t bytes, fkv_device* device) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = may_take(memory, bytes, device, "fkv_host_alloc")) return status;
    const uint64_t total = machine_bytes(), used = device->ledger.usage().pinned;
    void* pages = MAP_FAILED;
    if (bytes <= total - std::min(used, total)) {
      pages = mmap(nullptr, round_up(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }
    if (pages == MAP_FAILED) {
      return fail(FKV_OUT_OF_MEMORY, "%llu bytes of pinned memory: %llu of %llu are in use",
                  static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(used),
                  static_cast<unsigned long long>(total));
    }
    if (bytes >= kHugeBytes) madvise(pages, round_up(bytes), MADV_HUGEPAGE);  // a wish: where it is refused nothing changes
    // Touched first: registration that has to fault pages in stops the device for longer.
    volatile char* touched = static_cast<volatile char*>(pages);
    for (uint64_t at = 0; at < bytes; at += kPage) touched[at] = 0;
    if (const int32_t status = pin(pages, bytes, device, "fkv_host_alloc")) {
      munmap(pages, round_up(bytes));
      return status;
    }
    device->ledger.add(pages, bytes, Ledger::Kind::kAllocated);
    *memory = pages;
    return FKV_OK;
  });
}

int32_t fkv_host_free(void* memory, fkv_device* device) {
  return guarded([&]() -> int32_t {
    uint64_t bytes = 0;
    constexpr auto kKind = Ledger::Kind::kAllocated;
    if (const int32_t status = begin_giving_back(&bytes, memory, device, "fkv_host_free", kKind)) return status;
    release(memory, bytes, kKind);
    return FKV_OK;
  });
}

int32_t fkv_host_register(void* memory, uint64_t bytes, fkv_device* device) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = may_take(memory, bytes, device, "fkv_host_register")) return status;
    if (const int32_t status = device->ledger.require_free(memory, bytes)) return status;
    if (const int32_t status = pin(memory, bytes, device, "fkv_host_register")) return status;
    device->ledger.add(memory, bytes, Ledger::Kind::kRegistered);
    return FKV_OK;
  });
}

int32_t fkv_host_unregister(void* memory, fkv_device* device) {
  return guarded([&]() -> int32_t {
    uint64_t bytes = 0;
    constexpr auto kKind = Ledger::Kind::kRegistered;
    if (const int32_t status = begin_giving_back(&bytes, memory, device, "fkv_host_unregister", kKind)) return status;
    release(memory, bytes, kKind);
    return FKV_OK;
  });
}
