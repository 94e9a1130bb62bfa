#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "tests/step_streams/replay.h"

namespace reprise::step_streams {

/// A stream written by hand: `tape.op("mm", {x, w})`.
class Tape {
 public:
  Stream stream;
  bool grad_mode = true;

  uint64_t from_host() {
    stream.from_host.insert(++last_);
    ++live_;
    return last_;
  }
  uint64_t parameter() {
    const uint64_t storage = from_host();
    require_grad(storage);
    return storage;
  }
  void require_grad(uint64_t storage) { leaves_.insert(storage); }

  /// An op that makes one storage, alive until `drop` or the end of `kept_alive`.
  uint64_t op(const std::string& name, std::initializer_list<uint64_t> inputs) {
    add(name, inputs, 0).created.push_back(++last_);
    ++live_;
    made_.push_back(last_);
    return last_;
  }
  void write(const std::string& name, uint64_t target,
             std::initializer_list<uint64_t> inputs = {}) {
    add(name, inputs, target);
  }
  void read(uint64_t storage) { stream.reads.push_back({stream.ops.size(), storage}); }

  void iteration() { stream.iterations.push_back(stream.ops.size()); }
  /// All that ops made since the last call dies, but for so many.
  void drop_made(size_t kept = 0) {
    live_ -= static_cast<int64_t>(made_.size() - kept);
    made_.clear();
  }
  void drop_from_host() { --live_; }

 private:
  Stream::Op& add(const std::string& name, std::initializer_list<uint64_t> inputs,
                  uint64_t target) {
    Stream::Op op;
    op.op = op.skeleton = ids_.try_emplace(name, static_cast<uint32_t>(ids_.size())).first->second;
    op.grad_mode = grad_mode;
    op.live = live_;
    if (target != 0) op.arguments.push_back({target, true, leaves_.contains(target), false});
    for (const uint64_t input : inputs) {
      op.arguments.push_back({input, false, leaves_.contains(input), false});
    }
    stream.ops.push_back(std::move(op));
    return stream.ops.back();
  }

  uint64_t last_ = 0;
  int64_t live_ = 0;
  std::vector<uint64_t> made_;
  std::set<uint64_t> leaves_;
  std::map<std::string, uint32_t> ids_;
};

}  // namespace reprise::step_streams
