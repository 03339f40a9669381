// memory.cu: device memory, pinned memory, and their accounts. Giving memory back waits for queued work.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "machine.h"
#include "runtime.cuh"
#include "threads.h"

namespace fkv {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kHugeBytes = uint64_t{4} << 20;  // from here on huge pages are worth asking for
constexpr unsigned kPinned = cudaHostRegisterMapped | cudaHostRegisterPortable;

// Threads that touch memory, beside the one that asks: four of them keep up with registration.
constexpr unsigned kTouchers = 4;

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

// So that registration need not fault pages in, which stops the device for longer.
void touch(char* memory, uint64_t bytes) {
  constexpr uint64_t kShare = uint64_t{2} << 20;
  std::atomic<uint64_t> next{0};
  const auto work = [&] {
    for (uint64_t at; (at = next.fetch_add(kShare)) < bytes;) {
      volatile char* touched = memory;
      for (const uint64_t end = std::min(bytes, at + kShare); at < end; at += kPage) touched[at] = 0;
    }
  };
  const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
  const uint64_t helpers = std::min<uint64_t>({kTouchers, cores, round_up(bytes) / kShare});
  std::vector<std::thread> threads;
  try {
    for (uint64_t i = 1; i < helpers; ++i) threads.push_back(start_thread(work));
  } catch (const std::exception&) {  // no more threads to be had: those that are there do it all
  }
  work();
  for (std::thread& thread : threads) thread.join();
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

// floor: registration, 42-55 GiB/s of touched huge pages; measured, touching included: 12.8 GiB/s by 8 MiB, 13.6 by 16 MiB, and half of
// it where the virtual machine has never used the memory before. A graph launch beside it waits for the piece: 16 MiB 0.5 ms, of fresh
// memory 1.1 (longest 7); 64 MiB 1.7 (2.8). The device goes on meanwhile (H100, 2026-11).
int32_t pin_piece(char* piece, uint64_t bytes, uint64_t total, fkv_device* device) {
  constexpr const char* kCall = "fkv_host_grow";
  const uint64_t used = device->ledger.usage().pinned;
  if (!fits(bytes, used, total)) return over_limit("pinned", bytes, used, total);
  touch(piece, bytes);
  const Beside beside;
  if (const int32_t status = status_of(device, cudaSetDevice(device->ordinal), kCall)) return status;
  if (const int32_t status = pin(piece, bytes, device, kCall)) return status;
  device->ledger.add(piece, bytes, Ledger::Kind::kGrown);
  return FKV_OK;
}

void unpin_piece(char* piece, fkv_device* device) {
  uint64_t bytes = 0;
  device->ledger.take_out(&bytes, piece, Ledger::Kind::kGrown);
  release(piece, bytes, Ledger::Kind::kGrown);
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
    if (fits(bytes, used, total)) {
      pages = mmap(nullptr, round_up(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }
    if (pages == MAP_FAILED) return over_limit("pinned", bytes, used, total);
    if (bytes >= kHugeBytes) madvise(pages, round_up(bytes), MADV_HUGEPAGE);  // a wish: where it is refused nothing changes
    touch(static_cast<char*>(pages), bytes);
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
    if (const int32_t status = check(device)) return status;
    if (device->ledger.growths.find(memory) != nullptr) {
      if (const int32_t status = refuse_while_capturing(device, "fkv_host_free")) return status;
      drain(device, "fkv_host_free");
      device->ledger.growths.take_out(memory);
      return FKV_OK;
    }
    uint64_t bytes = 0;
    constexpr auto kKind = Ledger::Kind::kAllocated;
    if (const int32_t status = begin_giving_back(&bytes, memory, device, "fkv_host_free", kKind)) return status;
    release(memory, bytes, kKind);
    return FKV_OK;
  });
}

int32_t fkv_host_reserve(void** memory, uint64_t bytes, uint64_t piece_bytes, fkv_device* device) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(device)) return status;
    FKV_REQUIRE(memory != nullptr && bytes > 0, FKV_BAD_ARGUMENT, "%s", memory ? "bytes: 0" : "memory: null");
    if (const int32_t status = ready(device, "fkv_host_reserve")) return status;
    const Growth::Pinning pinning{
        [device, total = machine_bytes()](char* piece, uint64_t n) { return pin_piece(piece, n, total, device); },
        [device](char* piece, uint64_t) { unpin_piece(piece, device); }};
    std::unique_ptr<Growth> growth;
    if (const int32_t status = Growth::reserve(&growth, bytes, piece_bytes, pinning)) return status;
    *memory = growth->memory();
    device->ledger.growths.add(std::move(growth));
    return FKV_OK;
  });
}

int32_t fkv_host_grow(void* memory, uint64_t bytes, fkv_device* device) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(device)) return status;
    return device->ledger.growths.grow(memory, bytes);
  });
}

int32_t fkv_host_ready(uint64_t* bytes, void* memory, fkv_device* device) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(device)) return status;
    return device->ledger.growths.ready(bytes, memory);
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
