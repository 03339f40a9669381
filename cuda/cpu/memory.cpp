// memory.cpp: the ABI's entries for memory. Giving memory back waits for queued work, as on CUDA.
#include "runtime.h"

using namespace fkv;

namespace {

int32_t allocate(void** memory, uint64_t bytes, fkv_device* device, const char* call,
                 int32_t (Memory::*take)(void**, uint64_t)) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(device)) return status;
    FKV_REQUIRE(memory != nullptr, FKV_BAD_ARGUMENT, "memory: null");
    FKV_REQUIRE(bytes > 0, FKV_BAD_ARGUMENT, "bytes: 0");
    if (const int32_t status = device->check_failure()) return status;
    if (const int32_t status = refuse_while_capturing(device, call)) return status;
    return (device->memory.*take)(memory, bytes);
  });
}

int32_t give_back(void* memory, fkv_device* device, const char* call, int32_t (Memory::*release)(void*)) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(device)) return status;
    FKV_REQUIRE(memory != nullptr, FKV_BAD_ARGUMENT, "memory: null");
    if (const int32_t status = refuse_while_capturing(device, call)) return status;
    drain(device);  // a failed device still takes its memory back
    return (device->memory.*release)(memory);
  });
}

}  // namespace

int32_t fkv_device_alloc(void** memory, uint64_t bytes, fkv_device* device) {
  return allocate(memory, bytes, device, "fkv_device_alloc", &Memory::device_alloc);
}

int32_t fkv_device_free(void* memory, fkv_device* device) {
  return give_back(memory, device, "fkv_device_free", &Memory::device_free);
}

int32_t fkv_host_alloc(void** memory, uint64_t bytes, fkv_device* device) {
  return allocate(memory, bytes, device, "fkv_host_alloc", &Memory::host_alloc);
}

int32_t fkv_host_free(void* memory, fkv_device* device) {
  return give_back(memory, device, "fkv_host_free", &Memory::host_free);
}

int32_t fkv_host_reserve(void** memory, uint64_t bytes, uint64_t piece_bytes, fkv_device* device) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(device)) return status;
    FKV_REQUIRE(memory != nullptr && bytes > 0, FKV_BAD_ARGUMENT, "%s", memory ? "bytes: 0" : "memory: null");
    if (const int32_t status = device->check_failure()) return status;
    return device->memory.host_reserve(memory, bytes, piece_bytes);
  });
}

int32_t fkv_host_grow(void* memory, uint64_t bytes, fkv_device* device) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(device)) return status;
    return device->memory.growths().grow(memory, bytes);
  });
}

int32_t fkv_host_ready(uint64_t* bytes, void* memory, fkv_device* device) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(device)) return status;
    return device->memory.growths().ready(bytes, memory);
  });
}

int32_t fkv_host_register(void* memory, uint64_t bytes, fkv_device* device) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(device)) return status;
    FKV_REQUIRE(memory != nullptr && bytes > 0, FKV_BAD_ARGUMENT, "%s", memory ? "bytes: 0" : "memory: null");
    if (const int32_t status = device->check_failure()) return status;
    if (const int32_t status = refuse_while_capturing(device, "fkv_host_register")) return status;
    return device->memory.host_register(memory, bytes);
  });
}

int32_t fkv_host_unregister(void* memory, fkv_device* device) {
  return give_back(memory, device, "fkv_host_unregister", &Memory::host_unregister);
}
