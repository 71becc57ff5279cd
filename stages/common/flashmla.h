/// @file
/// All that a program needs to decode with stages, in one header. Installed as
/// `flashmla/flashmla.h`. It includes no library but the standard one.
#pragma once

#include "reference/problem.h"
#include "stages/common/cache/paged_cache.h"
#include "stages/common/cache/paging_check.h"
#include "stages/common/choose/choose.h"
#include "stages/common/parallel/nccl_transport.h"
#include "stages/common/parallel/parallel.h"
#include "stages/common/stage.h"
