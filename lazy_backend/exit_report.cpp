#include "lazy_backend/exit_report.h"

#include <c10/util/Exception.h>
#include <torch/csrc/lazy/core/metrics.h>

#include <fstream>
#include <sstream>
#include <utility>

#include "lazy_backend/json_text.h"
#include "reprise/explain.h"
#include "reprise/metrics.h"
#include "reprise/options.h"

namespace reprise {
namespace {

/// The sum of a metric of the lazy tensor core, 0 where nothing was measured.
double total(const char* metric) {
  const auto* data = torch::lazy::GetMetric(metric);
  return data == nullptr ? 0 : data->Accumulator();
}

}  // namespace

void write_exit_report() {
  const std::string& path = options().report_file;
  if (path.empty()) return;
  std::ofstream file(path);
  file << "{\n  \"statistics\": {";
  const char* separator = "";
  for_each_statistic(statistics(), [&](const char* name, uint64_t value) {
    file << std::exchange(separator, ", ") << json_text(name) << ": " << value;
  });
  file << "},\n  \"seconds\": {\"import\": " << total("reprise.ImportSeconds")
       << ", \"compile\": " << total("reprise.CompileSeconds") << "},\n  \"explain\": [";
  std::istringstream lines(explain());
  separator = "\n    ";
  for (std::string line; std::getline(lines, line); separator = ",\n    ") {
    file << separator << json_text(line);
  }
  file << "]\n}\n";
  if (!file.flush()) TORCH_WARN("reprise: cannot write the report to ", path);
}

}  // namespace reprise
