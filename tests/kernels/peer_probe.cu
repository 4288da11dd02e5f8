// Devices that wait for each other: a one-shot all-reduce over peer memory. Test data.
#include "../../kernels/include/peer_flag.h"

namespace megachat {
namespace {

constexpr int kMaxDevices = 8;
constexpr int kThreads = 32;

struct Peers {
  float* exchange[kMaxDevices];  // each [elements]
  unsigned* flags[kMaxDevices];  // each [blocks, devices]
};

// fault: 0 none, 1 flags set before the data, 2 nobody waits, 3 waits for a flag nobody sets.
__global__ void all_reduce_kernel(int device, int devices, int elements, int fault,
                                  const float* input, float* out, Peers peers) {
  const int element = blockIdx.x * kThreads + threadIdx.x;
  const int thread = threadIdx.x;
  const auto announce = [&] {
    if (thread < devices) set_flag(peers.flags[thread] + blockIdx.x * devices + device, 1);
  };
  if (fault == 1) announce();
  if (element < elements) peers.exchange[device][element] = input[element];
  __syncthreads();
  if (fault != 1) announce();
  if (thread < devices && fault != 2) {
    const unsigned* const flag = peers.flags[device] + blockIdx.x * devices + thread;
    while (read_flag(flag) != (fault == 3 ? 2u : 1u)) {
    }
  }
  __syncthreads();
  if (element >= elements) return;
  float sum = 0.0f;
  for (int peer = 0; peer < devices; ++peer) sum += peers.exchange[peer][element];
  out[element] = sum;
}

__global__ void double_kernel(int elements, float* values) {
  const int element = blockIdx.x * kThreads + threadIdx.x;
  if (element < elements) values[element] *= 2.0f;
}

}  // namespace
}  // namespace megachat

using namespace megachat;

// Doubles the input of a device, reduces over devices, doubles the result: three launches on the
// device's stream.
MEGACHAT_EXPORT int probe_all_reduce(int device, int devices, int elements, int fault, float* input,
                                     float* out, float* const* exchange, unsigned* const* flags) {
  Peers peers = {};
  for (int i = 0; i < devices; ++i) {
    peers.exchange[i] = exchange[i];
    peers.flags[i] = flags[i];
  }
  auto* const stream = reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(device + 1));
  const dim3 grid((elements + kThreads - 1) / kThreads);
  MEGACHAT_LAUNCH(double_kernel, grid, dim3(kThreads), 0, stream, elements, input);
  MEGACHAT_LAUNCH(all_reduce_kernel, grid, dim3(kThreads), 0, stream, device, devices, elements,
                  fault, input, out, peers);
  MEGACHAT_LAUNCH(double_kernel, grid, dim3(kThreads), 0, stream, elements, out);
  return cudaGetLastError();
}
