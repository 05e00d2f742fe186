// Operands of matrix products: one number of a row, gathered from decoded coefficients and further numbers (cg_operands).
#pragma once

#include <math.h>

#include "../include/cachegen.h"
#include "value.h"

namespace cachegen {

constexpr uint32_t kIndexBits = 28;  // of an entry of cg_operands.sources, below its kind

// The coefficient as the coarsest level decodes it: the nearest multiple of its step.
CACHEGEN_HD float coarsest(float x, float step) { return rintf(x / step) * step; }

// Number `source` of token t. An index outside its matrix gives 0.
CACHEGEN_HD float operand_of(const cg_operands& job, uint64_t t, uint32_t source) {
  const uint32_t kind = source >> kIndexBits, index = source & ((1u << kIndexBits) - 1);
  if (kind == CG_ONE) return 1.0f;
  if (kind == CG_NUMBER) return index < job.n_numbers ? CACHEGEN_LOAD(job.numbers + t * job.n_numbers + index) : 0.0f;
  if (kind < CG_COEFFICIENT || kind > CG_COARSEST || index >= job.columns) return 0.0f;
  float x = CACHEGEN_LOAD(job.coefficients + t * job.row_stride + index);
  if (kind == CG_COARSEST && t >= job.first && t < job.last) x = coarsest(x, job.step);
  if (job.factors != nullptr) x *= CACHEGEN_LOAD(job.factors + t);
  return kind == CG_ROUNDING ? x - Bfloat16::load(Bfloat16::store(x)) : x;
}

}  // namespace cachegen
