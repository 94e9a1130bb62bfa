/// \file
/// A graph of an exported program: ops over numbered values.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>

#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace reprise {

/// What Python computes of sizes between ops: `operator.mul`, `torch.sym_max` and the like.
using SizeFunction = c10::IValue (*)(std::span<const c10::IValue>);
/// Null for one that is not known. `target` as torch.export names it: `_operator.mul`.
SizeFunction size_function(const std::string& target);

/// The one member of a union, as torch/_export/serde/union.py writes it: its name and value.
std::pair<std::string, const nlohmann::json*> member_of(const nlohmann::json& one);
c10::ScalarType dtype_of(const nlohmann::json& code);
/// The name of the value that an argument is; nothing for a constant.
std::optional<std::string> value_name(const nlohmann::json& argument);

/// How a program is run.
struct ExportedCall {
  /// Where its ops' device arguments say `exported_on`.
  c10::Device device = c10::kCPU;
  c10::DeviceType exported_on = c10::kCPU;
  /// In place of the ops' own flags.
  std::optional<bool> training;
};

/// Immutable. Values and subgraphs belong to one graph, as their names do in Python.
class ExportedGraph {
 public:
  /// Throws c10::Error for what cannot be run.
  explicit ExportedGraph(const nlohmann::json& graph);

  /// One value for each input, constants among them; gives one for each output.
  std::vector<c10::IValue> run(std::vector<c10::IValue> inputs, const ExportedCall& call) const;

 private:
  struct Operand {
    enum class Kind : uint8_t { kConstant, kValue, kDevice, kTensors, kOptionalTensors, kNumbers };
    Kind kind = Kind::kConstant;
    bool is_tensor = false;  ///< of kValue: the op wants no number
    uint32_t value = 0;
    c10::IValue constant;
    std::vector<Operand> items;
  };
  struct Output {
    std::vector<uint32_t> values;  // several: of a list
    bool is_list = false;
  };
  struct Node {
    enum class Kind : uint8_t { kOp, kSizes, kGradMode, kAutocast, kCondition };
    Kind kind = Kind::kOp;
    std::optional<c10::OperatorHandle> op;
    SizeFunction sizes = nullptr;
    std::vector<Operand> operands;
    std::vector<ExportedGraph> graphs;
    std::vector<Output> outputs;
    std::vector<uint32_t> last_used;  // values that no later node needs
    int training_argument = -1;
    int device_argument = -1;  // of a factory that is told none
  };

  uint32_t number_of(const std::string& name);
  Operand operand_of(const nlohmann::json& argument);
  void add_op(Node& node, const nlohmann::json& json, const std::string& target);
  void add_higher_order(Node& node, const nlohmann::json& json, const std::string& target);
  void find_last_uses();

  c10::IValue resolve(const Operand& operand, const std::vector<c10::IValue>& values,
                      const ExportedCall& call) const;
  std::vector<c10::IValue> run_graphs(const Node& node, std::vector<c10::IValue> operands,
                                      const ExportedCall& call) const;

  std::map<std::string, uint32_t> numbers_;
  std::vector<Operand> inputs_;
  std::vector<Node> nodes_;
  std::vector<Operand> outputs_;
};

}  // namespace reprise
