// What the caller must know before a kernel may trust a plan or a token order; BlockPlan.check and cpu_call.py name the problem.
#pragma once
#include "abi.h"

#include <vector>

namespace {

// indices [rows, columns] and counts [rows], dense: ascending block numbers below `blocks`, then -1.
bool valid_plan(const int32_t* indices, const int32_t* counts, int64_t rows, int64_t columns, int64_t blocks) {
  for (int64_t row = 0; row < rows; row++, indices += columns) {
    if (counts[row] < 0 || counts[row] > columns) return false;
    int64_t previous = -1;
    for (int64_t i = 0; i < counts[row]; previous = indices[i++])
      if (indices[i] <= previous || indices[i] >= blocks) return false;
    for (int64_t i = counts[row]; i < columns; i++)
      if (indices[i] != -1) return false;
  }
  return true;
}

// Each of `rows` rows, dense, is a permutation of 0 .. length - 1.
bool are_permutations(const int64_t* order, int64_t rows, int64_t length) {
  std::vector<bool> seen;
  for (int64_t row = 0; row < rows; row++, order += length) {
    seen.assign(length, false);
    for (int64_t i = 0; i < length; i++) {
      if (order[i] < 0 || order[i] >= length || seen[order[i]]) return false;
      seen[order[i]] = true;
    }
  }
  return true;
}

}  // namespace
