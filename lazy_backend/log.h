/// \file
/// `REPRISE_LOG`: what happens, as it happens, on standard error.
#pragma once

#include <c10/util/StringUtil.h>

#include <string>

#include "reprise/options.h"

namespace reprise {
void write_log_line(const std::string& text);
}  // namespace reprise

#define REPRISE_LOG(level, ...)                                 \
  do {                                                          \
    if (C10_UNLIKELY(::reprise::options().log_level >= level))  \
      ::reprise::write_log_line(c10::str(__VA_ARGS__));         \
  } while (false)
