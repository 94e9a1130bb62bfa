#include "lazy_backend/ir.h"

#include <torch/csrc/lazy/core/hash.h>
#include <torch/csrc/lazy/core/ir_dump_util.h>
#include <torch/csrc/lazy/core/shape.h>

#include <unordered_map>

#include "lazy_backend/executor.h"
#include "lazy_backend/session.h"
#include "reprise/explain.h"

namespace reprise {
namespace {

using torch::lazy::hash_t;
using torch::lazy::OpKind;
using torch::lazy::Shape;
using torch::lazy::Value;

class TraceNode final : public torch::lazy::Node {
 public:
  TraceNode(const std::string& op, torch::lazy::OpList operands, std::vector<Shape> shapes,
            std::string detail)
      : Node(OpKind(c10::Symbol::fromQualString(op)), operands, std::move(shapes)),
        detail_(std::move(detail)) {
    hash_ = torch::lazy::MHash(op, detail_);
    for (const Shape& shape : this->shapes()) hash_ = torch::lazy::HashCombine(hash_, shape.hash(/*bakeInSizes=*/true));
    for (const auto& operand : this->operands()) {
      hash_ = torch::lazy::HashCombine(hash_, operand.shapeHash());
    }
  }
  hash_t hash() const override { return hash_; }
  hash_t shapeHash() const override { return hash_; }
  std::string ToString() const override { return Node::ToString() + detail_; }

 private:
  std::string detail_;
  hash_t hash_;
};

Shape shape_of(const Geometry& geometry) { return {geometry.dtype, geometry.sizes()}; }

std::string constants_of(const Step& step) {
  std::string text;
  const auto& declared = step.op.schema().arguments();
  for (size_t k = 0; k < step.args.size(); ++k) {
    const Arg& arg = step.args[k];
    std::string value;
    switch (arg.kind) {
      case Arg::Kind::kInt: value = std::to_string(arg.i); break;
      case Arg::Kind::kBool: value = arg.b ? "true" : "false"; break;
      case Arg::Kind::kDouble: value = arg.dynamic ? "dynamic" : c10::str(arg.d); break;
      case Arg::Kind::kIntList: value = c10::str(arg.ints()); break;
      case Arg::Kind::kNumber: value = arg.dynamic ? "dynamic" : "number"; break;
      default: continue;
    }
    text += ", " + declared[k].name() + "=" + value;
  }
  return text;
}

}  // namespace

std::vector<torch::lazy::NodePtr> to_ir(const std::vector<StepPtr>& steps) {
  std::vector<torch::lazy::NodePtr> nodes;
  std::unordered_map<uint32_t, Value> values;  // the last writer of each slot
  for (const StepPtr& step : steps) {
    std::vector<Value> operands;
    for_each_tensor(step->args, [&](const Arg& arg) {
      if (!values.contains(arg.slot)) {
        nodes.push_back(std::make_shared<TraceNode>(
            "reprise::input", torch::lazy::OpList(),
            std::vector<Shape>{shape_of(arg.geometry())}, c10::str(", slot=", arg.slot)));
        values[arg.slot] = Value(nodes.back(), 0);
      }
      operands.push_back(values[arg.slot]);
    });
    std::vector<Shape> shapes;
    std::vector<uint32_t> slots;
    for_each_result(step->results, [&](const Result& result) {
      shapes.push_back(shape_of(*result.geometry));
      slots.push_back(result.slot);
    });
    if (shapes.empty() && !operands.empty()) {
      for (const uint32_t slot : step->written) {
        shapes.push_back(values.at(slot).shape());
        slots.push_back(slot);
      }
    }
    nodes.push_back(std::make_shared<TraceNode>(step->op.operator_name().name, operands, shapes,
                                                constants_of(*step)));
    for (size_t k = 0; k < slots.size(); ++k) values[slots[k]] = Value(nodes.back(), k);
  }
  return nodes;
}

namespace {

template <class Dump>
std::string dump_segments(const Dump& dump) {
  std::string text;
  Session::current().with_tree([&](const TraceTree& tree) {
    tree.for_each_end([&](const Node& node) {
      const auto nodes = to_ir(TraceTree::path(&node));
      std::vector<const torch::lazy::Node*> raw;
      for (const auto& each : nodes) raw.push_back(each.get());
      text += dump(node.end->name, raw);
    });
  });
  return text;
}

}  // namespace

std::string dump_text() {
  return dump_segments([](const std::string& name, const auto& nodes) {
    return "# " + name + "\n" + torch::lazy::DumpUtil::PostOrderToText(nodes, nodes);
  });
}

std::string dump_dot() {
  return dump_segments([](const std::string& name, const auto& nodes) {
    return "// " + name + "\n" + torch::lazy::DumpUtil::PostOrderToDot(nodes, nodes);
  });
}

}  // namespace reprise
