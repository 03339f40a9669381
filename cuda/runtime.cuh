// runtime.cuh: the objects behind the ABI's handles on CUDA, and how CUDA's errors become the ABI's. Kernel files see it through
// common.cuh and use three things of it: `ready`, `launched` and a stream's `handle`.
//
// Who guards what: `issue` of the device guards what the host changes when it issues work (captures, an event's latest record,
// lists of handles, the failure); the ledger has a lock of its own.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "entry.h"
#include "ledger.h"

namespace fkv {

// What of CUDA's is one for all fkv_devices of an ordinal.
struct ComputeStream {
  cudaStream_t handle;

  explicit ComputeStream(cudaStream_t made) : handle(made) {}
  ~ComputeStream();
  ComputeStream(const ComputeStream&) = delete;
  ComputeStream& operator=(const ComputeStream&) = delete;
};

// First word of every live handle, so that a null, stray or destroyed one is told apart.
constexpr uint64_t kDeviceMagic = 0x666b762064657632, kStreamMagic = 0x666b762073747232;
constexpr uint64_t kEventMagic = 0x666b762065766e32, kGraphMagic = 0x666b762067726132;

// A capture in progress, shared by its streams and by events recorded in it. CUDA builds the graph; this remembers enough to refuse
// what the ABI refuses, with a text, before CUDA sees it.
struct Capture : CaptureState {
  fkv_stream* origin = nullptr;
  std::vector<fkv_stream*> streams{};
};

// Launches behind which others may begin early: see early.cuh.
enum class Kind { none, chain, retrieve, attend };
struct Captured {
  cudaGraphNode_t node = nullptr;
  Kind kind = Kind::none;
};
// Whether the next launch on the stream comes in a capture right behind one of these kinds (a bit each), on a chip that lets it begin
// early.
bool begins_early(fkv_stream* stream, unsigned behind);
// What was launched on the stream just now.
void remember_launch(fkv_stream* stream, Kind kind);

// The status that a CUDA error is, with its text. Errors that leave the context unusable make the device fail, for good.
// FKV_OK for cudaSuccess. `device` may be null where none is open yet.
int32_t status_of(fkv_device* device, cudaError_t error, const char* call);

// While one lives, the calling thread may ask about work outside a capture that it has begun itself; CUDA otherwise breaks a
// thread-local capture at any query, whatever it is of.
class Beside {
 public:
  Beside() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Beside() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Beside(const Beside&) = delete;
  Beside& operator=(const Beside&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// What an entry does before it issues anything to `stream`: the handle is alive, the device has not failed, a capture of the stream is
// not broken; and the stream's device becomes the calling thread's.
int32_t ready(fkv_stream* stream, const char* call);
// The same for work that belongs to no stream.
int32_t ready(fkv_device* device, const char* call);
// What an entry does after a launch: FKV_OK, or why CUDA did not take it.
int32_t launched(fkv_stream* stream, const char* call);

// Waits until all that the device's streams hold now is done; also FKV_DEVICE_FAILED.
int32_t drain(fkv_device* device, const char* call);
// Gives memory back to CUDA or the system, whatever state the device is in.
void release(void* memory, uint64_t bytes, Ledger::Kind kind);

// FKV_CAPTURE, and breaks the captures that the calling thread has begun on the device, if there are any.
int32_t refuse_while_capturing(fkv_device* device, const char* call);
// With `issue` held: takes the capture off its streams; the graph that CUDA made is returned, or null.
cudaError_t end_capture(fkv_device* device, const std::shared_ptr<Capture>& capture, cudaGraph_t* graph);

}  // namespace fkv

struct fkv_stream {
  uint64_t magic = fkv::kStreamMagic;
  fkv_device* device;
  cudaStream_t handle;
  std::shared_ptr<fkv::Capture> capture{};  // guarded by device->issue
  // Of the compute stream: where work goes, and what captures in its place, since another fkv_device may issue to it meanwhile.
  std::shared_ptr<fkv::ComputeStream> shared{};
  cudaStream_t own;
  int32_t uses = 1;  // calls of fkv_stream_compute that were not answered
  fkv::Captured latest{};  // launch in the capture, where it is of a kind

  fkv_stream(fkv_device* owner, cudaStream_t made) : device(owner), handle(made), own(made) {}
  ~fkv_stream();
  // With the device's `issue` held: a capture takes the stream, or leaves it.
  void enter(const std::shared_ptr<fkv::Capture>& taking) {
    handle = own;
    capture = taking;
  }
  void leave() {
    if (shared) handle = shared->handle;
    capture.reset();
    latest = {};  // eager launches ask no further
  }
};

struct fkv_event {
  uint64_t magic = fkv::kEventMagic;
  fkv_device* device;
  cudaEvent_t handle;
  bool recorded = false;                    // outside a capture, ever
  std::shared_ptr<fkv::Capture> capture{};  // set while the latest record is one in a capture

  fkv_event(fkv_device* owner, cudaEvent_t made) : device(owner), handle(made) {}
  ~fkv_event();
};

struct fkv_graph {
  uint64_t magic = fkv::kGraphMagic;
  fkv_device* device;
  cudaGraphExec_t handle;

  fkv_graph(fkv_device* owner, cudaGraphExec_t made) : device(owner), handle(made) {}
  ~fkv_graph();
};

struct fkv_device {
  uint64_t magic = fkv::kDeviceMagic;
  int ordinal;
  cudaDeviceProp properties;  // multiProcessorCount, sharedMemPerBlockOptin, …: what launchers size themselves by
  const bool plain;           // launchers do without clusters, warpgroups and more than kPlainShared bytes of shared memory
  fkv::Ledger ledger{};

  std::mutex issue{};
  std::unordered_map<const fkv_stream*, std::unique_ptr<fkv_stream>> streams{};
  fkv_stream* compute = nullptr;  // of `streams`, once it was asked for
  std::unordered_map<const fkv_event*, std::unique_ptr<fkv_event>> events{};
  std::unordered_map<const fkv_graph*, std::unique_ptr<fkv_graph>> graphs{};
  std::unordered_map<const fkv_module*, std::shared_ptr<fkv_module>> modules{};
  std::vector<std::shared_ptr<fkv::Capture>> captures{};  // in progress
  std::unordered_set<const void*> side_kernels{};         // whose shared memory is divided as a dense chain's

  std::mutex failure_mutex{};
  std::string failure{};      // why the device failed; empty while it has not
  bool failure_told = false;  // some call has returned it

  fkv_device(int number, const cudaDeviceProp& found, bool no_clusters) : ordinal(number), properties(found), plain(no_clusters) {}
  ~fkv_device();
  // FKV_DEVICE_FAILED with the reason, or FKV_OK.
  int32_t check_failure();
};
