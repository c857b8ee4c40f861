#pragma once
#include "forward.cuh"
namespace nas::cuda {
template <typename T, int V>
class Backward {
 public:
  using P = Sum<T>;
  Backward(const CellBackward<T, P>&, void*, Stream) {}
  int64_t workspace_bytes() const { return 0; }
  void run() {}
};
}
