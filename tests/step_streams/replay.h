#pragma once

#include <cstdint>
#include <fstream>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "lazy_backend/step_finder.h"

/// A model of the session for tests of the step finder: it follows a trace
/// tree where it can, and records and asks the finder where it cannot.
namespace reprise::step_streams {

/// What a program did, as record.py writes it down.
struct Stream {
  struct Op {
    uint32_t op = 0;
    uint32_t skeleton = 0;
    bool grad_mode = false;
    int64_t live = 0;
    std::vector<StepFinder::Argument> arguments;
    std::vector<uint64_t> created;
  };
  struct Read {
    size_t position = 0;  // ops before it
    uint64_t storage = 0;
  };

  std::vector<Op> ops;
  std::vector<Read> reads;
  std::vector<size_t> iterations;  // where they begin
  std::unordered_set<uint64_t> from_host;

  static std::optional<Stream> load(const std::string& path);
};

inline std::optional<Stream> Stream::load(const std::string& path) {
  std::ifstream file(path);
  if (!file) return std::nullopt;
  std::string format, version;
  file >> format >> version;
  if (format != "reprise-op-stream" || version != "1")
    throw std::runtime_error(path + ": not an op stream of version 1");
  Stream stream;
  for (char event; file >> event;) {
    if (event == 'i') {
      stream.iterations.push_back(stream.ops.size());
    } else if (event == 'h') {
      uint64_t storage;
      file >> storage;
      stream.from_host.insert(storage);
    } else if (event == 'r') {
      Read read{stream.ops.size(), 0};
      file >> read.storage;
      stream.reads.push_back(read);
    } else {
      Op op;
      size_t count;
      file >> op.op >> op.skeleton >> op.grad_mode >> op.live >> count;
      op.arguments.resize(count);
      for (StepFinder::Argument& argument : op.arguments) {
        unsigned flags;
        file >> argument.storage >> flags;
        argument.written = flags & 1;
        argument.leaf = flags & 2;
      }
      file >> count;
      op.created.resize(count);
      for (uint64_t& storage : op.created) file >> storage;
      stream.ops.push_back(std::move(op));
    }
    if (!file) throw std::runtime_error(path + ": cut short");
  }
  return stream;
}

/// The trace tree: what was recorded, up to the names of storages.
class Tree {
 public:
  using Node = uint64_t;
  static constexpr Node kRoot = 0;

  /// Names storages by their order of appearance in a segment.
  class Slots {
   public:
    uint64_t operator[](uint64_t storage) {
      return slots_.try_emplace(storage, slots_.size()).first->second;
    }

   private:
    std::unordered_map<uint64_t, uint64_t> slots_;
  };

  static uint64_t edge(const Stream::Op& op, Slots& slots) {
    uint64_t hash = op.skeleton;
    for (const auto& argument : op.arguments) hash = mix(hash, slots[argument.storage]);
    for (uint64_t storage : op.created) slots[storage];
    return hash;
  }
  std::optional<Node> child(Node node, uint64_t edge) const {
    auto found = children_.find(mix(node, edge));
    return found == children_.end() ? std::nullopt : std::optional<Node>(found->second);
  }
  Node insert(Node node, uint64_t edge) {
    return children_.try_emplace(mix(node, edge), children_.size() + 1).first->second;
  }
  void mark_end(Node node) { ends_.insert(node); }
  bool is_end(Node node) const { return ends_.contains(node); }

 private:
  static uint64_t mix(uint64_t hash, uint64_t value) {
    hash = (hash ^ (value + 1)) * 0x9E3779B97F4A7C15u;
    return hash ^ (hash >> 31);
  }

  std::unordered_map<uint64_t, Node> children_;
  std::unordered_set<Node> ends_;
};

struct Result {
  size_t programs = 0;       // distinct segments
  double verified = 0;       // share of ops that matched the tree when they came
  std::vector<size_t> cuts;  // where segments begin, but for the first
};

/// Feeds ops of a stream to a finder.
class Feeder {
 public:
  explicit Feeder(const Stream& stream) : stream_(stream) {
    for (size_t p = 0; p < stream.ops.size(); ++p) {
      for (const auto& argument : stream.ops[p].arguments) {
        if (stream.from_host.contains(argument.storage))
          first_use_.try_emplace(argument.storage, p);
      }
    }
  }

  /// Op `at` of the segment that began at `start`.
  std::optional<size_t> feed(StepFinder& finder, size_t start, size_t at) {
    const Stream::Op& op = stream_.ops[at];
    arguments_ = op.arguments;
    for (auto& argument : arguments_) {
      const auto first = first_use_.find(argument.storage);
      argument.fresh = first != first_use_.end() && first->second >= start;
    }
    const auto cut = finder.feed({op.op, arguments_, op.created, op.grad_mode, op.live});
    if (cut && (*cut == 0 || start + *cut > at))
      throw std::logic_error("the step finder cut outside of what it was fed");
    return cut;
  }

 private:
  const Stream& stream_;
  std::unordered_map<uint64_t, size_t> first_use_;  // of storages from the host
  std::vector<StepFinder::Argument> arguments_;
};

class Replay {
 public:
  explicit Replay(const Stream& stream) : stream_(stream), feeder_(stream) {}

  /// Cut by the finder.
  Result run() {
    begin(0);
    while (at_ < stream_.ops.size()) {
      if (end_by_read()) continue;
      if (following_)
        follow();
      else
        record();
    }
    end_program(at_);
    return result(verified_);
  }

  /// Cut where iterations begin: what could be had. `verified` is the share of
  /// ops in segments seen before.
  Result run_aligned() {
    begin(0);
    size_t mark = 0;
    while (at_ < stream_.ops.size()) {
      while (mark < stream_.iterations.size() && stream_.iterations[mark] < at_) ++mark;
      if (end_by_read()) continue;
      if (mark < stream_.iterations.size() && stream_.iterations[mark] == at_ && at_ > start_)
        cut(at_, true);
      ++at_;
    }
    end_program(at_);
    return result(repeated_);
  }

 private:
  void begin(size_t start) {
    start_ = at_ = start;
    following_ = true;
    node_ = Tree::kRoot;
    slots_ = {};
    finder_.restart();
  }

  void end_program(size_t end) {
    Tree::Node node = Tree::kRoot;
    Tree::Slots slots;
    for (size_t p = start_; p < end; ++p)
      node = tree_.insert(node, Tree::edge(stream_.ops[p], slots));
    if (!programs_.insert(node).second) repeated_ += end - start_;
    last_ = node;
  }

  void cut(size_t end, bool marked) {
    end_program(end);
    if (marked) tree_.mark_end(last_);
    cuts_.push_back(end);
    begin(end);
  }

  // A read ends the segment when it wants a value that the segment computes.
  bool end_by_read() {
    while (read_ < stream_.reads.size() && stream_.reads[read_].position == at_) {
      const uint64_t storage = stream_.reads[read_++].storage;
      if (pending(storage)) {
        cut(at_, false);
        return true;
      }
    }
    return false;
  }

  bool pending(uint64_t storage) const {
    for (size_t p = start_; p < at_; ++p) {
      for (const auto& argument : stream_.ops[p].arguments)
        if (argument.written && argument.storage == storage) return true;
      for (uint64_t created : stream_.ops[p].created)
        if (created == storage) return true;
    }
    return false;
  }

  void follow() {
    if (tree_.is_end(node_)) return cut(at_, true);
    auto next = tree_.child(node_, Tree::edge(stream_.ops[at_], slots_));
    if (!next) {
      arrived_ = std::max(arrived_, at_ + 1);  // it came, and did not match
      following_ = false;
      at_ = start_;
      return;
    }
    node_ = *next;
    arrive(true);
  }

  void record() {
    const auto found = feeder_.feed(finder_, start_, at_);
    arrive(false);
    if (found) cut(start_ + *found, true);
  }

  void arrive(bool matched) {
    if (++at_ <= arrived_) return;
    arrived_ = at_;
    verified_ += matched;
  }

  Result result(size_t verified) const {
    return {programs_.size(),
            static_cast<double>(verified) / static_cast<double>(stream_.ops.size()), cuts_};
  }

  const Stream& stream_;
  Feeder feeder_;
  StepFinder finder_;
  Tree tree_;
  std::unordered_set<Tree::Node> programs_;
  std::vector<size_t> cuts_;

  size_t start_ = 0;
  size_t at_ = 0;
  size_t arrived_ = 0;
  size_t read_ = 0;
  bool following_ = true;
  Tree::Node node_ = Tree::kRoot;
  Tree::Node last_ = Tree::kRoot;
  Tree::Slots slots_;
  size_t verified_ = 0;
  size_t repeated_ = 0;
};

}  // namespace reprise::step_streams
