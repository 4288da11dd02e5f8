// The next token of every row from what `megachat_sample` leaves on each rank of a tensor group:
// megachat/ops/sample.py defines the result.
#include "../include/device.h"

namespace megachat {
namespace {

constexpr int kThreads = 128;

// Of equal scores that of the lowest rank wins.
__global__ void __launch_bounds__(kThreads)
    sample_combine_kernel(const double* parts, int64_t* tokens, float* logprobs, int ranks,
                          int rows) {
  const int row = blockIdx.x * kThreads + threadIdx.x;
  if (row >= rows) return;
  const auto part = [&](int rank, int number) {
    return parts[(static_cast<size_t>(rank) * 4 + number) * rows + row];
  };
  int winner = 0;
  double maximum = part(0, 3);
  for (int rank = 1; rank < ranks; ++rank) {
    if (part(rank, 0) > part(winner, 0)) winner = rank;
    maximum = fmax(maximum, part(rank, 3));
  }
  double sum = 0.0;
  for (int rank = 0; rank < ranks; ++rank) sum += exp(part(rank, 3) - maximum);
  tokens[row] = static_cast<int64_t>(part(winner, 1));
  logprobs[row] = static_cast<float>(part(winner, 2) - (maximum + log(sum)));
}

}  // namespace
}  // namespace megachat

// The tokens and their log-probabilities from the parts of all ranks, [ranks, 4, rows]. Returns a
// cudaError_t.
MEGACHAT_EXPORT int megachat_sample_combine(const double* parts, int64_t* tokens, float* logprobs,
                                            int ranks, int rows, void* stream) {
  using namespace megachat;
  if (ranks <= 0 || rows < 0) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  MEGACHAT_LAUNCH(sample_combine_kernel, dim3((rows + kThreads - 1) / kThreads), dim3(kThreads), 0,
                  static_cast<cudaStream_t>(stream), parts, tokens, logprobs, ranks, rows);
  return cudaGetLastError();
}
