/// \file
/// Marks what `libreprise.so` exports.
#pragma once

#define REPRISE_API __attribute__((visibility("default")))
