/// \file
/// What a process did, written when it ends.
#pragma once

namespace reprise {

/// Writes `options().report_file`, if it is set: one JSON object of `statistics`
/// (the fields of `reprise::Statistics`), `seconds` of what took long, and
/// `explain`, the lines of `reprise::explain()`. A file that cannot be written is
/// a warning. No session lock may be held.
void write_exit_report();

}  // namespace reprise
