/// \file
/// All of Reprise's public headers.
#pragma once

#include "reprise/cache.h"
#include "reprise/compile.h"
#include "reprise/device.h"
#include "reprise/dynamic.h"
#include "reprise/explain.h"
#include "reprise/export.h"
#include "reprise/metrics.h"
#include "reprise/options.h"
#include "reprise/package.h"
#include "reprise/torchscript.h"
