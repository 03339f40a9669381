// runtime.h: the objects behind the ABI's handles. Only the runtime's own files see it; kernel files see twin.h.
//
// Who guards what: `issue` of the device guards what the host changes when it issues work (captures, an event's latest
// record, lists of handles); a stream's `mutex` guards its queue; everything else is atomic or belongs to one thread.
#pragma once
#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "../entry.h"
#include "arena.h"
#include "link.h"
#include "pool.h"
#include "schedule.h"
#include "twin.h"
#include "waiting.h"

namespace fkv {

// First word of every live handle, so that a null, stray or destroyed one is told apart.
constexpr uint64_t kDeviceMagic = 0x666b762064657631, kStreamMagic = 0x666b762073747231;
constexpr uint64_t kEventMagic = 0x666b762065766e31, kGraphMagic = 0x666b762067726131;

// One execution of fkv_event_record. An event points at its latest; who waits holds the one that was latest then.
struct Record {
  std::atomic<bool> done{false};
  uint64_t time_ns = 0;
  Signal signal;

  bool is_done() const { return done.load(); }
  void complete() {
    time_ns = now_ns();
    done.store(true);
    signal.notify();
  }
};

struct GraphBody;

// An entry of a stream's queue.
struct Op {
  enum class Kind { kWork, kRecord, kWait, kGraph };
  Kind kind;
  const char* name = "";
  Work work{};
  std::shared_ptr<Record> record{};
  std::shared_ptr<GraphBody> graph{};
};

struct GraphNode {
  const char* name;
  Work work;
  int lane;                // the captured stream, in order of joining
  std::vector<int> after;  // nodes that must be done before
  bool crosses = false;    // a node of another lane waits for this one
};

// A captured graph, with the state of its one replay in progress. Each lane runs its nodes in order.
struct GraphBody {
  std::vector<GraphNode> nodes;
  std::vector<std::vector<int>> lanes;
  std::mutex running;  // held while a stream replays it: launches of one graph never overlap
  std::vector<std::atomic<uint64_t>> done_at;  // per node: the last replay in which it was done
  std::atomic<uint64_t> replay{0};
  std::atomic<int> lanes_running{0};
  Signal progress;
  bool scheduled = false;  // under a schedule seed: some stream is replaying it

  explicit GraphBody(std::vector<GraphNode> captured);
  bool ready(int node, uint64_t replay_number) const;
};

// A capture in progress, shared by its streams and by events recorded in it.
struct Capture : CaptureState {
  fkv_stream* origin = nullptr;
  std::vector<fkv_stream*> streams{};
  std::vector<GraphNode> nodes{};
};

// A thread of a stream that replays one lane of a graph beside the stream's own.
class LaneThread {
 public:
  explicit LaneThread(fkv_device* device);
  ~LaneThread();
  void start(std::shared_ptr<GraphBody> graph, int lane);

 private:
  void run();
  fkv_device* device_;
  std::shared_ptr<GraphBody> graph_;  // both handed over by started_
  int lane_ = 0;
  std::atomic<bool> started_{false};
  std::atomic<bool> stopping_{false};
  Signal arrived_;
  std::thread thread_;
};

class DeviceContext : public Context {
 public:
  explicit DeviceContext(fkv_device* device) : device_(device) {}
  void parallel(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) override;
  void link(uint64_t bytes, bool to_device) override;
  uint64_t clock_ns() const override { return now_ns(); }

 private:
  fkv_device* device_;
};

// Appends to the stream's queue, also while the stream captures.
void enqueue(fkv_stream* stream, Op op);
// Runs a queued entry, but not a graph under a schedule seed. Worker threads and the schedule.
void execute(fkv_stream* stream, Op& op);
// Waits for the record; also FKV_DEVICE_FAILED.
int32_t await_record(fkv_device* device, Record& record);
// Waits until all that the device's streams hold now is done.
int32_t drain(fkv_device* device);

// Replays the graph on the calling stream thread and its lane threads.
void replay(fkv_stream* stream, const std::shared_ptr<GraphBody>& graph);

// FKV_CAPTURE, and breaks the captures that the calling thread has begun on the device, if there are any.
int32_t refuse_while_capturing(fkv_device* device, const char* call);
// With `issue` held: what the next operation of the stream waits for also includes `nodes`.
void add_frontier(fkv_stream* stream, const std::vector<int>& nodes);
void end_capture(fkv_device* device, const std::shared_ptr<Capture>& capture);

}  // namespace fkv

struct fkv_stream {
  uint64_t magic = fkv::kStreamMagic;
  fkv_device* device;
  uint32_t id;  // in order of creation; what a schedule knows the stream by

  std::shared_ptr<fkv::Capture> capture{};  // guarded by device->issue, as the two below
  int lane = 0;
  std::vector<int> frontier{};  // nodes that the next captured operation comes after

  std::mutex mutex{};
  std::deque<fkv::Op> queue{};
  std::atomic<uint64_t> pending{0};  // queued or running
  std::atomic<bool> stopping{false};
  fkv::Signal arrived{};
  std::thread worker{};  // none under a schedule seed
  std::vector<std::unique_ptr<fkv::LaneThread>> lane_threads{};  // of the worker, made when first needed
  int32_t uses = 1;  // of the compute stream: calls that asked for it and were not answered
  std::vector<size_t> cursors{};  // of the schedule: per lane of the graph at the queue's head, nodes done

  fkv_stream(fkv_device* owner, uint32_t number);
  ~fkv_stream();
  void work();
};

struct fkv_event {
  uint64_t magic = fkv::kEventMagic;
  fkv_device* device;
  std::shared_ptr<fkv::Record> record{};    // latest; null before the first
  std::shared_ptr<fkv::Capture> capture{};  // set while the latest record is one in a capture
  std::vector<int> frontier{};              // and what it stands for there

  explicit fkv_event(fkv_device* owner) : device(owner) {}
  ~fkv_event() { magic = 0; }
};

struct fkv_graph {
  uint64_t magic = fkv::kGraphMagic;
  fkv_device* device;
  std::shared_ptr<fkv::GraphBody> body;

  fkv_graph(fkv_device* owner, std::shared_ptr<fkv::GraphBody> captured) : device(owner), body(std::move(captured)) {}
  ~fkv_graph() { magic = 0; }
};

struct fkv_device {
  uint64_t magic = fkv::kDeviceMagic;
  const fkv_device_params params;
  fkv::Memory memory{};
  fkv::Link link;
  fkv::Pool pool;
  fkv::DeviceContext context{this};
  std::unique_ptr<fkv::Schedule> schedule{};  // null: real threads

  std::mutex issue{};
  uint32_t streams_made = 0;
  std::vector<std::unique_ptr<fkv_stream>> streams{};
  fkv_stream* compute = nullptr;  // of `streams`, once it was asked for
  std::unordered_map<const fkv_event*, std::unique_ptr<fkv_event>> events{};
  std::unordered_map<const fkv_graph*, std::unique_ptr<fkv_graph>> graphs{};
  std::vector<std::shared_ptr<fkv::Capture>> captures{};  // in progress

  std::atomic<bool> failed{false};
  std::atomic<bool> failure_told{false};  // some call has returned it
  std::mutex failure_mutex{};
  std::string failure{};

  explicit fkv_device(const fkv_device_params& given);
  ~fkv_device();
  // Runs one operation; what it throws makes the device fail. Does nothing on a failed device.
  void run(const char* name, const fkv::Work& work) noexcept;
  // FKV_DEVICE_FAILED with the reason, or FKV_OK.
  int32_t check_failure();
};
