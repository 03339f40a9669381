// schedule.cpp: a seeded generator picks the next operation among those that may run.
#include "schedule.h"

#include <vector>

#include "runtime.h"

namespace fkv {

namespace {

// The output function of SplitMix64 (Steele, Lea, Flood 2014).
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

uint64_t Schedule::draw() { return mix(state_ += 0x9e3779b97f4a7c15u); }

Schedule::Choice Schedule::choose() {
  std::vector<Choice> ready;
  std::lock_guard<std::mutex> issue(device_->issue);
  for (const auto& stream : device_->streams) {
    std::lock_guard<std::mutex> lock(stream->mutex);
    if (stream->queue.empty()) continue;
    const Op& head = stream->queue.front();
    if (head.kind == Op::Kind::kWait && !head.record->is_done()) continue;
    if (head.kind != Op::Kind::kGraph || head.graph->nodes.empty()) {
      ready.push_back({stream.get(), -1, -1});
      continue;
    }
    GraphBody& graph = *head.graph;
    if (stream->cursors.empty()) {
      if (graph.scheduled) continue;  // another stream is in the middle of it
      // Its first node may wait for a while yet: the graph has begun when the stream gets there, as on a device.
      graph.scheduled = true;
      graph.replay.fetch_add(1);
      stream->cursors.assign(graph.lanes.size(), 0);
    }
    for (size_t lane = 0; lane < graph.lanes.size(); ++lane) {
      if (stream->cursors[lane] == graph.lanes[lane].size()) continue;
      const int node = graph.lanes[lane][stream->cursors[lane]];
      if (graph.ready(node, graph.replay.load())) ready.push_back({stream.get(), static_cast<int>(lane), node});
    }
  }
  if (ready.empty()) return {nullptr, -1, -1};
  if (stretch_ == 0) {
    ranking_ = draw();
    stretch_ = uint64_t{1} << (draw() % 7);
  }
  --stretch_;
  if (draw() % 8 == 0) return ready[draw() % ready.size()];
  const auto rank = [this](const Choice& choice) {
    return mix(ranking_ ^ (uint64_t{choice.stream->id} << 32) ^ static_cast<uint64_t>(choice.lane + 1));
  };
  Choice best = ready[0];
  for (const Choice& choice : ready) {
    if (rank(choice) > rank(best)) best = choice;
  }
  return best;
}

bool Schedule::step() {
  std::lock_guard<std::mutex> lock(mutex_);
  const Choice choice = choose();
  if (choice.stream == nullptr) return false;
  Op* head;
  {
    std::lock_guard<std::mutex> queue(choice.stream->mutex);
    head = &choice.stream->queue.front();  // stays where it is: only this function takes entries out
  }
  bool finished = true;
  if (choice.node < 0) {
    execute(choice.stream, *head);
  } else {
    GraphBody& graph = *head->graph;
    const GraphNode& node = graph.nodes[choice.node];
    device_->run(node.name, node.work);
    graph.done_at[choice.node].store(graph.replay.load());
    choice.stream->cursors[choice.lane] += 1;
    for (size_t lane = 0; lane < graph.lanes.size(); ++lane) {
      finished = finished && choice.stream->cursors[lane] == graph.lanes[lane].size();
    }
    if (finished) {
      graph.scheduled = false;
      choice.stream->cursors.clear();
    }
  }
  if (finished) {
    std::lock_guard<std::mutex> queue(choice.stream->mutex);
    choice.stream->queue.pop_front();
    choice.stream->pending.fetch_sub(1);
  }
  return true;
}

bool Schedule::run_until(const Record& record) {
  while (!record.is_done()) {
    if (!step()) return record.is_done();
  }
  return true;
}

void Schedule::run_some() {
  uint64_t count;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    count = 1 + draw() % 8;
  }
  while (count > 0 && step()) --count;
}

}  // namespace fkv
